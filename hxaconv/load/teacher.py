"""A checkpoint opened as a teacher: its config checked, fused projections split, names canonical."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from hxaconv.errors import HxaconvError, Inconsistent, raise_all
from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.strided import Strided
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import ModelConfig, teacher_config
from hxaconv.model.experts import FUSED
from hxaconv.model.model import Model, TiedHead, checked_here
from hxaconv.model.names import EMBEDDING, HEAD, canonical_names, template_of
from hxaconv.model.plan import Divisible, Plan, Ranges, Recipe, check, rows
from hxaconv.model.shells import summary

if TYPE_CHECKING:
    from hxaconv.model.model import Checkpoint

GATE_UP, DOWN = (f"model.layers.{{i}}.{name}" for name in FUSED)
"""Experts as transformers 5 writes them, in one tensor."""


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
        canonical, _ = canonical_names(listed, checkpoint.key_format, checkpoint.label)
        lacking = [f"{name}: not in {listed[name]}" for name in listed if canonical.get(name) in missing]
        raise_all(
            f"{checkpoint.label}: {checkpoint.extra['index']} names tensors that its files lack:",
            lacking,
            hint=f"Download {', '.join(sorted({listed[name] for name in listed})[:3])} again.",
            kind=Inconsistent,
        )


def split_fused(plan: Plan, config: ModelConfig) -> Plan:
    """Phi-3's qkv_proj and gate_up_proj, and fused experts, as the parts they are made of; other tensors as they are.

    Raises:
        Inconsistent: for a fused tensor whose shape the config does not explain.
    """
    a, kv, f = config.attention_size, config.key_value_size, config.intermediate_size
    parts = {
        "model.layers.{i}.self_attn.qkv_proj.weight": (("q_proj", a), ("k_proj", kv), ("v_proj", kv)),
        "model.layers.{i}.mlp.gate_up_proj.weight": (("gate_proj", f), ("up_proj", f)),
    }
    result: Plan = {}
    for name, recipe in plan.items():
        template = template_of(name)[0]
        if template in (GATE_UP, DOWN):
            result |= _experts(name, plan, config)
        elif template in parts:
            result |= _rows(name, recipe, parts[template])
        else:
            result[name] = recipe
    return result


def _rows(name: str, recipe: Recipe, pieces: tuple[tuple[str, int], ...]) -> Plan:
    if recipe.shape[0] != sum(size for _, size in pieces):
        sizes = " + ".join(str(size) for _, size in pieces)
        raise Inconsistent(f"{name} has {recipe.shape[0]} rows, the config implies {sizes}")
    result: Plan = {}
    start, fused = 0, name.rsplit(".", 2)[1]
    for part, size in pieces:
        result[name.replace(fused, part)] = rows(recipe, start, start + size, f"{name} rows {start}:{start + size}")
        start += size
    return result


def _experts(name: str, plan: Plan, config: ModelConfig) -> Plan:
    """One layer's experts: as transformers 5 has them, (E, 2I, C) and (E, C, I), or each matrix transposed."""
    if config.experts is None:
        raise Inconsistent(f"{name} holds experts, and config.json has no num_experts")
    recipe, count = plan[name], config.experts.num_experts
    matrix = _matrix(name, config)
    if recipe.shape not in ((count, *matrix), (count, *reversed(matrix))):
        turned = (count, *reversed(matrix))
        raise Inconsistent(
            f"{name}: shape {recipe.shape}, the config implies {(count, *matrix)}, or {turned} transposed"
        )
    make = _transposed if _is_transposed(name, plan, config) else _straight
    base, _, fused = name.rpartition(".")
    number = matrix[0] // 2 if fused == "gate_up_proj" else matrix[0]
    parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
    return {
        f"{base}.{expert}.{part}.weight": make(recipe, matrix, expert, place * number, number)
        for expert in range(count)
        for place, part in enumerate(parts)
    }


def _matrix(name: str, config: ModelConfig) -> tuple[int, int]:
    """(rows, columns) of one expert's matrix in a fused tensor."""
    assert config.experts is not None
    c, i = config.hidden_size, config.experts.moe_intermediate_size
    return (2 * i, c) if name.endswith("gate_up_proj") else (c, i)


def _is_transposed(name: str, plan: Plan, config: ModelConfig) -> bool:
    """By its shape; where its matrices are square, by that of the layer's other one."""
    base = name.rpartition(".")[0]
    for one in (name, f"{base}.gate_up_proj", f"{base}.down_proj"):
        matrix = _matrix(one, config)
        if one in plan and matrix[0] != matrix[1]:
            return plan[one].shape[1:] != matrix
    return False


def _straight(recipe: Recipe, matrix: tuple[int, int], expert: int, first: int, number: int) -> Recipe:
    """Rows of one expert's matrix."""
    assert isinstance(recipe.make, Divisible)
    itemsize = BY_NAME[recipe.dtype].itemsize
    start, size = (expert * matrix[0] + first) * matrix[1], number * matrix[1]
    part = recipe.make.part(start * itemsize, size * itemsize)
    return Recipe(recipe.dtype, (number, matrix[1]), part, f"{recipe.origin}[{expert}] rows {first}:{first + number}")


def _transposed(recipe: Recipe, matrix: tuple[int, int], expert: int, first: int, number: int) -> Recipe:
    """The same rows where they are stored as columns."""
    assert isinstance(recipe.make, Ranges)
    extent, itemsize = recipe.make.extents[0], BY_NAME[recipe.dtype].itemsize
    assert extent.file is not None
    offset = extent.offset + (expert * matrix[0] * matrix[1] + first) * itemsize
    make = Strided(extent.file, offset, itemsize, (number, matrix[1]), (1, matrix[0]))
    origin = f"{recipe.origin}[{expert}] columns {first}:{first + number}"
    return Recipe(recipe.dtype, (number, matrix[1]), make, origin)
