"""Runs a command as several ranks, as torchrun starts them, and prints as JSON what came of it.

    python rank_rounds.py FOLDER [--commands]

Ranks are forked after the imports. Runs: alone; two ranks; two of which one is killed while it writes, resumed by
two, and another such run resumed by one process; two of which one finds the disk full. With --commands instead: the
commands that compute before they write, alone and by two ranks.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed  # noqa: F401
from kill_rounds import TEACHER
from writing import leftovers, tree

from hxaconv.cli.app import app, guarded
from hxaconv.save import fill, interruption

OPTIONS = ("--gqa-layers", "2,5", "--max-shard-size", "1MB", "--no-verify", "--quiet")


def start(words: list[str], rank: int, world: int, port: int, log: Path, prepare: Callable[[], None] | None) -> int:
    """One rank in a process of its own; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()})
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        fill.BATCH_BYTES = 200_000
        if prepare is not None:
            prepare()
        interruption.for_life()
        sys.argv = ["hxaconv", *words]
        code = guarded(app)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def slow() -> None:
    real = os.pwrite

    def pwrite(*arguments: Any) -> int:
        time.sleep(0.03)
        return real(*arguments)

    os.pwrite = pwrite


def full() -> None:
    def pwrite(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.pwrite = pwrite


def dying() -> None:
    """Ends before its second layer of a calibration is kept."""
    from hxaconv.calibration.store import Store

    real = Store.save

    def save(self: Store, name: str, *rest: Any) -> None:
        if name == "layer-003":
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, name, *rest)

    Store.save = save  # type: ignore[method-assign]


def run(
    folder: Path,
    name: str,
    world: int,
    *more: str,
    prepare: Callable[[], None] | None = None,
    number: int = 0,
    source: Path | None = None,
) -> dict[str, Any]:
    """The command by so many ranks; the last is prepared, and sent a signal once it has written something."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = str(folder / name / "out")
    words = ["init-from-teacher", str(TEACHER), out, *OPTIONS, *more]
    if more[:1] == ("pick",):
        words = ["pick-gqa-layers", str(source), out, *more[1:]]
    (folder / name).mkdir(exist_ok=True)
    logs = [folder / f"log-{rank}" for rank in range(world)]
    last = world - 1
    pids = [start(words, r, world, port, logs[r], prepare if r == last else None) for r in range(world)]
    while number:
        found = [path.read_text() for path in (folder / name).glob(f"out.partial-*/journal-{last}")]
        if found and found[0].count("tensor") >= 3:
            os.kill(pids[last], number)
            break
        time.sleep(0.005)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return {"codes": codes, "said": [log.read_text() for log in logs], "published": (folder / name / "out").exists()}


TOKENS = ("--input-ids", str(TEACHER / "calibration_tokens.npy"), "--tokens", "64")


def commands(folder: Path) -> dict[str, Any]:
    """Whether two ranks give the bytes of one process, by command."""
    fit = ("--init", "calibrated", *TOKENS, "--refine-steps", "0")
    found = {}
    student = folder / "student" / "out"
    run(folder, "student", 1)
    pick = ("pick", "--strategy", "influence", "--count", "3", *TOKENS, "--quiet")
    for name, words, source in (("fit", fit, None), ("pick", pick, student)):
        trees = []
        for world in (1, 2):
            place = f"{name}-{world}"
            given = words if source is None else (words[0], "--teacher", str(TEACHER), *words[1:])
            done = run(folder, place, world, *given, source=source)
            assert set(done["codes"]) == {0}, done
            trees.append(tree(folder / place / "out"))
            assert [path.name for path in (folder / place).iterdir()] == ["out"]
        found[name] = trees[0] == trees[1]
    # Layers that other ranks have finished are taken over, by however many.
    killed = run(folder, "fit-killed", 2, *fit, prepare=dying)
    assert killed["codes"] == [2, -signal.SIGKILL], killed
    assert "rank 0 of 2 has lost the others" in killed["said"][0], killed
    kept = sorted(path.stem for path in (folder / "fit-killed" / "out.calibration").glob("layer-*"))
    assert kept == [f"layer-{i:03d}" for i in (0, 1, 2, 4)], kept
    assert run(folder, "fit-killed", 1, *fit)["codes"] == [0]
    found["fit resumed"] = tree(folder / "fit-killed" / "out") == tree(folder / "fit-1" / "out")
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    if "--commands" in sys.argv:
        print(json.dumps(commands(folder)))
        return
    found = {"alone": run(folder, "alone", 1), "two": run(folder, "two", 2)}
    for name in ("killed", "taken-over"):
        found[name] = run(folder, name, 2, prepare=slow, number=signal.SIGKILL)
    found["stopped"] = run(folder, "stopped", 2, prepare=slow, number=signal.SIGTERM)
    found["resumed"] = run(folder, "killed", 2, "--resume")
    found["resumed alone"] = run(folder, "taken-over", 1, "--resume")
    found["full"] = run(folder, "full", 2, prepare=full)
    alone = tree(folder / "alone" / "out")
    for name in ("two", "killed", "taken-over"):
        found[name]["same"] = tree(folder / name / "out") == alone
        found[name]["left"] = leftovers(folder / name / "out")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
