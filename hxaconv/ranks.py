"""The processes that do one job together, as torchrun or srun start them; a process alone is rank 0 of 1.

    torchrun --nproc-per-node 4 -m hxaconv init-from-teacher TEACHER OUT

They talk by torch.distributed (gloo), which is imported only where there are several. All of them must call
`gather`, `broadcast`, `together` and `in_turn` alike and in the same order.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from hxaconv.errors import HxaconvError

T = TypeVar("T")

TORCHRUN = ("RANK", "WORLD_SIZE")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
"""A batch script has the first as well, and no second: it is no task of a step."""
WAIT = datetime.timedelta(days=7)
"""Others wait while one of them verifies, and a rank that has ended is noticed at once."""

_place = (0, 1)
_host: Mapping[str, str] = {}


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Take the place that torchrun or srun gave this process: for a program, not for code that others call.

    Raises:
        HxaconvError: when the environment names no place that there is.
    """
    global _place, _host
    for names in (TORCHRUN, SRUN):
        if all(name in environment for name in names):
            found, text = [environment[name] for name in names], " and ".join(names)
            if not all(re.fullmatch(r"\d{1,6}", value) for value in found) or int(found[0]) >= int(found[1]):
                raise HxaconvError(
                    f"{text} are {' and '.join(found)}, expected a rank and a larger world size",
                    hint=f"Unset {text} to run one process alone.",
                )
            _place, _host = (int(found[0]), int(found[1])), environment
            return
    _place, _host = (0, 1), {}


def rank() -> int:
    """Which of the processes this is, from 0."""
    return _place[0]


def world() -> int:
    """How many there are."""
    return _place[1]


def gather(value: T) -> list[T]:
    """What each of them gives, by rank, to all.

    Raises:
        HxaconvError: when another one has ended.
    """
    if world() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world()
    try:
        _connect()
        dist.all_gather_object(found, value)
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise HxaconvError(
            f"rank {rank()} of {world()} has lost the others: {reason}",
            hint="Another rank has ended; its own message has the reason. The same command with --resume continues.",
        ) from error
    return found


def broadcast(value: T) -> T:
    """What rank 0 gives, to all."""
    return gather(value if rank() == 0 else None)[0]  # type: ignore[return-value]


@contextmanager
def together() -> Iterator[None]:
    """Work that all of them end together: what one of them refuses, all do.

    Raises:
        HxaconvError: the first rank's own, in every process.
    """
    failure: HxaconvError | None = None
    try:
        yield
    except HxaconvError as error:
        if world() == 1:
            raise
        failure = error
    for number, found in enumerate(gather(failure)):
        if found is not None:
            shared = failure if number == rank() and failure is not None else found
            if number:
                shared.message = f"rank {number}: {shared.message}"
            shared.shared = True
            raise shared


def in_turn(work: Callable[[], T]) -> T:
    """What `work` gives in each of them: first in rank 0, then in the others, which find what that has kept.

    Raises:
        HxaconvError: the first rank's own, in every process.
    """
    found = []
    for others in (False, True):
        with together():
            if (rank() > 0) == others:
                found.append(work())
    return found[0]


@functools.cache
def _connect() -> None:
    import torch.distributed as dist

    address = "env://" if _host.get("MASTER_ADDR") else f"tcp://{_first_node()}:{_port()}"
    dist.init_process_group("gloo", init_method=address, rank=rank(), world_size=world(), timeout=WAIT)
    atexit.register(dist.destroy_process_group)


def _first_node() -> str:
    """`node[03-07,12]` -> `node03`: where rank 0 of a Slurm step runs."""
    nodes = _host.get("SLURM_STEP_NODELIST") or _host.get("SLURM_JOB_NODELIST") or "localhost"
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    return f"{match[1]}{match[2] or ''}" if match else nodes


def _port() -> int:
    job = re.sub(r"\D", "", _host.get("SLURM_JOB_ID", "")) or "0"
    return 20_000 + int(job) % 20_000
