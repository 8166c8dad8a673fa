"""Kills writing commands at random moments, resumes them, and compares with an undisturbed run.

    python tests/kill_rounds.py --rounds 200 [--seed 0] [COMMAND ... {target}]

Without COMMAND the writer alone is put to the test (tests/write_job.py), a folder and a `.pth` in turn, new
and replacing. A command is a command line of hxaconv with `{target}` for its output, for example

    python tests/kill_rounds.py --rounds 50 -- hxaconv to-pth student/ {target}

After every kill the target must be absent, or what stood there before, or complete; after `--resume` it must
be byte for byte what an undisturbed run gives, with nothing left beside it.
"""

from __future__ import annotations

import argparse
import collections
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from writing import leftovers, source, tree

HERE = Path(__file__).parent
SUFFIXES = ("", ".pth")


def job(folder: Path, target: Path, *options: str, slow: float = 0.002) -> list[str]:
    """The command that writes `target` from the source in `folder`."""
    return [sys.executable, str(HERE / "write_job.py"), str(folder), str(target), "--slow", str(slow), *options]


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def state(target: Path, before: dict[str, bytes], after: dict[str, bytes]) -> str:
    """`absent`, `old` or `complete`; anything else is a failure."""
    now = tree(target) if target.exists() else {}
    if not now:
        return "absent"
    if now == after:
        return "complete"
    assert now == before, f"{target} is neither what it was nor complete: {sorted(now)}"
    return "old"


def kill_once(command: Sequence[str], seconds: float, number: int = signal.SIGKILL) -> int:
    """Start, send the signal after `seconds`, return the exit code."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    process.communicate()
    return process.returncode


def one_round(command: Sequence[str], target: Path, reference: dict[str, bytes], seconds: float, kills: int = 1) -> str:
    """Kill the command, and the first attempts to resume it, then resume it; returns what the kills found."""
    before = tree(target) if target.exists() else {}
    kill_once(command, seconds)
    found = state(target, before, reference)
    for _ in range(kills - 1):
        if found != "complete":
            kill_once([*command, "--resume"], seconds)
            found = state(target, before, reference)
    if found != "complete":
        done = run([*command, "--resume"])
        assert done.returncode == 0, f"resuming after {seconds:.3f} s failed:\n{done.stderr}"
    assert state(target, {}, reference) == "complete"
    return found


def clear(folder: Path, keep: Sequence[Path] = ()) -> None:
    for path in folder.iterdir():
        if path not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def writer_rounds(rounds: int, seed: int, scratch: Path) -> collections.Counter[str]:
    """Kill rounds over the writer alone; counts what the kills found."""
    rng, found = random.Random(seed), collections.Counter[str]()
    folder, place = scratch / "source", scratch / "place"
    folder.mkdir()
    place.mkdir()
    source(folder)
    references, durations = {}, {}
    for suffix in SUFFIXES:
        target = place / f"out{suffix}"
        begin = time.monotonic()
        assert run(job(folder, target)).returncode == 0
        durations[suffix], references[suffix] = time.monotonic() - begin, tree(target)
        clear(place)
    for number in range(rounds):
        suffix, replacing = SUFFIXES[number % 2], number % 4 >= 2
        target = place / f"out{suffix}"
        if replacing:
            put_old(target)
        command = job(folder, target, *(["--overwrite"] if replacing else []))
        seconds = rng.uniform(0.05, 1.1) * durations[suffix]
        found[one_round(command, target, references[suffix], seconds, 1 + number % 3 // 2)] += 1
        assert_tidy(command, target, references[suffix])
        clear(place)
    return found


def put_old(target: Path) -> None:
    """Something that --overwrite may replace."""
    if target.suffix:
        target.write_bytes(b"old")
        target.with_suffix(".json").write_bytes(b"{}")
    else:
        target.mkdir()
        (target / "config.json").write_bytes(b"old")


def assert_tidy(command: Sequence[str], target: Path, reference: dict[str, bytes]) -> None:
    """What a kill after the last rename left is cleared away by the next run on the target."""
    if leftovers(target):
        run([*command, "--overwrite"])
        assert tree(target) == reference
        assert leftovers(target) == []


def command_rounds(words: Sequence[str], rounds: int, seed: int, scratch: Path) -> collections.Counter[str]:
    """Kill rounds over any command line."""
    rng, found = random.Random(seed), collections.Counter[str]()
    suffix = next(Path(word.replace("{target}", "out")).suffix for word in words if "{target}" in word)
    target = scratch / f"out{suffix}"
    command = [word.replace("{target}", str(scratch / "out")) for word in words]
    begin = time.monotonic()
    done = run(command)
    assert done.returncode == 0, done.stderr
    duration, reference = time.monotonic() - begin, tree(target)
    clear(scratch)
    for _ in range(rounds):
        found[one_round(command, target, reference, rng.uniform(0, 1.1) * duration)] += 1
        clear(scratch)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("command", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.command:
            found = command_rounds(arguments.command, arguments.rounds, arguments.seed, Path(scratch))
        else:
            found = writer_rounds(arguments.rounds, arguments.seed, Path(scratch))
    print(f"{arguments.rounds} kills, all resumed to identical bytes; targets found: {dict(found)}")


if __name__ == "__main__":
    main()
