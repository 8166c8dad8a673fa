"""The one way in: whatever the user names, a folder, a file or a Hub id, becomes a Model. Headers only, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError, raise_all, shortened
from hxaconv.load import partial
from hxaconv.load.checkpoint import download_weights, open_checkpoint
from hxaconv.load.companions import refuse_broken
from hxaconv.load.partial import complete
from hxaconv.load.student import FLAGS, SettingsSource, is_student, student_model, student_settings
from hxaconv.load.teacher import open_teacher
from hxaconv.model import layer_choice, layer_maps
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.model import Checkpoint, Model
from hxaconv.model.names import EMBEDDING, HEAD, is_attention, layer_kinds
from hxaconv.model.plan import Plan, check
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
    """
    settings = settings or Settings()
    checkpoint = _opened(name, settings, progress)
    if copied:
        refuse_broken([checkpoint])
    tied = settings.tie_word_embeddings
    ties = bool((checkpoint.config or {}).get("tie_word_embeddings", False)) if tied is None else tied
    checkpoint = replace(checkpoint, plan=_with_adapters(checkpoint.plan, settings, checkpoint.label, tied=ties))
    unfollowed = rope_of(checkpoint.config or {})[2] is not None
    if lenient:  # a teacher without a head may have an untied student
        tied = False if tied is False and HEAD in checkpoint.plan else None
    return open_teacher(
        checkpoint,
        rope_theta=settings.rope_theta,
        rms_norm_eps=settings.rms_norm_eps,
        allow_output_bias=lenient or settings.allow_output_bias,
        drop_rope_scaling=(lenient and unfollowed) or settings.drop_rope_scaling,
        tie_word_embeddings=tied,
        headers_only=headers_only,
    )


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
        settings: What overrules its files; a layer map tells what they leave open.
        teacher: Completes a checkpoint that holds a part of a student, and tells settings: the transformer that it was
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
        refuse_broken([checkpoint])
    if base and isinstance(base.config, StudentConfig) and not continued:
        raise HxaconvError(
            f"{base.label} is a student, the transformer that it was made of is needed here",
            hint="Give that as --teacher.",
        )
    layer_map = map_settings(settings.layer_map) if settings.layer_map is not None else None
    named = _layers_named(checkpoint, settings, base)
    layers = partial.layers_of(checkpoint, base.config, named) if base else None
    student = student_model(
        checkpoint,
        flags=overrules(settings),
        teacher=base.config if base else None,
        layer_map=layer_map,
        layers=layers,
    )
    student = replace(student, raw=student.raw or (base.raw if base else {}), base=base)
    student = complete(student) if whole or layers else _attention_of(student)
    if base and layers:
        said = partial.notes(checkpoint, base.config, confirmed=bool(named))
        student = replace(student, notes=(*said, *student.notes))
    plan = _with_adapters(student.plan, settings, student.label, tied=student.config.tie_word_embeddings)
    return replace(student, plan=plan, notes=(*student.notes, *_remarks(checkpoint, plan, settings)))


def _base(name: Name | Model | None, settings: Settings, copied: bool, progress: Progress | None) -> Model | None:
    """What completes a student: its teacher, or the student that its run began with."""
    if name is None or isinstance(name, Model):
        return name
    settings = of_another(settings)
    checkpoint = _opened(name, settings, progress)
    if is_student(checkpoint):
        return load_student(checkpoint, replace(settings, gqa_layers=None), copied=copied)
    return load_teacher(checkpoint, settings, lenient=True, headers_only=True, copied=copied)


def _layers_named(checkpoint: Checkpoint, settings: Settings, base: Model | None) -> list[SettingsSource]:
    """Sources that say which layers of a student are GQA, beside its tensors; the strongest first."""
    found = []
    if settings.gqa_layers is not None and base is not None:
        count = base.config.num_hidden_layers
        layers = layer_choice.parse_layers(settings.gqa_layers, count, allow_layer_0=True, option="--gqa-layers")
        found.append(SettingsSource("--gqa-layers", {"gqa_layers": layers}))
    for source, raw in (("config.json", checkpoint.config), ("the sidecar", checkpoint.sidecar)):
        if raw and raw.get("transformer_layers") is not None:
            found.append(SettingsSource(source, {"gqa_layers": tuple(raw["transformer_layers"])}))
    if settings.layer_map is not None:
        chosen = layer_maps.load(settings.layer_map)
        found.append(SettingsSource(f"layer map {chosen.name}", {"gqa_layers": chosen.gqa_layers}))
    return found


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
        untold = {key: getattr(like, key) for key in FLAGS if getattr(settings, key) is None}
        if settings.variant is None and isinstance(like, StudentConfig):
            untold["variant"] = like.rwkv_architecture
        settings = replace(settings, **untold)
    return load_student(checkpoint, settings, teacher=teacher, copied=False, progress=progress)


def load_other(
    name: Name, student: Model, settings: Settings | None = None, *, progress: Progress | None = None
) -> Model:
    """Another trained student of the same teacher, whose layers can be taken over.

    What it does not say of itself, it has in common with `student`.

    Raises:
        HxaconvError: when it is no student, or of another shape.
    """
    settings = settings or Settings()
    checkpoint = _opened(name, of_another(settings), progress)
    common = student_settings(student.student)
    if EMBEDDING in checkpoint.plan:
        # Its mixers fit whatever its MLPs and vocabulary were padded to.
        common = {key: value for key, value in common.items() if key not in ("intermediate_size", "vocab_size")}
    facts = SettingsSource(f"SOURCE ({student.label})", common)
    return student_model(checkpoint, flags=overrules(settings), layer_map=facts)


def of_another(settings: Settings) -> Settings:
    """The settings without what belongs to one source alone."""
    return replace(settings, revision=None, weights=None, adapter=(), adapter_scale=())


def _with_adapters(plan: Plan, settings: Settings, where: str, *, tied: bool) -> Plan:
    """The plan with the adapters merged into it that the settings name."""
    names, scales = settings.adapter, settings.adapter_scale
    if scales and len(scales) != len(names):
        raise HxaconvError(
            f"{len(names)} --adapter and {len(scales)} --adapter-scale", hint="Give every adapter a scale, or none."
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


def _opened(name: Name, settings: Settings, progress: Progress | None) -> Checkpoint:
    if isinstance(name, Checkpoint):
        return name
    return open_checkpoint(name, revision=settings.revision, weights=settings.weights, progress=progress)


def overrules(settings: Settings) -> dict[str, Any]:
    """What overrules every file: name -> value, None where nothing is said."""
    named = {key: getattr(settings, key) for key in FLAGS}
    return named | {"rwkv_architecture": settings.variant, "drop_rope_scaling": settings.drop_rope_scaling}


def may_be_student(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a student, or says too little of itself to be a teacher."""
    return is_student(checkpoint) or checkpoint.config is None


def tells_nothing(checkpoint: Checkpoint) -> bool:
    """Whether no file beside the tensors tells the settings that tensors cannot tell."""
    return checkpoint.config is None and checkpoint.sidecar is None


def map_settings(layer_map: str) -> SettingsSource:
    """What a layer map says of its model, as a named source of settings; its choice of layers is not one."""
    chosen = layer_maps.load(layer_map)
    values = {key: value for key, value in chosen.model.items() if key != "model_type"}
    if chosen.variant:
        values["rwkv_architecture"] = chosen.variant
    return SettingsSource(f"layer map {chosen.name}", values)


def _attention_of(student: Model) -> Model:
    """The student, its attention checked; nothing else of it is asked for."""
    expected = {name: shape for name, shape in expected_tensors(student.config).items() if is_attention(name)}
    check({name: recipe for name, recipe in student.plan.items() if is_attention(name)}, expected, student.label)
    return replace(student, tied_head=None)


def download(
    checkpoints: Iterable[Checkpoint],
    needed: Sequence[SourceFile],
    models: Iterable[Model],
    progress: Progress | None,
) -> None:
    """Have these files of the checkpoints here, where they come from the Hub, and compare heads that waited for it.

    Raises:
        Inconsistent: when a model's tied head is not its embedding.
    """
    heads = [model.tied_head for model in models if model.tied_head is not None]
    files = [*needed, *(file for head in heads for file in head.files)]
    remote = [checkpoint for checkpoint in checkpoints if checkpoint.handle is not None]
    if remote:
        will_download(remote, files)
    for checkpoint in remote:
        download_weights(checkpoint, progress, needed=files)
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
