"""hxa07c: hxa07b with k scaled by the decay itself.

Source: OpenMOSE/RWKVInside, rwkv_inside/TimeMixer.py, class RWKV_Tmix_x070_Mose_cxa07C, at d03af49.
"""

from __future__ import annotations

from functools import partial

from hxaconv.model.variants import hxa07b
from hxaconv.model.variants.base import Variant

VARIANT = Variant(
    name="hxa07c",
    summary="hxa07b with k scaled by 1 - decay + a",
    parameters=hxa07b.PARAMETERS,
    ranks=hxa07b.ranks,
    time_mix=partial(hxa07b.time_mix, by_decay=True),
    own_value_scale=hxa07b.VALUE_SCALE,
    key_by_decay=True,
    loaders=dict.fromkeys(("RWKV-Infer, HF folder", "RWKV-Infer, .pth"), "it runs hxa079 and hxa07a, not hxa07c"),
)
