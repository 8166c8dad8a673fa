"""Which part of an output a process writes: said by --part, by torchrun, or by a Slurm array."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from hxaconv.errors import HxaconvError

TORCHRUN = ("RANK", "WORLD_SIZE")
SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
WHOLE = "--part 1/1 writes the whole"


def resolve_part(text: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """(index from 0, count) of `--part 2/8`, torchrun's RANK/WORLD_SIZE or a Slurm array's task; else None.

    Raises:
        HxaconvError: for a part that does not exist, and an array with gaps.
    """
    source = f"--part {text}" if text is not None else part_source(text, environment)
    if not source:
        return None
    if text is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise HxaconvError(f"--part {text!r} is not understood", hint="Parts are 1/n to n/n.")
        number, count = int(match[1]), int(match[2])
    elif source == _joined(TORCHRUN):
        rank, count = (_whole(environment, name) for name in TORCHRUN)
        number = rank + 1
    else:
        number, count = _of_slurm(environment)
    if not 1 <= number <= count:
        raise HxaconvError(f"{source}: there is no part {number} of {count}", hint="Parts are 1/n to n/n.")
    return (number - 1, count) if count > 1 else None


def part_source(text: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The environment variables that say which part this is, where --part does not; empty where nothing does."""
    if text is not None:
        return ""
    return next((_joined(names) for names in (TORCHRUN, SLURM) if all(name in environment for name in names)), "")


@contextmanager
def no_parts() -> Iterator[None]:
    """Every command within writes the whole, whatever the environment says."""
    kept = {name: os.environ.pop(name) for name in (*TORCHRUN, *SLURM) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _of_slurm(environment: Mapping[str, str]) -> tuple[int, int]:
    task, count = (_whole(environment, name) for name in SLURM)
    first = _whole(environment, "SLURM_ARRAY_TASK_MIN", "0")
    step = _whole(environment, "SLURM_ARRAY_TASK_STEP", "1") or 1
    last = _whole(environment, "SLURM_ARRAY_TASK_MAX", str(first + step * (count - 1)))
    if last != first + step * (count - 1) or (task - first) % step:
        raise HxaconvError(
            f"the Slurm array has {count} tasks from {first} to {last}: with gaps, it does not say which part"
            f" task {task} is",
            hint="Submit the array without gaps, or say it: --part i/n, as in the first run.",
        )
    return (task - first) // step + 1, count


def _whole(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not re.fullmatch(r"\d+", text):
        raise HxaconvError(f"{name} is {text!r}, expected a whole number", hint=f"Unset it, or add --part: {WHOLE}.")
    return int(text)


def _joined(names: tuple[str, str]) -> str:
    return " and ".join(names)
