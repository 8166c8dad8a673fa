"""`calibrate`, and `init-from-teacher --init calibrated`: fit a student's RWKV layers to its teacher."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.card import CALIBRATED
from hxaconv.commands.common import (
    Outcome,
    WriteOptions,
    base_model_name,
    check_target,
    checked_device,
    defaults_of,
    layer_0_warning,
    parse_size,
    perform,
    rounded,
)
from hxaconv.commands.convert import complete, dtype_warnings, main_dtype, open_student
from hxaconv.commands.tokens import TokenOptions, calibration_tokens
from hxaconv.errors import HxaconvError
from hxaconv.model import Model
from hxaconv.output import Job
from hxaconv.writing.interruption import Interrupted

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.calibration import CalibrationReport
    from hxaconv.checkpoint import Checkpoint
    from hxaconv.verification import Report
    from hxaconv.verification.calibrated import Distances

COMMAND = "calibrate"


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


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibrated student, not written yet, and the figures of how it went."""

    student: Model
    plain: Model
    replaced: tuple[str, ...]
    report: CalibrationReport
    distances: Distances
    heldout: Tensor
    folder: Path

    def told_in(self, job: Job) -> Job:
        """The job of the plain student, now with the calibrated one and its figures."""
        purpose = f"{CALIBRATED} {self.distances.sentence}."
        return replace(job, student=self.student, purpose=purpose, extra={**job.extra, "calibration": self.story()})

    def story(self) -> dict[str, Any]:
        """For hxaconv.json."""
        distances: Mapping[str, Any] = rounded(asdict(self.distances))
        return {**self.report.json(), "kl_teacher_student": distances}


def calibrate_student(
    teacher: Model,
    plain: Model,
    options: CalibrateOptions,
    seed: int,
    tokenizer: Checkpoint,
    write: WriteOptions,
    out: str,
) -> Calibrated:
    """Fit `plain` to its teacher; finished layers are kept beside `out` until it is published.

    Raises:
        HxaconvError: without tokens of real text, unless random ones are asked for.
    """
    from hxaconv.calibration import Settings
    from hxaconv.calibration.streaming import calibrate, cut, fitted_tokens
    from hxaconv.verification.calibrated import measure

    settings = Settings(
        chunk=options.chunk,
        refine_steps=options.refine_steps,
        refit_output=options.refit_output,
        fold_rope=options.fold_rope,
        device=checked_device(options.device),
        workers=write.workers or 2,
    )
    tokens = TokenOptions(input_ids=options.input_ids, text=options.text, tokens=options.tokens, seed=seed)
    if not tokens.given and not options.random_tokens:
        raise HxaconvError(
            "calibration fits layers to text, and no text is given",
            hint="Pass --text FILE or --input-ids FILE; --random-tokens goes on with random ones (much worse).",
        )
    ids = calibration_tokens(tokens, teacher.config.vocab_size, tokenizer)
    folder = Path(f"{out.rstrip('/')}.calibration")
    try:
        done = calibrate(teacher, plain, ids, settings, folder=folder, progress=write.progress)
    except KeyboardInterrupt:
        kept = f"Interrupted. Finished layers are kept in {folder}; the same command continues after them."
        raise Interrupted(signal.SIGINT, kept) from None
    student = Model(plain.config, plain.plan | done.replaced, plain.label, plain.raw)
    pieces = cut(ids, settings.chunk)[0]
    heldout = heldout_rows(pieces, int(fitted_tokens(pieces).sum()))
    distances = measure(teacher, plain, student, heldout, settings.device)
    return Calibrated(student, plain, tuple(done.replaced), done.report, distances, heldout, folder)


def heldout_rows(ids: Tensor, fitted: int) -> Tensor:
    """The part of token ids (B, T) after the first `fitted` of them: whole rows, or the end of the last one."""
    row, column = divmod(fitted, ids.shape[1])
    whole = ids[row + (column > 0) :]
    return whole if len(whole) else ids[row:, column:]


def finish_calibration(calibrated: Calibrated | None, outcome: Outcome) -> Outcome:
    """The outcome with the calibration's report; finished layers are dropped once the output is published."""
    if calibrated is not None and outcome.written is not None and outcome.written.published:
        shutil.rmtree(calibrated.folder, ignore_errors=True)
    return replace(outcome, calibration=calibrated.report) if calibrated is not None else outcome


def calibration_warnings(report: CalibrationReport) -> list[str]:
    """Those of the whole run, those of layers with how many say so, and how many layers kept the plain values."""
    counts = Counter(text for layer in report.layers for text in layer.warnings)
    kept = sum(layer.kept_plain for layer in report.layers)
    found = [*report.warnings, *(f"{count} of {len(report.layers)} layers: {text}" for text, count in counts.items())]
    if kept:
        found.append(f"{kept} of {len(report.layers)} layers keep the plain values: their fit was no better")
    return found


def run(
    source: str,
    out: str,
    *,
    teacher: str,
    revision: str | None = None,
    layer_map: str | None = None,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    tie_word_embeddings: bool | None = None,
    calibration: CalibrateOptions | Mapping[str, Any] | None = None,
    seed: int = 0,
    format: str | None = None,
    max_shard_size: str = "5GB",
    write: WriteOptions | None = None,
) -> Outcome:
    """Write `source`, an untrained student, calibrated to `teacher`, to `out`.

    Raises:
        HxaconvError: for a student that was trained, or does not belong to the teacher.
        CheckFailed: when the output does not pass its verification.
    """
    write = write or WriteOptions()
    options = calibration if isinstance(calibration, CalibrateOptions) else CalibrateOptions(**(calibration or {}))
    recorded = {k: v for k, v in locals().items() if k not in ("write", "options")} | {"calibration": asdict(options)}
    flags = {"rope_theta": rope_theta, "rms_norm_eps": rms_norm_eps, "tie_word_embeddings": tie_word_embeddings}
    opened = open_student(source, revision=revision, teacher=teacher, layer_map=layer_map, flags=flags)
    checkpoint, model = opened.sources["teacher"], opened.teacher
    assert model is not None
    plain, notes, warnings = complete(opened, need_all=True)
    job = Job(
        command=COMMAND,
        options=recorded,
        defaults=defaults_of(run) | defaults_of(CalibrateOptions),
        student=plain,
        target=Path(out),
        format=format or ("pth" if Path(out).suffix == ".pth" else "hf"),
        dtype=main_dtype(plain.plan),
        max_shard_bytes=parse_size(max_shard_size),
        sources=opened.sources,
        base_model=base_model_name(checkpoint),
        purpose=CALIBRATED,
    )
    calibrated = None
    if not write.dry_run:
        check_target(job, write)
        calibrated = calibrate_student(model, plain, options, seed, checkpoint, write, out)
        job = calibrated.told_in(job)

    def verify(output: Model) -> Report:
        assert calibrated is not None
        return verify_calibrated(calibrated, model, output, None, options.device)

    warnings += [*dtype_warnings(plain.plan, ""), *layer_0_warning(plain.student)]
    if calibrated is not None:
        warnings += calibration_warnings(calibrated.report)
        notes.append(calibrated.distances.sentence)
    outcome = perform(job, write, verify, warnings, notes)
    return finish_calibration(calibrated, outcome)


def verify_calibrated(
    calibrated: Calibrated, teacher: Model, output: Model, factors: Mapping[str, float] | None, device: str
) -> Report:
    """The check of a calibrated output, on the held-out tokens."""
    from hxaconv.verification.calibrated import check_calibrated

    return check_calibrated(
        teacher,
        calibrated.plain,
        output,
        replaced=calibrated.replaced,
        ids=calibrated.heldout,
        factors=factors,
        device=device,
    )
