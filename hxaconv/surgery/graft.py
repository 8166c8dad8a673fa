"""A trained checkpoint completed by its teacher, and MLPs padded for loaders that want it so."""

from __future__ import annotations

from dataclasses import dataclass

from hxaconv.errors import raise_all
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import StudentConfig
from hxaconv.model.names import is_attention, layer_index
from hxaconv.model.plan import Plan, Recipe, check, pad_columns, pad_rows


@dataclass(frozen=True, slots=True)
class Grafted:
    """A trained checkpoint completed by its teacher."""

    plan: Plan
    from_teacher: tuple[str, ...]
    both: tuple[str, ...]
    """Tensors that both hold: the trained one won."""


def graft(trained: Plan, teacher: Plan, config: StudentConfig) -> Grafted:
    """Trained tensors where there are some, the teacher's for the rest, in the architecture's order.

    Raises:
        HxaconvError: when a trained tensor would end up unused, or something is in neither.
    """
    expected = expected_tensors(config)
    layers = {layer_index(name) for name in trained if is_attention(name)}
    raise_all(
        "the trained checkpoint holds these layers' attention only in part, and the teacher's was not trained with it:",
        [f"{n} is missing" for n in expected if is_attention(n) and layer_index(n) in layers and n not in trained],
        hint="Is the file whole? A layer's attention comes from one checkpoint.",
    )
    unused = [f"{name} {trained[name].shape} ({trained[name].origin})" for name in trained if name not in expected]
    raise_all(
        f"{len(unused)} tensors of the trained checkpoint have no place in the result:",
        unused,
        hint="The layer kinds or the tied head differ between the checkpoint and the teacher's config.",
    )
    plan = {name: trained.get(name) or teacher.get(name) for name in expected}
    missing = [name for name, recipe in plan.items() if recipe is None]
    hint = "Is it the teacher that this checkpoint was trained from, and is the checkpoint complete?"
    raise_all("neither the trained checkpoint nor the teacher holds:", missing, hint=hint)
    complete = {name: recipe for name, recipe in plan.items() if recipe is not None}
    check(complete, expected, "the trained checkpoint with its teacher")
    return Grafted(
        complete,
        tuple(name for name in expected if name not in trained),
        tuple(name for name in expected if name in trained and name in teacher),
    )


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
