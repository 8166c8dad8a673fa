"""What the teacher's attention does in one layer, a sequence and a group of heads at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hxaconv.forward import llama
from hxaconv.forward.pool import Pool
from hxaconv.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Projected:
    """q (B, H, T, N), k and v (B, G, T, N) after norms, before RoPE."""

    q: Tensor
    k: Tensor
    v: Tensor


def project(x: Tensor, weights: Mapping[str, Tensor], config: ModelConfig, pool: Pool) -> Projected:
    """From the normed input (B, T, C); `weights` by short name (`q_proj.weight`)."""

    def one(name: str, norm: str | None) -> Tensor:
        found = pool.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        found = found.view(*found.shape[:2], -1, config.head_dim).transpose(1, 2)
        if norm is not None and config.qk_norm:
            found = llama.rmsnorm(found, weights[f"{norm}.weight"], config.rms_norm_eps)
        return found

    return Projected(one("q_proj", "q_norm"), one("k_proj", "k_norm"), one("v_proj", None))


def placed(x: Tensor, config: ModelConfig) -> Tensor:
    """With RoPE, (B, heads, T, N)."""
    return llama.rotate(x, torch.arange(x.shape[2], device=x.device), config.rope)


def attend(projected: Projected, config: ModelConfig, pool: Pool, *, rope: bool = True) -> Tensor:
    """Causal attention before the output matrix, (B, T, A)."""
    q, k, v = projected.q, projected.k, projected.v
    if rope:
        q, k = placed(q, config), placed(k, config)
    groups = k.shape[1]
    q = q.view(q.shape[0], groups, -1, *q.shape[2:])

    def one(place: tuple[int, int]) -> Tensor:
        b, g = place
        return llama.attend(q[b : b + 1, g], k[b : b + 1, g : g + 1], v[b : b + 1, g : g + 1])[0]

    places = [(b, g) for b in range(q.shape[0]) for g in range(groups)]
    found = torch.cat(pool.map(one, places)).view(q.shape[0], -1, *q.shape[3:])
    return found.transpose(1, 2).flatten(2)
