"""The reference time-mix on a batch, a sequence at a time: what it needs in between does not grow with the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from hxaconv.forward import hxa079
from hxaconv.forward.chunked import chunked
from hxaconv.forward.hxa079 import Get
from hxaconv.model.config import StudentConfig

First = tuple[Tensor, Tensor] | None
"""v_first and k_first, (B, T, G, N) each; None before the first RWKV layer."""


def time_mix(normed: Tensor, get: Get, config: StudentConfig, layer: int, first: First) -> tuple[Tensor, First]:
    """An RWKV mixer on normed inputs (B, T, C), from an empty state: (output, (v_first, k_first) to hand on)."""
    outputs, firsts = [], []
    for i in range(normed.shape[0]):
        carry = hxa079.Carry(first[0][i : i + 1], first[1][i : i + 1]) if first else hxa079.Carry()
        outputs.append(hxa079.time_mix(normed[i : i + 1], get, config, layer, carry, chunked))
        assert carry.v_first is not None and carry.k_first is not None
        firsts.append((carry.v_first, carry.k_first))
    if first is None:
        first = torch.cat([v for v, _ in firsts]), torch.cat([k for _, k in firsts])
    return torch.cat(outputs), first
