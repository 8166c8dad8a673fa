"""What the system offers beyond reading and writing, its errors in words, and a lock that one run at a time holds.

Each call has a fallback: Linux has all of them; others go without writeback and cache control, which costs speed only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from hxaconv.errors import HxaconvError
from hxaconv.formats.files import CHUNK_BYTES

_SYNC_WAIT_BEFORE, _SYNC_WRITE, _SYNC_WAIT_AFTER = 1, 2, 4
_NOT_OFFERED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


@functools.cache
def _libc(name: str) -> Callable[..., int] | None:
    """A call of Linux's C library that Python does not wrap."""
    import ctypes

    return getattr(ctypes.CDLL(None, use_errno=True), name, None) if sys.platform.startswith("linux") else None


def reserve(fd: int, size: int) -> None:
    """Give the file its final size, and its blocks where the file system can.

    The C library's own posix_fallocate is avoided: where the file system cannot reserve, it writes a byte into
    every block instead.

    Raises:
        OSError: ENOSPC, EDQUOT or EFBIG when the size does not fit.
    """
    import ctypes

    fallocate = _libc("fallocate")
    while size and fallocate and fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        number = ctypes.get_errno()
        if number in _NOT_OFFERED:
            break
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    os.ftruncate(fd, size)


def write_back(fd: int, offset: int, count: int, *, wait: bool = False) -> None:
    """Ask for these dirty pages to go to disk, or wait until they are; errors are left for the fsync that follows."""
    import ctypes

    if call := _libc("sync_file_range"):
        how = _SYNC_WAIT_BEFORE | _SYNC_WRITE | _SYNC_WAIT_AFTER if wait else _SYNC_WRITE
        call(fd, ctypes.c_int64(offset), ctypes.c_int64(count), how)


def drop_cached(fd: int, offset: int = 0, count: int = 0) -> None:
    """Inform the system that the cached pages (all of the file by default) will not be needed again."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, count, os.POSIX_FADV_DONTNEED)


def sync_file(fd: int) -> None:
    """Wait until the file's bytes, and its size, would survive a power loss.

    Raises:
        OSError: when the device reports an error. It does so once: what was not synced then never is.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):
        with contextlib.suppress(OSError):  # macOS's own fsync stops at the drive's cache
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    getattr(os, "fdatasync", os.fsync)(fd)


def sync_folder(path: Path) -> None:
    """Make creations and renames in a folder survive a power loss."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    finally:
        os.close(fd)


def write_file(path: Path, chunks: Iterable[bytes | memoryview], workplace: Path) -> None:
    """A small file, complete and synced under its name, or not there at all.

    It is written in the folder `workplace`, on the same file system: a crash leaves nothing beside `path`.

    Raises:
        OSError: naming the file.
    """
    temporary = workplace / f"{path.name}.tmp-{os.getpid()}"
    try:
        with open(temporary, "wb", buffering=0) as file:
            for chunk in chunks:
                view = memoryview(chunk)
                while len(view):
                    view = view[os.write(file.fileno(), view) :]
            sync_file(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        error.filename = path  # not all calls know it
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def write_result(path: Path, data: bytes) -> None:
    """A small file of results (a layer map, a plot), whole or not at all.

    Raises:
        HxaconvError: when it cannot be written.
    """
    with explained(path, f"writing {len(data):,} bytes"):
        write_file(path, [data], path.parent)


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write here."""
    return shutil.disk_usage(folder).free


def memory_limit() -> int | None:
    """Bytes of memory that are to be had, cached file pages included; None where the system has no figure."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^MemAvailable: +(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


_HINTS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Choose a folder that files can be made in."),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "Raise the limit of open files (ulimit -n), or end programs that hold many."
    ),
}


@contextlib.contextmanager
def explained(path: Path, doing: str = "writing", total: int | None = None) -> Iterator[None]:
    """What the system refuses inside, as an error of ours that names the file, or else `path`, and what to do.

    `total` bytes are what the whole output takes.
    """
    try:
        yield
    except OSError as error:
        path = Path(os.fsdecode(error.filename or path))
        hint = _HINTS.get(error.errno or 0, "Check the disk or the network file system.")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "" if total is None else f"The output needs {total:,} bytes in all; "
            with contextlib.suppress(OSError):
                free = free_bytes(path.parent)
                full = free < (total or CHUNK_BYTES)
                hint += f"{free:,} are free now{'' if full else ': what has run out is a quota, or inodes (`df -i`)'}. "
            hint += "Make room, or choose another disk."
        raise HxaconvError(f"{path}: {doing} failed: {error.strerror or error}", hint=hint) from error


@contextlib.contextmanager
def held(path: Path, target: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is removed in the end, during a run on `target`.

    The lock is the system's and ends with its holder, however that ends; where the file system keeps none, nobody
    is held up.

    Raises:
        HxaconvError: naming who holds it, or why the file cannot be made.
    """
    with contextlib.ExitStack() as stack:
        with explained(path, "locking"):
            fd = None
            # Its last holder may have removed the file between our opening and locking it.
            while fd is None or not _stands_at(fd, path):
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                stack.callback(os.close, fd)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = os.read(fd, 4096).decode(errors="replace") or "another process"
                    raise HxaconvError(
                        f"{target}: {holder} is writing the same target",
                        hint="Wait until it has finished, or stop it first; --resume takes over what it has done.",
                    ) from None
                except OSError:  # a file system without such locks
                    pass
            with contextlib.suppress(OSError):  # on a full disk the lock is held without its holder's name
                os.ftruncate(fd, 0)
                os.write(fd, f"process {os.getpid()} on host {socket.gethostname()}".encode())
        stack.callback(_remove, path)
        yield


def _stands_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
