"""The tensors of a model under the names that the architecture expects: fused ones split, missing ones completed.

A trainer saves what it trained: of stage 1, with frozen attention layers, the RWKV layers alone; of a run that was
continued, whatever that run did not freeze. A layer that such a file lacks is the one of the model that completes
it: the teacher's attention, or the layer of the student that the run began with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hxaconv.errors import Inconsistent, raise_all
from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.gathered import Strided
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.experts import FUSED
from hxaconv.model.model import Checkpoint, Model, TiedHead, checked_here
from hxaconv.model.names import (
    EMBEDDING,
    HEAD,
    canonical_names,
    is_attention,
    layer_index,
    layer_kinds,
    template_of,
)
from hxaconv.model.plan import Plan, Recipe, check, copied, rows, undivided

GATE_UP, DOWN = (f"model.layers.{{i}}.{name}" for name in FUSED)
"""Experts as transformers 5 writes them, in one tensor."""
INCOMPLETE = "The checkpoint is incomplete: no other holds what was trained."


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
        why = "its settings do not tie it to the embedding"
        if (checkpoint.config or {}).get("tie_word_embeddings") is None:
            why = "config.json has no tie_word_embeddings, which this family takes for false: its head would be random"
        raise Inconsistent(
            f"{checkpoint.label} stores no head, and {why}",
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
            found = _experts(name, plan, config)
        elif template in parts:
            found = _rows(name, recipe, parts[template])
        else:
            found = {name: recipe}
        if twice := found.keys() & result.keys():
            raise Inconsistent(f"{min(twice)} is there twice, once inside a fused tensor")
        result |= found
    return result


def _rows(name: str, recipe: Recipe, parts: tuple[tuple[str, int], ...]) -> Plan:
    if recipe.shape[0] != sum(size for _, size in parts):
        sizes = " + ".join(str(size) for _, size in parts)
        raise Inconsistent(f"{name} has {recipe.shape[0]} rows, the config implies {sizes}")
    result: Plan = {}
    start, fused = 0, name.rsplit(".", 2)[1]
    for part, size in parts:
        result[name.replace(fused, part)] = rows(recipe, start, start + size, f"{name} rows {start}:{start + size}")
        start += size
    return result


def _experts(name: str, plan: Plan, config: ModelConfig) -> Plan:
    """One layer's experts: as transformers 5 has them, (E, 2I, C) and (E, C, I), or each matrix transposed."""
    if config.experts is None:
        raise Inconsistent(f"{name} holds experts, and config.json has no num_experts")
    c, i, count = config.hidden_size, config.experts.moe_intermediate_size, config.experts.num_experts
    matrices = {"gate_up_proj": (2 * i, c), "down_proj": (c, i)}
    base, _, fused = name.rpartition(".")
    recipe, matrix = plan[name], matrices[fused]
    straight, turned = (count, *matrix), (count, *reversed(matrix))
    if recipe.shape not in (straight, turned):
        raise Inconsistent(f"{name}: shape {recipe.shape}, the config implies {straight}, or {turned} transposed")
    # Where its matrices are square, the layer's other ones tell whether they are transposed.
    shapes = [(plan.get(f"{base}.{other}"), matrices[other]) for other in (fused, *matrices)]
    turned_by_shape = (found.shape[1:] != shape for found, shape in shapes if found and shape[0] != shape[1])
    is_turned = next(turned_by_shape, False)
    parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
    number = matrix[0] // len(parts)
    return {
        f"{base}.{expert}.{part}.weight": _expert_rows(recipe, expert, matrix, place * number, number, is_turned)
        for expert in range(count)
        for place, part in enumerate(parts)
    }


def _expert_rows(recipe: Recipe, expert: int, matrix: tuple[int, int], first: int, number: int, turned: bool) -> Recipe:
    """Rows of one expert's matrix; `turned`: they are stored as columns."""
    height, width = matrix
    origin = f"{recipe.origin}[{expert}] {'columns' if turned else 'rows'} {first}:{first + number}"
    if not turned:
        all_rows = replace(recipe, shape=(recipe.shape[0] * height, width))
        return rows(all_rows, expert * height + first, expert * height + first + number, origin)
    itemsize, extent = BY_NAME[recipe.dtype].itemsize, copied(recipe).extents[0]
    if extent.nbytes != recipe.nbytes or extent.file is None:
        raise undivided(recipe)
    offset = extent.offset + (expert * height * width + first) * itemsize
    make = Strided(extent.file, offset, itemsize, (number, width), (1, height))
    return Recipe(recipe.dtype, (number, width), make, origin)


def complete(student: Model) -> Model:
    """The whole student: a checkpoint that lacks tensors is completed by its teacher, `student.base`.

    Raises:
        HxaconvError: when tensors are missing and no teacher has them, or would end up unused.
    """
    config, base = student.student, student.base
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in student.plan]
    if missing and base is None and student.checkpoint is not None:
        refuse_known_gaps(student.checkpoint, student.plan, expected)
    if missing and base is None:
        hint = "Pass --teacher FOLDER_OR_HUB_ID: a training checkpoint holds attention only, the rest is its."
        if any(is_attention(name) and layer_index(name) in layer_kinds(student.plan) for name in missing):
            hint = INCOMPLETE
        raise_all(
            f"{student.label} lacks {len(missing)} of {len(expected)} tensors:", missing, hint=hint, kind=Inconsistent
        )
    if not missing:
        check(student.plan, expected, student.label)
        return student
    assert base is not None
    trained, tied = student.plan, student.tied_head
    if config.tie_word_embeddings and EMBEDDING not in trained:
        tied, head = base.tied_head, trained.get(HEAD)
        if head is not None and EMBEDDING in base.plan:
            trained = {name: recipe for name, recipe in trained.items() if name != HEAD}
            tied = TiedHead(head, base.plan[EMBEDDING], student.label)
    student_base = isinstance(base.config, StudentConfig)
    plan = graft(trained, base.plan, config, parts=student_base)
    both = [name for name in plan if name in trained and name in base.plan]
    lacked = sum(name not in trained for name in plan)
    notes = [f"{lacked} tensors come from {base.label if student_base else 'the teacher'}"]
    if both:
        notes += [f"{len(both)} tensors are in both, the trained ones are taken:", *(f"  - {name}" for name in both)]
    return checked_here(replace(student, plan=plan, tied_head=tied, notes=(*student.notes, *notes)))


def graft(trained: Plan, teacher: Plan, config: StudentConfig, *, parts: bool = False) -> Plan:
    """Trained tensors where there are some, the teacher's for the rest, in the architecture's order.

    `parts`: `teacher` is the student that the run began with: tensors that were frozen in a layer are its.

    Raises:
        HxaconvError: when a trained tensor would end up unused, or something is in neither.
    """
    expected = expected_tensors(config)
    layers = {layer_index(name) for name in trained if is_attention(name)} if not parts else set()
    raise_all(
        "the trained checkpoint holds these layers' attention only in part, and the teacher's was not trained with it:",
        [f"{n} is missing" for n in expected if is_attention(n) and layer_index(n) in layers and n not in trained],
        hint="Is the file whole? A layer's attention comes from one checkpoint.",
    )
    unused = [f"{name} {trained[name].shape} ({trained[name].place(name)})" for name in trained if name not in expected]
    raise_all(
        f"{len(unused)} tensors of the trained checkpoint have no place in the result:",
        unused,
        hint="The layer kinds or the tied head differ between the checkpoint and the teacher's config.",
    )
    plan = {name: trained.get(name) or teacher.get(name) for name in expected}
    missing = [name for name, recipe in plan.items() if recipe is None]
    hint = "Is it the teacher that this checkpoint was trained from, and is the checkpoint complete?"
    raise_all("neither the trained checkpoint nor the teacher holds:", missing, hint=hint)
    whole = {name: recipe for name, recipe in plan.items() if recipe is not None}
    check(whole, expected, "the trained checkpoint with its teacher")
    return whole
