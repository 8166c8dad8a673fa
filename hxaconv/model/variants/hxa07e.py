"""hxa07e: decay, learning rate and gate read r instead of x; v of the first layer and a low-rank term of its own.

No training code of it is published. Source: OpenMOSE/llama.cpp, src/models/rwkv07e.cpp, at 7033bf6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hxaconv.model.variants.base import Parameter, Variant

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.forward.hxa079 import TimeMix

VALUE_SCALE = 0.5
"""Of the low-rank term in v."""

PARAMETERS = (
    Parameter("layer_architecture", (), None, optional=True),
    Parameter("head_size_record", (), None, optional=True),
    Parameter("w1", ("A", "decay"), None),
    Parameter("w2", ("decay", "A"), None),
    Parameter("w0", (1, 1, "A"), None),
    Parameter("a1", ("A", "iclr"), None),
    Parameter("a2", ("iclr", "A"), None),
    Parameter("a0", (1, 1, "A"), None),
    Parameter("v1", ("C", "value"), None),
    Parameter("v2", ("value", "K"), None),
    Parameter("v0", (1, 1, "K"), None),
    Parameter("dv1", ("C", "own_value"), None),
    Parameter("dv2", ("own_value", "A"), None),
    Parameter("g1", ("A", "gate"), None),
    Parameter("g2", ("gate", "A"), None),
)


def time_mix(m: TimeMix) -> Tensor:
    """(B, T, C) -> (B, T, C)."""
    x = m.x
    r, k, v = m.rope(m.heads("receptance", "r_norm")), m.rope(m.heads("key", "k_norm")), m.heads("value")
    q = r.flatten(2)  # after norm and RoPE
    v_first, _ = m.first(v, k)
    if not m.is_first:
        v = v + (v_first - v) * m.by_head((m["v0"] + x @ m["v1"] @ m["v2"]).sigmoid())
    k, v = m.repeated(k), m.repeated(v) + m.by_head(x @ m["dv1"] @ m["dv2"]) * VALUE_SCALE
    w = m.log_neg_log_decay(m["w0"] + (q @ m["w1"]).tanh() @ m["w2"])
    a = m.by_head((m["a0"] + q @ m["a1"] @ m["a2"]).sigmoid())
    g = (q @ m["g1"]).sigmoid() @ m["g2"]
    kk = m.unit(k)
    k = k * (1 - (-w.exp()).exp() + a)  # the decay, not w
    y = m.recurrence(r, w, k, v, kk, a) * m.config.head_dim**-0.5
    return m.output(y.flatten(2) * g)


VARIANT = Variant(
    name="hxa07e",
    summary="w, a and g of r, v of the first layer plus 0.5 (x dv1) dv2, no bonus, k scaled by 1 - decay + a",
    parameters=PARAMETERS,
    ranks=None,
    time_mix=time_mix,
    key_by_decay=True,
    loaders=dict.fromkeys(("RWKV-Infer, HF folder", "RWKV-Infer, .pth"), "it runs hxa079 and hxa07a, not hxa07e"),
)
