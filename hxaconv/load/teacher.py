"""A checkpoint opened as a teacher: its config checked, fused projections split, names canonical."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from hxaconv.errors import HxaconvError, Inconsistent, raise_all
from hxaconv.load.fused import split_fused
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import teacher_config
from hxaconv.model.model import Model, TiedHead, checked_here
from hxaconv.model.names import EMBEDDING, HEAD, canonical_names
from hxaconv.model.plan import Plan, Recipe, check
from hxaconv.model.shells import summary

if TYPE_CHECKING:
    from hxaconv.model.model import Checkpoint


def open_teacher(
    checkpoint: Checkpoint,
    *,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    allow_output_bias: bool = False,
    drop_rope_scaling: bool = False,
    tie_word_embeddings: bool | None = None,
    headers_only: bool = False,
) -> Model:
    """The teacher in a checkpoint, its names and shapes checked against its config.

    `headers_only` leaves a stored head that the config ties for later; see `checked_here`.

    Raises:
        HxaconvError: for a config that hxa079 cannot carry, and for tensors that do not fit it.
        Inconsistent: when the config ties the head, and the stored one is another.
    """
    if checkpoint.config is None:
        raise HxaconvError(
            f"{checkpoint.label} has no config.json, so its dimensions and rope_theta are not known",
            hint="Give the teacher's folder or Hub id, not one weight file.",
        )
    config = teacher_config(
        checkpoint.config,
        where=checkpoint.label,
        has_head=HEAD in checkpoint.plan,
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
        allow_output_bias=allow_output_bias,
        drop_rope_scaling=drop_rope_scaling,
        tie_word_embeddings=tie_word_embeddings,
    )
    if checkpoint.shell:
        left = f"the text model becomes a student, not {summary(checkpoint.shell)} (--keep-shell carries it along)"
        config = replace(config, warnings=(*config.warnings, left))
    plan = split_fused(checkpoint.plan, config)
    tied = None
    if config.tie_word_embeddings:
        plan, tied = split_tied_head(plan, checkpoint.label)
    expected = expected_tensors(config)
    refuse_known_gaps(checkpoint, plan, expected)
    check(plan, expected, f"teacher {checkpoint.label}")
    ordered = {name: _from_teacher(name, plan[name]) for name in expected}
    model = Model(config, ordered, checkpoint.label, checkpoint.config, tied, checkpoint)
    return model if headers_only else checked_here(model)


def _from_teacher(name: str, recipe: Recipe) -> Recipe:
    return Recipe(recipe.dtype, recipe.shape, recipe.make, f"teacher {name}")


def split_tied_head(plan: Plan, where: str) -> tuple[Plan, TiedHead | None]:
    """(a tied model's plan without the copy of the embedding that some files store as head, that copy).

    Where only the head is stored, as safetensors' `save_model` may do, it is the embedding.
    """
    if HEAD not in plan:
        return plan, None
    rest = {name: recipe for name, recipe in plan.items() if name != HEAD}
    if EMBEDDING not in plan:
        return {EMBEDDING: plan[HEAD], **rest}, None
    return rest, TiedHead(plan[HEAD], plan[EMBEDDING], where)


def refuse_known_gaps(checkpoint: Checkpoint, plan: Plan, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Stop where tensors are missing and it is known what helps.

    Raises:
        Inconsistent: for a head that may be tied, and for tensors that the index lists and no file holds.
    """
    missing = [name for name in expected if name not in plan]
    if missing == [HEAD]:
        raise Inconsistent(
            f"{checkpoint.label} stores no head, and its settings do not tie it to the embedding",
            hint='If the head is the embedding: --tie-word-embeddings, or "tie_word_embeddings": true in config.json.',
        )
    listed: Mapping[str, str] = checkpoint.extra.get("only_in_index") or {}
    if missing and listed:
        canonical, _ = canonical_names(listed, checkpoint.dialect, checkpoint.label)
        lacking = [f"{name}: not in {listed[name]}" for name in listed if canonical.get(name) in missing]
        raise_all(
            f"{checkpoint.label}: {checkpoint.extra['index']} names tensors that its files lack:",
            lacking,
            hint=f"Download {', '.join(sorted({listed[name] for name in listed})[:3])} again.",
            kind=Inconsistent,
        )
