"""hxa07b: a low-rank term of the layer's own input in v; low-rank pairs that all but the gate's start at random.

Source: OpenMOSE/RWKVInside, rwkv_inside/TimeMixer.py, class RWKV_Tmix_x070_Mose_cxa07B, at d03af49.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hxaconv.model.variants.base import Orthogonal, Parameter, Ranks, Variant, decay_ramp, iclr_ramp, round32

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.forward.hxa079 import TimeMix

VALUE_SCALE = 0.2
"""Of the low-rank term in v."""

PARAMETERS = (
    Parameter("w1", ("C", "decay"), Orthogonal()),
    Parameter("w2", ("decay", "A"), Orthogonal()),
    Parameter("w0", (1, 1, "A"), decay_ramp),
    Parameter("a1", ("C", "iclr"), Orthogonal()),
    Parameter("a2", ("iclr", "A"), Orthogonal()),
    Parameter("a0", (1, 1, "A"), iclr_ramp),
    Parameter("v1", ("C", "value"), Orthogonal()),
    Parameter("v2", ("value", "A"), Orthogonal()),
    Parameter("g1", ("C", "gate"), 0.0),
    Parameter("g2", ("gate", "A"), Orthogonal()),
)


def ranks(attention_size: int) -> Ranks:
    """From A."""
    decay = max(256, round32(1.7 * attention_size**0.6))
    return Ranks(
        decay=decay,
        iclr=max(128, round32(1.8 * attention_size**0.5)),
        value=max(32, round32(1.3 * attention_size**0.5)),
        gate=decay,
    )


def time_mix(m: TimeMix, by_decay: bool = False) -> Tensor:
    """(B, T, C) -> (B, T, C); `by_decay` is what hxa07c differs in."""
    x = m.x
    r, k, v = m.rope(m.heads("receptance", "r_norm")), m.rope(m.heads("key", "k_norm")), m.heads("value")
    m.first(v, k)  # kept for readers of the carry; no later layer uses them
    k, v = m.repeated(k), m.repeated(v) + m.by_head(x @ m["v1"] @ m["v2"]) * VALUE_SCALE
    w = m.log_neg_log_decay(m["w0"] + (x @ m["w1"]).tanh() @ m["w2"])
    a = m.by_head((m["a0"] + x @ m["a1"] @ m["a2"]).sigmoid())
    g = (x @ m["g1"]).sigmoid() @ m["g2"]
    kk = m.unit(k)
    scale = (-w.exp()).exp() if by_decay else w  # the decay, or the log of -log decay
    k = k * (1 - scale + a)
    y = m.recurrence(r, w, k, v, kk, a) * m.config.head_dim**-0.5
    return m.output(y.flatten(2) * g)


VARIANT = Variant(
    name="hxa07b",
    summary="v plus 0.2 (x v1) v2 of its own, no bonus, k scaled by 1 - w + a",
    parameters=PARAMETERS,
    ranks=ranks,
    time_mix=time_mix,
    own_value_scale=VALUE_SCALE,
    loaders=dict.fromkeys(("RWKV-Infer, HF folder", "RWKV-Infer, .pth"), "it runs hxa079 and hxa07a, not hxa07b"),
)
