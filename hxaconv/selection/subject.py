"""What is asked: which options go together, the rules they make, and the models that a strategy compares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hxaconv.calls import Call
from hxaconv.errors import HxaconvError, raise_all
from hxaconv.load import load_other, load_student, load_teacher, open_checkpoint
from hxaconv.load.student import is_student
from hxaconv.model import layer_choice
from hxaconv.model.config import dropped_scaling, student_of
from hxaconv.model.model import Checkpoint, Model
from hxaconv.model.plan import main_dtype, source_files
from hxaconv.options import Choice, Init, Settings, Tokens, option_words, options_of
from hxaconv.selection.advice import needs
from hxaconv.selection.schedule import Rules
from hxaconv.selection.strategies import STRATEGIES
from hxaconv.surgery.init import as_options, init_settings, new_student, parse_scale
from hxaconv.surgery.reshape import in_dtype, repick

if TYPE_CHECKING:
    import numpy as np

    from hxaconv.formats.files import SourceFile
    from hxaconv.progress import Progress


CHOOSING = tuple(name for name in options_of(Choice) if name not in ("layers", "allow_gqa_layer_0"))
TOKENS = ("input_ids", "text", "tokens", "device")
WRITING = (
    *("max_shard_size", "format", "dry_run", "resume", "verify", "workers", "digest"),
    *("allow_nonfinite", "push_to"),
)


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


def refuse_useless(choice: Choice, call: Call, *, writes: bool) -> None:
    """Refuse options that would be ignored; `writes`: there is an OUT.

    Raises:
        HxaconvError: listing everything at once.
    """
    if choice.layers is not None and not writes:
        raise HxaconvError("--layers names the choice, but there is no OUT to write it to", hint="Add OUT.")
    raise_all("these options do not go together:", _useless(choice, call, writes=writes))


def _useless(choice: Choice, call: Call, *, writes: bool) -> list[str]:
    if choice.layers is not None:
        return call.useless((*CHOOSING, *TOKENS), "--layers is a choice made, nothing is to be scored")
    wanted, found = needs(choice.strategy), []
    if choice.strategy != "kl":
        found += call.useless(("kl_mode",), "only --strategy kl has modes")
    if choice.strategy == "log" and not choice.log:
        found.append("--strategy log reads a training log: name it with --log FILE.csv")
    elif choice.strategy != "log":
        found += call.useless(("log",), "only --strategy log reads one")
    if not writes:
        found += call.useless(WRITING, "there is no OUT to write")
        if "student" not in wanted:
            found += call.useless(("from_", "preset", "scale"), f"--strategy {choice.strategy} looks at no RWKV layer")
        if "tokens" not in wanted:
            found += call.useless(("seed",), "nothing is random here")
        if not choice.save and not choice.plot:
            found += call.useless(("overwrite",), "nothing is written")
    return found


def unread_tokens(choice: Choice, call: Call) -> list[str]:
    """A note where tokens were named for a strategy that reads none, as a loop over strategies does."""
    if choice.layers is not None or "tokens" in needs(choice.strategy):
        return []
    return call.useless(TOKENS, f"--strategy {choice.strategy} looks at no tokens, they are not read")


def rules_of(choice: Choice, num_layers: int) -> Rules | None:
    """The strategy's own rules with the options over them; None where no option is given.

    Raises:
        HxaconvError: for gaps that contradict each other, and for --exclude that names no layers of the model.
    """
    gaps = {key: getattr(choice, key) for key in ("min_gap", "max_gap", "max_consecutive")}
    given = {key: value for key, value in gaps.items() if value is not None}
    problems = [f"{option_words([key])} {value}: from 1 on" for key, value in given.items() if value < 1]
    if not problems and choice.min_gap and choice.max_gap and choice.min_gap > choice.max_gap:
        problems.append(f"--min-gap {choice.min_gap} is more than --max-gap {choice.max_gap}")
    raise_all("the rules cannot be kept:", problems, hint="Adjacent layers have gap 1, and are a run of 2.")
    if choice.exclude:
        given["exclude"] = frozenset(layer_choice.parse_numbers(choice.exclude, num_layers, "--exclude"))
    return replace(STRATEGIES[choice.strategy].rules, **given) if given else None
