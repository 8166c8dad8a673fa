"""hxa07a: neither values nor keys of the first layer, no bonus; the smallest of the variants.

Source: OpenMOSE/RWKVInside, rwkv_inside/TimeMixer.py, class RWKV_Tmix_x070_Mose_cxa07A, at d03af49.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hxaconv.model.variants.base import Orthogonal, Parameter, Ranks, Variant, decay_ramp, iclr_ramp, round32

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.forward.hxa079 import TimeMix

PARAMETERS = (
    Parameter("w1", ("C", "decay"), 0.0),
    Parameter("w2", ("decay", "A"), Orthogonal()),
    Parameter("w0", (1, 1, "A"), decay_ramp),
    Parameter("a1", ("C", "iclr"), 0.0),
    Parameter("a2", ("iclr", "A"), Orthogonal()),
    Parameter("a0", (1, 1, "A"), iclr_ramp),
    Parameter("g1", ("C", "gate"), 0.0),
    Parameter("g2", ("gate", "A"), Orthogonal()),
)


def ranks(attention_size: int) -> Ranks:
    """From A."""
    decay = max(32, round32(1.7 * attention_size**0.6))
    return Ranks(decay=decay, iclr=max(32, round32(1.3 * attention_size**0.5)), gate=decay)


def time_mix(m: TimeMix) -> Tensor:
    """(B, T, C) -> (B, T, C)."""
    x = m.x
    r, k, v = m.rope(m.heads("receptance", "r_norm")), m.rope(m.heads("key", "k_norm")), m.heads("value")
    m.first(v, k)  # kept for readers of the carry; no later layer uses them
    k, v = m.repeated(k), m.repeated(v)
    w = m.log_neg_log_decay(m["w0"] + (x @ m["w1"]).tanh() @ m["w2"])
    a = m.by_head((m["a0"] + x @ m["a1"] @ m["a2"]).sigmoid())
    g = (x @ m["g1"]).sigmoid() @ m["g2"]
    kk = m.unit(k)
    k = k * (1 - w + a)  # w, not the decay
    y = m.recurrence(r, w, k, v, kk, a) * m.config.head_dim**-0.5
    return m.output(y.flatten(2) * g)


VARIANT = Variant(
    name="hxa07a",
    summary="nothing of the first layer mixed in, no bonus, k scaled by 1 - w + a",
    parameters=PARAMETERS,
    ranks=ranks,
    time_mix=time_mix,
    loaders={"RWKV-Infer, .pth": "it reads (heads, head_dim) off r_k, which hxa07a does not have"},
)
