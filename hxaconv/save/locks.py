"""One run at a time on a target: a lock of the system's on a file that says who holds it.

It ends with its holder, however that ends. Where the file system keeps no locks, runs are not told apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from hxaconv.errors import HxaconvError
from hxaconv.save import diskio


@contextlib.contextmanager
def held(path: Path, target: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is removed in the end, during a run on `target`.

    Raises:
        HxaconvError: naming who holds it, or why the file cannot be made.
    """
    with diskio.explained(path, "locking"):
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
            if _still_there(fd, path):
                with contextlib.suppress(OSError):  # on a full disk the lock is held without saying by whom
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
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _still_there(fd: int, path: Path) -> bool:
    # Its last holder may have removed the file between our opening and locking it.
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(fd: int) -> str:
    """`process 4711 on host node3`."""
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
        return f"process {int(holder['pid'])} on host {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
