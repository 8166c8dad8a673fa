"""Checkpoints that hold a part of a student: which kind each layer is of, and the completing by another model.

A trainer saves what it trained: of stage 1, with frozen attention layers, the RWKV layers alone; of a run that was
continued, whatever that run did not freeze. A layer that such a file lacks is the one of the model that completes
it: the teacher's attention, or the layer of the student that the run began with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hxaconv.errors import Inconsistent, raise_all
from hxaconv.load.student import SettingsSource
from hxaconv.load.teacher import refuse_known_gaps
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.model import Checkpoint, Model, TiedHead, checked_here
from hxaconv.model.names import EMBEDDING, HEAD, is_attention, layer_index, layer_kinds
from hxaconv.model.plan import Plan, check

KINDS = {"gqa": "GQA", "rwkv": "RWKV"}


def layers_of(checkpoint: Checkpoint, base: ModelConfig, named: Sequence[SettingsSource]) -> SettingsSource | None:
    """The layers of a student, some of which the checkpoint lacks; None where it has a mixer for all of `base`.

    `named` are sources that say `gqa_layers`: they confirm, or contradict, what the tensors leave open.

    Raises:
        Inconsistent: for contradictions, and for RWKV layers that nothing here holds.
    """
    found, count = layer_kinds(checkpoint.plan), base.num_hidden_layers
    absent = [layer for layer in range(count) if layer not in found]
    if not absent or max(found, default=0) >= count:
        return None
    if isinstance(base, StudentConfig):
        named = [*named, SettingsSource("the student that completes it", {"gqa_layers": base.gqa_layers})]
    given = {layer: KINDS[kind] for layer, kind in found.items()}
    raise_all(
        f"{checkpoint.label}: what its tensors are contradicts what the layers are said to be:",
        _contradictions(given, named, count),
        hint="One of them belongs to another run.",
        kind=Inconsistent,
    )
    gqa = set(named[0].values["gqa_layers"]) if named else set(absent)
    lost = [layer for layer in absent if layer not in gqa]
    hint = (
        "If the run was continued from a student, give that student as --teacher: it completes the file."
        " Otherwise the file is not whole."
    )
    if lost and not isinstance(base, StudentConfig):
        raise Inconsistent(
            f"{checkpoint.label} holds nothing of {numbers(lost)}, RWKV by {named[0].source}, which no teacher has",
            hint=hint,
        )
    if "rwkv" not in found.values() and not isinstance(base, StudentConfig):
        raise Inconsistent(
            f"{checkpoint.label} holds {numbers(found)} as attention and no RWKV layer, which no teacher has", hint=hint
        )
    kept = gqa.intersection(absent) | {layer for layer, kind in found.items() if kind == "gqa"}
    return SettingsSource("the layers", {"num_hidden_layers": count, "gqa_layers": tuple(sorted(kept))})


def _contradictions(given: dict[int, str], named: Iterable[SettingsSource], count: int) -> list[str]:
    """Layers of which two sources say different kinds, a line each; `given` are those of the tensors."""
    problems = []
    origin = dict.fromkeys(given, "its tensors")
    for source in named:
        for layer in range(count):
            kind = KINDS["gqa" if layer in source.values["gqa_layers"] else "rwkv"]
            if given.setdefault(layer, kind) != kind:
                problems.append(f"layer {layer} is {given[layer]} by {origin[layer]}, {kind} by {source.source}")
            origin.setdefault(layer, source.source)
    return problems


def numbers(layers: Iterable[int]) -> str:
    """`layer 3`, `layers 1, 2`."""
    found = sorted(layers)
    return f"layer{'s' if len(found) != 1 else ''} {', '.join(map(str, found))}"


def notes(checkpoint: Checkpoint, base: ModelConfig, *, confirmed: bool) -> list[str]:
    """What the layers are that a checkpoint lacks, for people."""
    found = layer_kinds(checkpoint.plan)
    absent = [layer for layer in range(base.num_hidden_layers) if layer not in found]
    if isinstance(base, StudentConfig):
        return [f"{numbers(absent)}: not in {checkpoint.label}, those of the student that completes it"]
    how = "" if confirmed else "; --layer-map or --gqa-layers would confirm it"
    return [f"{numbers(absent)}: not in {checkpoint.label}, the teacher's attention (GQA){how}"]


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
            hint = "The checkpoint is incomplete: no other holds what was trained."
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
    grafted = graft(trained, base.plan, config, parts=student_base)
    notes = [f"{len(grafted.from_teacher)} tensors come from {base.label if student_base else 'the teacher'}"]
    if grafted.both:
        notes.append(f"{len(grafted.both)} tensors are in both, the trained ones are taken:")
        notes += [f"  - {name}" for name in grafted.both]
    return checked_here(replace(student, plan=grafted.plan, tied_head=tied, notes=(*student.notes, *notes)))


@dataclass(frozen=True, slots=True)
class Grafted:
    """A trained checkpoint completed by its teacher."""

    plan: Plan
    from_teacher: tuple[str, ...]
    both: tuple[str, ...]
    """Tensors that both hold: the trained one won."""


def graft(trained: Plan, teacher: Plan, config: StudentConfig, *, parts: bool = False) -> Grafted:
    """Trained tensors where there are some, the teacher's for the rest, in the architecture's order.

    `parts` says that `teacher` is the student that the run began with: tensors that were frozen in a layer are its.

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
