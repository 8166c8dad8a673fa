"""What a teacher's heads look at: entropy, distance, and which of them copy. Symbols as in llama.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from hxaconv.errors import HxaconvError
from hxaconv.forward import llama
from hxaconv.forward.llama import Get, rmsnorm, rotate
from hxaconv.forward.state import State, StateFile
from hxaconv.forward.walk import Walk
from hxaconv.model.config import ModelConfig
from hxaconv.model.model import Model
from hxaconv.model.names import mixer_prefix
from hxaconv.model.plan import layer_bytes
from hxaconv.progress import Progress, bar


def head_weights(normed: Tensor, get: Get, config: ModelConfig, layer: int) -> Iterator[tuple[int, Tensor]]:
    """For one sequence (T, C): (kv group, attention of its heads (H/G, T, T)), a group at a time."""
    prefix, n = mixer_prefix(layer), config.head_dim
    q, k = (_projected(normed, get, config, prefix, part) for part in ("q", "k"))
    positions = torch.arange(normed.shape[0], device=normed.device)
    if layer not in config.nope_layers:
        q, k = rotate(q[None], positions, config.rope)[0], rotate(k[None], positions, config.rope)[0]
    future = torch.ones(len(positions), len(positions), dtype=torch.bool, device=normed.device).triu(1)
    share = config.num_attention_heads // config.num_key_value_heads
    for group in range(config.num_key_value_heads):
        scores = q[group * share : (group + 1) * share] @ k[group].T * n**-0.5
        yield group, scores.masked_fill_(future, -torch.inf).softmax(dim=-1)


def _projected(normed: Tensor, get: Get, config: ModelConfig, prefix: str, part: str) -> Tensor:
    bias = get(f"{prefix}{part}_proj.bias") if config.attention_bias else None
    heads: Tensor = linear(normed, get(f"{prefix}{part}_proj.weight"), bias)
    heads = heads.view(normed.shape[0], -1, config.head_dim).transpose(0, 1)
    if not config.qk_norm:
        return heads
    return rmsnorm(heads, get(f"{prefix}{part}_norm.weight"), config.rms_norm_eps)


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


def copying(normed: Tensor, get: Get, config: ModelConfig, layer: int, expected: Tensor) -> Tensor:
    """Per head (H), the share of queries whose most attended earlier position, 0 aside, is the expected one.

    `expected` (B, T) holds that position, and -1 for queries that are not asked.
    """
    hits = torch.zeros(config.num_attention_heads, dtype=torch.float64)
    share = config.num_attention_heads // config.num_key_value_heads
    for sequence, wanted in zip(normed, expected, strict=True):
        asked = (wanted >= 0).nonzero()[:, 0]
        for group, weights in head_weights(sequence, get, config, layer):
            earlier = weights[:, asked].clone()
            earlier[:, :, 0] = -1.0
            # "Earlier": not the query itself. Later positions have weight 0 already.
            earlier[:, torch.arange(len(asked)), asked] = -1.0
            found = earlier.argmax(dim=-1) == wanted[asked]
            hits[group * share : (group + 1) * share] += found.double().sum(dim=-1).cpu()
    return hits / max(1, int((expected >= 0).sum()))


LENGTH = 128
"""Tokens of u."""
SEQUENCES = 8
FAINT = 0.1
"""A head that copies less often than this is not a copying head."""


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Shares of copied positions per layer and head, (L, H), and the layers' scores from them."""

    heads: tuple[tuple[float, ...], ...]
    scores: tuple[float, ...]
    warnings: tuple[str, ...]


def sequences(
    vocab_size: int,
    text: np.ndarray | None,
    *,
    separator: int,
    seed: int = 0,
    length: int = LENGTH,
    count: int = SEQUENCES,
) -> tuple[Tensor, Tensor]:
    """(ids, expected), both (count, 2*length+1): half of random vocabulary, half of real text where there is any.

    `expected` is the position right behind the token's first occurrence, -1 outside the second copy.
    """
    rng = np.random.default_rng(seed)
    pool = np.setdiff1d(np.arange(vocab_size), [separator])
    real = _windows(text, length, count // 2 if text is not None else 0)
    drawn = [rng.choice(pool, length, replace=len(pool) < length) for _ in range(count - len(real))]
    rows, expected = [], []
    for u in [*drawn, *real]:
        rows.append(np.concatenate([u, [separator], u]))
        _, first, inverse = np.unique(u, return_index=True, return_inverse=True)
        expected.append(np.concatenate([np.full(length + 1, -1), first[inverse] + 1]))
    return torch.from_numpy(np.stack(rows).astype(np.int64)), torch.from_numpy(np.stack(expected))


def _windows(text: np.ndarray | None, length: int, count: int) -> list[np.ndarray]:
    if text is None or count == 0:
        return []
    flat = np.asarray(text).reshape(-1)
    if len(flat) < length:
        raise HxaconvError(
            f"the calibration text has {len(flat)} tokens, retrieval needs at least {length}",
            hint=f"Pass --tokens {length} or more, with a --text or --input-ids that has as many.",
        )
    starts = np.linspace(0, len(flat) - length, count).astype(int)
    return [flat[start : start + length] for start in starts]


def separator_of(model: Model) -> int:
    """The token between the copies: the one that begins or ends texts, where the config names one, else 0."""
    for key in ("bos_token_id", "eos_token_id"):
        value = model.raw.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < model.config.vocab_size:
            return value
    return 0


def retrieval(
    teacher: Model,
    ids: Tensor,
    expected: Tensor,
    *,
    device: str = "cpu",
    kept: StateFile | None = None,
    progress: Progress | None = None,
) -> Retrieval:
    """A layer scores the sum of its best max(1, H // 16) heads; one layer's weights at a time.

    Args:
        ids, expected: as `sequences` makes them.
        kept: where an interrupted pass goes on.
    """
    kept = kept or StateFile(None)
    config, sizes = teacher.config, [layer_bytes(teacher.plan, i) for i in range(teacher.config.num_hidden_layers)]
    saved, expected = kept.load(device), expected.to(device)
    with (
        torch.no_grad(),
        Walk({"teacher": teacher}, device=device) as walk,
        bar(progress, "looking for copying heads", sum(sizes)) as advance,
    ):
        shares = list(saved[0]["shares"].cpu()) if saved else []
        x, get = saved[0]["x"] if saved else walk["teacher"].start(ids).x, walk["teacher"].weight

        def state() -> State:
            return {"shares": torch.stack(shares), "x": x}, {}

        advance(sum(sizes[: len(shares)]), "resumed" if saved else "")
        for layer in walk.layers(range(len(shares), config.num_hidden_layers)):
            found = copying(llama.input_norm(x, get, config, layer), get, config, layer, expected)
            x = walk.each(functools.partial(llama.layer, get=get, config=config, index=layer), x)
            shares.append(found)
            advance(sizes[layer], f"layer {layer}")
            kept.pause(state)
    kept.save(*state())
    return _summary(torch.stack(shares), config.num_attention_heads)


def _summary(shares: Tensor, num_heads: int) -> Retrieval:
    best = shares.topk(max(1, num_heads // 16), dim=-1).values.sum(dim=-1)
    warnings = []
    if float(shares.max()) <= FAINT:
        warnings.append(
            f"no head copies more than {FAINT:.0%} of the positions (the best: {float(shares.max()):.1%}):"
            " this teacher has no clear copying heads, the retrieval scores are noise"
        )
    return Retrieval(tuple(tuple(map(float, row)) for row in shares), tuple(map(float, best)), tuple(warnings))
