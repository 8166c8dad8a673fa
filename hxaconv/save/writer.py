"""Writes an output so that its target is either absent or complete and right, whatever happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import CheckFailed, HxaconvError, raise_all
from hxaconv.formats.files import SourceChanged, SourceFile
from hxaconv.formats.layout import FileLayout
from hxaconv.save import diskio, locks, preflight
from hxaconv.save.checksums import Finished
from hxaconv.save.documents import write_documents, write_provenance
from hxaconv.save.fill import FillSettings, fill_files
from hxaconv.save.interruption import Signals, interruptible
from hxaconv.save.journal import Journal, journal_path, read_journals
from hxaconv.save.nonfinite import NonfiniteError, nonfinite_counts, refuse_nonfinite
from hxaconv.save.staging import Staging, plan_record, publish, recover, refuse_other_plans, staging_of, stagings_at
from hxaconv.save.target import Output, WriteResult, WriteSettings, layouts

if TYPE_CHECKING:
    from hxaconv.progress import Progress

Prepare = Callable[[Sequence[SourceFile]], None]
"""Gets source files ready to be read: downloads them."""
Verify = Callable[[Path], Mapping[str, Any]]
"""Takes the staged checkpoint; returns a verdict for the provenance, or raises CheckFailed."""


@contextmanager
def _system_errors() -> Iterator[None]:
    """What the system refuses around the writing, as an error of ours; also a decorator."""
    try:
        yield
    except OSError as error:
        where = error.filename or "the target's file system"
        raise HxaconvError(f"{where}: {error.strerror or error}", hint=diskio.hint_for(error)) from error


@_system_errors()
def write(
    output: Output,
    settings: WriteSettings,
    *,
    verify: Verify | None = None,
    prepare: Prepare | None = None,
    progress: Progress | None = None,
) -> WriteResult:
    """Write an output beside its target, verify it there, and rename it into place.

    `prepare` is given the sources that will be read, once nothing stands in the way any more.

    Raises:
        HxaconvError: for anything that stands in the way; the target is as before.
        CheckFailed: when `verify` finds the result wrong; it is kept beside the target and named.
        Interrupted: on Ctrl-C or SIGTERM; what is done is kept for --resume.
    """
    output = replace(output, target=_place(output.target))
    files = layouts(output)
    record = plan_record(output, files, settings.digest)
    staging = staging_of(output, record)
    preflight.check_place(output, files, staging, overwrite=settings.overwrite)
    run = _Run(output, settings, files, staging, progress)
    with locks.held(_lock_path(output.target), output.target), interruptible(run.what_is_kept) as signals:
        done = read_journals(staging.path).tensors
        if _recover_all(output.target, staging) and settings.resume:
            run.note_published(signals)
            return _published(output, settings, files, done, None)
        preflight.check(output, files, staging, overwrite=settings.overwrite)
        _begin(settings, staging, files, record)
        return run.write(signals, record, verify, prepare)


@_system_errors()
def check(output: Output, settings: WriteSettings) -> None:
    """Refuse what `write` would refuse before its first byte, for work that has to be done before there is a plan.

    Raises:
        HxaconvError: listing every problem.
    """
    output = replace(output, target=_place(output.target))
    files = layouts(output)
    staging = staging_of(output, plan_record(output, files, settings.digest))
    preflight.check_place(output, files, staging, overwrite=settings.overwrite)
    preflight.check(output, files, staging, overwrite=settings.overwrite)


def _place(target: Path) -> Path:
    target = target.absolute()
    if target.name in ("", ".."):
        raise HxaconvError(f"{target} cannot be written: it has no name of its own", hint="Name a new file or folder.")
    return target


def _recover_all(target: Path, ours: Staging) -> bool:
    """Finish or undo what crashes left half published; whether our own output turned out to be published."""
    published = False
    for staging in stagings_at(target):
        if recover(staging):
            published |= staging.path == ours.path
    return published


def _published(
    output: Output,
    settings: WriteSettings,
    files: Sequence[FileLayout],
    tensors: Mapping[str, Finished],
    verification: Mapping[str, Any] | None,
) -> WriteResult:
    digests = {name: tensors[name].digest(settings.digest) for name in output.tensors}
    return WriteResult(
        path=output.target,
        published=True,
        nbytes=sum(layout.size for layout in files),
        digests={name: digest for name, digest in digests.items() if digest is not None},
        nonfinite=nonfinite_counts(tensors),
        verification=verification,
        leftovers=tuple(staging.path for staging in stagings_at(output.target)),
    )


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.hxaconv-lock")


def _begin(settings: WriteSettings, staging: Staging, files: Sequence[FileLayout], record: dict[str, Any]) -> None:
    """Decide what the staging folder's being there, or not, means."""
    done = read_journals(staging.path)
    if done.tensors and not settings.resume:
        raise HxaconvError(
            f"{staging.path} holds {len(done.tensors)} finished tensors of an interrupted run of the same command",
            hint="Add --resume to continue it, or delete that folder to start over.",
        )
    if settings.resume and not staging.path.is_dir():
        refuse_other_plans(staging, record)
    if not done.tensors:
        staging.remove()


def _missing(staging: Staging, files: Sequence[FileLayout]) -> list[FileLayout]:
    """The files that are not complete yet."""
    done = read_journals(staging.path).files
    return [
        layout for layout in files if layout.name not in done or _size(staging.content / layout.name) != layout.size
    ]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


class _Run:
    """One call of `write`, from the first byte on."""

    def __init__(
        self,
        output: Output,
        settings: WriteSettings,
        files: Sequence[FileLayout],
        staging: Staging,
        progress: Progress | None,
    ) -> None:
        self.output = output
        self.settings = settings
        self.files = files
        self.staging = staging
        self.progress = progress
        self.published = False

    def write(
        self, signals: Signals, record: dict[str, Any], verify: Verify | None, prepare: Prepare | None
    ) -> WriteResult:
        try:
            self.staging.create(record)
            self._fill(signals, prepare)
            return self._finish(signals, verify)
        except (NonfiniteError, SourceChanged):
            self.staging.remove()
            raise
        except CheckFailed as error:
            error.hint = (
                f"What was written is kept in {self.staging.path}. Should it have been damaged there, the same command"
                " with --resume repairs it and checks once more; otherwise delete it before another run."
            )
            raise
        except (HxaconvError, OSError) as error:
            told = error if isinstance(error, HxaconvError) else self._told(error)
            told.hint = f"{told.hint} {self.what_is_kept()}".strip()
            raise told from error.__cause__

    def _told(self, error: OSError) -> HxaconvError:
        """What the system refuses of the small things around the tensors: locks, folders, documents."""
        path = Path(error.filename or self.staging.path)
        return diskio.output_error(error, path, "writing", preflight.bytes_needed(self.output, self.files))

    def what_is_kept(self) -> str:
        """Drop the staging folder if nothing in it is worth keeping; say how to go on."""
        path, target = self.staging.path, self.staging.target
        if self.published:
            return f"{target} is complete."
        count = len(read_journals(path).tensors)
        if count == 0:
            self.staging.remove()
            return f"Nothing had been finished; {target} is as before."
        return f"{count} finished tensors are kept in {path}; the same command with --resume continues."

    def note_published(self, signals: Signals) -> None:
        """What is said of an interruption from now on, when the command is about to end."""
        self.published = True
        signals.message = f"Interrupted. {self.what_is_kept()}"

    def _fill(self, signals: Signals, prepare: Prepare | None) -> None:
        mine = self.files
        if prepare is not None:
            recipes = [fill.recipe for layout in mine for fill in layout.fills]
            prepare(list(dict.fromkeys(file for recipe in recipes for file in recipe.make.sources())))
        digest, total = self.settings.digest, sum(layout.size for layout in mine)
        limit = diskio.memory_limit()
        settings = FillSettings(
            workers=self.settings.workers or min(2, os.cpu_count() or 1),
            crc32=digest == "crc32" or self.output.container == "pth",
            sha256=digest == "sha256",
            keep_cache=limit is None or total <= limit // 2,
        )
        recorded = read_journals(self.staging.path).tensors
        journal = Journal(journal_path(self.staging.path))
        places = [(layout, self.staging.content / layout.name) for layout in mine]
        if self.progress is not None:
            self.progress.start("Writing", sum(fill.recipe.nbytes for layout in mine for fill in layout.fills))
        try:
            with signals.deferred():
                stop = signals.requested
                fill_files(places, recorded, settings, journal, stop_requested=stop, progress=self.progress)
        finally:
            journal.close()
            if self.progress is not None:
                self.progress.stop()
        signals.stop_if_requested()

    def _finish(self, signals: Signals, verify: Verify | None) -> WriteResult:
        done = read_journals(self.staging.path)
        missing = [layout.name for layout in _missing(self.staging, self.files)]
        raise_all(
            f"{self.staging.path}: {len(missing)} of {len(self.files)} files that were written are not there:",
            missing,
            hint="Something else cleared or changed that folder during the run. Run the command again.",
        )
        verification = self._complete(done.tensors, verify)
        with signals.deferred(all_of_them=True):
            publish(self.staging, overwrite=self.settings.overwrite)
            self.note_published(signals)
        return _published(self.output, self.settings, self.files, done.tensors, verification)

    def _complete(self, tensors: Mapping[str, Finished], verify: Verify | None) -> Mapping[str, Any] | None:
        """Everything but the tensors, and the verdict on them; returns it."""
        if not self.settings.allow_nonfinite:
            refuse_nonfinite(self.output, tensors)
        self._check_sources()
        write_documents(self.staging, self.output, self.files)
        verification = None if verify is None else self._verified(verify)
        digests = {name: tensors[name].digest(self.settings.digest) for name in self.output.tensors}
        write_provenance(self.staging, self.output, digests, nonfinite_counts(tensors), verification)
        self._check_sources()
        return verification

    def _verified(self, verify: Verify) -> dict[str, Any]:
        try:
            return dict(verify(self.staging.checkpoint))
        except SourceChanged as error:
            self._check_sources()
            # It is none of those that the tensors were made of: what is written stays good, or can be repaired.
            raise HxaconvError(error.message, hint=error.hint) from None

    def _check_sources(self) -> None:
        for file in self.output.sources():
            file.check_unchanged()
