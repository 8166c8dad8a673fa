"""What `calibrate` and `init-from-teacher --init calibrated` share: fit a student's RWKV layers to its teacher."""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hxaconv.commands.common import (
    Outcome,
    WriteOptions,
    checked_device,
    perform,
    useless,
)
from hxaconv.errors import HxaconvError, raise_all
from hxaconv.forward.tokens import TokenOptions, calibration_tokens
from hxaconv.load.models import download
from hxaconv.model.model import Model
from hxaconv.model.plan import source_files
from hxaconv.save.card import CALIBRATED, UNTRAINED, calibration_section
from hxaconv.save.interruption import interruptible
from hxaconv.save.writer import refuse

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.calibration import CalibrationReport, Settings
    from hxaconv.formats.files import SourceFile
    from hxaconv.model.model import Checkpoint
    from hxaconv.model.plan import Plan
    from hxaconv.progress import Progress
    from hxaconv.save.output import Output, Record
    from hxaconv.verification.report import Report


SHARE_OF_ONE_TOKEN = 0.5
RANDOM_HINT = "--random-tokens goes on without a text (much worse)."


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateOptions:
    """What to fit to, and how; `random_tokens` allows tokens that are nobody's text."""

    input_ids: str | None = None
    text: str | None = None
    tokens: int = 1024
    chunk: int = 2048
    random_tokens: bool = False
    refit_output: str = "auto"
    refine_steps: int = 100
    fold_rope: bool = False
    device: str = "cpu"

    def refuse_without_calibration(self) -> None:
        """Stop where nothing is calibrated although options say how.

        Raises:
            HxaconvError: naming these options.
        """
        plain = CalibrateOptions()
        given = [f.name for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)]
        if given:
            (line,) = useless(given, given, "these are for a calibration")
            raise HxaconvError(line, hint="Add --init calibrated.")


@dataclass(frozen=True, slots=True)
class Task:
    """A calibration with everything it needs, checked; nothing has been computed."""

    teacher: Model
    plain: Model
    ids: Tensor
    asked: int
    """Tokens that were asked for; there may be fewer."""
    settings: Settings

    @property
    def files(self) -> list[SourceFile]:
        """Those that are read."""
        return [*source_files(self.teacher.plan), *source_files(self.plain.plan)]

    @property
    def pieces(self) -> Tensor:
        """The tokens in sequences as they are used, (B, T)."""
        from hxaconv.calibration.streaming import cut

        return cut(self.ids, self.settings.chunk)[0]

    @property
    def fitted(self) -> int:
        """How many of them are fitted, from the first on."""
        from hxaconv.calibration.streaming import fitted_tokens

        return int(fitted_tokens(self.pieces).sum())

    @property
    def heldout(self) -> Tensor:
        """The others, (B, T)."""
        return heldout_rows(self.pieces, self.fitted)

    @property
    def notes(self) -> list[str]:
        """What will be fitted to what."""
        total, length = self.pieces.numel(), self.pieces.shape[1]
        judging, judging_all = total - self.fitted, self.heldout.numel()
        asked = "" if total == self.asked else f" ({self.asked} were asked for)"
        whole = "" if judging == judging_all else f" (the last {judging_all} of them the student as a whole)"
        note = (
            f"Calibration: {total} tokens{asked} in sequences of {length}, {self.fitted} to fit and {judging} to judge"
            f"{whole}; no decay can know of lags beyond {length}"
        )
        idle = self.settings.fold_rope and not self.plain.student.gqa_layers
        return [note, *(["--fold-rope changes nothing: no layer stays attention"] if idle else [])]

    @property
    def warnings(self) -> list[str]:
        """What makes the tokens no text."""
        [(token, count)] = Counter(self.pieces.flatten().tolist()).most_common(1)
        share = count / self.pieces.numel()
        said = f"{share:.0%} of the calibration tokens are one and the same (id {token})"
        return [f"{said}: figures made of them say little of text"] if share > SHARE_OF_ONE_TOKEN else []

    @property
    def planned(self) -> Plan:
        """The tensors that may be replaced, not calibrated yet."""
        from hxaconv.calibration.planned import planned

        return planned(self.plain, self.fitted, self.settings)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibrated student, not written yet, and the figures of how it went."""

    task: Task
    student: Model
    replaced: tuple[str, ...]
    report: CalibrationReport
    folder: Path

    def described_in(self, record: Record) -> Record:
        """The record of the plain student, now with the figures of the calibrated one."""
        return replace(
            record,
            purpose=CALIBRATED if self.replaced else UNTRAINED,
            section=calibration_section(self.report),
            extra={**record.extra, "calibration": self.report.json()},
        )

    @property
    def notes(self) -> list[str]:
        """For people: how near the student is."""
        return [self.report.distances.sentence] if self.report.distances else []

    @property
    def warnings(self) -> list[str]:
        """Those of the whole run, those of layers with how many say so, and how many layers kept the plain values."""
        layers = self.report.layers
        counts = Counter(text for layer in layers for text in layer.warnings)
        kept = sum(layer.kept_plain for layer in layers)
        found = [*self.report.warnings, *(f"{count} of {len(layers)} layers: {text}" for text, count in counts.items())]
        told = self.report.distances
        if told is not None and not self.report.taken:
            found.append(
                "the calibration is NOT USED, every layer keeps its plain values: on the"
                f" {told.tokens} held-out tokens, KL(teacher || student) is {told.calibrated:.3g} calibrated and"
                f" {told.plain:.3g} plain. Give it more tokens of real text (--tokens), or try --refit-output never"
            )
        elif kept:
            found.append(f"{kept} of {len(layers)} layers keep the plain values: no fit was better on held-out tokens")
        return found

    def verify(self, factors: Mapping[str, float] | None, output: Model, progress: Progress | None) -> Report:
        """The check of the written student, on the held-out tokens."""
        from hxaconv.calibration.check import check_calibrated

        task = self.task
        return check_calibrated(
            task.teacher,
            task.plain,
            output,
            replaced=self.replaced,
            ids=task.heldout,
            factors=factors,
            device=task.settings.device,
            progress=progress,
        )

    def finish(self, outcome: Outcome) -> Outcome:
        """The outcome with the calibration's report; finished layers are dropped once the output is published."""
        if outcome.written is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        return replace(outcome, calibration=self.report)


def prepare(
    teacher: Model, plain: Model, options: CalibrateOptions, seed: int, tokenizer: Checkpoint, write: WriteOptions
) -> Task:
    """Read the tokens and check the settings, all of them.

    Raises:
        HxaconvError: without tokens of real text, unless random ones are asked for; for settings without sense.
    """
    from hxaconv.calibration.report import Settings, problems_of
    from hxaconv.calibration.streaming import check_enough, check_sizes

    values = asdict(options) | {"workers": write.workers if write.workers is not None else 2}
    problems = problems_of(values)
    tokens = TokenOptions(input_ids=options.input_ids, text=options.text, tokens=options.tokens, seed=seed)
    if tokens.given and options.random_tokens:
        problems.append("--random-tokens and a text both say which tokens to use; give one of them")
    if not tokens.given and not options.random_tokens:
        problems.append("calibration fits layers to text, and no text is given; pass --text FILE or --input-ids FILE")
    if not plain.student.rwkv_layers and not options.fold_rope:
        problems.append("every layer stays attention: there is nothing to fit, except for --fold-rope")
    raise_all("the calibration cannot be done:", problems, hint=RANDOM_HINT if not tokens.given else "")
    check_sizes(teacher, plain)
    checked_device(options.device)
    names = ("chunk", "refine_steps", "refit_output", "fold_rope", "device", "workers")
    settings = Settings(**{name: values[name] for name in names})
    task = Task(
        teacher, plain, calibration_tokens(tokens, teacher.config.vocab_size, tokenizer), options.tokens, settings
    )
    check_enough(task.pieces)
    return task


def perform_calibrated(
    task: Task,
    output: Output,
    write: WriteOptions,
    factors: Mapping[str, float] | None,
    warnings: list[str],
    notes: list[str],
) -> Outcome:
    """Calibrate, then write and verify as `perform` does; `factors`, where known, are those of the initialisation.

    Raises:
        HxaconvError: when the calibration or the target is refused.
        CheckFailed: when the output does not pass its verification.
    """
    notes, warnings = [*notes, *task.notes], [*warnings, *task.warnings]
    if write.dry_run:
        planned = task.planned
        student = replace(task.plain, plan=task.plain.plan | planned)
        output = output.refilled(student, output.record)
        notes.append(
            f"Up to {len(planned)} tensors are fitted, those shown as calibrated; where a fit is no better, the plain"
            " values stay"
        )
        return perform(output, write, None, warnings, notes)
    calibrated = calibrate_student(task, output, write)
    warnings, notes = warnings + calibrated.warnings, notes + calibrated.notes
    verify = functools.partial(calibrated.verify, factors)
    output = output.refilled(calibrated.student, calibrated.described_in(output.record))
    return calibrated.finish(perform(output, write, verify, warnings, notes))


def calibrate_student(task: Task, output: Output, write: WriteOptions) -> Calibrated:
    """Fit the plain student; finished layers are kept beside the target until it is published.

    Layers are judged one by one, and then all together: where they leave the student no nearer to its teacher than
    the plain one, that is what comes back.

    Raises:
        HxaconvError: when the target cannot be written, or the teacher is not finite.
    """
    from hxaconv.calibration.cache import Cache, fingerprint, locked
    from hxaconv.calibration.check import measure
    from hxaconv.calibration.streaming import calibrate

    folder = Path(f"{output.target.absolute()}.calibration")

    def kept() -> str:
        done = len(list(folder.glob("layer-*.safetensors")))
        return (
            f"Layers are kept in {folder} ({done}); the same command continues." if done else "No layer was finished."
        )

    refuse(output, write.group)
    with interruptible(kept), locked(folder):
        cache = Cache(folder, fingerprint(task.teacher, task.plain, task.pieces, task.settings))
        distances = cache.load_distances()
        if distances is None:
            download(output.record.sources.values(), task.files, [task.teacher, task.plain], write.progress)
        done = calibrate(
            task.teacher,
            task.plain,
            task.ids,
            task.settings,
            cache=cache,
            allow_nonfinite=write.allow_nonfinite,
            progress=write.progress,
        )
        replaced, report = done.replaced, done.report
        if distances is None:
            fitted = replace(task.plain, plan=task.plain.plan | replaced)
            distances = measure(task.teacher, task.plain, fitted, task.heldout, task.settings.device, write.progress)
            # A second measurement may round otherwise: whoever goes on, and other parts, tell what this one found.
            cache.save_distances(distances)
    if replaced and not distances.nearer:
        replaced, report = {}, report.not_taken()
    student = replace(task.plain, plan=task.plain.plan | replaced)
    return Calibrated(task, student, tuple(replaced), replace(report, distances=distances), folder)


def heldout_rows(ids: Tensor, fitted: int) -> Tensor:
    """The part of token ids (B, T) after the first `fitted` of them: whole rows, or the end of the last one."""
    row, column = divmod(fitted, ids.shape[1])
    whole = ids[row + (column > 0) :]
    return whole if len(whole) else ids[row:, column:]
