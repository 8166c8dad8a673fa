"""Another choice of GQA layers for a student that has one."""

from __future__ import annotations

from dataclasses import replace

from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention, layer_index, mixer_prefix
from hxaconv.model.plan import Plan, main_dtype, with_origin
from hxaconv.surgery.init import InitSettings, in_order, mixer_from_teacher


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
    donor: Model | None = None,
) -> Plan:
    """Another choice of GQA layers: layers that change kind come from `donor` where it has that kind, else the teacher.

    All tensors of layers that keep their kind, and everything outside the mixers, stay as they are.
    """
    plan = {name: recipe for name, recipe in student.items() if not _changes(name, old, new)}
    for layer in range(new.num_hidden_layers):
        if old.layer_kind(layer) == new.layer_kind(layer):
            continue
        if donor is not None and donor.student.layer_kind(layer) == new.layer_kind(layer):
            plan |= _mixer(donor.plan, layer, "trained ")
        else:
            plan |= mixer_from_teacher(teacher, new, layer, settings)
    return in_order(plan, new, "the student with the new layers")


def _changes(name: str, old: StudentConfig, new: StudentConfig) -> bool:
    layer = layer_index(name)
    return is_attention(name) and layer is not None and old.layer_kind(layer) != new.layer_kind(layer)


def _mixer(plan: Plan, layer: int, prefix: str) -> Plan:
    inside = mixer_prefix(layer)
    return {n: with_origin(r, f"{prefix}{r.origin}") for n, r in plan.items() if n.startswith(inside)}
