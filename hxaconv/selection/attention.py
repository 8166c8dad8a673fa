"""What the heads of a teacher's attention look at: entropy, distance, copying. Symbols as in reference/llama.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from hxaconv.forward.llama import Get, rmsnorm, rotate
from hxaconv.model.config import ModelConfig
from hxaconv.model.names import mixer_prefix


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
