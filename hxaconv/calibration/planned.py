"""Which tensors a calibration may replace, before anything is computed."""

from __future__ import annotations

import functools

from hxaconv.calibration.output_matrix import TOKENS_PER_COLUMN
from hxaconv.calibration.polish import TRAINED
from hxaconv.calibration.report import Settings
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention, layer_index
from hxaconv.model.plan import Plan, Recipe
from hxaconv.surgery.arithmetic import Computed, tensor

PROJECTIONS = {"receptance.weight", "receptance.bias", "key.weight", "key.bias", "output.bias"}
RWKV = {"v0", "k0", "w0", "a0", "r_k", "g2"} | PROJECTIONS
GQA = {"q_proj.weight", "q_proj.bias", "q_norm.weight", "o_proj.weight"}
POLISHED = {f"{name}.weight" for name in TRAINED}


def planned(student: Model, fitted_tokens: int, settings: Settings) -> Plan:
    """The tensors of a plain student that a fit to so many tokens may replace, holding what they hold until then."""
    rwkv = set(RWKV)
    enough = fitted_tokens >= TOKENS_PER_COLUMN * student.config.attention_size
    if settings.refit_output == "always" or (settings.refit_output == "auto" and enough):
        rwkv.add("output.weight")
    parts = {"rwkv": rwkv, "gqa": GQA}
    if settings.polish_tokens:
        parts = {kind: POLISHED if settings.polish_only else names | POLISHED for kind, names in parts.items()}
    found = {}
    for name, recipe in student.plan.items():
        layer = layer_index(name)
        if layer is None or not is_attention(name):
            continue
        if name.partition(".self_attn.")[2] in parts[student.student.layer_kind(layer)]:
            until_then, files = functools.partial(tensor, recipe), tuple(recipe.make.sources())
            make = Computed(until_then, recipe.dtype, "calibrated", files)
            found[name] = Recipe(recipe.dtype, recipe.shape, make, f"calibrated from {recipe.origin}")
    return found
