"""`pick-gqa-layers`, the advice: score the layers of a teacher or student, and choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.commands.advice_options import cache_path, rules
from hxaconv.commands.common import base_model_name, checked_device, one_of, scaling_warnings
from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats.dtypes import FLOATS
from hxaconv.forward.tokens import TokenOptions, calibration_tokens
from hxaconv.load import load_other, load_student, load_teacher, open_checkpoint
from hxaconv.load.models import download
from hxaconv.load.student import FLAGS, is_student
from hxaconv.model import layer_choice
from hxaconv.model.config import student_of
from hxaconv.model.model import Model
from hxaconv.model.plan import main_dtype, source_files
from hxaconv.options import Settings
from hxaconv.save.diskio import write_result
from hxaconv.save.interruption import interruptible
from hxaconv.selection import report
from hxaconv.selection.advice import Advice, Request, advise, needs
from hxaconv.selection.scores import check_request
from hxaconv.surgery.init import InitSettings, as_options, init_from_teacher, parse_scale
from hxaconv.surgery.repick import in_dtype, repick

if TYPE_CHECKING:
    import numpy as np

    from hxaconv.model.model import Checkpoint
    from hxaconv.progress import Progress


@dataclass(frozen=True, slots=True)
class Subject:
    """What is scored: `model`, whose layers are chosen, and what the strategy compares."""

    model: Model
    teacher: Model | None
    student: Model | None
    """Every layer RWKV."""
    sources: tuple[Checkpoint, ...]
    """SOURCE first, its teacher last."""

    @property
    def origin(self) -> Checkpoint:
        """The teacher's checkpoint where there is one: it names the model that a choice is for."""
        return self.sources[-1]

    @property
    def tokenizer(self) -> Checkpoint:
        """The checkpoint with the tokenizer."""
        return next((found for found in self.sources if "tokenizer.json" in found.companions), self.sources[0])


@dataclass(frozen=True, slots=True)
class Advised:
    """The advice, what it is about, and the file that keeps its scores until they are used."""

    advice: Advice
    subject: Subject
    settings: tuple[str, ...]
    cache: Path | None

    def save(self, path: str | None, plot: str | None) -> None:
        """Write the layer map and the picture that were asked for.

        Raises:
            HxaconvError: when a file cannot be written, or matplotlib is missing.
        """
        if path is not None:
            repo = self.subject.origin.repo
            chosen = report.layer_map(
                self.advice,
                self.subject.model.config,
                name=Path(path).stem,
                model=base_model_name(self.subject.origin),
                model_ids=[repo] if repo else [],
            )
            text = report.layer_map_text(self.advice, chosen, date=date.today().isoformat(), settings=self.settings)
            write_result(Path(path), text.encode())
        if plot is not None:
            report.plot(self.advice, Path(plot))

    def forget(self) -> None:
        """Drop the scores: everything that was to be made of them is made."""
        if self.cache is not None:
            self.cache.unlink(missing_ok=True)


def run(
    values: Mapping[str, Any],
    *,
    rehearse: Callable[[str], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> Advised:
    """Score the layers of SOURCE: a teacher (its plain initialisation is scored), or a student with its teacher.

    Args:
        values: the command's arguments and options by name.
        rehearse: called with some choice of as many layers before anything is scored; refuses what could not
            be written afterwards.

    Raises:
        HxaconvError: when the strategy needs something that is not given.
        Interrupted: on Ctrl-C or SIGTERM; says what is kept.
    """
    strategy, wanted = values["strategy"], needs(values["strategy"])
    tokens = TokenOptions(
        input_ids=values["input_ids"], text=values["text"], tokens=values["tokens"], seed=values["seed"]
    )
    request = Request(
        strategy=strategy,
        count=values["count"],
        kl_mode=one_of("--kl-mode", values["kl_mode"], ("restore", "convert")),
        allow_layer_0=values["allow_gqa_layer_0"],
        tokens_are_text=tokens.given,
        device=checked_device(values["device"]),
        seed=values["seed"],
        cache=cache_path(values) if "tokens" in wanted else None,
    )
    subject = open_subject(values, wanted, progress)
    num_layers = subject.model.config.num_hidden_layers
    count = layer_choice.default_count(num_layers) if values["count"] is None else values["count"]
    request = replace(request, count=count, rules=rules(values, num_layers))
    check_request(strategy, num_layers, count, request.rules, allow_layer_0=request.allow_layer_0)
    if rehearse is not None and "tokens" in wanted:
        rehearse(",".join(map(str, layer_choice.uniform(num_layers, count))))
    ids, settings = None, _told(values, subject, wanted)
    if "tokens" in wanted:
        ids = calibration_tokens(tokens, subject.model.config.vocab_size, subject.tokenizer).numpy()
        settings.append(_tokens_told(tokens, ids))
        if ids.size != tokens.tokens:
            say(f"{tokens.tokens} tokens are asked for, {ids.size} are used.")
    if "tokens" in wanted and request.cache is None:
        say("Scores are kept nowhere: with --save MAP.toml, interrupted scoring would go on where it stopped.")
    with interruptible(lambda: _kept(request)) as signals:
        if "tokens" in wanted:
            models = [model for model in (subject.teacher, subject.student) if model is not None]
            # Before scoring, which does not stop between two layers for as long as a download takes.
            download(subject.sources, [f for model in models for f in source_files(model.plan)], models, progress)
        with signals.deferred():
            advice = advise(
                num_layers,
                replace(request, check=signals.stop_if_requested),
                teacher=subject.teacher,
                student=subject.student,
                ids=ids,
                log=Path(values["log"]) if values["log"] else None,
                progress=progress,
            )
        signals.stop_if_requested()
    if "tokens" in wanted:
        advice = replace(advice, warnings=(*scaling_warnings(subject.sources), *advice.warnings))
    return Advised(advice, subject, tuple(settings), request.cache)


def _kept(request: Request) -> str:
    if request.cache is not None and request.cache.is_file():
        return f"Scores so far are kept in {request.cache}; run the same command again to continue."
    return "Nothing is kept." if request.cache is None else "Nothing had been scored yet."


def _told(values: Mapping[str, Any], subject: Subject, wanted: frozenset[str]) -> list[str]:
    """What the scores are of, and what they depend on, by bare names."""
    if "log" in wanted:
        return [f"training log: {Path(values['log']).name}"]
    if "tokens" not in wanted:
        return []
    told = [f"SOURCE: {_name(subject.sources[0])}"]
    if len(subject.sources) > 1:
        told.append(f"teacher: {_name(subject.origin)}")
    if "student" in wanted:
        others = subject.sources[1:-1]
        told += [f"layers that SOURCE has as GQA: {_name(other)}, where RWKV there" for other in others]
        how = as_options(values["preset"], parse_scale(values["scale"], values["preset"]), values["seed"])
        told.append(f"RWKV layers that nobody has yet: {how}")
    if values["strategy"] == "kl":
        told.append(f"--kl-mode {values['kl_mode']}")
    return told


def _name(checkpoint: Checkpoint) -> str:
    return base_model_name(checkpoint) + (f"@{checkpoint.revision}" if checkpoint.revision else "")


def _tokens_told(tokens: TokenOptions, ids: np.ndarray) -> str:
    given = tokens.input_ids or tokens.text
    return f"scored on {ids.size} tokens" + (f" of {Path(given).name}" if given else f", random, seed {tokens.seed}")


def open_subject(values: Mapping[str, Any], wanted: frozenset[str], progress: Progress | None) -> Subject:
    """Open SOURCE and what belongs to it, each once; with `student` in `wanted`, every layer of it as RWKV.

    Raises:
        HxaconvError: when a teacher is missing, or options are given that have no use.
    """
    checkpoint = open_checkpoint(values["source"], revision=values["revision"], progress=progress)
    settings = InitSettings(parse_scale(values["scale"], values["preset"]), values["seed"], "")
    if is_student(checkpoint):
        return _student(checkpoint, values, wanted, settings, progress)
    _refuse_for_teachers(values)
    teacher = load_teacher(
        checkpoint,
        Settings(rope_theta=values["rope_theta"], rms_norm_eps=values["rms_norm_eps"]),
        lenient=True,
    )
    plain = None
    if "student" in wanted:
        settings = replace(settings, dtype=main_dtype(teacher.plan))
        assert settings.dtype in FLOATS
        config = student_of(teacher.config, ())
        made = init_from_teacher(teacher.plan, config, settings)
        plain = Model(config, made, f"plain student of {teacher.label}")
    return Subject(teacher, teacher, plain, (checkpoint,))


def _student(
    checkpoint: Checkpoint,
    values: Mapping[str, Any],
    wanted: frozenset[str],
    settings: InitSettings,
    progress: Progress | None,
) -> Subject:
    settled = Settings(layer_map=values["layer_map"], **{key: values[key] for key in FLAGS})
    whole = bool(wanted & {"teacher", "student"})
    model = load_student(checkpoint, settled, teacher=values["teacher"], whole=whole, progress=progress)
    sources, teacher = tuple(model.sources.values()), model.base
    if "teacher" not in wanted:
        return Subject(model, teacher, None, sources)
    if teacher is None:
        raise HxaconvError(f"--strategy {values['strategy']} compares with the teacher", hint="Pass --teacher.")
    if "student" not in wanted:
        return Subject(model, teacher, None, sources)
    settings = replace(settings, dtype=main_dtype(model.plan))
    config = student_of(model.config, (), model.student.ranks)
    donor = load_other(values["from_"], model, settled, progress=progress) if values["from_"] is not None else None
    plan = repick(
        model.plan,
        teacher.plan,
        model.student,
        config,
        settings,
        in_dtype(donor, settings.dtype) if donor else None,
    )
    if donor is not None and donor.checkpoint is not None:
        sources = (sources[0], donor.checkpoint, *sources[1:])
    return Subject(model, teacher, Model(config, plan, f"{model.label}, every layer RWKV"), sources)


def _refuse_for_teachers(values: Mapping[str, Any]) -> None:
    if values["out"] is not None:
        raise HxaconvError(
            f"{values['source']} is a teacher, whose layers are all attention: there is no choice to change",
            hint="Make a student of it: hxaconv init-from-teacher, with --layer-map for a saved choice.",
        )
    without = {"--teacher": "teacher", "--from": "from_", "--layer-map": "layer_map"}
    without["--tie-word-embeddings"] = "tie_word_embeddings"
    raise_all(
        f"{values['source']} is a teacher itself:",
        [f"{option} has no use" for option, name in without.items() if values[name] is not None],
        hint="To score a student, name it as SOURCE, and its teacher with --teacher.",
    )
