"""A student in another shape: other GQA layers, another dtype, MLPs padded for loaders that need it."""

from __future__ import annotations

from dataclasses import replace

from hxaconv.errors import HxaconvError
from hxaconv.formats.dtypes import FLOATS, parse_dtype
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention, layer_index, mixer_prefix
from hxaconv.model.plan import Plan, Recipe, main_dtype, pad_columns, pad_rows, with_origin
from hxaconv.surgery.init import InitSettings, in_order, mixer_from_teacher


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


def in_dtype(model: Model, dtype: str) -> Model:
    """The model with every tensor cast to `dtype`, unless most of it has that already."""
    if main_dtype(model.plan) == dtype:
        return model
    from hxaconv.surgery.arithmetic import cast

    return replace(model, plan={name: cast(recipe, dtype) for name, recipe in model.plan.items()})


def repick(
    student: Plan,
    teacher: Plan,
    old: StudentConfig,
    new: StudentConfig,
    settings: InitSettings,
    source_student: Model | None = None,
) -> Plan:
    """Another choice of GQA layers: changed layers come from `source_student` where it has that kind, else the teacher.

    All tensors of layers that keep their kind, and everything outside the mixers, stay as they are.
    """
    changed = [i for i in range(new.num_hidden_layers) if old.layer_kind(i) != new.layer_kind(i)]
    plan = {n: r for n, r in student.items() if not is_attention(n) or layer_index(n) not in changed}
    for layer in changed:
        if source_student is not None and source_student.student.layer_kind(layer) == new.layer_kind(layer):
            mixer = {n: r for n, r in source_student.plan.items() if n.startswith(mixer_prefix(layer))}
            plan |= {n: with_origin(r, f"trained {r.origin}") for n, r in mixer.items()}
        else:
            plan |= mixer_from_teacher(teacher, new, layer, settings)
    return in_order(plan, new, "the student with the new layers")
