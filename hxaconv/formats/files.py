"""Files of a source checkpoint: opened once, read at offsets, and watched for change."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hxaconv.errors import HxaconvError, raise_all

TEMPLATES = "additional_chat_templates"
"""The one folder inside a checkpoint whose files belong to it: chat templates of transformers, one per file."""
CHUNK_BYTES = 1024 * 1024
"""Bytes moved per read and write. With smaller ones, workers that cast wait for the interpreter's lock; writes of
2 MiB and more take Linux twice the time."""
MAX_NAME_LENGTH = 512


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Read at `offset` into `buffer`; returns the bytes read (0 at the end of the file)."""
    return os.preadv(fd, [buffer], offset)


def write_from(fd: int, buffer: memoryview, offset: int) -> None:
    """Write the whole of `buffer` at `offset`, however many calls the system needs for it."""
    while len(buffer):
        done = os.pwrite(fd, buffer[:CHUNK_BYTES], offset)
        buffer, offset = buffer[done:], offset + done


_READING = os.O_RDONLY | os.O_NONBLOCK
"""Without waiting, should a pipe have taken the file's place."""


class SourceChanged(HxaconvError):
    """A source is no longer the one that was planned with: what was made of it so far is of no use."""


def kind_of(path: Path) -> str:
    """In words, what stands there that is no regular file."""
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which does not exist"
    kinds = ((path.is_dir, "a folder"), (path.is_fifo, "a named pipe"), (path.is_socket, "a socket"))
    return next((word for is_one, word in kinds if is_one()), "a device")


def show(text: str) -> str:
    """Text from a file as a message may print it: short, and without control characters."""
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return text if text.isprintable() else repr(text)


def not_the_file(start: bytes) -> tuple[str, str] | None:
    """What stands in place of a file that did not arrive, by its first bytes, and what to do; None for others."""
    start = start.lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself", "Run `git lfs pull` in that folder."
    if start.lower().startswith((b"<!", b"<html", b"<?xml")):
        return "a web page", "The download went wrong: download it again."
    if re.fullmatch(rb"(\.\./)+blobs/[0-9a-f]{40,64}\s*", start):
        return "a link of the Hub's cache written out as text", "Copy the cache with its links, or download it again."
    return None


def broken(where: str, what: str) -> HxaconvError:
    """The error for a file whose structure contradicts itself."""
    return HxaconvError(f"{where}: {what}", hint="The file is damaged or truncated; download or copy it again.")


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse names of tensors that no reader could print or look up.

    Raises:
        HxaconvError: listing names that are empty, longer than 512 characters or not printable.
    """
    odd = [show(name) for name in names if not (0 < len(name) <= MAX_NAME_LENGTH and name.isprintable())]
    raise_all(f"{where}: tensor names must be printable text of at most {MAX_NAME_LENGTH} characters:", odd)


@dataclass(eq=False, slots=True)
class SourceFile:
    """One file of a checkpoint, local or (until `fetch` has run) only on the Hub.

    `name` is relative to the checkpoint, `label` is what messages call the file, `size` its bytes.
    """

    name: str
    label: str
    size: int
    path: Path | None = None
    mtime_ns: int | None = None
    fetch: Callable[[], None] | None = None
    """Downloads the file and sets its path."""
    header_digest: str = ""
    """sha256 of the bytes that locate the tensors, set by their parser."""
    _fd: int | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @classmethod
    def local(cls, path: Path, *, name: str | None = None, label: str | None = None) -> SourceFile:
        """A file on this machine.

        Raises:
            HxaconvError: when it is missing or not a regular file.
        """
        try:
            stat = os.stat(path)
        except OSError as error:
            raise HxaconvError(f"{path}: {error.strerror}", hint="Check the path.") from None
        if not path.is_file():
            raise HxaconvError(f"{path} is {kind_of(path)}, expected a file")
        return cls(name or path.name, label or str(path), stat.st_size, path, stat.st_mtime_ns)

    def open(self) -> int:
        """The file's descriptor, opened at first use; downloads the file where it is not here yet.

        Raises:
            HxaconvError: when the file cannot be opened, or (SourceChanged) has changed since it was parsed.
        """
        with self._lock:
            if self._fd is None:
                if self.path is None:
                    assert self.fetch is not None
                    self.fetch()
                assert self.path is not None
                try:
                    self._fd = os.open(self.path, _READING)
                except OSError as error:
                    raise HxaconvError(f"{self.label}: {error.strerror}") from None
                self._check_unchanged(self._fd)
            return self._fd

    def _check_unchanged(self, fd: int) -> None:
        stat = os.fstat(fd)
        changed = stat.st_size != self.size or (self.mtime_ns is not None and stat.st_mtime_ns != self.mtime_ns)
        if changed:
            raise SourceChanged(
                f"{self.label} changed while it was being read: expected {self.size} bytes,"
                f" found {stat.st_size}{'' if stat.st_size != self.size else ' with a new modification time'}",
                hint="Wait until whatever writes it has finished, then start again.",
            )

    def check_unchanged(self) -> None:
        """Fail if the file on disk is no longer the one that was parsed (also when it was replaced).

        Raises:
            SourceChanged: when size or modification time differ, or it is gone.
        """
        if self.path is None:
            return
        if self._fd is not None:
            self._check_unchanged(self._fd)
        try:
            fd = os.open(self.path, _READING)
        except OSError as error:
            raise SourceChanged(
                f"{self.label} has vanished: {error.strerror}", hint="Put it back, then start again."
            ) from None
        try:
            self._check_unchanged(fd)
        finally:
            os.close(fd)

    def __del__(self) -> None:
        # Plans hold their files: one is done with when the last plan of it is.
        self.close()

    def close(self) -> None:
        """Close the descriptor; the next `open` opens it again."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes at `offset`.

        Raises:
            HxaconvError: when the file ends before.
        """
        buffer = bytearray(count)
        self._fill(memoryview(buffer), offset)
        return bytes(buffer)

    def chunks(self, offset: int, count: int, buffer: memoryview) -> Iterator[memoryview]:
        """The bytes [offset, offset + count), one chunk after the other in `buffer`."""
        end = offset + count
        while offset < end:
            chunk = buffer[: end - offset]
            self._fill(chunk, offset)
            yield chunk
            offset += len(chunk)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        fd, filled = self.open(), 0
        while filled < len(buffer):
            try:
                got = read_into(fd, buffer[filled:], offset + filled)
            except OSError as error:
                raise HxaconvError(
                    f"{self.label}: reading {len(buffer)} bytes at {offset} failed: {error.strerror}",
                    hint="The disk or the network file system reports an error; check it, then use --resume.",
                ) from None
            if got == 0:
                self._check_unchanged(fd)
                raise HxaconvError(
                    f"{self.label} ends at byte {offset + filled}, expected {offset + len(buffer)}",
                    hint="The file is truncated; download or copy it again.",
                )
            filled += got


@dataclass(frozen=True, slots=True)
class Section:
    """A file inside a file: the bytes [start, start + size) of `file`, read as if they began at 0."""

    file: SourceFile
    start: int
    size: int
    label: str

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes at `offset` of the section.

        Raises:
            HxaconvError: when the section or the file ends before.
        """
        if offset < 0 or offset + count > self.size:
            raise broken(self.label, f"it ends at byte {self.size}, expected {offset + count}")
        return self.file.read(self.start + offset, count)


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of bytes of a source file; `file` None stands for zero bytes."""

    file: SourceFile | None
    offset: int
    nbytes: int
