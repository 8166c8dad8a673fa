"""Commands as people run them, verification included, beside `cp`; and the same on busy cores, by threads of torch.

    python benchmarks/verified.py [--bytes 2GB] [--pairs 5] [--folder DIR] [--busy 2]

Prints the two tables of benchmarks/VERIFY.md. `--busy` is how many endless loops keep cores busy in the second one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import measure
from throughput import HXACONV, Bench, _bytes

ROWS = (
    ("`to-hf`, safetensors to safetensors", "student", ("to-hf", "{source}", "{out}"), "out"),
    ("`to-pth`, with every CRC read back", "student", ("to-pth", "{source}", "{out}"), "out.pth"),
    ("`init-from-teacher`", "teacher", ("init-from-teacher", "{source}", "{out}"), "out"),
    ("`verify ONE`", "student", ("verify", "{source}"), "out"),
)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep cores busy with endless loops."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def as_run(bench: Bench, rows: tuple[tuple[str, str, tuple[str, ...], str], ...]) -> None:
    """The first table."""
    print("| command, verification included | s | CPU s | times `cp` | GB of weights per s | peak MiB (anonymous) |")
    print("|---|--:|--:|--:|--:|--:|")
    for title, kind, words, out in rows:
        with bench.source(kind) as source:
            files = bench.weights(source)
            total = sum(path.stat().st_size for path in files)
            command = (HXACONV, *words, "--quiet")
            found = measure.compare(
                lambda command=command, source=source, out=out: bench.ours(source, command, bench.folder / out),
                lambda source=source, files=files: bench.copy(source, files),
                bench.args.pairs,
                lambda text: None,
            ).summary()
        speed = total / 1e9 / found["seconds"]
        print(
            f"| {title} | {found['seconds']:.2f} | {found['cpu_seconds']:.2f} | {found['ratio']:.2f} | {speed:.2f} |"
            f" {found['rss_mib']:.0f} ({found['anonymous_mib']:.0f}) |",
            flush=True,
        )


def by_threads(bench: Bench, loops: int) -> None:
    """The second table."""
    print(f"\n| | idle, s (CPU s) | {loops} endless loops beside it, s (CPU s) |\n|---|--:|--:|")
    with bench.source("student") as source:
        for title, threads in (("torch's default threads", None), ("OMP_NUM_THREADS=1", "1")):
            os.environ.pop("OMP_NUM_THREADS", None)
            if threads is not None:
                os.environ["OMP_NUM_THREADS"] = threads
            cells = []
            for count in (0, loops):
                with busy(count):
                    runs = [
                        bench.ours(source, (HXACONV, "verify", "{source}", "--quiet"), bench.folder / "out")
                        for _ in range(bench.args.pairs)
                    ]
                cpu = sorted(sample.cpu for sample in runs)[len(runs) // 2]
                cells.append(f"{measure.median_wall(runs):.2f} ({cpu:.2f})")
            print(f"| `verify ONE`, {title} | {' | '.join(cells)} |", flush=True)
    os.environ.pop("OMP_NUM_THREADS", None)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", default="2GB")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-files"), help="on the disk to measure")
    parser.add_argument("--busy", type=int, default=os.cpu_count())
    parser.set_defaults(limit=None, nice=0, pause=0.5)
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ.pop("OMP_NUM_THREADS", None)
    try:
        bench = Bench(args)
        print(f"{_bytes(args.bytes) / 1e9:g} GB, {args.pairs} pairs; {bench.machine}\n", flush=True)
        as_run(bench, ROWS)
        by_threads(bench, args.busy)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
