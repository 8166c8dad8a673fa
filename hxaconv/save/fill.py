"""Fills laid-out files with bytes: the one place where tensors are written.

Workers take tensors in plan order, make or copy their bytes in chunks, and on the way compute checksums and
count values that are not finite. The calling thread syncs what is finished and hands it to the journal,
so that a tensor is recorded as done only once its bytes would survive a power loss.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from hxaconv.errors import HxaconvError
from hxaconv.formats import FileLayout, Fill, diskio
from hxaconv.formats.dtypes import count_nonfinite
from hxaconv.formats.files import SourceFile, read_into, write_from
from hxaconv.model.plan import Buffers, Recipe
from hxaconv.progress import Progress

BATCH_BYTES = 512 * 1024 * 1024
"""Bytes that are finished before they are synced and recorded together."""
PROGRESS_BYTES = 8 * 1024 * 1024
WINDOW_BYTES = 32 * 1024 * 1024
"""Bytes that a worker writes before it asks for them to go to disk."""


class Filling:
    """The tensors that one process writes into files which have their sizes already.

    Args:
        jobs: (file, its path, the tensors to write there), in order.
        recorded: Tensors of an earlier run: they are re-read, and written again only if their checksum differs.
        done: Is given tensors that are on disk.
        workers: How many threads write.
        kinds: Which checksums are computed.
        keep_cache: False: what was read and written is dropped from the page cache, so that it does not push out the
            rest.
        total: Bytes of the whole output, for messages.
    """

    def __init__(
        self,
        jobs: Sequence[tuple[FileLayout, Path, Sequence[Fill]]],
        recorded: Mapping[str, Finished],
        done: Callable[[Mapping[str, Finished]], None],
        *,
        workers: int = 1,
        kinds: Collection[str] = ("crc32",),
        keep_cache: bool = True,
        total: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self._files = [OutputFile(layout, path, len(fills), total) for layout, path, fills in jobs]
        self._jobs = ((file, fill) for file, job in zip(self._files, jobs, strict=True) for fill in job[2])
        self._recorded, self._done, self._progress = recorded, done, progress
        self._workers, self._kinds, self._keep_cache = workers, kinds, keep_cache
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._results: queue.SimpleQueue[tuple[OutputFile, Fill, Finished] | BaseException | None] = queue.SimpleQueue()
        self._unsynced_bytes = 0

    def run(self, stop_requested: Callable[[], bool] = lambda: False) -> None:
        """Write them all, or, once `stop_requested`, those that are under way; what is finished is recorded.

        Raises:
            HxaconvError: when reading or writing fails; what is finished then is recorded.
        """
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._workers)]
        try:
            for thread in threads:
                thread.start()
            working = len(threads)
            while working:
                if stop_requested():
                    self._stop.set()
                with contextlib.suppress(queue.Empty):
                    result = self._results.get(timeout=0.1)
                    if isinstance(result, BaseException):
                        raise result
                    if result is None:
                        working -= 1
                    else:
                        self._finished(*result)
            self._record()
        except BaseException:
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            with contextlib.suppress(OSError, HxaconvError):
                while not self._results.empty():
                    result = self._results.get()
                    if isinstance(result, tuple):
                        self._finished(*result)
                self._record()
            raise
        finally:
            for file in self._files:
                file.close()

    def _finished(self, file: OutputFile, fill: Fill, finished: Finished) -> None:
        """Take note of a tensor; record those so far once they are many, or all of a file."""
        file.unsynced[fill.name] = finished
        file.waiting -= 1
        self._unsynced_bytes += fill.recipe.nbytes
        if self._unsynced_bytes >= BATCH_BYTES or not file.waiting:
            self._record()
        if not file.waiting:
            if not self._keep_cache:
                diskio.drop_cached(file.open())
            file.close()

    def _record(self) -> None:
        """Sync what is finished, then have it recorded: never the other way round."""
        for file in self._files:
            if file.unsynced and not file.failed:
                file.sync()
                self._done(file.unsynced)
                file.unsynced = {}
        self._unsynced_bytes = 0

    def _work(self) -> None:
        """A worker: one tensor after the other, with buffers of its own."""
        try:
            buffers, writeback = Buffers(), Writeback(keep_cache=self._keep_cache)
            while not self._stop.is_set():
                with self._lock:
                    file, fill = next(self._jobs, (None, None))
                if file is None or fill is None:
                    break
                finished = self._there(file, fill, buffers)
                if finished is None and file.layout.hard_link is None:
                    finished = self._write(file, fill, buffers, writeback)
                if finished is not None:
                    self._results.put((file, fill, finished))
        except BaseException as error:
            self._stop.set()
            self._results.put(error)
        finally:
            self._results.put(None)

    def _there(self, file: OutputFile, fill: Fill, buffers: Buffers) -> Finished | None:
        """A tensor that stands in its file already: a source's own, or one of an earlier run with the same checksum."""
        earlier, linked = self._recorded.get(fill.name), file.layout.hard_link is not None
        if not linked and (earlier is None or earlier[:2] == (None, None)):  # without a checksum there is no telling
            return None
        fd, checks = file.open(), Checks(self._kinds, fill.recipe.dtype)
        position, end = fill.offset, fill.offset + fill.recipe.nbytes
        with file.errors(f"reading {fill.name}") if linked else contextlib.suppress(OSError):
            while position < end and not self._stop.is_set():
                chunk = buffers.read[: end - position]
                got = read_into(fd, chunk, position)
                if got == 0:
                    break
                checks.update(chunk[:got])
                position += got
        if position < end or not (linked or checks.found()[:2] == earlier[:2]):  # type: ignore[index]
            return None
        self._advance(fill.recipe.nbytes, fill.name)
        return checks.found()

    def _write(self, file: OutputFile, fill: Fill, buffers: Buffers, writeback: Writeback) -> Finished | None:
        """Make a tensor's bytes, where they belong; None if it was stopped on the way."""
        fd, checks, sources = file.open(), Checks(self._kinds, fill.recipe.dtype), fill.recipe.make.sources()
        position = reported = fill.offset
        for chunk in fill.recipe.chunks(buffers):
            if self._stop.is_set():
                return None
            with file.errors(f"writing {len(chunk)} bytes at {position} ({fill.name})"):
                write_from(fd, chunk, position)
            checks.update(chunk)
            writeback.wrote(file, position, len(chunk), sources)
            position += len(chunk)
            if position - reported >= PROGRESS_BYTES:
                self._advance(position - reported, fill.name)
                reported = position
        self._advance(position - reported, fill.name)
        return checks.found()

    def _advance(self, count: int, what: str) -> None:
        if self._progress is not None:
            with self._lock:
                self._progress.advance(count, what)


class OutputFile:
    """One output file while tensors are written into it, and the descriptor that all of them share.

    It is there before the first byte is written and until the last is synced, so that it learns of every lost page.
    """

    def __init__(self, layout: FileLayout, path: Path, waiting: int, total: int) -> None:
        self.layout = layout
        self.waiting = waiting
        """Tensors that are not finished."""
        self.unsynced: dict[str, Finished] = {}
        self.failed = False
        """Whether a sync has failed: a later one that succeeds is no proof for these bytes."""
        self._path, self._total = path, total
        self._lock = threading.Lock()
        self._fd: int | None = None

    def open(self) -> int:
        """The descriptor; a hard link to a source is only read."""
        with self._lock, self.errors("opening"):
            if self._fd is None:
                self._fd = os.open(self._path, os.O_RDWR if self.layout.hard_link is None else os.O_RDONLY)
            return self._fd

    def sync(self) -> None:
        """Wait until everything written so far is on disk."""
        self.failed = True
        with self.errors("syncing"):
            diskio.sync_file(self.open())
        self.failed = False

    def close(self) -> None:
        """Close the descriptor, if there is one."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def errors(self, doing: str) -> AbstractContextManager[None]:
        """What the system refuses inside, as an error of ours."""
        return diskio.explained(self._path, doing, self._total)


class Writeback:
    """Sends what a worker writes to disk a window at a time, and keeps big totals out of the page cache."""

    def __init__(self, *, keep_cache: bool) -> None:
        self._keep_cache = keep_cache
        self._file: OutputFile | None = None
        self._start = self._bytes = 0
        """Of the window; what other workers write in between may go with it."""
        self._before: tuple[int, int] | None = None

    def wrote(self, file: OutputFile, offset: int, count: int, sources: Iterable[SourceFile]) -> None:
        """Take note of a range; with a full window, start writing it, wait for the one before and drop its pages.

        In another file it begins anew: what is left of the last one is synced when that is complete.
        """
        if file is not self._file:
            self._file, self._start, self._bytes, self._before = file, offset, 0, None
        self._bytes += count
        if self._bytes < WINDOW_BYTES:
            return
        fd, window = file.open(), (self._start, offset + count - self._start)
        diskio.write_back(fd, *window)
        if not self._keep_cache:
            if self._before is not None:
                diskio.write_back(fd, *self._before, wait=True)
                diskio.drop_cached(fd, *self._before)
            for source in dict.fromkeys(sources):
                diskio.drop_cached(source.open())
        self._start, self._bytes, self._before = offset + count, 0, window


# Checksums, computed as bytes pass by


class Finished(NamedTuple):
    """A tensor whose bytes are written: its checksums, and how many of its values are NaN or infinite."""

    crc32: int | None
    sha256: str | None
    nonfinite: int

    def digest(self, kind: str) -> str | None:
        """`crc32:0a1b2c3d` or `sha256:...`; None for `none`."""
        if kind == "crc32":
            return f"crc32:{self.crc32 or 0:08x}"
        return f"sha256:{self.sha256}" if kind == "sha256" else None


class Checks:
    """Checksums over the chunks of one tensor, and, with its dtype, the count of values that are not finite."""

    def __init__(self, kinds: Collection[str], dtype: str | None = None) -> None:
        self._crc = 0 if "crc32" in kinds else None
        self._sha = hashlib.sha256() if "sha256" in kinds else None
        self._dtype, self._nonfinite = dtype, 0

    def update(self, chunk: memoryview) -> None:
        """Count in the next bytes of the tensor."""
        if self._crc is not None:
            self._crc = zlib.crc32(chunk, self._crc)
        if self._sha is not None:
            self._sha.update(chunk)
        if self._dtype is not None:
            self._nonfinite += count_nonfinite(chunk, self._dtype)

    def found(self) -> Finished:
        """What was found so far."""
        return Finished(self._crc, self._sha.hexdigest() if self._sha else None, self._nonfinite)


def digest_of(chunks: Iterable[bytes | memoryview], kind: str) -> str:
    """The digest of bytes, as records have them; sha256 where `kind` is `none`."""
    kind = kind if kind == "crc32" else "sha256"
    checks = Checks((kind,))
    for chunk in chunks:
        checks.update(memoryview(chunk))
    return str(checks.found().digest(kind))


def digest_of_file(path: Path, kind: str) -> str:
    """The same of a file, which may be large."""
    with open(path, "rb") as file:
        return digest_of(iter(lambda: file.read(1024 * 1024), b""), kind)


def type_text(recipe: Recipe) -> str:
    """`BF16 [48, 256]`: the dtype and shape of a tensor, as records have them."""
    return f"{recipe.dtype} {list(recipe.shape)}"
