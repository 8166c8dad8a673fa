"""Which kind each layer is of, where a training file holds only some of them.

A trainer saves what it trained: of stage 1, with frozen attention layers, the RWKV layers alone; of a run that was
continued, whatever that run did not freeze. A layer that such a file lacks is the one of the model that completes
it: the teacher's attention, or the layer of the student that the run began with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hxaconv.errors import Inconsistent, raise_all
from hxaconv.load.student import Facts
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.model import Checkpoint
from hxaconv.model.names import layer_kinds

KINDS = {"gqa": "GQA", "rwkv": "RWKV"}


def layers_of(checkpoint: Checkpoint, base: ModelConfig, named: Sequence[Facts]) -> Facts | None:
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
        named = [*named, Facts("the student that completes it", {"gqa_layers": base.gqa_layers})]
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
    return Facts("the layers", {"num_hidden_layers": count, "gqa_layers": tuple(sorted(kept))})


def _contradictions(given: dict[int, str], named: Iterable[Facts], count: int) -> list[str]:
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
