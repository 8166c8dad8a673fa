"""A student that is calibrated before it is written: `calibrate`, and `init-from-teacher --init calibrated`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hxaconv import ranks
from hxaconv.commands.plots import draw_calibration
from hxaconv.load.models import download
from hxaconv.model.model import Model
from hxaconv.options import Write
from hxaconv.save.documents import CALIBRATED, UNTRAINED, calibration_section
from hxaconv.save.interruption import interruptible
from hxaconv.save.output import Output
from hxaconv.save.run import Outcome, planned, save
from hxaconv.save.writer import refuse
from hxaconv.verification.written import OutputCheck

if TYPE_CHECKING:
    from hxaconv.calibration.report import CalibrationReport
    from hxaconv.calibration.store import Store
    from hxaconv.calibration.streaming import Calibration
    from hxaconv.calibration.task import Task
    from hxaconv.progress import Progress
    from hxaconv.verification.report import Report


def save_calibrated(
    task: Task,
    output: Output,
    write: Write,
    *,
    plot: str | None,
    factors: Mapping[str, float] | None = None,
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Outcome:
    """Calibrate, then write and verify as `save` does; `factors`, where known, are those of the initialisation.

    Raises:
        HxaconvError: when the calibration or the target is refused.
        CheckFailed: when the output does not pass its verification.
    """
    from hxaconv.surgery.initial import made_once

    intended = replace(task.plain, plan=task.plain.plan | task.planned)
    at_most = (
        f"Up to {len(task.planned)} tensors are fitted, those shown as calibrated; where a fit is no better, the plain"
        " values stay"
    )
    notes, warnings = [*notes, *task.notes, at_most], [*warnings, *task.warnings]
    if write.dry_run:
        return save(output.refilled(intended, output.record), write, warnings=warnings, notes=notes)
    with ranks.together():
        refuse(output, write)
    progress = output.record.call.progress
    if progress is not None:
        if ranks.rank() == 0:
            progress.show(planned(output.refilled(intended, output.record), write, (), ()))
        for note in notes:
            progress.note(note)
        notes = []
    folder = Path(f"{output.target.absolute()}.calibration")
    task = replace(task, plain=replace(task.plain, plan=made_once(task.plain.plan, folder)))
    student, replaced, report = calibrate_student(task, output, write, folder)
    record = replace(
        output.record,
        purpose=CALIBRATED if replaced else UNTRAINED,
        section=calibration_section(report),
        extra={**output.record.extra, "calibration": report.json()},
    )

    def verify(written: Model, progress: Progress | None) -> Report:
        from hxaconv.calibration.check import check_calibrated

        return check_calibrated(
            task.teacher,
            task.plain,
            written,
            replaced=replaced,
            ids=task.heldout,
            factors=factors,
            device=task.settings.device,
            progress=progress,
        )

    outcome = save(
        output.refilled(student, record),
        write,
        check=OutputCheck(verify),
        announce=progress is None,
        warnings=[*warnings, *report.all_warnings],
        notes=[*notes, *report.notes],
    )
    shutil.rmtree(folder, ignore_errors=True)
    if plot is not None and ranks.rank() == 0:
        draw_calibration(report, Path(plot))
    return replace(outcome, calibration=report)


Calibrated = tuple[Model, tuple[str, ...], "CalibrationReport"]
"""The student, the names of the tensors that are fitted, and the figures of how that went."""


def calibrate_student(task: Task, output: Output, write: Write, folder: Path) -> Calibrated:
    """Fit the plain student; finished layers are kept in a folder, beside the target until that is published.

    Layers are validated one by one, and then all together: where they leave the student no nearer to its teacher than
    the plain one, that is what comes back. Ranks divide the layers; polish and measurement are the first one's, whose
    figures the others take over.

    Raises:
        HxaconvError: when another process calibrates to the same target, or the teacher is not finite.
    """
    from hxaconv.calibration.report import CalibrationReport, settings_of
    from hxaconv.calibration.store import Store, key_of, locked
    from hxaconv.calibration.streaming import Calibration, calibrate

    fit, progress = task.settings, output.record.call.progress

    def kept() -> str:
        done = len(list(folder.glob("layer-*.safetensors")))
        if done:
            return f"Layers are kept in {folder} ({done}); the same command continues."
        shutil.rmtree(folder, ignore_errors=True)
        return "No layer was finished."

    with interruptible(kept), ExitStack() as stack:
        with ranks.together():
            if ranks.rank() == 0:
                stack.enter_context(locked(folder))
        store = Store(folder, key_of(task.teacher, task.plain, task.rows, fit))
        measured = Store(folder, f"{store.key} {fit.polish_tokens} {fit.polish_only}")
        if measured.facts("distances") is None:
            models = [task.teacher, task.plain]
            ranks.in_turn(lambda: download(output.record.sources.values(), task.files, models, progress))
        if fit.polish_only:
            tokens, settings = task.ids.numel(), settings_of(fit)
            done = Calibration({}, CalibrationReport(tokens=tokens, fitted_tokens=0, settings=settings))
        else:
            done = calibrate(
                task.teacher,
                task.plain,
                task.ids,
                fit,
                workers=task.workers,
                store=store,
                allow_nonfinite=write.allow_nonfinite,
                progress=progress,
            )
        return ranks.in_turn(lambda: _as_a_whole(task, done, store, measured, progress))


def _as_a_whole(task: Task, done: Calibration, store: Store, measured: Store, progress: Progress | None) -> Calibrated:
    """The student as a whole: polished where requested, then measured, then accepted or not."""
    from hxaconv.calibration.check import measure
    from hxaconv.calibration.polish import polish
    from hxaconv.calibration.report import Distances, Recall

    assert store.folder is not None
    replaced, report, device = done.replaced, done.report, task.settings.device
    if task.polish_ids is not None:
        student = replace(task.plain, plan=task.plain.plan | replaced)
        polished, figures = polish(
            task.teacher,
            student,
            task.polish_ids,
            task.settings.polish_tokens,
            folder=store.folder,
            key=store.key,
            device=device,
            workers=task.workers,
            progress=progress,
        )
        replaced, report = replaced | polished, replace(report, polish=figures)
    student = replace(task.plain, plan=task.plain.plan | replaced)
    kept = measured.facts("distances")
    if kept is None:
        distances = measure(task.teacher, task.plain, student, task.heldout, device, progress)
        # A second measurement may round otherwise: a resumed run, and other ranks, take over this one.
        measured.save("distances", {}, asdict(distances))
    else:
        distances = Distances(**kept | {"recall": tuple(Recall(**one) for one in kept["recall"])})
    if replaced and not distances.nearer:
        student, replaced, report = task.plain, {}, report.not_taken()
    return student, tuple(replaced), replace(report, distances=distances)
