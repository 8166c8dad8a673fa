"""The frequencies of rotary position embeddings, as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from hxaconv.model.rope import Rope


def frequencies(rope: Rope, pairs: int, device: torch.device) -> tuple[Tensor, float]:
    """Radians per token of every channel pair, (pairs,) in float64, and what cos and sin are multiplied by."""
    exponents = torch.arange(pairs, dtype=torch.float64, device=device) / pairs
    found = rope.theta**-exponents
    if rope.scaling is None:
        return found, 1.0
    stretched = [rope.scaling.stretched(f, i, pairs, rope.theta) for i, f in enumerate(found.tolist())]
    return found.new_tensor(stretched), rope.scaling.cos_sin_factor
