"""Locks that say who holds them, and that end with their holder, however it ends.

The system's own file locks decide; what is written in the file is for the message. Where there are none
(Windows, some network file systems), a lock counts as held while its process lives, as far as can be known.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hxaconv.errors import HxaconvError
from hxaconv.save import diskio

if sys.platform != "win32":
    import fcntl

_HELD = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)


@dataclass(slots=True)
class Lock:
    """A lock that is held; `release` it, or let the process end."""

    path: Path
    fd: int
    shared: bool

    def release(self) -> None:
        """Give it up, and remove its file unless somebody shares it."""
        if self.fd < 0:
            return
        if not self.shared or _flock(self.fd, shared=False) is not False:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        os.close(self.fd)
        self.fd = -1


def acquire(path: Path, doing: str, *, shared: bool = False) -> Lock | dict[str, Any]:
    """The lock, or, if others hold it, what they wrote into it about themselves.

    Raises:
        OSError: where the file cannot be made.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            found = _try(fd, path, doing, shared)
        except BaseException:
            os.close(fd)
            raise
        if isinstance(found, Lock):
            return found
        os.close(fd)
        if found is not None:
            return found


def _try(fd: int, path: Path, doing: str, shared: bool) -> Lock | dict[str, Any] | None:
    """The lock, or who holds it; None if its file is no longer the one at `path`."""
    locked = _flock(fd, shared=shared)
    holder = _read(fd)
    if locked is False or (locked is None and _alive(holder) and not shared):
        return (holder or {"doing": "unknown"}) | ({"believed": True} if locked is None else {})
    if not _still_there(fd, path):
        return None
    if not shared or not holder:
        owner = {"doing": doing, "pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
        try:
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, json.dumps(owner).encode())
        except OSError:  # on a full disk the lock is held without saying by whom, if the system keeps it
            if locked is None:
                raise
    return Lock(path, fd, shared)


@contextlib.contextmanager
def held(path: Path, target: Path, part: tuple[int, int] | None, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock for a whole run on a target, or for part (i, n) of one, counted from 0.

    Raises:
        HxaconvError: naming who holds it.
    """
    doing = "a whole run" if part is None else f"part {part[0] + 1} of {part[1]}"
    try:
        lock = acquire(path, doing, shared=shared)
    except OSError as error:
        raise diskio.output_error(error, path, "locking") from error
    if not isinstance(lock, Lock):
        # Where the system keeps no locks, a file is all there is to go by.
        gone = f" If it is gone without a trace, delete {path}." if lock.get("believed") else ""
        raise HxaconvError(
            f"{target}: {describe_holder(lock)} is writing the same target",
            hint=f"Wait until it has finished, or stop it first; --resume takes over what it has done.{gone}",
        )
    try:
        yield
    finally:
        lock.release()


def describe_holder(holder: dict[str, Any]) -> str:
    """`process 4711 on host node3 (part 1 of 4)`."""
    if "pid" not in holder:
        return "another process"
    return f"process {holder['pid']} on host {holder.get('host', '?')} ({holder.get('doing', 'writing')})"


def _flock(fd: int, *, shared: bool) -> bool | None:
    """True: locked; False: held by others; None: this file system has no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def _read(fd: int) -> dict[str, Any]:
    try:
        os.lseek(fd, 0, os.SEEK_SET)
        holder = json.loads(os.read(fd, 4096))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) and type(holder.get("pid")) is int else {}


def _still_there(fd: int, path: Path) -> bool:
    # Its last holder may have removed the file between our opening and locking it.
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: tells it from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _alive(holder: dict[str, Any]) -> bool:
    if "pid" not in holder or holder["pid"] == os.getpid():
        return False
    if holder.get("host") != socket.gethostname():
        return True
    if sys.platform != "win32":
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
    return holder.get("started") == _started(holder["pid"])
