"""Kills every writing command at random moments, resumes it, and compares with an undisturbed run.

    python tests/kill_rounds.py --kills 200 [--seed 0] [--record benchmarks/KILLS.md]

The commands run on the embedded teacher, each in a process of its own that is forked after the imports, so that
kills hit its work. System calls that write are slowed down, and a write is done in two halves. Commands take
turns; a target is new or replaces an old one, outputs are verified or not, and some of the resumed runs are
killed as well. After a kill the target must be absent, or what stood there before, or complete; in the end it
must be byte for byte what an undisturbed run gives, with nothing left beside it.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib
import itertools
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from writing import leftovers, tree

TEACHER = Path(__file__).parents[1] / "hxaconv" / "commands" / "embedded" / "teacher"
PAUSE_SECONDS = 0.003
HALF_BYTES = 20_000
BATCH_BYTES = 500_000
"""Between two lines of the journal; an output has some 7 MB."""
OUTCOMES = ("before the first byte", "while writing", "while publishing", "published")
"""What kills found."""

FIT = ("--input-ids", "{teacher}/calibration_tokens.npy", "--tokens", "64", "--chunk", "64", "--refine-steps", "0")
INIT = ("init-from-teacher", "{teacher}", "{out}", "--gqa-layers", "2,5")
SHARDS = ("--max-shard-size", "1MB")


@dataclass(frozen=True)
class Job:
    """A writing command; resuming is the same with --resume."""

    name: str
    words: tuple[str, ...]
    suffix: str = ""


JOBS = (
    Job("init-from-teacher", (*INIT, *SHARDS)),
    Job("init-from-teacher --format pth", (*INIT, "--format", "pth"), ".pth"),
    Job("init-from-teacher --format training", (*INIT, "--format", "training"), ".pth"),
    Job("init-from-teacher --init calibrated", (*INIT, *SHARDS, "--init", "calibrated", *FIT)),
    Job("calibrate", ("calibrate", "{student}", "{out}", "--teacher", "{teacher}", *FIT)),
    Job("to-hf", ("to-hf", "{pth}", "{out}", *SHARDS)),
    Job("to-hf --teacher", ("to-hf", "{attention}", "{out}", "--teacher", "{teacher}", "--dtype", "float16")),
    Job("to-pth", ("to-pth", "{student}", "{out}"), ".pth"),
    Job("to-training --all", ("to-training", "{student}", "{out}", "--all"), ".pth"),
    Job("pick-gqa-layers", ("pick-gqa-layers", "{student}", "{out}", "--layers", "1,5", "--teacher", "{teacher}")),
)


# Processes


def slowed(call: Any, seconds: float) -> Any:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        result = call(*arguments, **options)
        time.sleep(seconds)
        return result

    return wrapped


def in_halves(write: Any) -> Any:
    def wrapped(fd: int, data: Any, *offset: int) -> int:
        time.sleep(PAUSE_SECONDS)
        return int(write(fd, memoryview(data)[: max(HALF_BYTES, len(data) // 2)], *offset))

    return wrapped


def slow_down() -> None:
    """In this process, from now on: writes, syncs, renames and deletions take their time."""
    from hxaconv.save import fill

    fill.BATCH_BYTES = BATCH_BYTES
    for name in ("fsync", "fdatasync", "replace", "unlink", "mkdir"):
        setattr(os, name, slowed(getattr(os, name), PAUSE_SECONDS))
    os.rename = slowed(os.rename, 10 * PAUSE_SECONDS)  # there are few, and much hangs on them
    for name in ("pwrite", "write"):
        setattr(os, name, in_halves(getattr(os, name)))


def import_everything() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only get in each other's way on tensors this small
    import hxaconv

    for module in pkgutil.walk_packages(hxaconv.__path__, "hxaconv."):
        if not module.name.startswith("hxaconv.model.hf"):
            importlib.import_module(module.name)


def start(words: Sequence[str], log: Path) -> int:
    """The command line in a process of its own; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        from hxaconv.cli.app import app, guarded

        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(out, 1)
        os.dup2(out, 2)
        slow_down()
        sys.argv = ["hxaconv", *words]
        code = guarded(app)
        sys.stdout.flush()
        os._exit(code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


def run(words: Sequence[str], log: Path, *, kill_after: float | None = None) -> bool:
    """The command line; False if it was killed."""
    end = None if kill_after is None else time.monotonic() + kill_after
    pid = start(words, log)
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if end is not None and time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == -signal.SIGKILL:
        return False
    assert code == 0, f"{' '.join(words)} ended with {code}:\n{log.read_text()}"
    return True


# Rounds


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass
class Rounds:
    """All rounds: what commands work on, and what each of them gives undisturbed."""

    buffers: Path
    rng: random.Random
    found: dict[str, collections.Counter[str]] = field(default_factory=dict)
    references: dict[tuple[str, bool], tuple[dict[str, bytes], float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place, self.material, self.log = (self.buffers / name for name in ("place", "material", "log"))
        self.place.mkdir()
        self.material.mkdir()
        student, pth, attention = (self.material / name for name in ("student", "s.pth", "attention.pth"))
        self.names = {"teacher": TEACHER, "student": student, "pth": pth, "attention": attention}
        run(self.words((*INIT, "--no-verify"), student), self.log)
        run(self.words(("to-pth", "{student}", "{out}", "--no-verify"), pth), self.log)
        run(self.words(("to-training", "{student}", "{out}", "--no-verify"), attention), self.log)

    def words(self, words: Sequence[str], out: Path, *options: str) -> list[str]:
        return [*(word.format(out=out, **self.names) for word in words), *options]

    def begin(self, job: Job, target: Path, *, verified: bool, replacing: bool) -> tuple[str, ...]:
        """Bring about what is there before the command runs; returns the options it then needs."""
        options = () if verified else ("--no-verify",)
        if replacing:
            old = self.material / f"s{job.suffix}" if job.suffix else self.material / "student"
            copy = shutil.copytree if old.is_dir() else shutil.copyfile
            copy(old, target)
            if job.suffix:
                shutil.copyfile(old.with_suffix(".json"), target.with_suffix(".json"))
            options += ("--overwrite",)
        return options

    def reference(self, job: Job, *, verified: bool) -> tuple[dict[str, bytes], float]:
        """(what the command gives undisturbed, seconds)."""
        key = job.name, verified
        if key not in self.references:
            target = self.place / f"out{job.suffix}"
            options = self.begin(job, target, verified=verified, replacing=False)
            begin = time.monotonic()
            run(self.words(job.words, target, *options), self.log)
            self.references[key] = tree(target), time.monotonic() - begin
            clear(self.place)
        return self.references[key]

    def round(self, job: Job, *, verified: bool, replacing: bool, kills: int) -> None:
        """Kill the command, and the first attempts to resume it, then resume it."""
        target = self.place / f"out{job.suffix}"
        after, seconds = self.reference(job, verified=verified)
        options = self.begin(job, target, verified=verified, replacing=replacing)
        before = tree(target) if replacing else {}
        words = self.words(job.words, target, *options)
        again = [*words, "--resume"]
        for number in range(kills):
            moment = self.rng.uniform(0, seconds)
            run(again if number else words, self.log, kill_after=moment)
            found = self.state(target, before, after)
            self.found.setdefault(job.name, collections.Counter())[found] += 1
            if found == "published":
                break
        else:
            run(again, self.log)
        assert self.state(target, {}, after) == "published", f"{job.name}: {target} is not complete"
        self.tidy(words, target, after)
        clear(self.place)

    def state(self, target: Path, before: dict[str, bytes], after: dict[str, bytes]) -> str:
        """Which of OUTCOMES; anything else is a failure."""
        now = tree(target) if target.exists() else {}
        if now and now == after:
            return "published"
        folders = list(self.place.glob("out*.partial-*"))
        publishing = any((folder / "publishing").exists() for folder in folders)
        assert now == before or (publishing and not now), f"{target} is neither what it was nor complete: {sorted(now)}"
        return OUTCOMES[2] if publishing else OUTCOMES[1] if folders else OUTCOMES[0]

    def tidy(self, words: list[str], target: Path, after: dict[str, bytes]) -> None:
        """What a kill after the last rename left is cleared away by the next run on the target."""
        if leftovers(target):
            run([*words, *([] if "--overwrite" in words else ["--overwrite"])], self.log)
            assert leftovers(target) == [], leftovers(target)
            assert tree(target) == after


def all_rounds(kills: int, seed: int, buffers: Path) -> dict[str, collections.Counter[str]]:
    """Rounds over the commands in turn until there were that many kills; by command, how often kills found what."""
    import_everything()
    rng = random.Random(seed)
    work = Rounds(buffers, rng)
    done = 0
    for job in itertools.islice(itertools.cycle(JOBS), seed % len(JOBS), None):
        if done >= kills:
            return work.found
        verified, replacing, again = (rng.random() < 0.4 for _ in range(3))
        work.round(job, verified=verified, replacing=replacing, kills=1 + again)
        done = sum(counter.total() for counter in work.found.values())
        print(f"{done} of {kills} kills", file=sys.stderr)
    raise AssertionError


def table(found: dict[str, collections.Counter[str]]) -> str:
    """By command, how often kills found what; in Markdown."""
    lines = [f"| command | kills | {' | '.join(OUTCOMES)} |", "|---|--:|--:|--:|--:|--:|"]
    total = sum(found.values(), collections.Counter())
    for name, counter in [*((f"`{job.name}`", found[job.name]) for job in JOBS if job.name in found), ("all", total)]:
        lines.append(f"| {name} | {counter.total()} | {' | '.join(str(counter[key]) for key in OUTCOMES)} |")
    return "\n".join(lines)


RECORD = """\
# Kills

`python tests/kill_rounds.py --kills {kills} --seed {seed}`, {date}: every writing command of hxaconv on the embedded
teacher, killed with `kill -9` at random moments of its run (imports excluded), new targets and with `--overwrite`, with
and without verification; in every third round or so the resumed run was killed as well. Before its first byte, a
command plans or calibrates.

What the kills found:

{table}

In every case but "published" the target was absent or the old one, untouched ("while publishing": between the
renames, the old one set aside); "published" was byte for byte the result of a run that nobody killed. Resuming ended
in these bytes in every round, with nothing left beside the target. Anything else would have ended the run.

CI kills {ci} times per run (`HXACONV_KILLS`). Killed ranks of `torchrun` are tested on their own (tests/test_ranks.py).
"""
CI_KILLS = int(os.environ.get("HXACONV_KILLS", "2"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as buffers:
        found = all_rounds(arguments.kills, arguments.seed, Path(buffers))
    print(table(found))
    if arguments.record:
        kills, today = arguments.kills, datetime.date.today().isoformat()
        text = RECORD.format(kills=kills, seed=arguments.seed, date=today, table=table(found), ci=CI_KILLS)
        arguments.record.write_text(text)


if __name__ == "__main__":
    main()
