"""hxa07d: the tensors of hxa079, with k scaled by the decay itself. No training code of it is published.

Source: OpenMOSE/llama.cpp, src/models/rwkv07d.cpp, at 2230605.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hxaconv.model.variants import hxa079
from hxaconv.model.variants.base import Variant

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.forward.hxa079 import TimeMix


def time_mix(m: TimeMix) -> Tensor:
    """(B, T, C) -> (B, T, C)."""
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
    k = k * (1 - (-w.exp()).exp() + a)  # the decay, not w
    bonus = (r * k * m["r_k"]).sum(dim=-1, keepdim=True) * v
    y = m.recurrence(r, w, k, v, kk, a) * m.config.head_dim**-0.5 + bonus  # the bonus is not scaled
    return m.output(y.flatten(2) * g)


VARIANT = Variant(
    name="hxa07d",
    summary="hxa079 with k scaled by 1 - decay + a: the same tensors, another formula",
    parameters=tuple(replace(parameter, initial=None) for parameter in hxa079.PARAMETERS),
    ranks=None,
    time_mix=time_mix,
    key_by_decay=True,
    loaders={
        "RWKV-Infer, HF folder": "it runs hxa079 and hxa07a, not hxa07d",
        "RWKV-Infer, .pth": "it takes every file with k0 for hxa079, and would compute hxa079's formula",
    },
)
