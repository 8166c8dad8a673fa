"""hxa079: RWKV-7 time mixing with RoPE in most layers, grouped-query attention without RoPE in a few.

B batch, T tokens of this call, P tokens seen before (the cache), C hidden_size, H num_attention_heads,
G num_key_value_heads, N head_dim, A = H*N, V vocab_size.

    r, k, v         receptance, key, value of an RWKV layer: (B, T, H, N); k and v are (B, T, G, N) at first
    v_first k_first v and k of the first RWKV layer (k after norm and RoPE): (B, T, G, N), mixed into later ones
    log_decay       log of the decay per key channel, always in [-0.61, 0]: (B, T, H, N)
    iclr            in-context learning rate, 0..1: (B, T, H, N)
    S, state        (B, H, N_v, N_k), float32 or better, also when the model runs in bfloat16
    token_mask      (B, P+T) bool, False where there is padding; None means no padding anywhere
    starts          (B, P+T) bool, True where a packed row goes on with another sequence; None means one per row

One RWKV head, from S = 0:   S = S * decay + (S @ a) b^T + v k^T,   y = S @ r,   with a = -kk, b = kk * iclr.
A padded position leaves S as it is and does not count: RoPE positions start at the first real token of a row
(with decays per channel RoPE is not relative, so positions matter). Keys of padding are masked in GQA layers.
Packed sequences do not see each other: at a start the state is zero, and GQA layers mask the keys before it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .configuration_hxa079 import Hxa079Config

logger = logging.get_logger(__name__)
# Outputs and `generate` call the cache `cache` from transformers 5.24 on; the models take both names.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
CHUNK = 32
SEGMENT = 2048  # tokens whose intermediate results are in memory at once; long prompts need several times more


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# The recurrence in three forms: r, log_decay, k, v, a, b, all (B, T, H, N), and state -> y (B, T, H, N_v), state.
# The state begins anew at the tokens where `starts` (B, T) is True.


def wkv_loop(*inputs: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Token by token: decoding, and what the other forms are tested against."""
    r, log_decay, k, v, a, b, state = inputs
    out, decay = [], log_decay.exp()
    for t in range(r.shape[1]):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0)
        removed = (state @ a[:, t, :, :, None]) * b[:, t, :, None, :]
        state = state * decay[:, t, :, None, :] + removed + v[:, t, :, :, None] * k[:, t, :, None, :]
        out.append((state @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(out, dim=1), state


def wkv_chunked(*inputs: Tensor, starts: Tensor | None = None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """In chunks of L tokens: matrix products inside, one state per chunk. Never N x N per token.

    With u_t = S_{t-1} a_t, every S_t is S_0 decayed plus sums of u_s b_s^T and v_s k_s^T decayed from s to t, so
    that U (L, N_v) solves the unit lower triangular system (I - ab) U = a' S_0^T + ak V. Where another sequence
    starts within the chunk, the terms between tokens (or S_0 and tokens) of different sequences are left out.
    """
    *inputs, state = inputs
    tokens = inputs[0].shape[1]
    # Zeros after the end are harmless: log_decay 0 keeps the state, k = a = b = 0 adds nothing.
    r, log_decay, k, v, a, b = (
        F.pad(x, (0, 0, 0, 0, 0, -tokens % chunk)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4) for x in inputs
    )  # (B, H, chunks, L, N)
    log_since_start = log_decay.cumsum(-2)
    log_before = log_since_start - log_decay
    log_total = log_since_start[..., -1:, :]
    # Decay from s to t is exp(g_t - c) * exp(c - g_s). log_decay > -0.61 and c in the middle bound both
    # exponents by 0.31 * L: no overflow and little rounding up to L = 128.
    middle = log_total / 2
    r_, a_ = r * (log_since_start - middle).exp(), a * (log_before - middle).exp()
    k_, b_ = k * (middle - log_since_start).exp(), b * (middle - log_since_start).exp()
    ab, ak = (a_ @ b_.mT).tril(-1), (a_ @ k_.mT).tril(-1)
    rb, rk = (r_ @ b_.mT).tril(), (r_ @ k_.mT).tril()
    # u = u_state S_0^T + u_chunk and y = y_state S_0^T + y_chunk: all but S_0 is known for all chunks at once.
    a_state, r_state = a * log_before.exp(), r * log_since_start.exp()
    to_end, decay = (log_total - log_since_start).exp(), log_total.exp()
    if starts is not None:
        number = F.pad(starts, (0, -tokens % chunk)).unflatten(1, (-1, chunk)).cumsum(-1)[:, None]  # (B, 1, chunks, L)
        same, old = number[..., :, None] == number[..., None, :], (number == 0)[..., None]
        ab, ak, rb, rk = (x * same for x in (ab, ak, rb, rk))
        a_state, r_state, decay = a_state * old, r_state * old, decay * old[..., -1:, :]
        to_end = to_end * (number == number[..., -1:])[..., None]
    solved = torch.linalg.solve_triangular(-ab, torch.cat([a_state, ak @ v], dim=-1), upper=False, unitriangular=True)
    u_state, u_chunk = solved.split(r.shape[-1], dim=-1)
    y_state, y_chunk = r_state + rb @ u_state, rb @ u_chunk + rk @ v
    k_end, b_end = k * to_end, b * to_end
    out = []
    for c in range(r.shape[2]):
        out.append(y_state[:, :, c] @ state.mT + y_chunk[:, :, c])
        u = u_state[:, :, c] @ state.mT + u_chunk[:, :, c]
        state = state * decay[:, :, c] + u.mT @ b_end[:, :, c] + v[:, :, c].mT @ k_end[:, :, c]
    return torch.cat(out, dim=2).transpose(1, 2)[:, :tokens], state


@functools.cache
def fla_kernel(packed: bool) -> Callable[..., Any] | None:
    """`chunk_rwkv7` of flash-linear-attention, where it can be called: None where it is absent, broken, of the old
    calling convention, or unable to start anew within a `packed` row."""
    if importlib.util.find_spec("fla") is None:
        return None
    try:
        kernel: Callable[..., Any] = importlib.import_module("fla.ops.rwkv7").chunk_rwkv7
    except (ImportError, AttributeError, RuntimeError) as error:
        logger.warning_once(f"flash-linear-attention is installed but unusable, using plain torch: {error}")
        return None
    names = list(inspect.signature(kernel).parameters)
    return kernel if names[:6] == ["r", "w", "k", "v", "a", "b"] and ("cu_seqlens" in names or not packed) else None


def wkv_fla(*inputs: Tensor, dtype: torch.dtype, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """By the kernel: its `w` is the log of the decay (negative), its state is [k, v], its tensors are `dtype`.

    It takes packed sequences as one row, with their bounds in `cu_seqlens` and a state for each of them.
    """
    kernel = fla_kernel(starts is not None)
    assert kernel is not None
    kernel = functools.partial(kernel, scale=1.0, output_final_state=True)
    tensors = {name: x.contiguous() for name, x in zip("rwkvab", inputs, strict=False)}
    tensors |= {name: x.to(dtype) for name, x in tensors.items() if name != "w"}
    state = inputs[6]
    initial = state.mT.contiguous()
    if starts is None:
        y, final = kernel(**tensors, initial_state=initial)
        return y.to(state.dtype), final.to(state.dtype).mT
    begins = starts.clone()
    begins[:, 0] = True
    number = begins.flatten().cumsum(0).view_as(begins) - 1  # of a token's sequence
    bounds = F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel())
    states = initial.new_zeros(len(bounds) - 1, *initial.shape[1:])
    states = states.index_copy(0, number[:, 0], initial.masked_fill(starts[:, 0, None, None, None], 0))
    tensors = {name: x.flatten(0, 1)[None] for name, x in tensors.items()}
    y, final = kernel(**tensors, initial_state=states, cu_seqlens=bounds)
    return y.view_as(inputs[3]).to(state.dtype), final[number[:, -1]].to(state.dtype).mT


def wkv(*tensors: Tensor, dtype: torch.dtype, use_fla: bool, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence in the form that suits the length and the machine; `dtype` is what the layer computes in."""
    # Autocast would run the products in bfloat16; the state does not bear that. Meta tensors know no autocast.
    device = tensors[0].device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        if tensors[0].shape[1] == 1:
            return wkv_loop(*tensors, starts=starts)
        half = dtype in (torch.bfloat16, torch.float16)
        if use_fla and half and tensors[0].is_cuda and fla_kernel(starts is not None) is not None:
            return wkv_fla(*tensors, dtype=dtype, starts=starts)
        out, state = [], tensors[6]
        for begin in range(0, tensors[0].shape[1], SEGMENT):
            part = slice(begin, begin + SEGMENT)
            begun = None if starts is None else starts[:, part]
            y, state = wkv_chunked(*(x[:, part] for x in tensors[:6]), state, starts=begun)
            out.append(y)
        return torch.cat(out, dim=1), state


class Hxa079Cache(Cache):  # type: ignore[misc]
    """What a sequence leaves behind: a state per RWKV layer, keys and values per GQA layer, where padding was.

    Of a packed row its last sequence goes on: `starts` tells it from the others, `position` (B, 1) is where it is.

    A subclass because `generate` asks for one; nothing of the base class is used, its layout changes by version.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # `generate` cuts a prompt to what the cache has not seen, as for attention

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Back to the empty sequence."""
        self.states: dict[int, Tensor] = {}
        self.keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self.token_mask: Tensor | None = None
        self.starts: Tensor | None = None
        self.position: Tensor | None = None
        self.length = 0

    def __len__(self) -> int:
        return len(self.states) + len(self.keys_values)

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """P: tokens seen, padding included."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """There is no maximum."""
        return -1

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value (B, G, T, N) of a GQA layer; all of them so far, (B, G, P+T, N)."""
        if layer in self.keys_values:
            old_key, old_value = self.keys_values[layer]
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        self.keys_values[layer] = (key, value)
        return key, value

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.states = {layer: change(state) for layer, state in self.states.items()}
        self.keys_values = {layer: (change(key), change(value)) for layer, (key, value) in self.keys_values.items()}
        for name in ("token_mask", "starts", "position"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else change(value))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self._map_rows(lambda x: x.index_select(0, indices.to(x.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues what was row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, to continue one prompt in several ways."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, *args: Any) -> None:
        """A recurrent state cannot be cut back to fewer tokens: copy.deepcopy the cache before going on."""
        raise NotImplementedError(str(Hxa079Cache.crop.__doc__))


class Hxa079RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 as Llama does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def stretched(frequencies: Tensor, config: Hxa079Config) -> tuple[Tensor, float]:
    """Frequencies per channel pair under `config.rope_stretch`, and the factor of cos and sin."""
    rope, scale = config.rope_stretch, 1.0
    if not rope:
        return frequencies, scale
    kept = torch.zeros_like(frequencies)  # of each frequency, the share that is not divided; none of it if linear
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    elif rope["rope_type"] == "yarn":
        pairs, length = len(frequencies), rope["original_max_position_embeddings"]
        low, high = (
            pairs * math.log(length / (turns * 2 * math.pi)) / math.log(config.rope_theta)
            for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
        )
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        index = torch.arange(pairs, device=frequencies.device, dtype=frequencies.dtype)
        kept = 1 - ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        up, down = rope.get("mscale"), rope.get("mscale_all_dim")
        up, down = (up, down) if up and down else (1.0, 0.0)
        grown = math.log(max(rope["factor"], 1.0))
        scale = rope.get("attention_factor") or (0.1 * up * grown + 1.0) / (0.1 * down * grown + 1.0)
    return (1 - kept) * frequencies / rope["factor"] + kept * frequencies, scale


def rope_angles(positions: Tensor, config: Hxa079Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (B, T, 1, N), both halves alike. Computed on the fly, so nothing to store."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype) / config.head_dim
    frequencies, factor = stretched(1.0 / config.rope_theta**exponents, config)
    angles = positions[..., None].to(dtype) * frequencies
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(2)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the rotate-half layout, x (B, T, heads, N)."""
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)


def projections(config: Hxa079Config) -> list[nn.Linear]:
    """q, k, v and o of attention, which are receptance, key, value and output of an RWKV layer."""
    size, width = config.hidden_size, config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    inputs = [nn.Linear(size, out, bias=config.attention_bias) for out in (width, narrow, narrow)]
    return [*inputs, nn.Linear(width, size, bias=config.attention_out_bias)]


def norms(config: Hxa079Config) -> list[nn.Module]:
    """Of q (or r) and k, over head_dim."""
    size, eps = config.head_dim, config.rms_norm_eps
    return [Hxa079RMSNorm(size, eps) if config.enable_qk_norm else nn.Identity() for _ in "qk"]


class Form(NamedTuple):
    """What the variants of the RWKV layer differ in."""

    first: str = ""
    """Which of v and k are mixed with those of the first RWKV layer."""
    own_value: str = ""
    """Name of the low-rank pair whose product with the input is added to v, times `own_scale`."""
    own_scale: float = 0.0
    bonus: bool = False
    """Whether r_k lets the current token answer for itself."""
    by_decay: bool = False
    """Whether k is scaled by 1 - decay + iclr, instead of 1 - log(-log decay) + iclr."""
    from_r: bool = False
    """Whether decay, learning rate and gate are functions of r, after norm and RoPE, instead of x."""


FORMS = {
    "hxa079": Form(first="vk", bonus=True),
    "hxa07a": Form(),
    "hxa07b": Form(own_value="v", own_scale=0.2),
    "hxa07c": Form(own_value="v", own_scale=0.2, by_decay=True),
    "hxa07d": Form(first="vk", bonus=True, by_decay=True),
    "hxa07e": Form(first="v", own_value="dv", own_scale=0.5, by_decay=True, from_r=True),
}


class Hxa079TimeMix(nn.Module):
    """The mixer of an RWKV layer. No token shift, no group norm."""

    def __init__(self, config: Hxa079Config, layer: int) -> None:
        super().__init__()
        size, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.layer, self.heads, self.groups, self.head_dim = layer, heads, groups, config.head_dim
        self.use_fla = config.use_fla_kernels
        width, narrow = heads * self.head_dim, groups * self.head_dim
        self.form = FORMS[config.rwkv_architecture]
        if config.has_layer_records:
            # Written by the published trainer, read by nobody; kept so that no tensor is lost.
            self.register_buffer("layer_architecture", torch.tensor(78.0))
            self.register_buffer("head_size_record", torch.tensor(float(self.head_dim)))
        seen = width if self.form.from_r else size
        self._low_rank("w", seen, config.lora_rank_decay, width)
        self._low_rank("a", seen, config.lora_rank_iclr, width)
        first_ranks = {"v": config.lora_rank_value_residual_mix, "k": config.lora_rank_key_residual_mix}
        for letter in self.form.first:
            self._low_rank(letter, size, first_ranks[letter], narrow)
        if self.form.own_value:
            rank = config.lora_rank_own_value if "v" in self.form.first else config.lora_rank_value_residual_mix
            self._low_rank(self.form.own_value, size, rank, width, start=False)
        if self.form.bonus:
            self.r_k = nn.Parameter(torch.zeros(heads, self.head_dim))
        self._low_rank("g", seen, config.lora_rank_gate, width, start=False)
        self.receptance, self.key, self.value, self.output = projections(config)
        self.r_norm, self.k_norm = norms(config)

    def _low_rank(self, letter: str, into: int, rank: int, out: int, start: bool = True) -> None:
        setattr(self, f"{letter}1", nn.Parameter(torch.zeros(into, rank)))
        setattr(self, f"{letter}2", nn.Parameter(torch.zeros(rank, out)))
        if start:
            setattr(self, f"{letter}0", nn.Parameter(torch.zeros(1, 1, out)))

    def forward(self, x: Tensor, *others: Any, cache: Hxa079Cache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normed x (B, T, C) -> (B, T, C), v_first, k_first; new_mask, starts: those of this call, (B, T)."""
        v_first, k_first, cos, sin, new_mask, starts = others
        shape = (*x.shape[:2], -1, self.head_dim)
        r = rotate(self.r_norm(self.receptance(x).view(shape)), cos, sin)
        k = rotate(self.k_norm(self.key(x).view(shape)), cos, sin)
        v = self.value(x).view(shape)
        if v_first is None or k_first is None:
            v_first, k_first = v, k  # the first RWKV layer has v0..v2 and k0..k2 as well, and no use for them
        else:
            if "v" in self.form.first:
                v = v + (v_first - v) * torch.sigmoid(self.v0 + (x @ self.v1) @ self.v2).view(shape)
            if "k" in self.form.first:
                k = k + (k_first - k) * torch.sigmoid(self.k0 + (x @ self.k1) @ self.k2).view(shape)
        dtype, seen = r.dtype, r.flatten(2) if self.form.from_r else x
        r, k, v = (wide(y) for y in (r, k, v))
        k, v = (y.repeat_interleave(self.heads // self.groups, dim=2) for y in (k, v))
        if letter := self.form.own_value:
            own = x @ getattr(self, f"{letter}1") @ getattr(self, f"{letter}2") * self.form.own_scale
            v = v + wide(own).view(shape)
        # Sums and what follows in float32: bfloat16 would round a w0 of -6 to steps of 0.03.
        log_neg_log_decay = wide(self.w0) + wide(torch.tanh(seen @ self.w1) @ self.w2)
        log_neg_log_decay = -F.softplus(-log_neg_log_decay.view(shape)) - 0.5
        iclr = torch.sigmoid(wide(self.a0) + wide((seen @ self.a1) @ self.a2)).view(shape)
        gate = torch.sigmoid(seen @ self.g1) @ self.g2
        kk = F.normalize(k, dim=-1, eps=1e-12)
        log_decay = -log_neg_log_decay.exp()
        k = k * (1 - (log_decay.exp() if self.form.by_decay else log_neg_log_decay) + iclr)
        if new_mask is not None:
            keep = new_mask[:, :, None, None]
            k, kk, log_decay = k * keep, kk * keep, log_decay * keep
        state = None if cache is None else cache.states.get(self.layer)
        if state is None:
            state = r.new_zeros(x.shape[0], self.heads, self.head_dim, self.head_dim)
        y, state = wkv(r, log_decay, k, v, -kk, kk * iclr, state, dtype=dtype, use_fla=self.use_fla, starts=starts)
        if cache is not None:
            cache.states[self.layer] = state
        y = y * self.head_dim**-0.5
        if self.form.bonus:
            y = y + (r * k * self.r_k).sum(-1, keepdim=True) * v  # not times N**-0.5; k is the scaled one
        return self.output(y.flatten(2).to(gate.dtype) * gate), v_first, k_first


class Hxa079Attention(nn.Module):
    """The mixer of a GQA layer: causal softmax attention without position embeddings."""

    def __init__(self, config: Hxa079Config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.repeats = config.num_attention_heads // config.num_key_value_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections(config)
        self.q_norm, self.k_norm = norms(config)

    def forward(self, x: Tensor, visible: Tensor | None, cache: Hxa079Cache | None) -> Tensor:
        """Normed x (B, T, C) -> (B, T, C). `visible` (B or 1, 1, T, P+T) bool; None: causal, or all for one token."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        if x.shape[1] == 1:
            # The queries of a group stand in for tokens: no copies of a long cache.
            y = F.scaled_dot_product_attention(q.unflatten(1, (-1, self.repeats)).squeeze(3), k, v, attn_mask=visible)
            return self.o_proj(y.reshape(*x.shape[:2], -1))
        k, v = (y.repeat_interleave(self.repeats, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Hxa079MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Hxa079Config, inner: int, bias: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Hxa079Experts(nn.Module):
    """A mixture of SwiGLU experts: the num_experts_per_tok with the largest softmax(gate(x)), weighted by that."""

    def __init__(self, config: Hxa079Config) -> None:
        super().__init__()
        self.per_token, self.normed = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        inner = config.moe_intermediate_size
        self.experts = nn.ModuleList(Hxa079MLP(config, inner, bias=False) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        shares = wide(self.gate(tokens)).softmax(dim=-1)
        weights, chosen = shares.topk(self.per_token, dim=-1)
        if self.normed:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        y = torch.zeros_like(tokens)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            part = self.experts[expert](tokens[token]) * weights[token, place, None].to(x.dtype)
            y = y.index_add(0, token, part)
        return y.view_as(x)


class Hxa079DecoderLayer(nn.Module):
    """Pre-norm block: mixer, then MLP."""

    def __init__(self, config: Hxa079Config, layer: int) -> None:
        super().__init__()
        mixer = Hxa079Attention if layer in config.transformer_layers else Hxa079TimeMix
        self.self_attn = mixer(config, layer)
        mixture = layer in config.expert_layers
        self.mlp = Hxa079Experts(config) if mixture else Hxa079MLP(config, config.intermediate_size, config.mlp_bias)
        self.input_layernorm = Hxa079RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Hxa079RMSNorm(config.hidden_size, config.rms_norm_eps)

    # Flat tensors in and out: checkpointing (use_reentrant=True) loses the gradients of nested ones.
    def forward(
        self, x: Tensor, v_first: Any, k_first: Any, visible: Any, *others: Any, cache: Hxa079Cache | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        normed = self.input_layernorm(x)
        if isinstance(self.self_attn, Hxa079Attention):
            mixed = self.self_attn(normed, visible, cache)
        else:
            mixed, v_first, k_first = self.self_attn(normed, v_first, k_first, *others, cache=cache)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), v_first, k_first


class Hxa079PreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers has to know about hxa079."""

    config_class = Hxa079Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Hxa079DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_cache_class = True
    _supports_sdpa = True
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        """Plain random values, for tests; a useful model starts from a teacher."""
        constants = {"w0": -3.0, "a0": 0.0, "v0": 0.73, "k0": 0.73, "r_k": -0.04, "bias": 0.0}
        constants |= {"layer_architecture": 78.0, "head_size_record": float(self.config.head_dim)}
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if getattr(tensor, "_is_hf_initialized", False):
                continue
            if isinstance(module, Hxa079RMSNorm):
                nn.init.ones_(tensor)
            elif name in constants:
                nn.init.constant_(tensor, constants[name])
            else:
                nn.init.normal_(tensor, std=self.config.initializer_range)


class Hxa079Model(Hxa079PreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: Hxa079Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Hxa079DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = Hxa079RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Hxa079Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: Hxa079Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`attention_mask` (B, P+T), or (B, T) for the new tokens alone; without it the cache's padding holds.

        Packed rows are told by position_ids that go back, by `seq_idx` (B, T), a number per sequence, or by
        `cu_seq_lens_q`, the bounds of sequences in the B*T tokens; the first may go on with what is in the cache.
        Hidden states are the embedding, then what leaves each layer, the last one after the final norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions: RWKV layers have no attention maps")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, Hxa079Cache):
            raise TypeError(f"{CACHE_NAME} is a {type(cache).__name__}, expected this model's Hxa079Cache")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = Hxa079Cache() if cache is None and use_cache and not checkpointing else cache
        past = Hxa079Cache() if cache is None else cache
        seen, last = past.length, past.position
        mask = self._token_mask(attention_mask, past, x)
        new_mask = None if mask is None else mask[:, seen:]
        if cu_seq_lens_q is not None:
            seq_idx = _numbers(cu_seq_lens_q, *x.shape[:2])
        position_ids, new_starts = _positions(position_ids, seq_idx, new_mask, last, x)
        starts = _joined(past.starts, new_starts, False, seen, x)
        cos, sin = rope_angles(position_ids, self.config, torch.promote_types(x.dtype, torch.float32))
        visible = self._visible(mask, starts, seen, x)

        want_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden, v_first, k_first = [x], None, None
        for layer in self.layers:
            inputs = (x, v_first, k_first, visible, cos, sin, new_mask, new_starts)
            if checkpointing and cache is None:
                x, v_first, k_first = self._gradient_checkpointing_func(layer.__call__, *inputs)
            else:
                x, v_first, k_first = layer(*inputs, cache=cache)
            if want_hidden:
                hidden.append(x)
        x = hidden[-1] = self.norm(x)
        if cache is not None:
            cache.length, cache.token_mask, cache.starts = seen + x.shape[1], mask, starts
            cache.position = _latest(position_ids.expand(x.shape[:2]), new_mask, last)[:, -1:]
        kept = tuple(hidden) if want_hidden else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=kept, **{CACHE_NAME: cache})

    @staticmethod
    def _token_mask(attention_mask: Tensor | None, past: Hxa079Cache, x: Tensor) -> Tensor | None:
        mask, seen, (rows, tokens) = attention_mask, past.length, x.shape[:2]
        if mask is not None:
            if mask.dim() != 2 or mask.shape[1] not in (tokens, seen + tokens):
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)}, expected ({rows}, {seen + tokens}):"
                    f" {seen} tokens in the cache and {tokens} new ones"
                )
            mask = mask.to(x.device) != 0
        if mask is None or mask.shape[1] < seen + tokens:
            mask = _joined(past.token_mask, mask, True, seen, x)
        return None if mask is None or mask.all() else mask

    @staticmethod
    def _visible(mask: Tensor | None, starts: Tensor | None, seen: int, x: Tensor) -> Tensor | None:
        if mask is None and starts is None and (seen == 0 or x.shape[1] == 1):
            return None
        ones = torch.ones(x.shape[1], seen + x.shape[1], dtype=torch.bool, device=x.device)
        causal = ones.tril(seen)
        visible = causal[None, None]
        if starts is not None:
            number = starts.cumsum(-1)
            visible = visible & (number[:, None, seen:, None] == number[:, None, None, :])
        if mask is None:
            return visible
        # Padding sees itself: a row that sees nothing would be NaN.
        itself = causal ^ ones.tril(seen - 1)
        return (visible & mask[:, None, None, :]) | itself


def _numbers(cu_seq_lens: Tensor, rows: int, tokens: int) -> Tensor:
    """Which sequence each token is of, (B, T), from the bounds of sequences in the flattened batch."""
    bounds = cu_seq_lens.tolist()
    if bounds[:1] != [0] or bounds[-1] != rows * tokens or sorted(bounds) != bounds:
        raise ValueError(f"cu_seq_lens_q is {bounds}, expected bounds from 0 to {rows * tokens} = {rows} x {tokens}")
    lengths = cu_seq_lens.diff().long()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths).view(rows, tokens)


def _latest(positions: Tensor, mask: Tensor | None, last: Tensor | None) -> Tensor:
    """Position of the latest token up to each one, padding left out, (B, T); `last` (B, 1) is the cache's."""
    if mask is None:
        return positions
    index = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).cummax(-1).values
    before = positions.new_full((1, 1), -1) if last is None else last
    return torch.where(index < 0, before, positions.gather(1, index.clamp(min=0)))


def _positions(
    position_ids: Tensor | None, seq_idx: Tensor | None, mask: Tensor | None, last: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """RoPE positions of this call, (B or 1, T), and `starts`, (B, T) or None: where a packed row changes sequence.

    A sequence starts where its position is not after the one before it, or where `seq_idx` changes. Positions that
    do not go back there count on, so they are counted again from each start.
    """
    shape = x.shape[:2]
    before = torch.full((1, 1), -1, device=x.device) if last is None else last.to(x.device)
    restarts = starts = None
    if position_ids is not None:
        position_ids = position_ids.to(x.device)
        latest = _latest(position_ids.expand(shape), mask, before)
        restarts = position_ids <= torch.cat([before.expand(shape[0], 1), latest[:, :-1]], dim=1)
    if seq_idx is not None:
        seq_idx = seq_idx.to(x.device).expand(shape)
        starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        if mask is not None:  # a sequence starts at its first token that is not padding
            real = _latest(seq_idx, mask, None)
            starts = F.pad((real[:, 1:] != real[:, :-1]) & (real[:, :-1] >= 0), (1, 0))
        if restarts is not None and (starts & ~restarts).any():
            position_ids = restarts = None
    if restarts is not None:
        starts = restarts if starts is None else restarts | starts
    if starts is not None:
        starts = starts if mask is None else starts & mask
        starts = starts if starts.any() else None
    if position_ids is None:
        real = torch.ones(shape, dtype=torch.bool, device=x.device) if mask is None else mask
        count = real.cumsum(-1)
        base = (-1 - before).expand(shape)
        if starts is not None:
            base = torch.where(starts, count - 1, base).cummax(-1).values
        position_ids = (count - 1 - base).clamp(min=0)
    return position_ids, starts


def _joined(old: Tensor | None, new: Tensor | None, otherwise: bool, seen: int, x: Tensor) -> Tensor | None:
    """What the cache and this call have of a mask, (B, P) and (B, T), as one, (B, P+T)."""
    if old is None and new is None:
        return None
    fill = x.new_full((x.shape[0], seen + x.shape[1]), otherwise, dtype=torch.bool)
    return torch.cat(
        [fill[:, :seen] if old is None else old.to(x.device), fill[:, seen:] if new is None else new], dim=1
    )


class Hxa079ForCausalLM(Hxa079PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The model with its language head."""

    # A mapping for transformers 5; version 4 goes through its keys.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Hxa079Config) -> None:
        super().__init__(config)
        self.model = Hxa079Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Hxa079Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        token_type_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: Hxa079Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or of the last `logits_to_keep` tokens; the loss where there are `labels`, shifted here.

        Other arguments are those of Hxa079Model. Named here is what the Trainer may pass on from a data set, and
        `token_type_ids`, which is ignored: many tokenizers return it, and `generate` refuses what is not named.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cache=cache,
            **(kwargs | {"return_dict": True}),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        kept_cache = {CACHE_NAME: getattr(outputs, CACHE_NAME)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **kept_cache)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.use_cache is not False and model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = Hxa079Cache()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Hxa079Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: Hxa079Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the cache has not seen; `attention_mask` spans everything, past and new, in all versions."""
        cache = past_key_values if cache is None else cache
        seen = 0 if cache is None else cache.get_seq_length()
        prompt = 0 if inputs_embeds is None else inputs_embeds.shape[1]
        total = max(input_ids.shape[1], prompt) if attention_mask is None else attention_mask.shape[1]
        if attention_mask is None and seen and ("next_sequence_length" in kwargs or kwargs.get("is_first_iteration")):
            # Recent versions drop a mask without padding and give the number of new tokens; None if these are all.
            new_tokens = kwargs.get("next_sequence_length")
            total = seen + (input_ids.shape[1] if new_tokens is None else new_tokens)
        if total <= seen:
            raise ValueError(
                f"{CACHE_NAME} holds {seen} tokens, the input has {total}: nothing is left to compute."
                " Pass the whole sequence, cached tokens first, and its attention_mask"
            )
        if inputs_embeds is None or seen >= prompt:
            inputs = {"input_ids": input_ids[:, seen - total :]}
        else:
            new = self.get_input_embeddings()(input_ids[:, prompt - total :] if total > prompt else input_ids[:, :0])
            inputs = {"inputs_embeds": torch.cat([inputs_embeds[:, seen:], new.to(inputs_embeds.dtype)], dim=1)}
        passed_on = {key: value for key, value in kwargs.items() if key != "labels"}
        if total - seen > 1:
            if cu_seq_lens_q is not None:
                rows = input_ids.shape[0]
                seq_idx = _numbers(cu_seq_lens_q, rows, int(cu_seq_lens_q[-1]) // rows)
            if seq_idx is not None:
                generated = seq_idx[:, -1:].expand(-1, max(total - seq_idx.shape[1], 0))
                passed_on["seq_idx"] = torch.cat([seq_idx, generated], dim=1)[:, seen:total]
            if position_ids is not None:
                # Otherwise positions follow from the mask in forward; what `generate` puts there overlooks padding
                # in some versions. It may be cut to the new tokens, and may lack those generated without a cache.
                begin = 0 if position_ids.shape[1] == total - seen else seen
                more = torch.arange(1, max(total - seen + begin - position_ids.shape[1], 0) + 1).to(position_ids)
                positions = torch.cat([position_ids, position_ids[:, -1:] + more], dim=1)
                positions = positions[:, begin : begin + total - seen].expand(input_ids.shape[0], -1)
                mask = None if attention_mask is None else attention_mask[:, seen:] != 0
                last = None if cache is None else cache.position
                if _positions(positions, None, mask, last, positions)[1] is not None:
                    passed_on["position_ids"] = positions
        return inputs | {"cache": cache, "attention_mask": attention_mask} | passed_on


Hxa079Model.register_for_auto_class("AutoModel")
Hxa079ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
