"""The second half of a block without its norm: one SwiGLU MLP, or a mixture of them.

    swiglu(x)  = down_proj(silu(gate_proj(x)) * up_proj(x))
    mixture(x) = sum over the k experts e with the largest p_e of  p_e * swiglu_e(x),   p = softmax(gate(x))

p is divided by its sum over those k where norm_topk_prob says so. Only experts that tokens go to are asked for, one
after the other. Published code takes the softmax in float32, here it is in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from hxaconv.model.config import ModelConfig
from hxaconv.model.experts import Experts

Get = Callable[[str], Tensor]


def mlp(x: Tensor, get: Get, config: ModelConfig, index: int) -> Tensor:
    """What a layer's MLP or mixture adds, of a normed input (B, T, C)."""
    name = f"model.layers.{index}.mlp"
    if config.experts is not None and config.experts.in_layer(index):
        return _mixture(x.flatten(0, -2), get, name, config.experts).view_as(x)
    return _swiglu(x, get, name, config.mlp_bias)


def _swiglu(x: Tensor, get: Get, name: str, bias: bool = False) -> Tensor:
    gate = _project(x, get, f"{name}.gate_proj", bias)
    up = _project(x, get, f"{name}.up_proj", bias)
    return _project(silu(gate) * up, get, f"{name}.down_proj", bias)


def _mixture(x: Tensor, get: Get, name: str, experts: Experts) -> Tensor:
    """(tokens, C) -> (tokens, C)."""
    shares = linear(x, get(f"{name}.gate.weight")).softmax(dim=-1)
    weights, chosen = shares.topk(experts.num_experts_per_tok, dim=-1)
    if experts.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    y = torch.zeros_like(x)
    for expert in sorted(set(chosen.flatten().tolist())):
        token, place = torch.where(chosen == expert)
        part = _swiglu(x[token], get, f"{name}.experts.{expert}")
        y = y.index_add(0, token, part * weights[token, place, None])
    return y


def _project(x: Tensor, get: Get, name: str, bias: bool) -> Tensor:
    return linear(x, get(f"{name}.weight"), get(f"{name}.bias") if bias else None)
