"""Commands beside `cp` of as many bytes: time in interleaved pairs, and peak memory.

    python benchmarks/throughput.py --bytes 4GB --pairs 5 --verify --naive
    python benchmarks/throughput.py --bytes 20GB --pairs 1 --rows reshard,to-pth
    python benchmarks/throughput.py --bytes 4GB --pairs 5 --limit 256MiB --rows reshard,to-pth   (root)

Sources are made by synthetic.py in --folder and removed again: up to four times --bytes are in use at a time.
Both sides end with their bytes synced. Results are appended to --results as JSON lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
from measure import Sample, say

HERE = Path(__file__).resolve().parent
HXACONV = str(Path(sys.executable).parent / "hxaconv")
PYTHON = sys.executable


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a command, and what it reads."""

    name: str
    source: str
    command: tuple[str, ...]
    """{source} and {out} are filled in."""
    out: str
    title: str
    verifies: bool = True


def _convert(command: str, *more: str) -> tuple[str, ...]:
    return HXACONV, command, "{source}", "{out}", "--quiet", *more


ROWS = (
    Row("reshard", "student", _convert("to-hf"), "out", "safetensors → safetensors"),
    Row("to-pth", "student", _convert("to-pth"), "out.pth", "safetensors → .pth, CRC"),
    Row("sha256", "student", _convert("to-hf", "--digest", "sha256"), "out", "sha256 of every tensor"),
    Row("cast-f16", "student", _convert("to-hf", "--dtype", "float16"), "out", "everything cast, bf16 → fp16"),
    Row(
        "scale",
        "student",
        (PYTHON, str(HERE / "engine.py"), "scale", "{source}", "{out}"),
        "out",
        "everything scaled, bf16",
        verifies=False,
    ),
    Row("from-pth", "pth", _convert("to-hf"), "out", ".pth (zip) → safetensors"),
    Row("from-legacy", "legacy", _convert("to-hf"), "out", ".pth (legacy) → safetensors"),
    Row("init", "teacher", _convert("init-from-teacher"), "out", "init-from-teacher"),
    Row("cast-bf16", "student-f32", _convert("to-hf", "--dtype", "bfloat16"), "out", "everything cast, fp32 → bf16"),
)

NAIVE = (
    ("load-save-shards", "student", "out", "load_file + save_file per shard"),
    ("load-save-pth", "student", "out.pth", "load_file + torch.save"),
    ("pth-save-file", "pth", "out", "torch.load(mmap) + save_file"),
    ("transformers", "teacher", "out", "transformers load + save"),
    ("mergekit", "teacher", "out", "mergekit passthrough"),
)

SOURCES = {
    "student": ("--kind", "student", "--container", "hf"),
    "pth": ("--kind", "student", "--container", "pth"),
    "legacy": ("--kind", "student", "--container", "legacy"),
    "teacher": ("--kind", "teacher"),
    "student-f32": ("--kind", "student", "--dtype", "float32"),
}


class Bench:
    """One size, one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.folder
        self.machine = measure.machine()
        self.total = _bytes(args.bytes)
        self.limit = _bytes(args.limit) if args.limit else None
        # A source that fits beside its copy stays in the page cache; a bigger one, or one in a cgroup, is read anew.
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.cold = self.limit is not None or 2 * self.total > memory // 2

    @contextmanager
    def source(self, kind: str) -> Iterator[Path]:
        """A synthetic checkpoint, while it is needed. The one in fp32 has twice the bytes."""
        path = self.folder / (f"{kind}.pth" if kind in ("pth", "legacy") else kind)
        size = str(2 * self.total if kind == "student-f32" else self.total)
        say(f"making {path}")
        shard = str(min(1_000_000_000, self.total // 4))
        made = measure.run(
            [PYTHON, str(HERE / "synthetic.py"), str(path), *SOURCES[kind], "--bytes", size, "--max-shard-size", shard]
        )
        say(f"  {made.wall:.0f} s")
        try:
            yield path
        finally:
            _remove(path, path.with_suffix(".json"))

    def weights(self, source: Path) -> list[Path]:
        return sorted(source.glob("*.safetensors")) if source.is_dir() else [source]

    def prepare(self, source: Path, *outputs: Path) -> None:
        """The same start for every run: no output, nothing dirty, the source cached or not, free memory at hand."""
        _remove(*outputs)
        os.sync()
        (measure.chill if self.cold else measure.warm)(self.weights(source))
        time.sleep(self.args.pause)
        if not self.cold:
            measure.touch(self.total * 5 // 4)

    def ours(self, source: Path, command: Sequence[str], out: Path) -> Sample:
        self.prepare(source, out, out.with_suffix(".json"))
        filled = [word.format(source=source, out=out) for word in command]
        return measure.run(filled, limit_bytes=self.limit, niceness=self.args.nice)

    def copy(self, source: Path, files: Sequence[Path]) -> Sample:
        target = self.folder / "copy"
        self.prepare(source, target)
        target.mkdir()
        words = shlex.join(map(str, files))
        script = f"cp {words} {shlex.quote(str(target))} && sync {shlex.quote(str(target))}/*"
        try:
            return measure.run(["sh", "-c", script], limit_bytes=self.limit, niceness=self.args.nice)
        finally:
            _remove(target)

    def copied(self, source: Path) -> list[Path]:
        """The files whose copy is compared: all, or, of fp32, about half of the bytes: as many as are written."""
        files = self.weights(source)
        if source.name != "student-f32":
            return files
        sizes, chosen = 0, []
        for path in files:
            if sizes + path.stat().st_size / 2 <= self.total:
                sizes += path.stat().st_size
                chosen.append(path)
        return chosen

    def row(self, row: Row, source: Path) -> None:
        """Measure one row and record it: without the verification, and, where wanted, as people run it."""
        say(f"{row.name}, {self.total / 1e9:g} GB")
        plain = row.command if row.name == "scale" else (*row.command, "--no-verify")
        self._compare(row, plain, source, verified=False)
        if self.args.verify and row.verifies:
            self._compare(row, row.command, source, verified=True)

    def _compare(self, row: Row, command: tuple[str, ...], source: Path, *, verified: bool) -> None:
        out = self.folder / row.out
        copied = self.copied(source)
        run = lambda: self.ours(source, command, out)  # noqa: E731
        found = measure.compare(run, lambda: self.copy(source, copied), self.args.pairs, say)
        written = sum(path.stat().st_size for path in (out.rglob("*") if out.is_dir() else [out]) if path.is_file())
        self.record(
            {
                "row": f"{row.name}, verified" if verified else row.name,
                "title": row.title,
                "verified": verified,
                "bytes": written,
                "cp_bytes": sum(path.stat().st_size for path in copied),
                "cold": self.cold,
                "nice": self.args.nice,
                "limit_mib": None if self.limit is None else self.limit // measure.MIB,
                **found.summary(),
            }
        )
        _remove(out, out.with_suffix(".json"))

    def naive(self, way: str, title: str, source: Path, out: Path) -> None:
        """What others would run, `cp` beside it."""
        if way == "mergekit" and shutil.which("mergekit-yaml") is None:
            say("mergekit is not installed")
            return
        say(f"{way}, {self.total / 1e9:g} GB")
        command = (PYTHON, str(HERE / "naive.py"), way, "{source}", "{out}")
        files = self.weights(source)
        pairs = min(3, self.args.pairs)
        run = lambda: self.ours(source, command, out)  # noqa: E731
        found = measure.compare(run, lambda: self.copy(source, files), pairs, say)
        total = sum(path.stat().st_size for path in files)
        self.record({"row": way, "title": title, "naive": True, "bytes": total, **found.summary()})
        _remove(out, out.with_suffix(".yml"))

    def record(self, result: dict[str, Any]) -> None:
        line = json.dumps({**result, "machine": self.machine})
        with open(self.args.results, "a") as file:
            file.write(line + "\n")
        say(json.dumps(result))


def _bytes(text: str) -> int:
    from hxaconv.options import parse_size

    return parse_size(text)


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def run_rows(bench: Bench, names: Sequence[str], naive: bool) -> None:
    """All rows asked for, a source at a time."""
    for kind in SOURCES:
        rows = [row for row in ROWS if row.source == kind and row.name in names]
        others = [way for way in NAIVE if way[1] == kind] if naive else []
        if not rows and not others:
            continue
        with bench.source(kind) as source:
            for row in rows:
                _reported(lambda row=row: bench.row(row, source))
            for way, _, out, title in others:
                _reported(lambda way=way, title=title, out=out: bench.naive(way, title, source, bench.folder / out))


def _reported(do: Callable[[], None]) -> None:
    try:
        do()
    except measure.Failed as error:
        say(f"FAILED: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", default="1GB")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", default=",".join(row.name for row in ROWS), help="comma separated; empty for none")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-files"), help="on the disk to measure")
    parser.add_argument("--limit", help="memory of a cgroup for both sides: 256MiB; needs root")
    parser.add_argument("--nice", type=int, default=0, help="of both sides; below 0 on a busy machine (root)")
    parser.add_argument("--verify", action="store_true", help="also measure every command with its verification")
    parser.add_argument("--naive", action="store_true", help="also measure what others would run")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds of rest before every run")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "throughput.jsonl")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_rows(Bench(args), args.rows.split(","), args.naive)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
