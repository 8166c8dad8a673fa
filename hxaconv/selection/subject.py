"""What is asked: which options go together, the models that a strategy compares, and their scoring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from hxaconv.calls import Call
from hxaconv.commands.plots import draw_advice
from hxaconv.errors import HxaconvError
from hxaconv.formats.diskio import write_result
from hxaconv.forward.tokens import calibration_tokens, checked_device
from hxaconv.load import load_other, load_student, load_teacher, open_checkpoint
from hxaconv.load.models import download
from hxaconv.load.student import is_student
from hxaconv.model import layer_maps
from hxaconv.model.config import dropped_scaling, student_of
from hxaconv.model.model import Checkpoint, Model
from hxaconv.model.plan import main_dtype, source_files
from hxaconv.options import Choice, Init, Settings, Tokens, Write, options_of
from hxaconv.progress import Progress
from hxaconv.save.interruption import interruptible
from hxaconv.selection.advice import Advice, advise, strategy_of
from hxaconv.selection.strategies import Given, Strategy
from hxaconv.surgery.init import as_options, init_settings, new_student, parse_scale
from hxaconv.surgery.reshape import in_dtype, repick

CHOOSING = tuple(name for name in options_of(Choice) if name not in ("layers", "allow_gqa_layer_0"))
TOKENS = tuple(options_of(Tokens))
WRITING = tuple(name for name in options_of(Write) if name != "overwrite")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is scored: `model`, whose layers are chosen, and what the strategy compares."""

    model: Model
    teacher: Model | None
    student: Model | None
    """Every layer RWKV."""
    sources: tuple[Checkpoint, ...]
    """SOURCE first, its teacher last: it names the model that a choice is for."""


def score(
    subject: Subject, choice: Choice, probe: Tokens, values: Init, cache: Path | None, progress: Progress | None
) -> Advice:
    """Score the layers of SOURCE: a teacher (its plain initialisation is scored), or a student with its teacher.

    `cache` is where interrupted scoring keeps its state.

    Raises:
        HxaconvError: when the strategy needs something that is not given.
        Interrupted: on Ctrl-C or SIGTERM; with what is kept.
    """
    given = Given(
        num_layers=subject.model.config.num_hidden_layers,
        teacher=subject.teacher,
        student=subject.student,
        are_text=probe.given,
        log=Path(choice.log) if choice.log else None,
        kl_mode=choice.kl_mode,
        device=checked_device(probe.device),
        seed=values.seed,
        progress=progress,
    )
    if "tokens" not in strategy_of(choice).needs:
        read = (f"training log: {given.log.name}",) if given.log else ()
        return replace(advise(choice, given), settings=read)
    tokenizer = next((found for found in subject.sources if "tokenizer.json" in found.companions), subject.sources[0])
    ids = calibration_tokens(probe, values.seed, subject.model, tokenizer).numpy()
    notes = [f"{probe.tokens} tokens are requested, {ids.size} are used."] if ids.size != probe.tokens else []
    if cache is None:
        notes.append("Scores are kept nowhere: with --save MAP.toml, interrupted scoring would go on where it stopped.")
    if progress is not None:
        for note in notes:
            progress.note(note)
        notes = []

    def kept() -> str:
        if cache is not None and cache.is_file():
            return f"Scores so far are kept in {cache}; run the same command again to continue."
        return "Nothing is kept." if cache is None else "Nothing had been scored yet."

    models = [model for model in (subject.teacher, subject.student) if model is not None]
    with interruptible(kept) as signals:
        # Before scoring, which does not stop between two layers for as long as a download takes.
        download(subject.sources, [file for model in models for file in source_files(model.plan)], models, progress)
        with signals.deferred():
            advice = advise(choice, replace(given, ids=ids, cache=cache, check=signals.stop_if_requested))
        signals.stop_if_requested()
    scaling = [line for checkpoint in subject.sources for line in dropped_scaling(checkpoint.config or {})]
    file = probe.text or (probe.input_ids if isinstance(probe.input_ids, str) else None)
    where = (
        f" of {Path(file).name}" if file else ", given in memory" if probe.given else f", random, seed {values.seed}"
    )
    settings = (*_described(subject, choice, values), f"scored on {ids.size} tokens{where}")
    return replace(advice, warnings=(*scaling, *advice.warnings), notes=tuple(notes), settings=settings)


def save_advice(advice: Advice, subject: Subject, choice: Choice) -> None:
    """Write the layer map and the picture that are wanted.

    Raises:
        HxaconvError: when a file cannot be written.
    """
    if choice.save is not None:
        origin, picked = subject.sources[-1], advice.pick
        chosen = layer_maps.of_config(
            Path(choice.save).stem,
            subject.model.config,
            picked.layers,
            title=f"{origin.name}, {len(picked.layers)} of {advice.num_layers} layers by {picked.strategy}",
            model_ids=(origin.repo,) if origin.repo else (),
            source=f"hxaconv, strategy {picked.strategy}",
        )
        write_result(Path(choice.save), advice.layer_map_text(chosen, date=date.today().isoformat()).encode())
    if choice.plot is not None:
        draw_advice(advice, Path(choice.plot))


def _described(subject: Subject, choice: Choice, values: Init) -> list[str]:
    """What the scores are of, and what they depend on, by bare names."""
    source, *others = [c.name + (f"@{c.revision}" if c.revision else "") for c in subject.sources]
    lines = [f"SOURCE: {source}", *(f"teacher: {name}" for name in others[-1:])]
    if "student" in strategy_of(choice).needs:
        lines += [f"layers that SOURCE has as GQA: {name}, where RWKV there" for name in others[:-1]]
        how = as_options(values.preset, parse_scale(values.scale, values.preset), values.seed)
        lines.append(f"RWKV layers that exist nowhere yet: {how}")
    return [*lines, f"--kl-mode {choice.kl_mode}"] if choice.strategy == "kl" else lines


def open_subject(
    source: str,
    teacher: str | None,
    other: str | None,
    settings: Settings,
    values: Init,
    strategy: Strategy,
    call: Call,
) -> Subject:
    """Open SOURCE and what belongs to it, each once; where the strategy needs a student, every layer of it as RWKV.

    Raises:
        HxaconvError: when a teacher is missing, or options are given that have no use.
    """
    wanted, progress = strategy.needs, call.progress
    checkpoint = open_checkpoint(source, revision=settings.revision, weights=settings.weights, progress=progress)
    if not is_student(checkpoint):
        itself = f"{source} is a teacher itself; to score a student, name it as SOURCE, its teacher with --teacher"
        call.refuse_useless((True, ("teacher", "from_", "layer_map", "tie_word_embeddings"), itself))
        model = load_teacher(checkpoint, settings, lenient=True)
        plain = None
        if "student" in wanted:
            initial = init_settings(values, main_dtype(model.plan))
            plain = new_student(model, student_of(model.config, ()), initial, label=f"plain student of {model.label}")
        return Subject(model, model, plain, (checkpoint,))
    whole = bool(wanted & {"teacher", "student"})
    student = load_student(checkpoint, settings, teacher=teacher, whole=whole, continued=False, progress=progress)
    sources, base = tuple(student.sources.values()), student.base
    if "teacher" in wanted and base is None:
        raise HxaconvError(f"--strategy {strategy.name} compares with the teacher", hint="Pass --teacher.")
    if "student" not in wanted or base is None:
        return Subject(student, base, None, sources)
    initial = init_settings(values, main_dtype(student.plan))
    config = student_of(student.config, (), student.student.ranks)
    trained = load_other(other, student, settings, progress=progress) if other is not None else None
    if trained is not None:
        sources = (sources[0], trained.opened, *sources[1:])
        trained = in_dtype(trained, initial.dtype)
    plan = repick(student.plan, base.plan, student.student, config, initial, trained)
    return Subject(student, base, Model(config, plan, f"{student.label}, every layer RWKV"), sources)


def refuse_useless(choice: Choice, call: Call, *, writes: bool) -> None:
    """Refuse options that would be ignored; `writes`: there is an OUT.

    Raises:
        HxaconvError: listing everything at once.
    """
    if choice.layers is not None and not writes:
        raise HxaconvError("--layers names the choice, but there is no OUT to write it to", hint="Add OUT.")
    name, wanted, advises = strategy_of(choice).name, strategy_of(choice).needs, not writes
    call.refuse_useless(
        (choice.layers is not None, (*CHOOSING, *TOKENS), "--layers is a choice made, nothing is to be scored"),
        (name != "kl", ("kl_mode",), "only --strategy kl has modes"),
        (name != "log", ("log",), "only --strategy log reads one"),
        (advises, WRITING, "there is no OUT to write"),
        (
            advises and "student" not in wanted,
            ("from_", "preset", "scale"),
            f"--strategy {name} looks at no RWKV layer",
        ),
        (advises and "tokens" not in wanted, ("seed",), "nothing is random here"),
        (advises and not (choice.save or choice.plot), ("overwrite",), "nothing is written"),
    )
    if name == "log" and not choice.log:
        raise HxaconvError("--strategy log reads a training log", hint="Name it with --log FILE.csv.")
