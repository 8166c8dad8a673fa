"""One weight file of an output while it is being filled: created, sealed, synced."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from hxaconv.formats.files import SourceFile, write_from
from hxaconv.formats.layout import FileLayout, Segment
from hxaconv.save import diskio
from hxaconv.save.checksums import Finished


class OutputFile:
    """One output file while it is being filled."""

    def __init__(self, layout: FileLayout, path: Path, total: int) -> None:
        self.layout = layout
        self.path = path
        self.waiting = {fill.name for fill in layout.fills}
        self.unsynced: list[Finished] = []
        self.failed = False
        """Whether a sync has failed: a later one that succeeds says nothing about these bytes."""
        self._bytes = {fill.name: fill.recipe.nbytes for fill in layout.fills}
        self._crcs: dict[str, int] = {}
        self._total = total
        self._lock = threading.Lock()
        self._fd: int | None = None

    def open(self) -> int:
        """The descriptor through which the file is created, sealed and synced."""
        with self._lock:
            if self._fd is None:
                self._fd = self._create()
            return self._fd

    def _create(self) -> int:
        if self.layout.mirror is not None:
            with self.errors("linking or copying"):
                mirror_file(self.layout.mirror, self.path)
                return open_output(self.path, write=False)
        existed = self.path.exists()
        with self.errors(f"reserving {self.layout.size} bytes"):
            fd = open_output(self.path)
            try:
                diskio.reserve(fd, self.layout.size)
            except OSError:
                os.close(fd)
                if not existed:
                    # A failed reservation keeps all the free space it found.
                    self.path.unlink()
                raise
        self.write_segments(fd, self.layout.segments)
        return fd

    def write_segments(self, fd: int, segments: Iterable[Segment]) -> None:
        """Write headers and other bytes that belong to no tensor, each at its offset.

        Raises:
            HxaconvError: when the system refuses.
        """
        for offset, data in segments:
            with self.errors(f"writing {len(data)} bytes at {offset}"):
                write_from(fd, memoryview(data), offset)

    @property
    def unsynced_bytes(self) -> int:
        """Bytes of tensors that may not be on disk yet."""
        return sum(self._bytes[finished.name] for finished in self.unsynced)

    def finished(self, finished: Finished) -> None:
        """Take note of a tensor."""
        self.waiting.discard(finished.name)
        self.unsynced.append(finished)
        if finished.crc32 is not None:
            self._crcs[finished.name] = finished.crc32

    def seal(self) -> None:
        """Write what depends on the tensors' checksums."""
        if self.layout.seal is not None:
            self.write_segments(self.open(), self.layout.seal(self._crcs))

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

    @contextlib.contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turn the system's errors into ours."""
        try:
            yield
        except OSError as error:
            raise diskio.output_error(error, self.path, doing, self._total) from error


def open_output(path: Path, *, write: bool = True) -> int:
    """A descriptor that writes into `path`, keeping what is in it; a mirror of a source is only read."""
    flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
    return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)


def mirror_file(source: SourceFile, path: Path) -> None:
    """Make `path` the same file as the source, or, where there are no links, a complete copy of it."""
    source.open()
    assert source.path is not None
    if path.exists():
        return
    try:
        os.link(source.path, path)
    except OSError:
        copy = path.with_name(f"{path.name}.copying")
        shutil.copyfile(source.path, copy)
        with open(copy, "rb+") as file:
            diskio.sync_file(file.fileno())
        os.replace(copy, path)
