"""`pick-gqa-layers`: another choice of attention layers for a student, or advice on one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hxaconv.calls import Call
from hxaconv.commands.plots import SUFFIXES, file_problems
from hxaconv.errors import HxaconvError, all_of, raise_all
from hxaconv.load import load_other, load_student
from hxaconv.model import layer_maps
from hxaconv.model.config import StudentConfig, student_of
from hxaconv.model.model import Model
from hxaconv.model.plan import main_dtype
from hxaconv.options import (
    Argument,
    Choice,
    Init,
    OfStudent,
    Option,
    Settings,
    Shown,
    Source,
    TeacherToo,
    Tokens,
    Write,
    option_words,
)
from hxaconv.save.documents import UNTRAINED, history_of, init_record, partly_untrained
from hxaconv.save.output import Output, Record, dtype_warnings, kept_shards, lay_out
from hxaconv.save.run import Outcome
from hxaconv.surgery.init import InitSettings, as_options, init_settings
from hxaconv.surgery.reshape import in_dtype, repick
from hxaconv.verification.written import OutputCheck, Verify

if TYPE_CHECKING:
    from hxaconv.progress import Progress
    from hxaconv.selection.advice import Advice
    from hxaconv.verification.report import Report

Out = Annotated[str | None, Argument(help="Folder or NAME.pth to create. Without it: advice only.")]
From = Annotated[
    str | None,
    Option(help="Trained checkpoint to take changed layers from.", panel="Teacher and settings", names=("--from",)),
]
BY_RETRIEVAL = "By retrieval, as there is text and no --strategy: it looks for the layers that recall."
EVENLY_SPACED = (
    "Evenly spaced, as there is neither --strategy nor text: with --text FILE, retrieval looks for the layers that"
    " recall."
)


def pick_gqa_layers(
    source: Source,
    out: Out = None,
    *,
    choice: Choice = Choice(),
    teacher: TeacherToo = None,
    from_: From = None,
    settings: OfStudent = Settings(),
    probe: Tokens = Tokens(),
    values: Annotated[Init, Shown(without=("init",))] = Init(),
    write: Annotated[Write, Shown(without=("copy_code",))] = Write(),
    call: Call,
) -> Outcome | Advice:
    """Choose the layers that stay attention: change the choice, or get advice on it.

    With --layers, OUT is written with these as its GQA layers. Otherwise the layers of SOURCE, a teacher or a
    student, are ranked by a strategy (by default retrieval where there is text, else they are evenly spaced): without
    OUT that is the result, with OUT it is written with the best ones.
    Layers that keep their kind keep their bits; others come from the checkpoint of --from where that has them in the
    new kind, else from the teacher: its attention as it is, or a time-mix initialised as init-from-teacher does.

    Command line:
        hxaconv pick-gqa-layers student/ student-2/ --layers 8,15,22,29,36,43 --teacher RekaAI/reka-flash-3
        hxaconv pick-gqa-layers RekaAI/reka-flash-3 --count 6 --text sample.txt --save map.toml

    Raises:
        HxaconvError: for layers that do not exist, or when no source has what a changed layer needs.
        CheckFailed: when the output does not pass its verification; it is left beside `out`.
    """
    from hxaconv import ranks
    from hxaconv.model.layer_maps import uniform
    from hxaconv.save.run import save
    from hxaconv.save.writer import refuse
    from hxaconv.selection.advice import checked_choice, strategy_of
    from hxaconv.selection.subject import TOKENS, open_subject, refuse_useless, save_advice, score

    notes = []
    if choice.layers is None and choice.strategy is None:
        choice = replace(choice, strategy="retrieval" if probe.given else "uniform")
        notes.append(BY_RETRIEVAL if probe.given else EVENLY_SPACED)
        if call.progress is not None:
            call.progress.note(notes.pop())
    refuse_useless(choice, call, writes=out is not None)

    def repicked(layers: str) -> Repicked:
        assert out is not None
        allowed = choice.allow_gqa_layer_0
        return _repicked(source, Path(out), layers, allowed, teacher, from_, settings, values, write, call)

    def written(layers: str) -> Outcome:
        output, verify, warnings, notes = repicked(layers)
        return save(output, write, check=OutputCheck(verify), warnings=warnings, notes=notes)

    if choice.layers is not None:
        return written(choice.layers)
    problems = file_problems("--save", choice.save, (), overwrite=write.overwrite)
    problems += file_problems("--plot", choice.plot, SUFFIXES, overwrite=write.overwrite)
    raise_all("this cannot be written:", problems)
    beside, strategy, found = choice.save or out or choice.plot, strategy_of(choice), None
    cache = Path(f"{beside.rstrip('/')}.scores.safetensors") if beside else None
    with ranks.together():
        if ranks.rank() == 0:  # a ranking is one process's
            subject = open_subject(source, teacher, from_, settings, values, strategy, call)
            num_layers = subject.model.config.num_hidden_layers
            _, count = checked_choice(choice, num_layers)
            if out is not None and not write.resume and "tokens" in strategy.needs:
                # Before hours of scoring, what would be refused after them, whichever layers it takes.
                refuse(repicked(",".join(map(str, uniform(num_layers, count))))[0], write)
            found = score(subject, choice, probe, values, cache, call.progress)
    advice = ranks.broadcast(found)
    assert advice is not None
    unread = option_words(name for name in TOKENS if name in call.given)
    if unread and "tokens" not in strategy.needs:  # as a loop over strategies gives them
        notes.append(f"{unread}: --strategy {strategy.name} looks at no tokens, they are not read")
    outcome = written(",".join(map(str, advice.pick.layers))) if out is not None else None
    if outcome is not None and not outcome.written:
        notes += [f"The scores are kept in {cache} for the run itself."] if cache and cache.is_file() else []
    elif ranks.rank() == 0:
        save_advice(advice, subject, choice)
        if cache is not None:
            cache.unlink(missing_ok=True)
    if outcome is None:
        return replace(advice, notes=(*notes, *advice.notes))
    return replace(outcome, advice=advice, notes=[*notes, *outcome.notes])


Repicked = tuple["Output", "Verify", list[str], list[str]]
"""An output, the check of what was written, warnings, notes."""


def _repicked(
    source: str,
    out: Path,
    layers: str,
    allow_layer_0: bool,
    teacher: str | None,
    from_: str | None,
    settings: Settings,
    values: Init,
    write: Write,
    call: Call,
) -> Repicked:
    """SOURCE with these layers as GQA."""
    student = load_student(source, settings, teacher=teacher, continued=False, progress=call.progress)
    base, sources, old = student.base, student.sources, student.student
    chosen, initial = all_of(
        lambda: layer_maps.parse_layers(layers, old.num_hidden_layers, allow_layer_0=allow_layer_0),
        lambda: init_settings(values, main_dtype(student.plan)),
    )
    new = student_of(old, chosen, old.ranks)
    changed = [i for i in range(old.num_hidden_layers) if old.layer_kind(i) != new.layer_kind(i)]
    other = None
    if from_ is not None:
        other = load_other(from_, student, settings, progress=call.progress)
        sources["from"] = other.opened
    taken = [i for i in changed if other and other.student.layer_kind(i) == new.layer_kind(i)]
    rest = [i for i in changed if i not in taken]
    if rest and base is None:
        raise HxaconvError(
            f"{_layers(rest)}: this choice turns RWKV into attention or attention into RWKV there, and nothing is"
            " given to make the new layers from",
            hint="Pass --teacher TEACHER, or --from a trained checkpoint that has them in the new kind.",
        )
    trained = in_dtype(other, initial.dtype) if other else None
    plan = repick(student.plan, base.plan if base else {}, old, new, initial, trained)
    fresh = [i for i in rest if i in new.rwkv_layers]
    made: dict[str, Any] = {"changed_layers": changed}
    if fresh:
        made["init"] = init_record(fresh, values, initial)
    shards = kept_shards(sources["source"], student.plan, plan, write.max_shard_bytes)
    purpose = UNTRAINED if fresh == list(new.rwkv_layers) else partly_untrained(fresh)
    output = lay_out(
        Model(new, plan, str(out), student.raw, student.tied_head),
        out,
        write,
        format=write.format_of(str(out)),
        record=Record(call=call, sources=sources, purpose=purpose, extra=made),
        shards=shards,
    )
    trained_as = main_dtype(other.plan) if other else initial.dtype
    cast = f", cast from {trained_as} to {initial.dtype}, the student's dtype" if trained_as != initial.dtype else ""
    origins = {
        f"trained, from {from_}{cast}": taken,
        "GQA, the teacher's attention": [i for i in rest if i in new.gqa_layers],
        f"RWKV, initialised ({as_options(values.preset, initial.factors, initial.seed)})": fresh,
    }
    notes = [*student.notes, *(f"{_layers(those)}: {origin}" for origin, those in origins.items() if those)]
    if not changed:
        notes.append("these are the student's GQA layers already: no layer changes")
    linked = sum(shard.hard_link is not None for shard in shards or ())
    if linked and output.is_folder:
        notes.append(
            f"{linked} of {len(shards or ())} files do not change: they become hard links to the source's, where"
            " the file system has links, so that editing one of them in place edits both"
        )
    warnings = [*student.source_warnings, *dtype_warnings(plan), *layer_maps.layer_0_warning(new)]
    warnings += _uneven(history_of(sources["source"]), fresh, new, values.preset, initial)
    if other and not taken:
        warnings.append(f"--from {from_} has none of the changed layers in its new kind: it is not used")

    def verify(written: Model, progress: Progress | None) -> Report:
        from hxaconv.verification.invariants import check_repicked, completed

        whole, factors, seed = completed(written, student), initial.factors, initial.seed
        return check_repicked(student, base, whole, other=other, factors=factors, seed=seed, progress=progress)

    return output, verify, warnings, notes


def _uneven(
    history: Sequence[Mapping[str, Any]], fresh: Sequence[int], new: StudentConfig, preset: str, settings: InitSettings
) -> list[str]:
    """Warnings where layers made just now are not what the student's others are by its record."""
    if not fresh:
        return []
    found = []
    first: Mapping[str, Any] = next((step["init"] for step in history if isinstance(step.get("init"), dict)), {})
    known = first.keys() >= {"preset", "factors", "seed"} and isinstance(first["factors"], dict)
    if known and (first["factors"], first["seed"]) != (settings.factors, settings.seed):
        used = as_options(preset, settings.factors, settings.seed)
        recorded = as_options(first["preset"], first["factors"], first["seed"])
        found.append(
            f"{_layers(fresh)}: initialised with {used}, the student by its record with {recorded};"
            " pass the latter for layers like the others"
        )
    if len(fresh) < len(new.rwkv_layers) and any("calibration" in step for step in history):
        choice = ",".join(map(str, new.gqa_layers)) or "none"
        found.append(
            f"{_layers(fresh)}: plain among calibrated layers, and a student that is calibrated in part cannot be"
            " calibrated further. To have all calibrated, begin with this choice: init-from-teacher with"
            f" --gqa-layers {choice} --init calibrated --text FILE"
        )
    return found


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' if len(numbers) != 1 else ''} {', '.join(map(str, numbers))}"
