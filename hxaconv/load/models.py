"""The one way in: whatever the user names, a folder, a file or a Hub id, becomes a Model. Headers only, no torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hxaconv.errors import HxaconvError, Inconsistent, raise_all, shortened
from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.load.files import ADAPTER_LEFT_OUT, refuse_broken
from hxaconv.load.student import FLAGS, SettingsSource, is_student, student_model, student_settings
from hxaconv.load.tensors import complete, refuse_known_gaps, split_fused, split_tied_head
from hxaconv.model import layer_maps
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import ModelConfig, StudentConfig, teacher_config
from hxaconv.model.model import Checkpoint, Model, checked_here
from hxaconv.model.names import EMBEDDING, HEAD, is_attention, layer_kinds
from hxaconv.model.plan import Plan, check, with_origin
from hxaconv.model.rope import rope_of
from hxaconv.options import Settings

if TYPE_CHECKING:
    from hxaconv.formats.files import SourceFile
    from hxaconv.progress import Progress

    Name = str | Path | Checkpoint
    """A folder, a file, a Hub id (`org/name@revision`), or what was opened before."""


def load_teacher(
    name: Name,
    settings: Settings | None = None,
    *,
    lenient: bool = False,
    headers_only: bool = False,
    copied: bool = True,
    progress: Progress | None = None,
) -> Model:
    """The teacher that `name` is, its names and shapes checked against its config.

    Args:
        name: What the user named; opened before, it is not opened again.
        settings: What overrules its config.json.
        lenient: Take output biases and scaled RoPE, which its students leave out: for a teacher beside a student.
        headers_only: Leave a stored head that the config ties for later (`Model.tied_head`).
        copied: Whether something is made of it that its tokenizer is copied to: broken files are refused.
        progress: Shows a download; pickles have to be here before they can be read.

    Raises:
        HxaconvError: when it does not exist, is damaged, or is no teacher that hxa079 can carry.
        Inconsistent: when its tensors do not fit its config, or a stored head is not the embedding that it is tied to.
    """
    settings = settings or Settings()
    checkpoint = _opened(name, settings, progress)
    if copied:
        refuse_broken(checkpoint)
    if checkpoint.config is None:
        raise HxaconvError(
            f"{checkpoint.label} has no config.json, so its dimensions and rope_theta are not known",
            hint="Give the teacher's folder or Hub id, not one weight file.",
        )
    tied = settings.tie_word_embeddings
    if lenient and tied is (HEAD in checkpoint.plan):
        tied = None  # a teacher without a head may have an untied student, one with a head a tied one
    config = teacher_config(
        checkpoint.config,
        where=checkpoint.label,
        rope_theta=settings.rope_theta,
        rms_norm_eps=settings.rms_norm_eps,
        allow_output_bias=lenient or settings.allow_output_bias,
        drop_rope_scaling=settings.drop_rope_scaling or (lenient and rope_of(checkpoint.config)[2] is not None),
        tie_word_embeddings=tied,
    )
    config = replace(config, warnings=(*config.warnings, *checkpoint.warnings))
    plan = _with_adapters(checkpoint.plan, settings, checkpoint.label, tied=config.tie_word_embeddings)
    plan, head = split_fused(plan, config), None
    if config.tie_word_embeddings:
        plan, head = split_tied_head(plan, checkpoint.label)
    expected = expected_tensors(config)
    refuse_known_gaps(checkpoint, plan, expected)
    check(plan, expected, f"teacher {checkpoint.label}")
    plan = {name: with_origin(plan[name], f"teacher {name}") for name in expected}
    model = Model(config, plan, checkpoint.label, checkpoint.config, head, checkpoint)
    return model if headers_only else checked_here(model)


def load_student(
    name: Name,
    settings: Settings | None = None,
    *,
    teacher: Name | Model | None = None,
    whole: bool = True,
    copied: bool = True,
    continued: bool = True,
    progress: Progress | None = None,
) -> Model:
    """The student that `name` is, in any container and key format; `Model.base` is its teacher, where one is given.

    Args:
        name: What the user named; opened before, it is not opened again.
        settings: What overrules its files; a layer map supplies what they leave open.
        teacher: Completes a checkpoint that holds a part of a student, and supplies settings: the transformer it was
            made of, or the student that the run began with.
        whole: Whether all tensors are wanted; otherwise attention is enough, and the rest stays as it is.
        copied: As in `load_teacher`.
        continued: Whether `teacher` may be the student that the run began with; otherwise it is a transformer.
        progress: Shows a download.

    Raises:
        HxaconvError: when a setting is known from no source, or tensors are missing and no teacher has them.
        Inconsistent: when its tensors and its settings do not make one model.
    """
    settings = settings or Settings()
    checkpoint = _opened(name, settings, progress)
    base = _base(teacher, settings, copied, progress)
    if copied:
        refuse_broken(checkpoint)
    if base and isinstance(base.config, StudentConfig) and not continued:
        raise HxaconvError(
            f"{base.label} is a student, the transformer that it was made of is needed here",
            hint="Give that as --teacher.",
        )
    layers, notes = _layers(checkpoint, settings, base.config) if base else (None, ())
    student = student_model(checkpoint, settings, teacher=base.config if base else None, layers=layers)
    student = replace(student, raw=student.raw or (base.raw if base else {}), base=base)
    if whole or layers:
        student = complete(student)
    else:  # its attention is checked; nothing else of it is needed
        expected = {name: shape for name, shape in expected_tensors(student.config).items() if is_attention(name)}
        check({name: recipe for name, recipe in student.plan.items() if is_attention(name)}, expected, student.label)
        student = replace(student, tied_head=None)
    plan = _with_adapters(student.plan, settings, student.label, tied=student.config.tie_word_embeddings)
    return replace(student, plan=plan, notes=(*notes, *student.notes, *_remarks(checkpoint, plan, settings)))


def _base(name: Name | Model | None, settings: Settings, copied: bool, progress: Progress | None) -> Model | None:
    """What completes a student: its teacher, or the student that its run began with."""
    if name is None or isinstance(name, Model):
        return name
    settings = of_another(settings)
    checkpoint = _opened(name, settings, progress)
    if is_student(checkpoint):
        return load_student(checkpoint, replace(settings, gqa_layers=None), copied=copied)
    return load_teacher(checkpoint, settings, lenient=True, headers_only=True, copied=copied)


def load_model(
    name: Name,
    settings: Settings | None = None,
    *,
    teacher: Name | Model | None = None,
    like: ModelConfig | None = None,
    progress: Progress | None = None,
) -> Model:
    """The teacher or the student that `name` is, with all its tensors.

    `like`, the config of a model that it belongs to, names the settings that a `.pth` cannot carry.

    Raises:
        HxaconvError: when it is neither, or a setting is known from no source.
        Inconsistent: when its tensors and its settings do not make one model.
    """
    settings = settings or Settings()
    checkpoint = _opened(name, settings, progress)
    if not may_be_student(checkpoint):
        return load_teacher(checkpoint, settings, lenient=True, copied=False)
    if like is not None and tells_nothing(checkpoint) and teacher is None:
        common = {key: getattr(like, key) for key in FLAGS if getattr(settings, key) is None}
        if settings.variant is None and isinstance(like, StudentConfig):
            common["variant"] = like.rwkv_architecture
        settings = replace(settings, **common)
    student = load_student(checkpoint, settings, teacher=teacher, copied=False, progress=progress)
    if isinstance(like, StudentConfig) and tells_nothing(checkpoint) and teacher is None:
        return replace(student, config=replace(student.config, rope_scaling=like.rope_scaling))
    return student


def load_other(
    name: Name, student: Model, settings: Settings | None = None, *, progress: Progress | None = None
) -> Model:
    """Another trained student of the same teacher, whose layers can be taken over.

    Settings that it lacks are those of `student`.

    Raises:
        HxaconvError: when it is no student, or of another shape.
    """
    settings = settings or Settings()
    checkpoint = _opened(name, of_another(settings), progress)
    common = student_settings(student.student)
    if EMBEDDING in checkpoint.plan:
        # Its mixers fit whatever its MLPs and vocabulary were padded to.
        common = {key: value for key, value in common.items() if key not in ("intermediate_size", "vocab_size")}
    return student_model(checkpoint, settings, other=SettingsSource(f"SOURCE ({student.label})", common))


def _opened(name: Name, settings: Settings, progress: Progress | None) -> Checkpoint:
    found = name
    if not isinstance(found, Checkpoint):
        found = open_checkpoint(found, revision=settings.revision, weights=settings.weights, progress=progress)
    merged = [Path(os.path.expanduser(adapter)).resolve() for adapter in settings.adapter]
    if found.root in (*merged, *(path.parent for path in merged)):  # the adapter beside it is not left out
        return replace(found, warnings=tuple(line for line in found.warnings if ADAPTER_LEFT_OUT not in line))
    return found


def of_another(settings: Settings) -> Settings:
    """The settings without what belongs to one source alone."""
    return replace(settings, revision=None, weights=None, adapter=(), adapter_scale=())


def may_be_student(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a student, or lacks what a teacher has to have."""
    return is_student(checkpoint) or checkpoint.config is None


def tells_nothing(checkpoint: Checkpoint) -> bool:
    """Whether no file beside the tensors holds the settings that tensors do not show."""
    return checkpoint.config is None and checkpoint.sidecar is None


# --- layers that a trainer left out -----------------------------------------------------------------


def _layers(
    checkpoint: Checkpoint, settings: Settings, base: ModelConfig
) -> tuple[SettingsSource | None, tuple[str, ...]]:
    """The layers of a student, some of which the checkpoint lacks, and for people what those are.

    None where it has a mixer for all layers of `base`. A list of GQA layers confirms, or contradicts, what
    the tensors leave open.

    Raises:
        Inconsistent: for contradictions, and for RWKV layers that nothing here holds.
    """
    found, count = layer_kinds(checkpoint.plan), base.num_hidden_layers
    absent = [layer for layer in range(count) if layer not in found]
    if not absent or max(found, default=0) >= count:
        return None, ()
    layers: Collection[int]
    named: dict[str, Collection[int]] = {}  # which layers are GQA by other sources than tensors, the strongest first
    if settings.gqa_layers is not None:
        layers = layer_maps.parse_layers(settings.gqa_layers, count, allow_layer_0=True, option="--gqa-layers")
        named["--gqa-layers"] = layers
    for source, raw in (("config.json", checkpoint.config), ("the sidecar", checkpoint.sidecar)):
        if raw and raw.get("transformer_layers") is not None:
            named[source] = raw["transformer_layers"]
    if settings.layer_map is not None:
        chosen = layer_maps.load(settings.layer_map)
        named[f"layer map {chosen.name}"] = chosen.gqa_layers
    how = "" if named else "; --layer-map or --gqa-layers would confirm it"
    note = f"{numbers(absent)}: not in {checkpoint.label}, the teacher's attention (GQA){how}"
    if isinstance(base, StudentConfig):
        named["the student that completes it"] = base.gqa_layers
        note = f"{numbers(absent)}: not in {checkpoint.label}, those of the student that completes it"
    kind_of = {layer: (kind.upper(), "its tensors") for layer, kind in found.items()}
    problems = []
    for source, layers in named.items():
        for layer in range(count):
            said = "GQA" if layer in layers else "RWKV"
            kind, by = kind_of.setdefault(layer, (said, source))
            if kind != said:
                problems.append(f"layer {layer} is {kind} by {by}, {said} by {source}")
    raise_all(
        f"{checkpoint.label}: its tensors contradict the list of GQA layers:",
        problems,
        hint="One of them belongs to another run.",
        kind=Inconsistent,
    )
    source, layers = next(iter(named.items()), ("", absent))
    lost = [layer for layer in absent if layer not in layers]
    lacking = f"holds {numbers(found)} as attention and no RWKV layer" if "rwkv" not in found.values() else ""
    if lost:
        lacking = f"holds nothing of {numbers(lost)}, RWKV by {source}"
    if lacking and not isinstance(base, StudentConfig):
        raise Inconsistent(
            f"{checkpoint.label} {lacking}, which no teacher has",
            hint="If the run was continued from a student, give that student as --teacher: it completes the file."
            " Otherwise the file is not whole.",
        )
    kept = {layer for layer, kind in found.items() if kind == "gqa"}.union(set(layers).intersection(absent))
    return SettingsSource("the layers", {"num_hidden_layers": count, "gqa_layers": tuple(sorted(kept))}), (note,)


def numbers(layers: Iterable[int]) -> str:
    """`layer 3`, `layers 1, 2`."""
    found = sorted(layers)
    return f"layer{'s' if len(found) != 1 else ''} {', '.join(map(str, found))}"


# --- adapters ---------------------------------------------------------------------------------------


def _with_adapters(plan: Plan, settings: Settings, where: str, *, tied: bool) -> Plan:
    """The plan with the adapters merged into it that the settings name."""
    names, scales = settings.adapter, settings.adapter_scale
    if scales and len(scales) != len(names):
        raise HxaconvError(
            f"every --adapter takes one --adapter-scale, given are {len(names)} and {len(scales)}",
            hint="Give every adapter a scale, or none.",
        )
    if not names:
        return plan
    from hxaconv.surgery.adapters import read_adapter  # it computes: only what merges imports torch
    from hxaconv.surgery.merging import merge

    kinds = layer_kinds(plan)
    adapters = [
        read_adapter(name, scale, kinds=kinds) for name, scale in zip(names, scales or [None] * len(names), strict=True)
    ]
    half = [adapter.label for adapter in adapters if tied and adapter.names & {EMBEDDING, HEAD}]
    raise_all(
        f"{where} ties its head to the embedding; these adapters change one of them:",
        half,
        hint="Merge them with the library that trained them, into an untied model, and convert that.",
    )
    return merge(plan, adapters, where)


def _remarks(checkpoint: Checkpoint, plan: Plan, settings: Settings) -> Iterator[str]:
    """What people should know of a trainer's folder and of adapters, once."""
    left = checkpoint.extra.get("ignored", ())
    if checkpoint.container in ("zero", "dcp", "dtensor") and left:
        yield f"Left behind of {checkpoint.label}: {shortened(left)}"
    if settings.adapter:
        count = sum(recipe.make.kind == "merge" for recipe in plan.values())
        yield f"{count} tensors are merged with {shortened(settings.adapter)}"


# --- the Hub ----------------------------------------------------------------------------------------


def download(
    checkpoints: Iterable[Checkpoint],
    needed: Iterable[SourceFile],
    models: Iterable[Model] = (),
    progress: Progress | None = None,
) -> None:
    """Have these files of the checkpoints here, where they come from the Hub, and compare heads that waited for it.

    What has arrived of a download that fails is kept and completed by the next attempt.

    Raises:
        Inconsistent: when a model's tied head is not its embedding.
    """
    heads = [model.tied_head for model in models if model.tied_head is not None]
    remote = [checkpoint for checkpoint in checkpoints if checkpoint.handle is not None]
    if remote:
        from hxaconv.formats import hub

        files = {*needed, *(file for head in heads for file in head.files)}
        will_download(remote, files)
        for checkpoint in remote:
            assert isinstance(checkpoint.handle, hub.Repository)
            hub.download([f for f in checkpoint.files if f.path is None and f in files], checkpoint.handle, progress)
    for head in heads:
        head.check()


def will_download(checkpoints: Iterable[Checkpoint], needed: Iterable[SourceFile]) -> str | None:
    """For people, what of these files of the checkpoints comes from the Hub and is not here yet; None: nothing.

    Raises:
        HxaconvError: when there is no room for all of it.
    """
    wanted = set(needed)
    files = [file for checkpoint in checkpoints if checkpoint.handle for file in checkpoint.files if file in wanted]
    if not files:
        return None
    from hxaconv.formats.hub import refuse_if_too_large

    return refuse_if_too_large(files)
