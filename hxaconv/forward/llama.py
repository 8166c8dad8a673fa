"""Llama-style transformers (Llama, Mistral, Qwen2, Qwen3, Phi-3), forward only.

B batch          C hidden_size             V vocab_size
T new tokens     H num_attention_heads     A = H * N, the width inside attention
S all tokens     G num_key_value_heads     F intermediate_size
                 N head_dim

x     (B, T, C)      the residual stream, in the compute dtype (float32 or float64)
q     (B, H, T, N)   k, v (B, G, S, N)
get   canonical tensor name -> weight in the compute dtype; called for one layer at a time

    x = x + attention(rmsnorm(x, input_layernorm))
    x = x + mlp(rmsnorm(x, post_attention_layernorm))

The MLP is one SwiGLU, or a mixture of them:

    swiglu(x)  = down_proj(silu(gate_proj(x)) * up_proj(x))
    mixture(x) = sum over the k experts e with the largest p_e of  p_e * swiglu_e(x),   p = softmax(gate(x))

p is divided by its sum over those k where norm_topk_prob is true. Only experts that tokens go to are fetched, one
after the other. Published code takes the softmax in float32, here it is in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from hxaconv.model.config import ModelConfig
from hxaconv.model.experts import Experts
from hxaconv.model.rope import Rope

Get = Callable[[str], Tensor]
Cache = dict[int, tuple[Tensor, Tensor]]
"""Layer -> its k (rotated) and v of all tokens so far, (B, G, S, N) each."""


def forward(
    ids: Tensor, get: Get, config: ModelConfig, *, rope: bool = True, cache: Cache | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Token ids (B, T) -> logits (B, T, V) and the residual stream after each layer.

    With a `cache`, the tokens continue those that it has seen.
    """
    x, hidden = embed(ids, get), []
    for index in range(config.num_hidden_layers):
        x = layer(x, get, config, index, rope=rope, cache=cache)
        hidden.append(x)
    return logits(x, get, config), hidden


def embed(ids: Tensor, get: Get) -> Tensor:
    """(B, T) -> (B, T, C)."""
    return get("model.embed_tokens.weight")[ids]


def layer(
    x: Tensor,
    get: Get,
    config: ModelConfig,
    index: int,
    *,
    rope: bool = True,
    positions: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """One block: (B, T, C) -> (B, T, C)."""
    normed = input_norm(x, get, config, index)
    x = x + attention(normed, get, config, index, rope=rope, positions=positions, cache=cache)
    return feed_forward(x, get, config, index)


def input_norm(x: Tensor, get: Get, config: ModelConfig, index: int) -> Tensor:
    """What the attention of a layer sees of the residual stream."""
    return rmsnorm(x, get(f"model.layers.{index}.input_layernorm.weight"), config.rms_norm_eps)


def attention(
    x: Tensor,
    get: Get,
    config: ModelConfig,
    index: int,
    *,
    rope: bool = True,
    positions: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Causal grouped-query attention on a normed input, (B, T, C) -> (B, T, C).

    `positions` (T,) are those of the new tokens; by default they count on from the cache.
    """
    name = f"model.layers.{index}.self_attn"
    past = cache[index][0].shape[2] if cache and index in cache else 0
    q = _heads(project(x, get, f"{name}.q_proj", config.attention_bias), config.head_dim)
    k = _heads(project(x, get, f"{name}.k_proj", config.attention_bias), config.head_dim)
    v = _heads(project(x, get, f"{name}.v_proj", config.attention_bias), config.head_dim)
    if config.qk_norm:
        q = rmsnorm(q, get(f"{name}.q_norm.weight"), config.rms_norm_eps)
        k = rmsnorm(k, get(f"{name}.k_norm.weight"), config.rms_norm_eps)
    if rope and index not in config.nope_layers:
        if positions is None:
            positions = torch.arange(past, past + x.shape[1], device=x.device)
        q, k = rotate(q, positions, config.rope), rotate(k, positions, config.rope)
    if cache is not None:
        if past:
            k, v = torch.cat([cache[index][0], k], dim=2), torch.cat([cache[index][1], v], dim=2)
        cache[index] = (k, v)
    y = attend(q, k, v)
    return project(y.transpose(1, 2).flatten(2), get, f"{name}.o_proj", config.output_bias)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, T, N) over k, v (B, G, S, N), the last T of S tokens being q's own -> (B, H, T, N)."""
    heads_per_group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads_per_group, dim=1), v.repeat_interleave(heads_per_group, dim=1)
    num_new, num_all = q.shape[2], k.shape[2]
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    future = torch.ones(num_new, num_all, dtype=torch.bool, device=q.device).triu(num_all - num_new + 1)
    weights: Tensor = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
    return weights @ v


def feed_forward(x: Tensor, get: Get, config: ModelConfig, index: int) -> Tensor:
    """The second half of a block: x + mlp(rmsnorm(x))."""
    name = f"model.layers.{index}"
    normed = rmsnorm(x, get(f"{name}.post_attention_layernorm.weight"), config.rms_norm_eps)
    return x + mlp(normed, get, config, index)


def mlp(x: Tensor, get: Get, config: ModelConfig, index: int) -> Tensor:
    """What a layer's MLP or mixture adds, of a normed input (B, T, C)."""
    name = f"model.layers.{index}.mlp"
    if config.experts is not None and config.experts.in_layer(index):
        return _mixture(x.flatten(0, -2), get, name, config.experts).view_as(x)
    return _swiglu(x, get, name, config.mlp_bias)


def _swiglu(x: Tensor, get: Get, name: str, bias: bool = False) -> Tensor:
    gate = project(x, get, f"{name}.gate_proj", bias)
    up = project(x, get, f"{name}.up_proj", bias)
    return project(silu(gate) * up, get, f"{name}.down_proj", bias)


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


def logits(x: Tensor, get: Get, config: ModelConfig) -> Tensor:
    """The residual stream after the last layer (B, T, C) -> (B, T, V)."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return linear(final_norm(x, get, config), get(head))


def final_norm(x: Tensor, get: Get, config: ModelConfig) -> Tensor:
    """What the head sees of the residual stream."""
    return rmsnorm(x, get("model.norm.weight"), config.rms_norm_eps)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last axis. In the compute dtype; published code drops to float32 here."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def frequencies(rope: Rope, pairs: int, device: torch.device) -> tuple[Tensor, float]:
    """Radians per token of every channel pair, (pairs,) in float64, and what cos and sin are multiplied by."""
    exponents = torch.arange(pairs, dtype=torch.float64, device=device) / pairs
    found = rope.theta**-exponents
    if rope.scaling is None:
        return found, 1.0
    stretched = [rope.scaling.stretched(f, i, pairs, rope.theta) for i, f in enumerate(found.tolist())]
    return found.new_tensor(stretched), rope.scaling.cos_sin_factor


def rotate(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """RoPE in the rotate-half layout, x (B, heads, T, N): channel n is paired with n + N/2."""
    half = x.shape[-1] // 2
    # The angles in float64: at position 10,000 float32 is off by 1e-3.
    per_token, factor = frequencies(rope, half, x.device)
    angles = positions.to(torch.float64)[:, None] * per_token
    cos, sin = (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def project(x: Tensor, get: Get, name: str, bias: bool) -> Tensor:
    """x times a weight, plus its bias where there is one."""
    return linear(x, get(f"{name}.weight"), get(f"{name}.bias") if bias else None)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)
