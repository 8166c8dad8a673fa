"""Runs commands and measures them: wall and CPU time, peak memory by kind, in a memory cgroup where asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

MIB = 1024 * 1024
SAMPLE_SECONDS = 0.04
CGROUPS = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One run of one command. Memory in MiB; `anonymous` and `rss` are peaks."""

    wall: float
    cpu: float
    rss: float
    anonymous: float
    load: float
    """What else wanted a core: the load average when the run began."""
    cgroup: float | None = None
    """Peak of the cgroup, page cache included."""


class Failed(Exception):
    """A measured command did not exit with 0."""


def run(command: Sequence[str], *, limit_bytes: int | None = None, niceness: int = 0) -> Sample:
    """Run a command to its end.

    Raises:
        Failed: with the last lines of what it said.
    """
    with _cgroup(limit_bytes) as group:

        def enter() -> None:
            if niceness:
                _be_nice(niceness)
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        load = os.getloadavg()[0]
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=enter,
        )
        rss, anonymous = _watch(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.stderr is not None
        said = process.stderr.read().decode(errors="replace")
        if process.returncode != 0:
            raise Failed(f"{shlex.join(command)} exited with {process.returncode}:\n{said[-2000:]}")
        peak = None if group is None else _cgroup_peak(group)
    return Sample(wall, usage.ru_utime + usage.ru_stime, rss, anonymous, load, peak)


def _be_nice(niceness: int) -> None:
    # With autogroups the kernel weighs sessions against each other, processes only inside of one.
    os.nice(niceness)
    os.setsid()
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(niceness))


def _watch(pid: int) -> tuple[float, float]:
    """(peak RSS, peak anonymous RSS) in MiB, of the process and the children it has at the time."""
    peak = anonymous = 0
    while not _ended(pid):
        high, now = _memory(pid)
        peak, anonymous = max(peak, high), max(anonymous, now)
        time.sleep(SAMPLE_SECONDS)
    return peak / 1024, anonymous / 1024


def _ended(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is not None
    return True


def _memory(pid: int) -> tuple[int, int]:
    # VmHWM is the kernel's own high-water mark since exec: samples cannot miss what came between them.
    with contextlib.suppress(OSError, ValueError):
        status = Path(f"/proc/{pid}/status").read_text()
        found = dict(re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", status, re.MULTILINE))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        below = [_memory(int(child)) for child in children]
        own = int(found.get("VmHWM", 0)), int(found.get("RssAnon", 0))
        return own[0] + sum(item[0] for item in below), own[1] + sum(item[1] for item in below)
    return 0, 0


@contextlib.contextmanager
def _cgroup(limit_bytes: int | None) -> Iterator[Path | None]:
    """A memory cgroup of its own (v2 or v1) for one command; page cache counts. Needs root."""
    if limit_bytes is None:
        yield None
        return
    version_1 = CGROUPS / "memory"
    group = (version_1 if version_1.is_dir() else CGROUPS) / f"hxaconv-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        name = "memory.limit_in_bytes" if version_1.is_dir() else "memory.max"
        (group / name).write_text(str(limit_bytes))
        yield group
    finally:
        group.rmdir()


def _cgroup_peak(group: Path) -> float | None:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        with contextlib.suppress(OSError, ValueError):
            return int((group / name).read_text()) / MIB
    return None


def peaks(samples: Iterable[Sample]) -> dict[str, Any]:
    """The highest of each kind of memory."""
    samples = list(samples)
    found: dict[str, Any] = {
        "rss_mib": round(max(sample.rss for sample in samples), 1),
        "anonymous_mib": round(max(sample.anonymous for sample in samples), 1),
    }
    groups = [sample.cgroup for sample in samples if sample.cgroup is not None]
    return found | ({"cgroup_mib": round(max(groups), 1)} if groups else {})


def median_wall(samples: Iterable[Sample]) -> float:
    """Median wall time in seconds."""
    return statistics.median(sample.wall for sample in samples)


def in_turn(runs: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, list[Sample]]:
    """Each run once per round, every second round backwards: so that none always finds the warmer cache."""
    found: dict[str, list[Sample]] = {name: [] for name in runs}
    for index in range(rounds):
        for name in list(runs)[:: -1 if index % 2 else 1]:
            found[name].append(runs[name]())
        say("  " + ", ".join(f"{name} {samples[-1].wall:.2f} s" for name, samples in found.items()))
    return found


def ratio(samples: Sequence[Sample], others: Sequence[Sample]) -> float:
    """How many times as long a run took as another one of the same round: the median."""
    return statistics.median(one.wall / other.wall for one, other in zip(samples, others, strict=True))


def warm(files: Iterable[Path]) -> None:
    """Read files into the page cache."""
    buffer = bytearray(MIB)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def touch(nbytes: int) -> None:
    """Use free memory once, so that no run pays for pages that a virtual machine's host has taken back meanwhile."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
    mmap.mmap(-1, nbytes, flags=flags).close()


def chill(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = re.search(r"model name\s*: (.*)", _text("/proc/cpuinfo"))
    mount = _file_system(Path.cwd())
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "file_system": mount,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("hxaconv", "torch", "numpy", "safetensors")},
    }


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def _file_system(path: Path) -> str:
    mounts = [line.split()[1:3] for line in _text("/proc/mounts").splitlines()]
    above = [(point, kind) for point, kind in mounts if path.is_relative_to(point)]
    return max(above, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def say(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)
