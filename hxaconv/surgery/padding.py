"""MLPs padded for loaders that want it so."""

from __future__ import annotations

from hxaconv.model.config import StudentConfig
from hxaconv.model.plan import Plan, Recipe, pad_columns, pad_rows


def pad_ffn(plan: Plan, config: StudentConfig, multiple: int) -> tuple[Plan, int]:
    """MLPs widened with zero rows and columns to a multiple; (plan, new intermediate size).

    silu(0) * 0 = 0, so that the logits do not change.
    """
    size = -(-config.intermediate_size // multiple) * multiple
    if size == config.intermediate_size:
        return plan, size

    def pad(name: str, recipe: Recipe) -> Recipe:
        if name.endswith((".mlp.gate_proj.weight", ".mlp.up_proj.weight", ".mlp.gate_proj.bias", ".mlp.up_proj.bias")):
            return pad_rows(recipe, size)
        return pad_columns(recipe, size) if name.endswith(".mlp.down_proj.weight") else recipe

    return {name: pad(name, recipe) for name, recipe in plan.items()}, size
