"""hxa07c: hxa07b with k scaled by the decay itself.

Source: OpenMOSE/RWKVInside, rwkv_inside/TimeMixer.py, class RWKV_Tmix_x070_Mose_cxa07C, at d03af49.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hxaconv.model.variants import hxa07b
from hxaconv.model.variants.base import Variant

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.forward.hxa079 import TimeMix


def time_mix(m: TimeMix) -> Tensor:
    """(B, T, C) -> (B, T, C)."""
    x = m.x
    r, k, v = m.rope(m.heads("receptance", "r_norm")), m.rope(m.heads("key", "k_norm")), m.heads("value")
    m.first(v, k)  # kept for readers of the carry; no later layer uses them
    k, v = m.repeated(k), m.repeated(v) + m.by_head(x @ m["v1"] @ m["v2"]) * hxa07b.VALUE_SCALE
    w = m.log_neg_log_decay(m["w0"] + (x @ m["w1"]).tanh() @ m["w2"])
    a = m.by_head((m["a0"] + x @ m["a1"] @ m["a2"]).sigmoid())
    g = (x @ m["g1"]).sigmoid() @ m["g2"]
    kk = m.unit(k)
    k = k * (1 - (-w.exp()).exp() + a)  # the decay, not w
    y = m.recurrence(r, w, k, v, kk, a) * m.config.head_dim**-0.5
    return m.output(y.flatten(2) * g)


VARIANT = Variant(
    name="hxa07c",
    summary="hxa07b with k scaled by 1 - decay + a",
    parameters=hxa07b.PARAMETERS,
    ranks=hxa07b.ranks,
    time_mix=time_mix,
    own_value_scale=hxa07b.VALUE_SCALE,
    key_by_decay=True,
    loaders=dict.fromkeys(("RWKV-Infer, HF folder", "RWKV-Infer, .pth"), "it runs hxa079 and hxa07a, not hxa07c"),
)
