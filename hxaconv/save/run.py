"""The end of every command that writes: what it planned becomes a checkpoint, verified, and uploaded where asked."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv import ranks
from hxaconv.errors import HxaconvError
from hxaconv.formats.files import SourceFile
from hxaconv.formats.json_files import plain_data
from hxaconv.model.model import Model
from hxaconv.options import Write
from hxaconv.progress import Progress
from hxaconv.save.interruption import interruptible
from hxaconv.save.outcome import Outcome, planned
from hxaconv.save.output import Output
from hxaconv.save.writer import refuse, write

if TYPE_CHECKING:
    from hxaconv.verification.report import Report

Verify = Callable[[Model, "Progress | None"], "Report"]
"""Checks the student that was written, and shows how far it is."""

VERDICT_DIGITS = 3
"""Significant digits of what a verification measured in hxaconv.json: beyond them, sums depend on the machine."""


def save(
    output: Output,
    options: Write,
    *,
    verify: Verify | None = None,
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Outcome:
    """Write an output, verify it before it gets its name, and upload it where asked; a dry run refuses the same.

    The progress that the command was called with is shown the plan, once nothing stands in the way of it.

    Raises:
        HxaconvError: when the target is refused, or something fails; the target is as before then.
        CheckFailed: when the output did not pass; it is left beside the target for inspection.
    """
    progress, outcome = output.record.call.progress, planned(output, options.max_shard_bytes, warnings, notes)
    if options.push_to:
        from hxaconv.save.hub_push import check_push

        check_push(options.push_to)
    if options.dry_run:
        with ranks.together():
            refuse(output, options)
        return replace(outcome, notes=[*outcome.notes, "Dry run: nothing was written."])
    check = _StagedCheck(output, verify, options, progress) if verify is not None and options.verify else None
    if check is not None:
        # It takes a second of one core, which the writing leaves idle.
        threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()

    def prepare(needed: Sequence[SourceFile]) -> None:
        models = [output.student] if output.student is not None and ranks.rank() == 0 else []
        from hxaconv.load.models import download

        if progress is not None and ranks.rank() == 0:
            progress.show(outcome)
        download(output.record.sources.values(), needed, models, progress)

    written = write(output, options, verify=check, prepare=prepare, progress=progress)
    pushed = _push(written.path, options.push_to) if options.push_to else None
    left = [
        f"{path} is left from an interrupted run with other options or sources; delete it if nobody will resume it."
        for path in written.leftovers
    ]
    return replace(
        outcome,
        written=written,
        report=check.report if check else None,
        notes=[*outcome.notes, *left],
        pushed_to=pushed,
    )


class _StagedCheck:
    """A verification of what is staged; keeps its report."""

    def __init__(self, output: Output, verify: Verify, options: Write, progress: Progress | None) -> None:
        self.output, self.verify, self.options, self.progress = output, verify, options, progress
        self.report: Report | None = None

    def __call__(self, staged: Path) -> Mapping[str, Any]:
        from hxaconv.load import open_checkpoint
        from hxaconv.verification.written import check_output

        student = self.output.student
        assert student is not None
        checkpoint = open_checkpoint(str(staged))
        report = check_output(
            checkpoint,
            student,
            self.output.tensors,
            self.output.dtype,
            str(self.output.target),
            lambda written: self.verify(written, self.progress),
        )
        if self.options.allow_nonfinite:
            _let_nonfinite_pass(report)
        report.raise_if_failed()
        self.report = report
        verdict: Mapping[str, Any] = plain_data(report.verdict(), VERDICT_DIGITS)
        return verdict


def _let_nonfinite_pass(report: Report) -> None:
    """Turn checks that NaN and Inf alone make fail into passed ones that say so; those of bits still count."""
    numeric = {"finite", "finite weights", "finite logits", "logits", "layers", "GQA layers"}
    if any(not check.passed and check.name.startswith("finite") for check in report.checks):
        report.checks = [
            replace(check, passed=True, detail=f"allowed by --allow-nonfinite: {check.detail}")
            if not check.passed and check.name in numeric
            else check
            for check in report.checks
        ]


def _push(path: Path, repo_id: str) -> str | None:
    from hxaconv.save.hub_push import push_folder

    if ranks.rank():
        return None
    kept = f"{path} is complete; `hf upload {repo_id} {path}` sends it as well."
    with interruptible(lambda: kept):
        try:
            return push_folder(path, repo_id)
        except HxaconvError as error:
            error.hint = f"{error.hint} {kept}".strip()
            raise
