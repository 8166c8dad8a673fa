"""hxa079: values and keys of the first RWKV layer are mixed into the later ones; a bonus for the current token.

Source: OpenMOSE/RWKVInside, rwkv_inside/TimeMixer.py, class RWKV_Tmix_x070_Mose_cxa079, at d03af49.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hxaconv.model.variants.base import (
    Orthogonal,
    Parameter,
    Ranks,
    Variant,
    decay_ramp,
    head_size,
    iclr_ramp,
    round32,
)

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.forward.hxa079 import TimeMix

PARAMETERS = (
    Parameter("layer_architecture", (), 78.0, optional=True),
    Parameter("head_size_record", (), head_size, optional=True),
    Parameter("w1", ("C", "decay"), 0.0),
    Parameter("w2", ("decay", "A"), Orthogonal()),
    Parameter("w0", (1, 1, "A"), decay_ramp),
    Parameter("a1", ("C", "iclr"), 0.0),
    Parameter("a2", ("iclr", "A"), Orthogonal()),
    Parameter("a0", (1, 1, "A"), iclr_ramp),
    Parameter("v1", ("C", "value"), 0.0),
    Parameter("v2", ("value", "K"), Orthogonal()),
    Parameter("v0", (1, 1, "K"), 0.73),
    Parameter("k1", ("C", "key"), 0.0),
    Parameter("k2", ("key", "K"), Orthogonal()),
    Parameter("k0", (1, 1, "K"), 0.73),
    Parameter("r_k", ("H", "N"), -0.04),
    Parameter("g1", ("C", "gate"), 0.0),
    Parameter("g2", ("gate", "A"), Orthogonal()),
)


def ranks(attention_size: int) -> Ranks:
    """From A."""
    value = max(32, round32(1.3 * attention_size**0.5))
    return Ranks(
        decay=max(256, round32(1.7 * attention_size**0.6)),
        iclr=max(32, round32(1.8 * attention_size**0.5)),
        value=value,
        key=value,
        gate=max(256, round32(0.35 * attention_size**0.8)),
    )


def time_mix(m: TimeMix, by_decay: bool = False) -> Tensor:
    """(B, T, C) -> (B, T, C); `by_decay` is what hxa07d differs in."""
    x = m.x
    r, k, v = m.rope(m.heads("receptance", "r_norm")), m.rope(m.heads("key", "k_norm")), m.heads("value")
    v_first, k_first = m.first(v, k)  # k after norm and RoPE
    if not m.is_first:
        v = v + (v_first - v) * m.by_head((m["v0"] + x @ m["v1"] @ m["v2"]).sigmoid())
        k = k + (k_first - k) * m.by_head((m["k0"] + x @ m["k1"] @ m["k2"]).sigmoid())
    k, v = m.repeated(k), m.repeated(v)
    w = m.log_neg_log_decay(m["w0"] + (x @ m["w1"]).tanh() @ m["w2"])
    a = m.by_head((m["a0"] + x @ m["a1"] @ m["a2"]).sigmoid())
    g = (x @ m["g1"]).sigmoid() @ m["g2"]
    kk = m.unit(k)
    scale = (-w.exp()).exp() if by_decay else w  # the decay, or the log of -log decay
    k = k * (1 - scale + a)
    bonus = (r * k * m["r_k"]).sum(dim=-1, keepdim=True) * v
    y = m.recurrence(r, w, k, v, kk, a) * m.config.head_dim**-0.5 + bonus  # the bonus is not scaled
    return m.output(y.flatten(2) * g)


VARIANT = Variant(
    name="hxa079",
    summary="v and k of the first RWKV layer mixed into later ones, bonus r_k, k scaled by 1 - w + a",
    parameters=PARAMETERS,
    ranks=ranks,
    time_mix=time_mix,
    loaders={},
)
