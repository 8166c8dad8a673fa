"""A student in another shape: cast, its MLPs padded for loaders that want it so."""

from __future__ import annotations

from dataclasses import replace

from hxaconv.errors import HxaconvError
from hxaconv.formats.dtypes import FLOATS, parse_dtype
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.plan import Plan, Recipe, pad_columns, pad_rows


def reshape(student: Model, dtype: str | None, multiple: int | None = None) -> Model:
    """The student with its MLPs padded to a multiple and every float tensor cast, as far as either is given.

    Raises:
        HxaconvError: for a dtype or a multiple that is not offered.
    """
    plan, config = student.plan, student.student
    if multiple is not None:
        if multiple not in (256, 512):
            raise HxaconvError(f"--pad-ffn {multiple} is not possible", hint="Use 256 or 512.")
        plan, size = pad_ffn(plan, config, multiple)
        config = replace(config, intermediate_size=size)
    if dtype is not None:
        name = parse_dtype(dtype)
        if any(recipe.dtype in FLOATS and recipe.dtype != name for recipe in plan.values()):
            from hxaconv.surgery.arithmetic import cast

            plan = {key: cast(recipe, name) for key, recipe in plan.items()}
    return replace(student, config=config, plan=plan)


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
