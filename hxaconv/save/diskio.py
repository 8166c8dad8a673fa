"""What the system offers beyond reading and writing, its errors in words, and a lock that one run at a time holds.

Each call has a fallback: Linux has all of them; others go without writeback and cache control, which costs speed only.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from hxaconv.errors import HxaconvError
from hxaconv.formats.files import CHUNK_BYTES

_F_FULLFSYNC = 51
_SYNC_WAIT_BEFORE, _SYNC_WRITE, _SYNC_WAIT_AFTER = 1, 2, 4
_NOT_OFFERED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


@functools.cache
def _libc(name: str) -> Callable[..., int] | None:
    """A call of the C library that Python does not wrap; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    try:
        call = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    offset = ctypes.c_int64
    call.argtypes = {
        "fallocate": [ctypes.c_int, ctypes.c_int, offset, offset],
        "sync_file_range": [ctypes.c_int, offset, offset, ctypes.c_uint],
    }[name]
    call.restype = ctypes.c_int
    return call  # type: ignore[no-any-return]


def reserve(fd: int, size: int) -> None:
    """Give the file its final size, and its blocks where the file system can.

    The C library's own posix_fallocate is avoided: where the file system cannot reserve, it writes a byte into
    every block instead.

    Raises:
        OSError: ENOSPC, EDQUOT or EFBIG when the size does not fit.
    """
    fallocate = _libc("fallocate")
    if size and fallocate is not None:
        import ctypes

        while fallocate(fd, 0, 0, size) != 0:
            number = ctypes.get_errno()
            if number in _NOT_OFFERED:
                break
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
    os.ftruncate(fd, size)


def write_back(fd: int, offset: int, count: int, *, wait: bool = False) -> None:
    """Ask for these dirty pages to go to disk, or wait until they are; errors are left for the fsync that follows."""
    call = _libc("sync_file_range")
    if call is not None:
        call(fd, offset, count, _SYNC_WAIT_BEFORE | _SYNC_WRITE | _SYNC_WAIT_AFTER if wait else _SYNC_WRITE)


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
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):  # macOS's own fsync stops at the drive's cache
            fcntl.fcntl(fd, _F_FULLFSYNC)
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
    """
    temporary = workplace / f"{path.name}.tmp-{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                while len(view):
                    view = view[os.write(fd, view) :]
            sync_file(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


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
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


_NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_HINTS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Choose a folder that files can be made in."),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "Raise the limit of open files (ulimit -n), or end programs that hold many."
    ),
}


def output_error(error: OSError, path: Path, doing: str, total: int | None = None) -> HxaconvError:
    """What went wrong while writing `path`, and what to do; `total` bytes are what the whole output takes."""
    hint = _HINTS.get(error.errno or 0, "Check the disk or the network file system.")
    if error.errno in _NO_SPACE:
        hint = "" if total is None else f"The output needs {total:,} bytes in all; "
        try:
            free = free_bytes(path.parent)
            full = free < (total or CHUNK_BYTES)
            hint += f"{free:,} are free now{'' if full else ': what has run out is a quota, or inodes (`df -i`)'}."
        except OSError:
            hint += "how much is free is not known."
        hint += " Make room, or choose another disk."
    return HxaconvError(f"{path}: {doing} failed: {error.strerror or error}", hint=hint)


@contextlib.contextmanager
def explained(path: Path, doing: str = "writing", total: int | None = None) -> Iterator[None]:
    """What the system refuses inside, as an error of ours that names the file, or else `path`."""
    try:
        yield
    except OSError as error:
        raise output_error(error, Path(os.fsdecode(error.filename or path)), doing, total) from error


@contextlib.contextmanager
def held(path: Path, target: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is removed in the end, during a run on `target`.

    The lock is the system's and ends with its holder, however that ends; where the file system keeps none, nobody
    is held up.

    Raises:
        HxaconvError: naming who holds it, or why the file cannot be made.
    """
    with explained(path, "locking"):
        fd = _acquire(path, target)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(fd)


def _acquire(path: Path, target: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(fd):
                raise HxaconvError(
                    f"{target}: {_holder(fd)} is writing the same target",
                    hint="Wait until it has finished, or stop it first; --resume takes over what it has done.",
                )
            # Its last holder may have removed the file between our opening and locking it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    with contextlib.suppress(OSError):  # on a full disk the lock is held without its holder's number
                        os.ftruncate(fd, 0)
                        os.write(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int) -> bool:
    """False where another process holds it."""
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, ImportError):  # a file system, or a system, without such locks
        return True
    return True


def _holder(fd: int) -> str:
    """`process 4711 on host node3`."""
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
        return f"process {int(holder['pid'])} on host {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
