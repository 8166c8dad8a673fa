"""What is scored: the model whose layers are chosen, and what a strategy compares it with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hxaconv.calls import Call
from hxaconv.errors import HxaconvError, raise_all
from hxaconv.load import load_other, load_student, load_teacher, open_checkpoint
from hxaconv.load.student import is_student
from hxaconv.model.config import dropped_scaling, student_of
from hxaconv.model.model import Checkpoint, Model
from hxaconv.model.plan import main_dtype, source_files
from hxaconv.options import Choice, Init, Settings, Tokens
from hxaconv.selection.advice import needs
from hxaconv.surgery.init import as_options, init_settings, new_student, parse_scale
from hxaconv.surgery.repick import in_dtype, repick

if TYPE_CHECKING:
    import numpy as np

    from hxaconv.formats.files import SourceFile
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

    @property
    def scaling_warnings(self) -> list[str]:
        """What the configs of the sources say of RoPE that is not followed."""
        return [line for checkpoint in self.sources for line in dropped_scaling(checkpoint.config or {})]

    @property
    def models(self) -> list[Model]:
        """Those that a strategy runs."""
        return [model for model in (self.teacher, self.student) if model is not None]

    @property
    def files(self) -> list[SourceFile]:
        """What they are read from."""
        return [file for model in self.models for file in source_files(model.plan)]

    def described(self, choice: Choice, values: Init, wanted: frozenset[str]) -> list[str]:
        """What the scores are of, and what they depend on, by bare names."""
        if "log" in wanted:
            return [f"training log: {Path(choice.log or '').name}"]
        if "tokens" not in wanted:
            return []
        lines = [f"SOURCE: {_name(self.sources[0])}"]
        if len(self.sources) > 1:
            lines.append(f"teacher: {_name(self.origin)}")
        if "student" in wanted:
            lines += [
                f"layers that SOURCE has as GQA: {_name(other)}, where RWKV there" for other in self.sources[1:-1]
            ]
            how = as_options(values.preset, parse_scale(values.scale, values.preset), values.seed)
            lines.append(f"RWKV layers that exist nowhere yet: {how}")
        if choice.strategy == "kl":
            lines.append(f"--kl-mode {choice.kl_mode}")
        return lines


def tokens_described(probe: Tokens, seed: int, ids: np.ndarray) -> str:
    """Which tokens the scores were taken on."""
    named = probe.text or (probe.input_ids if isinstance(probe.input_ids, str) else None)
    given = f" of {Path(named).name}" if named else ", given in memory" if probe.given else f", random, seed {seed}"
    return f"scored on {ids.size} tokens{given}"


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.name + (f"@{checkpoint.revision}" if checkpoint.revision else "")


def open_subject(
    source: str,
    teacher: str | None,
    other: str | None,
    settings: Settings,
    values: Init,
    *,
    strategy: str,
    call: Call,
) -> Subject:
    """Open SOURCE and what belongs to it, each once; where the strategy needs a student, every layer of it as RWKV.

    Raises:
        HxaconvError: when a teacher is missing, or options are given that have no use.
    """
    wanted, progress = needs(strategy), call.progress
    checkpoint = open_checkpoint(source, revision=settings.revision, weights=settings.weights, progress=progress)
    if is_student(checkpoint):
        return _student(checkpoint, teacher, other, settings, values, strategy, progress)
    given = {"--teacher": teacher, "--from": other, "--layer-map": settings.layer_map}
    given["--tie-word-embeddings"] = None if settings.tie_word_embeddings is None else "given"
    raise_all(
        f"{source} is a teacher itself:",
        [f"{option} has no use" for option, value in given.items() if value is not None],
        hint="To score a student, name it as SOURCE, and its teacher with --teacher.",
    )
    model = load_teacher(checkpoint, settings, lenient=True)
    plain = None
    if "student" in wanted:
        initial = init_settings(values, main_dtype(model.plan))
        plain = new_student(model, student_of(model.config, ()), initial, label=f"plain student of {model.label}")
    return Subject(model, model, plain, (checkpoint,))


def _student(
    checkpoint: Checkpoint,
    teacher: str | None,
    other: str | None,
    settings: Settings,
    values: Init,
    strategy: str,
    progress: Progress | None,
) -> Subject:
    wanted = needs(strategy)
    whole = bool(wanted & {"teacher", "student"})
    model = load_student(checkpoint, settings, teacher=teacher, whole=whole, continued=False, progress=progress)
    sources, base = tuple(model.sources.values()), model.base
    if "teacher" in wanted and base is None:
        raise HxaconvError(f"--strategy {strategy} compares with the teacher", hint="Pass --teacher.")
    if "student" not in wanted or base is None:
        return Subject(model, base, None, sources)
    initial = init_settings(values, main_dtype(model.plan))
    config = student_of(model.config, (), model.student.ranks)
    trained = load_other(other, model, settings, progress=progress) if other is not None else None
    given = in_dtype(trained, initial.dtype) if trained else None
    plan = repick(model.plan, base.plan, model.student, config, initial, given)
    if trained is not None:
        sources = (sources[0], trained.opened, *sources[1:])
    return Subject(model, base, Model(config, plan, f"{model.label}, every layer RWKV"), sources)
