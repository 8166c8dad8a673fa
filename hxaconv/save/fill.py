"""Fills laid-out files with bytes: the one place where tensors are written.

Workers take tensors in plan order, make or copy their bytes in chunks, and on the way compute checksums and
count values that are not finite. The calling thread syncs what is finished and hands it to the journal,
so that a tensor is recorded as done only once its bytes would survive a power loss.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from hxaconv.errors import HxaconvError
from hxaconv.formats import FileLayout, Fill
from hxaconv.formats.files import SourceFile, read_into, write_from
from hxaconv.model.plan import Buffers
from hxaconv.progress import Progress
from hxaconv.save import diskio
from hxaconv.save.checksums import Checks, Finished

BATCH_BYTES = 512 * 1024 * 1024
"""Bytes that are finished before they are synced and recorded together."""
PROGRESS_BYTES = 8 * 1024 * 1024
WINDOW_BYTES = 32 * 1024 * 1024
"""Bytes that a worker writes before it asks for them to go to disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FillSettings:
    """How to fill: `crc32` and `sha256` are computed where asked for."""

    workers: int
    crc32: bool
    sha256: bool
    keep_cache: bool
    """False: what was read and written is dropped from the page cache, so that it does not push out the rest."""


class Filling:
    """The tensors that one process writes into files which have their sizes already.

    `jobs` are (file, its path, the tensors to write there); tensors in `recorded` are re-read, and written again only
    if their checksum differs; `done` is told of tensors that are on disk.
    """

    def __init__(
        self,
        jobs: Sequence[tuple[FileLayout, Path, Sequence[Fill]]],
        recorded: Mapping[str, Finished],
        settings: FillSettings,
        done: Callable[[Sequence[Finished]], None],
        *,
        total: int,
        progress: Progress | None = None,
    ) -> None:
        self.settings = settings
        self.recorded = recorded
        self.total = total
        self.stop = threading.Event()
        self._done = done
        self._progress = progress
        self._files = [OutputFile(layout, path, fills, total) for layout, path, fills in jobs]
        self._jobs = iter([(file, fill) for file in self._files for fill in file.fills])
        self._lock = threading.Lock()
        self._results: queue.SimpleQueue[tuple[OutputFile, Finished] | BaseException | None] = queue.SimpleQueue()

    def run(self, stop_requested: Callable[[], bool] = lambda: False) -> None:
        """Write them all, or, once `stop_requested`, those that are under way; what is finished is recorded.

        Raises:
            HxaconvError: when reading or writing fails; what is finished then is recorded.
        """
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.settings.workers)]
        try:
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
            file.unsynced.append(finished)
            file.waiting -= 1
            if not file.waiting or sum(file.unsynced_bytes for file in self._files) >= BATCH_BYTES:
                self._record()
            if not file.waiting:
                if not self.settings.keep_cache:
                    diskio.drop_cached(file.open())
                file.close()
        self._record()

    def _drain(self) -> None:
        while not self._results.empty():
            result = self._results.get()
            if isinstance(result, tuple):
                result[0].unsynced.append(result[1])

    def _record(self) -> None:
        """Sync what is finished, then have it recorded: never the other way round."""
        for file in self._files:
            if file.unsynced and not file.failed:
                file.sync()
                self._done(file.unsynced)
                file.unsynced = []

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
        """Report progress; from any worker."""
        if self._progress is not None:
            with self._lock:
                self._progress.advance(count, what)


class OutputFile:
    """One output file while tensors are written into it: what is on its way to disk, and the descriptor that syncs."""

    def __init__(self, layout: FileLayout, path: Path, fills: Sequence[Fill], total: int) -> None:
        self.layout = layout
        self.path = path
        self.fills = fills
        self.waiting = len(fills)
        self.unsynced: list[Finished] = []
        self.failed = False
        """Whether a sync has failed: a later one that succeeds says nothing about these bytes."""
        self._bytes = {fill.name: fill.recipe.nbytes for fill in fills}
        self._total = total
        self._lock = threading.Lock()
        self._fd: int | None = None

    def open(self) -> int:
        """The descriptor that syncs: there before the first byte is written, so that it hears of every lost page."""
        with self._lock, self.errors("opening"):
            if self._fd is None:
                self._fd = open_output(self.path, write=self.layout.hard_link is None)
            return self._fd

    @property
    def unsynced_bytes(self) -> int:
        """Bytes of tensors that may not be on disk yet."""
        return sum(self._bytes[finished.name] for finished in self.unsynced)

    def sync(self) -> None:
        """Wait until everything written so far is on disk."""
        fd = self.open()
        self.failed = True
        with self.errors("syncing"):
            diskio.sync_file(fd)
        self.failed = False

    def close(self) -> None:
        """Close the descriptor, if there is one."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def errors(self, doing: str) -> AbstractContextManager[None]:
        """What the system refuses inside, as an error of ours."""
        return diskio.explained(self.path, doing, self._total)


class _Worker:
    """One thread's buffers, and its view of the file it writes into."""

    def __init__(self, filling: Filling) -> None:
        self._filling = filling
        self._buffers = Buffers()
        self._file: OutputFile | None = None
        self._fd = -1
        self._writeback = Writeback(keep_cache=filling.settings.keep_cache)

    def tensor(self, file: OutputFile, fill: Fill) -> Finished | None:
        """Make one tensor, or find it there already; None if it was stopped on the way."""
        self._enter(file)
        earlier = self._filling.recorded.get(fill.name)
        if earlier is not None and self._is_there(fill, earlier):
            self._filling.advance(fill.recipe.nbytes, fill.name)
            return earlier
        if file.layout.hard_link is not None:
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
                self._fd = open_output(file.path, write=file.layout.hard_link is None)
            self._file = file

    def leave(self) -> None:
        """Finish with the current file."""
        if self._file is not None:
            self._writeback.flush(self._fd)
            os.close(self._fd)
            self._file = None

    def _write(self, file: OutputFile, fill: Fill) -> Finished | None:
        checks = self._checks(fill)
        position, reported = fill.offset, fill.offset
        self._writeback.sources = list(dict.fromkeys(fill.recipe.make.sources()))
        for chunk in fill.recipe.pieces(self._buffers):
            if self._filling.stop.is_set():
                return None
            with file.errors(f"writing {len(chunk)} bytes at {position} ({fill.name})"):
                write_from(self._fd, chunk, position)
            checks.update(chunk)
            self._writeback.wrote(self._fd, position, len(chunk))
            position += len(chunk)
            if position - reported >= PROGRESS_BYTES:
                self._filling.advance(position - reported, fill.name)
                reported = position
        self._filling.advance(position - reported, fill.name)
        return checks.finished(fill.name)

    def _checks(self, fill: Fill) -> Checks:
        settings = self._filling.settings
        return Checks(fill.recipe.dtype, crc32=settings.crc32, sha256=settings.sha256)

    def _is_there(self, fill: Fill, earlier: Finished) -> bool:
        checks = self._read_back(fill)
        return checks is not None and checks.agrees(earlier)

    def _read_back(self, fill: Fill) -> Checks | None:
        """The checks of what stands in the file; None where it cannot be read."""
        checks = self._checks(fill)
        position, end = fill.offset, fill.offset + fill.recipe.nbytes
        while position < end:
            chunk = self._buffers.read[: min(len(self._buffers.read), end - position)]
            try:
                got = read_into(self._fd, chunk, position)
            except OSError:
                return None
            if got == 0 or self._filling.stop.is_set():
                return None
            checks.update(chunk[:got])
            position += got
        return checks


class Writeback:
    """Sends written ranges to disk a window at a time, and keeps big totals out of the page cache."""

    def __init__(self, *, keep_cache: bool) -> None:
        self._keep_cache = keep_cache
        self._window: list[tuple[int, int]] = []
        self._before: list[tuple[int, int]] = []
        self._window_bytes = 0
        self.sources: Sequence[SourceFile] = ()

    def wrote(self, fd: int, offset: int, count: int) -> None:
        """Take note of a range that was written, and send it off with others once they fill a window."""
        if self._window and sum(self._window[-1]) == offset:
            self._window[-1] = (self._window[-1][0], self._window[-1][1] + count)
        else:
            self._window.append((offset, count))
        self._window_bytes += count
        if self._window_bytes >= WINDOW_BYTES:
            self.turn(fd)

    def turn(self, fd: int) -> None:
        """Start writing this window, wait for the one before and drop its pages."""
        for offset, count in self._window:
            diskio.start_writing_back(fd, offset, count)
        if not self._keep_cache:
            for offset, count in self._before:
                diskio.wait_written_back(fd, offset, count)
                diskio.drop_cached(fd, offset, count)
            for source in self.sources:
                diskio.drop_cached(source.open())
        self._before, self._window, self._window_bytes = self._window, [], 0

    def flush(self, fd: int) -> None:
        """Let go of everything."""
        self.turn(fd)
        self.turn(fd)


def open_output(path: Path, *, write: bool = True) -> int:
    """A descriptor that writes into a file that is there; a hard link to a source is only read."""
    return os.open(path, (os.O_RDWR if write else os.O_RDONLY))
