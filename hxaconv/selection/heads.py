"""What a teacher's heads look at: entropy, distance, and which of them copy. Symbols as in llama.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from hxaconv.errors import HxaconvError
from hxaconv.forward.llama import Get, rmsnorm, rotate
from hxaconv.model.config import ModelConfig
from hxaconv.model.model import Model
from hxaconv.model.names import mixer_prefix

if TYPE_CHECKING:
    from hxaconv.selection.sweep import Layer

LENGTH = 128
"""Tokens of a text that is repeated once."""
SEQUENCES = 8
FAINT = 0.1
"""A head that copies less often than this is not a copying head."""


WINDOW, SINKS = 16, 4
"""Tokens that attention with a window sees: the last, itself among them, and the first of the sequence."""


def head_weights(
    normed: Tensor, get: Get, config: ModelConfig, layer: int, *, window: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """For one sequence (T, C): (kv group, attention of its heads (H/G, T, T)), a group at a time."""
    prefix, n = mixer_prefix(layer), config.head_dim
    q, k = (_projected(normed, get, config, prefix, part) for part in ("q", "k"))
    positions = torch.arange(normed.shape[0], device=normed.device)
    if layer not in config.nope_layers:
        q, k = rotate(q[None], positions, config.rope)[0], rotate(k[None], positions, config.rope)[0]
    back = positions[:, None] - positions
    hidden = (back < 0) | ((back >= WINDOW) & (positions >= SINKS)) if window else back < 0
    share = config.num_attention_heads // config.num_key_value_heads
    for group in range(config.num_key_value_heads):
        scores = q[group * share : (group + 1) * share] @ k[group].T * n**-0.5
        yield group, scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1)


def _projected(normed: Tensor, get: Get, config: ModelConfig, prefix: str, part: str) -> Tensor:
    bias = get(f"{prefix}{part}_proj.bias") if config.attention_bias else None
    heads: Tensor = linear(normed, get(f"{prefix}{part}_proj.weight"), bias)
    heads = heads.view(normed.shape[0], -1, config.head_dim).transpose(0, 1)
    if not config.qk_norm or part == "v":
        return heads
    return rmsnorm(heads, get(f"{prefix}{part}_norm.weight"), config.rms_norm_eps)


def windowed(normed: Tensor, get: Get, config: ModelConfig, layer: int) -> Tensor:
    """The attention of a layer with a sliding window: what it adds to one sequence, (T, C) -> (T, C)."""
    prefix = mixer_prefix(layer)
    v = _projected(normed, get, config, prefix, "v")
    heads = [weights @ v[group] for group, weights in head_weights(normed, get, config, layer, window=True)]
    bias = get(f"{prefix}o_proj.bias") if config.output_bias else None
    return linear(torch.cat(heads).transpose(0, 1).flatten(1), get(f"{prefix}o_proj.weight"), bias)


def entropy_and_distance(normed: Tensor, get: Get, config: ModelConfig, layer: int) -> tuple[float, float]:
    """Means over sequences, heads and queries of (B, T, C): entropy / log(visible), distance / (visible - 1).

    Both are 0..1: 0 looks at one position, or at itself; 1 looks everywhere alike, or at the first token.
    The first query, which sees only itself, does not count.
    """
    num_tokens = normed.shape[1]
    visible = torch.arange(1, num_tokens + 1, device=normed.device, dtype=normed.dtype)
    positions = visible - 1
    entropy, distance, count = 0.0, 0.0, 0
    for sequence in normed:
        for _, weights in head_weights(sequence, get, config, layer):
            bits = -(weights * weights.clamp_min(1e-30).log()).sum(dim=-1)[:, 1:] / visible[1:].log()
            far = (positions - weights @ positions)[:, 1:] / positions[1:]
            entropy += float(bits.double().sum())
            distance += float(far.double().sum())
            count += bits.numel()
    return entropy / max(1, count), distance / max(1, count)


def copying(at: Layer) -> list[float]:
    """Per head, the share of queries whose most attended earlier position, 0 aside, is the expected one.

    The tokens are repeated once, see `twice`. Expected is the position right behind the first occurrence of the query's
    token; queries of the first time are not counted.
    """
    num_tokens, length = at.ids.shape[1], at.ids.shape[1] // 2
    asked = torch.arange(length + 1, num_tokens, device=at.x.device)
    hits = torch.zeros(at.config.num_attention_heads, dtype=torch.float64)
    share = at.config.num_attention_heads // at.config.num_key_value_heads
    for ids, sequence in zip(at.ids, at.normed, strict=True):
        _, first, inverse = np.unique(ids[:length].cpu().numpy(), return_index=True, return_inverse=True)
        expected = torch.from_numpy(first[inverse] + 1).to(at.x.device)
        for group, weights in head_weights(sequence, at.get, at.config, at.index):
            earlier = weights[:, asked].clone()
            earlier[:, :, 0] = -1.0
            # "Earlier": not the query itself. Later positions have weight 0 already.
            earlier[:, torch.arange(length), asked] = -1.0
            found = earlier.argmax(dim=-1) == expected
            hits[group * share : (group + 1) * share] += found.double().sum(dim=-1).cpu()
    shares: list[float] = (hits / (len(at.ids) * length)).tolist()
    return shares


def twice(
    vocab_size: int,
    text: np.ndarray | None,
    *,
    separator: int,
    seed: int = 0,
    length: int = LENGTH,
    count: int = SEQUENCES,
) -> np.ndarray:
    """Tokens, a separator, the same tokens: (count, 2*length+1); half of them random, half of the text if there is one.

    Raises:
        HxaconvError: for a text that is too short.
    """
    rng = np.random.default_rng(seed)
    pool = np.setdiff1d(np.arange(vocab_size), [separator])
    real = [] if text is None else _windows(np.asarray(text).reshape(-1), length, count // 2)
    drawn = [rng.choice(pool, length, replace=len(pool) < length) for _ in range(count - len(real))]
    return np.stack([np.concatenate([u, [separator], u]) for u in [*drawn, *real]]).astype(np.int64)


def _windows(text: np.ndarray, length: int, count: int) -> list[np.ndarray]:
    if len(text) < length:
        raise HxaconvError(
            f"the calibration text has {len(text)} tokens, retrieval needs at least {length}",
            hint=f"Pass --tokens {length} or more, with a --text or --input-ids that has as many.",
        )
    starts = np.linspace(0, len(text) - length, count).astype(int)
    return [text[start : start + length] for start in starts]


def separator_of(model: Model) -> int:
    """The token between the copies: the one that begins or ends texts, where the config names one, else 0."""
    for key in ("bos_token_id", "eos_token_id"):
        value = model.raw.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < model.config.vocab_size:
            return value
    return 0
