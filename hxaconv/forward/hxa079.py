"""hxa079: RWKV-7 layers with rotary keys, a few grouped-query attention (GQA) layers without; forward only.

B batch      C hidden_size             V vocab_size
T tokens     H num_attention_heads     A = H * N, the width inside the mixers
             G num_key_value_heads     F intermediate_size
             N head_dim

x        (B, T, C)      the residual stream, in the compute dtype (float32 or float64)
r        (B, T, H, N)   receptance: what is asked of the state
k, v     (B, T, G, N)   key and value, each head then repeated H/G times
w        (B, T, H, N)   log(-log decay), at most -0.5
decay    (B, T, H, N)   exp(-exp(w)), between 0.54 and 1
a        (B, T, H, N)   in-context learning rate, 0..1
g        (B, T, A)      output gate
kk       (B, T, H, N)   k of length 1 in each head: what the state forgets
r_k      (H, N)         weight of the current token's own k in the answer (the bonus)
S        (B, H, N, N)   the state, rows along v, columns along k
get      canonical tensor name -> weight in the compute dtype; asked for one layer at a time

    x = x + mixer(rmsnorm(x, input_layernorm))
    x = x + swiglu(rmsnorm(x, post_attention_layernorm))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize, silu, softplus

from hxaconv.model.config import StudentConfig

Get = Callable[[str], Tensor]
Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(r, w, k, v, kk, a, S) -> (y, S after the last token), all (B, T, H, N) but S."""


@dataclass
class Carry:
    """What layers leave for later layers (first two) and for later tokens (the others)."""

    v_first: Tensor | None = None
    k_first: Tensor | None = None
    """v and k of the first RWKV layer, (B, T, G, N)."""
    position: int = 0
    """How many tokens came before."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """RWKV layer -> S."""
    caches: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """GQA layer -> k, v of all tokens so far, (B, all tokens, G, N) each."""


def forward(ids: Tensor, get: Get, config: StudentConfig, carry: Carry | None = None) -> tuple[Tensor, list[Tensor]]:
    """Token ids (B, T) -> logits (B, T, V) and the residual stream after each layer.

    With a `carry`, the tokens continue those that it has seen.
    """
    carry = carry or Carry()
    x, hidden = embed(ids, get), []
    for index in range(config.num_hidden_layers):
        x = layer(x, get, config, index, carry)
        hidden.append(x)
    carry.position += ids.shape[1]
    return logits(x, get, config), hidden


def embed(ids: Tensor, get: Get) -> Tensor:
    """(B, T) -> (B, T, C)."""
    return get("model.embed_tokens.weight")[ids]


def layer(x: Tensor, get: Get, config: StudentConfig, index: int, carry: Carry) -> Tensor:
    """One block: (B, T, C) -> (B, T, C)."""
    x = x + mixer(input_norm(x, get, config, index), get, config, index, carry)
    return feed_forward(x, get, config, index)


def input_norm(x: Tensor, get: Get, config: StudentConfig, index: int) -> Tensor:
    """What the mixer of a layer sees of the residual stream."""
    return rmsnorm(x, get(f"model.layers.{index}.input_layernorm.weight"), config.rms_norm_eps)


def mixer(
    x: Tensor, get: Get, config: StudentConfig, index: int, carry: Carry, recurrence: Recurrence | None = None
) -> Tensor:
    """The layer's mixer on a normed input, (B, T, C) -> (B, T, C)."""
    if config.layer_kind(index) == "gqa":
        return attention(x, get, config, index, carry)
    return time_mix(x, get, config, index, carry, recurrence or loop)


def time_mix(x: Tensor, get: Get, config: StudentConfig, index: int, carry: Carry, recurrence: Recurrence) -> Tensor:
    """An RWKV layer's mixer on a normed input, (B, T, C) -> (B, T, C)."""
    name = f"model.layers.{index}.self_attn"
    heads_per_group = config.num_attention_heads // config.num_key_value_heads
    r = _heads(_project(x, get, f"{name}.receptance", config.attention_bias), config.head_dim)
    k = _heads(_project(x, get, f"{name}.key", config.attention_bias), config.head_dim)
    v = _heads(_project(x, get, f"{name}.value", config.attention_bias), config.head_dim)
    if config.qk_norm:
        r = rmsnorm(r, get(f"{name}.r_norm.weight"), config.rms_norm_eps)
        k = rmsnorm(k, get(f"{name}.k_norm.weight"), config.rms_norm_eps)
    positions = torch.arange(carry.position, carry.position + x.shape[1], device=x.device)
    r, k = rotate(r, positions, config.rope_theta), rotate(k, positions, config.rope_theta)
    if index == config.rwkv_layers[0]:
        carry.v_first, carry.k_first = v, k  # k after norm and RoPE
    else:
        assert carry.v_first is not None and carry.k_first is not None
        v = v + (carry.v_first - v) * _heads(_low_rank(x, get, name, "v").sigmoid(), config.head_dim)
        k = k + (carry.k_first - k) * _heads(_low_rank(x, get, name, "k").sigmoid(), config.head_dim)
    k, v = k.repeat_interleave(heads_per_group, dim=2), v.repeat_interleave(heads_per_group, dim=2)
    w = _heads(-softplus(-_low_rank(x, get, name, "w", torch.tanh)) - 0.5, config.head_dim)
    a = _heads(_low_rank(x, get, name, "a").sigmoid(), config.head_dim)
    g = (x @ get(f"{name}.g1")).sigmoid() @ get(f"{name}.g2")
    kk = normalize(k, dim=-1, eps=1e-12)
    k = k * (1 - w + a)  # w, not the decay
    state = carry.states.get(index)
    if state is None:
        state = x.new_zeros(x.shape[0], config.num_attention_heads, config.head_dim, config.head_dim)
    y, carry.states[index] = recurrence(r, w, k, v, kk, a, state)
    bonus = (r * k * get(f"{name}.r_k")).sum(dim=-1, keepdim=True) * v
    y = y * config.head_dim**-0.5 + bonus  # the bonus is not scaled
    return _project(y.flatten(2) * g, get, f"{name}.output", config.output_bias)


def loop(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, a token at a time: y (B, T, H, N) and the state after the last one."""
    decay, answers = torch.exp(-torch.exp(w)), []
    for t in range(r.shape[1]):
        removed = torch.einsum("bhvk,bhk->bhv", state, -kk[:, t])
        state = (
            state * decay[:, t, :, None, :]
            + removed[..., None] * (kk * a)[:, t, :, None, :]
            + v[:, t, :, :, None] * k[:, t, :, None, :]
        )
        answers.append(torch.einsum("bhvk,bhk->bhv", state, r[:, t]))
    return torch.stack(answers, dim=1), state


def attention(x: Tensor, get: Get, config: StudentConfig, index: int, carry: Carry) -> Tensor:
    """A GQA layer's mixer on a normed input: causal, and without RoPE. (B, T, C) -> (B, T, C)."""
    name = f"model.layers.{index}.self_attn"
    heads_per_group = config.num_attention_heads // config.num_key_value_heads
    q = _heads(_project(x, get, f"{name}.q_proj", config.attention_bias), config.head_dim)
    k = _heads(_project(x, get, f"{name}.k_proj", config.attention_bias), config.head_dim)
    v = _heads(_project(x, get, f"{name}.v_proj", config.attention_bias), config.head_dim)
    if config.qk_norm:
        q = rmsnorm(q, get(f"{name}.q_norm.weight"), config.rms_norm_eps)
        k = rmsnorm(k, get(f"{name}.k_norm.weight"), config.rms_norm_eps)
    if index in carry.caches:
        k, v = torch.cat([carry.caches[index][0], k], dim=1), torch.cat([carry.caches[index][1], v], dim=1)
    carry.caches[index] = (k, v)
    num_new, num_all = q.shape[1], k.shape[1]
    k, v = k.repeat_interleave(heads_per_group, dim=2), v.repeat_interleave(heads_per_group, dim=2)
    scores = torch.einsum("bthn,bshn->bhts", q, k) * config.head_dim**-0.5
    future = torch.ones(num_new, num_all, dtype=torch.bool, device=x.device).triu(num_all - num_new + 1)
    weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
    y = torch.einsum("bhts,bshn->bthn", weights, v)
    return _project(y.flatten(2), get, f"{name}.o_proj", config.output_bias)


def feed_forward(x: Tensor, get: Get, config: StudentConfig, index: int) -> Tensor:
    """The second half of a block: x + swiglu(rmsnorm(x))."""
    name = f"model.layers.{index}"
    normed = rmsnorm(x, get(f"{name}.post_attention_layernorm.weight"), config.rms_norm_eps)
    gate = _project(normed, get, f"{name}.mlp.gate_proj", config.mlp_bias)
    up = _project(normed, get, f"{name}.mlp.up_proj", config.mlp_bias)
    return x + _project(silu(gate) * up, get, f"{name}.mlp.down_proj", config.mlp_bias)


def logits(x: Tensor, get: Get, config: StudentConfig) -> Tensor:
    """The residual stream after the last layer (B, T, C) -> (B, T, V)."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return linear(final_norm(x, get, config), get(head))


def final_norm(x: Tensor, get: Get, config: StudentConfig) -> Tensor:
    """What the head sees of the residual stream."""
    return rmsnorm(x, get("model.norm.weight"), config.rms_norm_eps)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last axis. In the compute dtype; published code drops to float32 inside the mixers."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE in the rotate-half layout, x (B, T, heads, N): channel n is paired with n + N/2."""
    half = x.shape[-1] // 2
    # The angles in float64: at position 10,000 float32 is off by 1e-3.
    exponents = torch.arange(half, dtype=torch.float64, device=x.device) / half
    angles = (positions.to(torch.float64)[:, None] * theta**-exponents)[:, None, :]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _low_rank(x: Tensor, get: Get, name: str, letter: str, inner: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """`w0 + inner(x @ w1) @ w2` for the letter w, likewise a, v, k."""
    narrow = x @ get(f"{name}.{letter}1")
    return get(f"{name}.{letter}0") + (inner(narrow) if inner else narrow) @ get(f"{name}.{letter}2")


def _project(x: Tensor, get: Get, name: str, bias: bool) -> Tensor:
    return linear(x, get(f"{name}.weight"), get(f"{name}.bias") if bias else None)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.view(*x.shape[:2], -1, head_dim)
