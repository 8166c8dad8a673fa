"""`pick-gqa-layers`, the operation: another choice of GQA layers on an existing student."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.commands.common import (
    Outcome,
    WriteOptions,
    base_model_name,
    defaults_of,
    format_by_suffix,
    layer_0_warning,
    layers_text,
    parse_size,
    perform,
    scaling_warnings,
)
from hxaconv.commands.convert import dtype_warnings
from hxaconv.errors import HxaconvError, all_of
from hxaconv.formats.safetensors_layout import Shard, shard_layouts
from hxaconv.load import load_other, load_student
from hxaconv.model import layer_choice
from hxaconv.model.config import StudentConfig, student_of
from hxaconv.model.model import Model
from hxaconv.model.plan import Plan, Recipe, main_dtype, total_bytes
from hxaconv.options import Settings
from hxaconv.save.card import UNTRAINED, partly_untrained
from hxaconv.save.output import Record, lay_out
from hxaconv.save.records import history_of, init_record
from hxaconv.surgery.init import InitSettings, as_options, parse_scale
from hxaconv.surgery.repick import in_dtype, repick

if TYPE_CHECKING:
    from hxaconv.formats.files import SourceFile
    from hxaconv.model.model import Checkpoint
    from hxaconv.progress import Progress
    from hxaconv.verification.report import Report

COMMAND = "pick-gqa-layers"


def run(
    source: str,
    out: str,
    *,
    layers: str | Iterable[int],
    teacher: str | None = None,
    other: str | None = None,
    revision: str | None = None,
    layer_map: str | None = None,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    tie_word_embeddings: bool | None = None,
    preset: str = "openmose-stage1",
    scale: str | None = None,
    seed: int = 0,
    allow_gqa_layer_0: bool = False,
    max_shard_size: str = "5GB",
    format: str | None = None,
    write: WriteOptions | None = None,
) -> Outcome:
    """Write `source` with `layers` as its GQA layers to `out`; layers that keep their kind keep their bits.

    A layer that changes kind comes from `other` (`--from`) where that has it in the new kind, else from
    the teacher: its attention as it is, or a time-mix initialised as `init-from-teacher` does.

    Args:
        source: Folder, file or Hub id (`org/name@revision`) of a student.
        out: The folder or NAME.pth to create.
        layers: The layers that become GQA: numbers, or text as `8,15-17,-1`, or the name or file of a layer map.
        teacher: Gives changed layers their attention, or what their time-mix is initialised from.
        other: A trained student of the same teacher to take changed layers from.
        revision: Branch, tag or commit of a Hub `source`.
        layer_map: Name or TOML file of a layer map that tells settings.
        rope_theta, rms_norm_eps, tie_word_embeddings: Settings that no source tells, or that overrule it.
        preset, scale, seed: As `init_from_teacher` takes them.
        allow_gqa_layer_0: Layer 0 as GQA is refused otherwise, with the reason.
        max_shard_size: Of a weight file that is written again.
        format: `hf`, `pth` or `training` (attention alone); None: by the suffix of `out`.
        write: Overwriting, resuming, verification, progress.

    Raises:
        HxaconvError: for layers that do not exist, or when no source has what a changed layer needs.
        CheckFailed: when the output does not pass its verification; it is left beside `out`.
    """
    layers = layers_text(layers)
    options = {key: value for key, value in locals().items() if key != "write"}
    write = write or WriteOptions()
    settled = Settings(
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        layer_map=layer_map,
        revision=revision,
    )
    student = load_student(source, settled, teacher=teacher, progress=write.progress)
    base, notes, sources = student.base, list(student.notes), student.sources
    count = student.config.num_hidden_layers
    chosen, factors, shard_bytes = all_of(
        lambda: layer_choice.parse_layers(layers, count, allow_layer_0=allow_gqa_layer_0),
        lambda: parse_scale(scale, preset),
        lambda: parse_size(max_shard_size),
    )
    old = student.student
    new = student_of(old, chosen, old.ranks)
    changed = [i for i in range(old.num_hidden_layers) if old.layer_kind(i) != new.layer_kind(i)]
    donor = load_other(other, student, settled, progress=write.progress) if other else None
    taken = [i for i in changed if donor and donor.student.layer_kind(i) == new.layer_kind(i)]
    _check_origins(changed, taken, base)
    settings = InitSettings(factors, seed, main_dtype(student.plan))
    plan = repick(
        student.plan,
        base.plan if base else {},
        old,
        new,
        settings,
        in_dtype(donor, settings.dtype) if donor else None,
    )
    result = Model(new, plan, out, student.raw, student.tied_head)
    fresh = [i for i in changed if i not in taken and i in new.rwkv_layers]
    history = history_of(sources["source"])
    made: dict[str, Any] = {"changed_layers": changed}
    if fresh:
        made["init"] = init_record(fresh, "openmose", preset, settings)
    initialised = f"RWKV, initialised ({as_options(preset, settings.factors, seed)})"
    notes += _told_origins(changed, taken, new, initialised, _trained(donor, other, settings.dtype))
    warnings = [*scaling_warnings(sources.values()), *dtype_warnings(plan, ""), *layer_0_warning(new)]
    warnings += _uneven(history, fresh, new, preset, settings)
    if donor and not taken:
        warnings.append(f"--from {other} has none of the changed layers in its new kind: it is not used")
    shards = kept_shards(sources["source"], student.plan, plan, shard_bytes)
    linked = sum(shard.mirror is not None for shard in shards or ())
    container = format or format_by_suffix(out)
    if linked and container == "hf":
        notes.append(
            f"{linked} of {len(shards or ())} files do not change: they become hard links to the source's, where the"
            " file system has links, so that editing one of them in place edits both"
        )
    if donor is not None and donor.checkpoint is not None:
        sources["from"] = donor.checkpoint
    output = lay_out(
        result,
        Path(out),
        format=container,
        dtype=settings.dtype,
        record=Record(
            command=COMMAND,
            options=options,
            defaults=defaults_of(run),
            sources=sources,
            base_model=base_model_name(sources.get("teacher", sources["source"])),
            purpose=UNTRAINED if fresh == list(new.rwkv_layers) else partly_untrained(fresh),
            extra=made,
        ),
        max_shard_bytes=shard_bytes,
        shards=shards,
    )

    def verify(output: Model, progress: Progress | None) -> Report:
        from hxaconv.verification.contracts import check_repicked, completed

        return check_repicked(
            student,
            base,
            completed(output, student),
            other=donor,
            factors=settings.factors,
            progress=progress,
        )

    return perform(output, write, verify, warnings, notes, shard_bytes)


def kept_shards(source: Checkpoint, before: Plan, after: Plan, max_shard_bytes: int) -> list[Shard] | None:
    """The source's own sharding for the new plan, so that shards without a change need not be written again.

    A shard that became larger than allowed is split. None where the source is no local safetensors folder.
    """
    ours = all(file in source.files for recipe in before.values() for file in recipe.make.sources())
    if source.container != "safetensors" or source.repo is not None or not ours:
        return None
    groups: dict[str, Plan] = {file.name: {} for file in source.files}
    for name, recipe in after.items():
        groups[_home(name, recipe, before)][name] = recipe
    shards = []
    for file in source.files:
        group = groups[file.name]
        held = {name for name, recipe in source.plan.items() if _file_of(recipe) is file}
        same = set(group) == held and all(after[name] is before[name] for name in group)
        if group and same and total_bytes(group) <= max_shard_bytes:
            linkable = file.path is not None and not file.path.is_symlink()
            shards.append(Shard(tuple(group), file if linkable else None))
        elif group:
            layouts = shard_layouts(group, max_shard_bytes)
            shards += [Shard(tuple(fill.name for fill in layout.fills)) for layout in layouts]
    return shards


def _home(name: str, recipe: Recipe, before: Plan) -> str:
    """The source file whose successor a tensor goes into: its own, or, where it is new, its layer's."""
    if before.get(name) is not recipe:
        prefix = name[: name.index("self_attn.")]
        recipe = next(found for known, found in before.items() if known.startswith(prefix))
    return _file_of(recipe).name


def _file_of(recipe: Recipe) -> SourceFile:
    return next(iter(recipe.make.sources()))


def _check_origins(changed: list[int], taken: list[int], teacher: Model | None) -> None:
    lacking = [i for i in changed if i not in taken]
    if lacking and teacher is None:
        raise HxaconvError(
            f"{_layers(lacking)}: of another kind in this choice, and there is nothing to make the new one from",
            hint="Pass --teacher TEACHER, or --from a trained checkpoint that has it in the new kind.",
        )


def _uneven(
    history: Sequence[Mapping[str, Any]],
    fresh: Sequence[int],
    new: StudentConfig,
    preset: str,
    settings: InitSettings,
) -> list[str]:
    """Warnings where layers made just now are not what the student's others are by its record."""
    found = []
    named = _layers(fresh)
    first: Mapping[str, Any] | None = next(
        (step["init"] for step in history if isinstance(step.get("init"), dict)), None
    )
    if first is not None and not (first.keys() >= {"preset", "factors", "seed"} and isinstance(first["factors"], dict)):
        first = None
    if fresh and first and (first["factors"], first["seed"]) != (settings.factors, settings.seed):
        recorded, used = (
            as_options(name, factors, seed)
            for name, factors, seed in (
                (first["preset"], first["factors"], first["seed"]),
                (preset, settings.factors, settings.seed),
            )
        )
        found.append(
            f"{named}: initialised with {used}, the student by its record with {recorded};"
            " pass the latter for layers like the others"
        )
    if len(fresh) < len(new.rwkv_layers) and fresh and any("calibration" in step for step in history):
        choice = ",".join(map(str, new.gqa_layers)) or "none"
        found.append(
            f"{named}: plain among calibrated layers, and a student that is calibrated in part cannot be calibrated"
            " further. To have all calibrated, begin with this choice: `hxaconv init-from-teacher TEACHER OUT"
            f" --gqa-layers {choice} --init calibrated --text FILE`"
        )
    return found


def _trained(donor: Model | None, name: str | None, dtype: str) -> str:
    """Where layers of the other student come from; empty without one."""
    if donor is None:
        return ""
    own = main_dtype(donor.plan)
    return f"trained, from {name}" + (f", cast from {own} to {dtype}, the student's dtype" if own != dtype else "")


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' if len(numbers) != 1 else ''} {', '.join(map(str, numbers))}"


def _told_origins(
    changed: list[int], taken: list[int], new: StudentConfig, initialised: str, trained: str
) -> list[str]:
    """Where the layers that change kind come from, a line for each origin."""
    if not changed:
        return ["these are the student's GQA layers already: no layer changes"]
    rest = [i for i in changed if i not in taken]
    origins = {
        trained: taken,
        "GQA, the teacher's attention": [i for i in rest if i in new.gqa_layers],
        initialised: [i for i in rest if i in new.rwkv_layers],
    }
    return [f"{_layers(layers)}: {origin}" for origin, layers in origins.items() if layers]
