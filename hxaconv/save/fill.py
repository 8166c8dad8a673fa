"""Fills laid-out files with bytes: the one place where tensors are written.

Workers take tensors in plan order, make or copy their bytes in pieces, and on the way compute checksums and
count values that are not finite. The calling thread syncs what is finished and hands it to the journal,
so that a tensor is recorded as done only once its bytes would survive a power loss.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hxaconv.errors import HxaconvError
from hxaconv.formats.files import read_into, write_from
from hxaconv.formats.layout import FileLayout, Fill
from hxaconv.model.plan import Scratch
from hxaconv.save import diskio
from hxaconv.save.checksums import Checks, Finished
from hxaconv.save.output_file import OutputFile, open_output
from hxaconv.save.writeback import WriteBehind

if TYPE_CHECKING:
    from hxaconv.progress import Progress

BATCH_BYTES = 512 * 1024 * 1024
"""Bytes that are finished before they are synced and recorded together."""
PROGRESS_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class FillSettings:
    """How to fill: `crc32` and `sha256` are computed where asked for."""

    workers: int
    crc32: bool
    sha256: bool
    keep_cache: bool
    """False: what was read and written is dropped from the page cache, so that it does not push out the rest."""


class Recorder(Protocol):
    """Where finished work is made known."""

    def tensors_done(self, layout: FileLayout, finished: Sequence[Finished]) -> None:
        """These tensors are on disk."""

    def file_done(self, layout: FileLayout) -> None:
        """The file is complete and synced."""


def fill_files(
    files: Sequence[tuple[FileLayout, Path]],
    recorded: Mapping[str, Finished],
    settings: FillSettings,
    recorder: Recorder,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> bool:
    """Write these files; tensors in `recorded` are re-read, and written again only if their checksum differs.

    Returns False if `stop_requested` became true first; what is finished then is recorded.

    Raises:
        HxaconvError: when reading or writing fails; what is finished then is recorded.
    """
    return _Filling(files, recorded, settings, recorder, progress).run(stop_requested)


class _Filling:
    """One run of `fill_files`: shared by its workers and the calling thread."""

    def __init__(
        self,
        files: Sequence[tuple[FileLayout, Path]],
        recorded: Mapping[str, Finished],
        settings: FillSettings,
        recorder: Recorder,
        progress: Progress | None,
    ) -> None:
        self.settings = settings
        self.recorded = recorded
        self.stop = threading.Event()
        self.total = sum(layout.size for layout, _ in files)
        self._recorder = recorder
        self._progress = progress
        self._files = [OutputFile(layout, path, self.total) for layout, path in files]
        self._jobs = iter([(file, fill) for file in self._files for fill in file.layout.fills])
        self._lock = threading.Lock()
        self._results: queue.SimpleQueue[tuple[OutputFile, Finished] | BaseException | None] = queue.SimpleQueue()

    def run(self, stop_requested: Callable[[], bool]) -> bool:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.settings.workers)]
        try:
            for file in self._files:
                if not file.layout.fills:
                    self._complete(file)
            for thread in threads:
                thread.start()
            self._collect(len(threads), stop_requested)
        except BaseException:
            self.stop.set()
            self._join(threads)
            with contextlib.suppress(OSError, HxaconvError):
                self._drain()
                self._record()
            raise
        finally:
            self._join(threads)
            for file in self._files:
                file.close()
        return not any(file.waiting for file in self._files)

    def _join(self, threads: Sequence[threading.Thread]) -> None:
        for thread in threads:
            if thread.ident is not None:
                thread.join()

    def _collect(self, workers: int, stop_requested: Callable[[], bool]) -> None:
        """Record what workers finish, until all of them have ended."""
        while workers:
            if stop_requested():
                self.stop.set()
            try:
                result = self._results.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(result, BaseException):
                raise result
            if result is None:
                workers -= 1
                continue
            file, finished = result
            file.finished(finished)
            if not file.waiting:
                self._complete(file)
            elif sum(file.unsynced_bytes for file in self._files) >= BATCH_BYTES:
                self._record()
        self._record()

    def _drain(self) -> None:
        while not self._results.empty():
            result = self._results.get()
            if isinstance(result, tuple):
                result[0].finished(result[1])

    def _record(self) -> None:
        """Sync what is finished, then make it known."""
        for file in self._files:
            if file.unsynced and not file.failed:
                file.sync()
                self._recorder.tensors_done(file.layout, file.unsynced)
                file.unsynced = []

    def _complete(self, file: OutputFile) -> None:
        file.seal()
        self._record()
        self._recorder.file_done(file.layout)
        if not self.settings.keep_cache:
            diskio.drop_cached(file.open())
        file.close()

    def _work(self) -> None:
        try:
            worker = _Worker(self)
            try:
                while (job := self._next_job()) is not None:
                    finished = worker.tensor(*job)
                    if finished is None:
                        break
                    self._results.put((job[0], finished))
            finally:
                worker.leave()
        except BaseException as error:
            self.stop.set()
            self._results.put(error)
        finally:
            self._results.put(None)

    def _next_job(self) -> tuple[OutputFile, Fill] | None:
        with self._lock:
            return None if self.stop.is_set() else next(self._jobs, None)

    def advance(self, count: int, what: str) -> None:
        """Tell of progress; from any worker."""
        if self._progress is not None:
            with self._lock:
                self._progress.advance(count, what)


class _Worker:
    """One thread's buffers, and its view of the file it writes into."""

    def __init__(self, filling: _Filling) -> None:
        self._filling = filling
        self._scratch = Scratch()
        self._file: OutputFile | None = None
        self._fd = -1
        self._behind = WriteBehind(keep_cache=filling.settings.keep_cache)

    def tensor(self, file: OutputFile, fill: Fill) -> Finished | None:
        """Make one tensor, or find it there already; None if it was stopped on the way."""
        self._enter(file)
        earlier = self._filling.recorded.get(fill.name)
        if earlier is not None and self._is_there(fill, earlier):
            self._filling.advance(fill.recipe.nbytes, fill.name)
            return earlier
        if file.layout.mirror is not None:
            checks = self._read_back(fill)
            self._filling.advance(fill.recipe.nbytes, fill.name)
            return checks.finished(fill.name) if checks else None
        return self._write(file, fill)

    def _enter(self, file: OutputFile) -> None:
        # A descriptor of its own: the calling thread closes its own one as soon as the file is complete.
        if file is not self._file:
            self.leave()
            file.open()
            with file.errors("opening"):
                self._fd = open_output(file.path, write=file.layout.mirror is None)
            self._file = file

    def leave(self) -> None:
        """Finish with the current file."""
        if self._file is not None:
            self._behind.flush(self._fd)
            os.close(self._fd)
            self._file = None

    def _write(self, file: OutputFile, fill: Fill) -> Finished | None:
        settings = self._filling.settings
        checks = Checks(fill.recipe.dtype, crc32=settings.crc32, sha256=settings.sha256)
        position, told = fill.offset, fill.offset
        self._behind.sources = list(dict.fromkeys(fill.recipe.make.sources()))
        for piece in fill.recipe.pieces(self._scratch):
            if self._filling.stop.is_set():
                return None
            try:
                write_from(self._fd, piece, position)
            except OSError as error:
                doing = f"writing {len(piece)} bytes at {position} ({fill.name})"
                raise diskio.output_error(error, file.path, doing, self._filling.total) from error
            checks.update(piece)
            self._behind.wrote(self._fd, position, len(piece))
            position += len(piece)
            if position - told >= PROGRESS_BYTES:
                self._filling.advance(position - told, fill.name)
                told = position
        self._filling.advance(position - told, fill.name)
        return checks.finished(fill.name)

    def _is_there(self, fill: Fill, earlier: Finished) -> bool:
        checks = self._read_back(fill)
        return checks is not None and checks.agrees(earlier)

    def _read_back(self, fill: Fill) -> Checks | None:
        """The checks of what stands in the file; None where it cannot be read."""
        settings = self._filling.settings
        checks = Checks(fill.recipe.dtype, crc32=settings.crc32, sha256=settings.sha256)
        position, end = fill.offset, fill.offset + fill.recipe.nbytes
        while position < end:
            piece = self._scratch.read[: min(len(self._scratch.read), end - position)]
            try:
                got = read_into(self._fd, piece, position)
            except OSError:
                return None
            if got == 0 or self._filling.stop.is_set():
                return None
            checks.update(piece[:got])
            position += got
        return checks
