"""hxa07d: the tensors of hxa079, with k scaled by the decay itself. No training code of it is published.

Source: OpenMOSE/llama.cpp, src/models/rwkv07d.cpp, at 2230605.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from hxaconv.model.variants import hxa079
from hxaconv.model.variants.base import Variant

VARIANT = Variant(
    name="hxa07d",
    summary="hxa079 with k scaled by 1 - decay + a: the same tensors, another formula",
    parameters=tuple(replace(parameter, initial=None) for parameter in hxa079.PARAMETERS),
    ranks=None,
    time_mix=partial(hxa079.time_mix, by_decay=True),
    key_by_decay=True,
    loaders={
        "RWKV-Infer, HF folder": "it runs hxa079 and hxa07a, not hxa07d",
        "RWKV-Infer, .pth": "it takes every file with k0 for hxa079, and would compute hxa079's formula",
    },
)
