"""Students: RWKV-7 layers with rotary keys, a few grouped-query attention (GQA) layers without; forward only.

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
get      canonical tensor name -> weight in the compute dtype; called for one layer at a time

    x = x + mixer(rmsnorm(x, input_layernorm))
    x = x + mlp(rmsnorm(x, post_attention_layernorm))

What an RWKV layer computes of these is its variant's: `hxaconv/model/variants/`. What stands outside the mixers is the
teacher's, `llama.py`; the mixers share nothing with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from hxaconv.forward import llama
from hxaconv.forward.llama import Get as Get
from hxaconv.forward.llama import embed as embed
from hxaconv.forward.llama import feed_forward as feed_forward
from hxaconv.forward.llama import final_norm as final_norm
from hxaconv.forward.llama import input_norm as input_norm
from hxaconv.forward.llama import logits as logits
from hxaconv.forward.llama import project as _project
from hxaconv.forward.llama import rmsnorm as rmsnorm
from hxaconv.model.config import StudentConfig
from hxaconv.model.rope import Rope

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
        x = x + mixer(input_norm(x, get, config, index), get, config, index, carry)
        x = feed_forward(x, get, config, index)
        hidden.append(x)
    carry.position += ids.shape[1]
    return logits(x, get, config), hidden


def mixer(
    x: Tensor, get: Get, config: StudentConfig, index: int, carry: Carry, recurrence: Recurrence | None = None
) -> Tensor:
    """The layer's mixer on a normed input, (B, T, C) -> (B, T, C)."""
    if config.layer_kind(index) == "gqa":
        return attention(x, get, config, index, carry)
    return time_mix(x, get, config, index, carry, recurrence or loop)


def time_mix(x: Tensor, get: Get, config: StudentConfig, index: int, carry: Carry, recurrence: Recurrence) -> Tensor:
    """An RWKV layer's mixer on a normed input, (B, T, C) -> (B, T, C), as its variant has it."""
    return config.variant.time_mix(TimeMix(x, get, config, index, carry, recurrence))


@dataclass(frozen=True, slots=True)
class TimeMix:
    """One RWKV layer at work: the operations that the formulas in `hxaconv/model/variants/` are written in."""

    x: Tensor
    """The normed input, (B, T, C)."""
    get: Get
    config: StudentConfig
    index: int
    carry: Carry
    kernel: Recurrence

    @property
    def name(self) -> str:
        """What the layer's tensors begin with."""
        return f"model.layers.{self.index}.self_attn"

    def __getitem__(self, parameter: str) -> Tensor:
        return self.get(f"{self.name}.{parameter}")

    @property
    def is_first(self) -> bool:
        """Whether this is the first RWKV layer."""
        return self.index == self.config.rwkv_layers[0]

    def first(self, v: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """v and k (B, T, G, N) of the first RWKV layer; in that layer, its own, which are kept."""
        if self.is_first:
            self.carry.v_first, self.carry.k_first = v, k
        assert self.carry.v_first is not None and self.carry.k_first is not None
        return self.carry.v_first, self.carry.k_first

    def by_head(self, x: Tensor) -> Tensor:
        """(B, T, heads * N) -> (B, T, heads, N)."""
        return _heads(x, self.config.head_dim)

    def heads(self, projection: str, norm: str | None = None) -> Tensor:
        """receptance, key or value of x, (B, T, heads, N), with that norm where the teacher has one."""
        found = self.by_head(_project(self.x, self.get, f"{self.name}.{projection}", self.config.attention_bias))
        if norm is None or not self.config.qk_norm:
            return found
        return rmsnorm(found, self[f"{norm}.weight"], self.config.rms_norm_eps)

    def rope(self, x: Tensor) -> Tensor:
        """x (B, T, heads, N) rotated by its positions."""
        start = self.carry.position
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        return rotate(x, positions, self.config.rope)

    def repeated(self, x: Tensor) -> Tensor:
        """Each kv head H/G times, (B, T, G, N) -> (B, T, H, N)."""
        return x.repeat_interleave(self.config.num_attention_heads // self.config.num_key_value_heads, dim=2)

    def log_neg_log_decay(self, x: Tensor) -> Tensor:
        """w of (B, T, A), (B, T, H, N): at most -0.5."""
        return self.by_head(-softplus(-x) - 0.5)

    def unit(self, x: Tensor) -> Tensor:
        """x with length 1 in each head."""
        return normalize(x, dim=-1, eps=1e-12)

    def recurrence(self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor) -> Tensor:
        """y (B, T, H, N), going on from the layer's state and leaving the new one."""
        state = self.carry.states.get(self.index)
        if state is None:
            heads, size = self.config.num_attention_heads, self.config.head_dim
            state = self.x.new_zeros(self.x.shape[0], heads, size, size)
        y, self.carry.states[self.index] = self.kernel(r, w, k, v, kk, a, state)
        return y

    def output(self, y: Tensor) -> Tensor:
        """(B, T, A) -> (B, T, C)."""
        return _project(y, self.get, f"{self.name}.output", self.config.output_bias)


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


def rotate(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """RoPE of x (B, T, heads, N)."""
    return llama.rotate(x.transpose(1, 2), positions, rope).transpose(1, 2)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.view(*x.shape[:2], -1, head_dim)
