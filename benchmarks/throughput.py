"""Commands beside `cp` of as many bytes, and beside another version of the program: time and peak memory, as a table.

    python benchmarks/throughput.py --bytes 4GB --rounds 5
    python benchmarks/throughput.py --bytes 2GB --beside ../older-tree
    python benchmarks/throughput.py --bytes 20GB --rounds 1 --rows to-hf,to-pth
    python benchmarks/throughput.py --bytes 4GB --limit 256MiB --rows to-hf,to-pth   (root)
    python benchmarks/throughput.py --rows verify --busy 2

Sources are made by synthetic.py in --folder and removed again: up to four times --bytes are in use at a time. In every
round `cp` and each program run once, and end with their bytes synced; the first copy of a source is not counted.
"""

from __future__ import annotations

import argparse
import compileall
import dataclasses
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import measure
from measure import Sample, say

HERE = Path(__file__).resolve().parent
PYTHON = sys.executable


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a command, and what it reads; {source} and {out} are filled in."""

    name: str
    source: str
    title: str
    command: str
    out: str = "out"

    @property
    def may_verify(self) -> bool:
        return self.command.startswith("hxaconv ") and self.name != "verify"

    def words(self, tree: Path, source: Path, out: Path, *, verify: bool) -> list[str]:
        """The command of the program in a tree."""
        text = self.command + (" --no-verify" if self.may_verify and not verify else "")
        text = text.replace("hxaconv ", f"{PYTHON} -m hxaconv ").replace("benchmarks/", f"{PYTHON} {tree}/benchmarks/")
        # From its own folder: `python -m` looks in the current one first.
        words = [word.format(source=source, out=out) for word in shlex.split(text)]
        return ["env", "-C", str(tree), f"PYTHONPATH={tree}", *words]


ROWS = (
    Row("to-hf", "student", "safetensors → safetensors", "hxaconv to-hf {source} {out} -q"),
    Row("to-pth", "student", "safetensors → .pth, CRC", "hxaconv to-pth {source} {out} -q", "out.pth"),
    Row("sha256", "student", "sha256 of every tensor", "hxaconv to-hf {source} {out} --digest sha256 -q"),
    Row("cast-f16", "student", "cast, bf16 → fp16", "hxaconv to-hf {source} {out} --dtype float16 -q"),
    Row("scale", "student", "everything scaled, bf16", "benchmarks/engine.py scale {source} {out}"),
    Row("verify", "student", "verify ONE", "hxaconv verify {source} -q"),
    Row("from-pth", "pth", ".pth (zip) → safetensors", "hxaconv to-hf {source} {out} -q"),
    Row("from-legacy", "legacy", ".pth (legacy) → safetensors", "hxaconv to-hf {source} {out} -q"),
    Row("init", "teacher", "init-from-teacher", "hxaconv init-from-teacher {source} {out} -q"),
    Row("cast-bf16", "student-f32", "cast, fp32 → bf16", "hxaconv to-hf {source} {out} --dtype bfloat16 -q"),
    # What people run without this package.
    Row("load-save-shards", "student", "load_file + save_file", "benchmarks/naive.py load-save-shards {source} {out}"),
    Row("load-save-pth", "student", "load_file + torch.save", "benchmarks/naive.py load-save-pth {source} {out}", "o"),
    Row("pth-save-file", "pth", "torch.load(mmap) + save_file", "benchmarks/naive.py pth-save-file {source} {out}"),
    Row("transformers", "teacher", "transformers load + save", "benchmarks/naive.py transformers {source} {out}"),
    Row("mergekit", "teacher", "mergekit passthrough", "benchmarks/naive.py mergekit {source} {out}"),
)
OURS = [row.name for row in ROWS if "naive" not in row.command]

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
        self.trees = {"before": args.beside.resolve()} if args.beside else {}
        self.trees["now"] = HERE.parent
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
        shard = str(min(1_000_000_000, self.total // 4))
        say(f"making {path}")
        measure.run(
            [PYTHON, str(HERE / "synthetic.py"), str(path), *SOURCES[kind], "--bytes", size, "--max-shard-size", shard]
        )
        try:
            yield path
        finally:
            _remove(path, path.with_suffix(".json"))

    def run(self, source: Path, command: Sequence[str], *outputs: Path) -> Sample:
        """From the same start every time: no output, nothing dirty, the source cached or not, free memory at hand."""
        _remove(*outputs)
        os.sync()
        (measure.chill if self.cold else measure.warm)(_weights(source))
        time.sleep(self.args.pause)
        if not self.cold:
            measure.touch(self.total * 5 // 4)
        return measure.run(command, limit_bytes=self.limit, niceness=self.args.nice)

    def copy(self, source: Path) -> Sample:
        """`cp` of the source; of one in fp32, which is read, of about as many bytes as are written."""
        files, target = _weights(source), self.folder / "copy"
        if source.name == "student-f32":
            files = files[: max(1, len(files) // 2)]
        place = shlex.quote(str(target))
        script = f"mkdir {place} && cp {shlex.join(map(str, files))} {place} && sync {place}/*"
        try:
            return self.run(source, ["sh", "-c", script], target)
        finally:
            _remove(target)

    def row(self, row: Row, source: Path, *, verify: bool) -> str:
        """A line of the table."""
        out, trees = self.folder / row.out, dict(self.trees) if "naive" not in row.command else {"now": HERE.parent}
        outputs = out, out.with_suffix(".json"), out.with_suffix(".yml")
        title = f"{row.title}, verified" if verify and row.may_verify else row.title
        say(title)

        def command(tree: Path) -> Sample:
            return self.run(source, row.words(tree, source, out, verify=verify), *outputs)

        try:
            runs = {"cp": lambda: self.copy(source)}
            runs |= {name: lambda tree=tree: command(tree) for name, tree in trees.items()}  # type: ignore[misc]
            found = measure.in_turn(runs, self.args.rounds)
        except measure.Failed as error:
            say(f"FAILED: {error}")
            return f"| {title} | failed |"
        _remove(*outputs)
        cells = [title]
        for name in trees:
            samples, peak = found[name], measure.peaks(found[name])
            cpu = statistics.median(sample.cpu for sample in samples)
            cells += [f"{measure.median_wall(samples):.2f} ({cpu:.2f})", f"{measure.ratio(samples, found['cp']):.2f}"]
            cells += [f"{peak['rss_mib']:.0f} ({peak['anonymous_mib']:.0f})"]
        if len(trees) > 1:
            cells.append(f"**{measure.ratio(found['now'], found['before']):.2f}**")
        return f"| {' | '.join(cells)} |"

    def table(self) -> None:
        """All rows that are wanted, a source at a time, each line printed when it is measured."""
        print(f"{self.total / 1e9:g} GB, {self.args.rounds} rounds; {measure.machine()}\n")
        columns = [f"{name}: {what}" for name in self.trees for what in ("s (CPU s)", "/ cp", "MiB (anonymous)")]
        columns = ["command", *columns, *(["now / before"] if len(self.trees) > 1 else [])]
        print(f"| {' | '.join(columns)} |\n|---{'|--:' * (len(columns) - 1)}|", flush=True)
        for tree in self.trees.values():
            compileall.compile_dir(tree / "hxaconv", quiet=2)
        for kind in SOURCES:
            rows = [row for row in ROWS if row.source == kind and row.name in self.args.rows.split(",")]
            if rows:
                with self.source(kind) as source:
                    self.copy(source)
                    for row in rows:
                        for verify in (False, True) if self.args.verify and row.may_verify else (False,):
                            print(self.row(row, source, verify=verify), flush=True)


def _weights(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors")) if source.is_dir() else [source]


def _bytes(text: str) -> int:
    from hxaconv.options import parse_size

    return parse_size(text)


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep cores busy with endless loops."""
    loops = [subprocess.Popen([PYTHON, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", default="1GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default=",".join(OURS), help=f"of {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--beside", type=Path, help="another version's source tree: both are measured")
    parser.add_argument("--verify", action="store_true", help="also measure every command with its verification")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-files"), help="on the disk to measure")
    parser.add_argument("--limit", help="memory of a cgroup for all sides: 256MiB; needs root")
    parser.add_argument("--nice", type=int, default=0, help="of all sides; below 0 on a busy machine (root)")
    parser.add_argument("--busy", type=int, default=0, help="endless loops beside the runs")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds of rest before every run")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(HERE.parent))
    os.environ["PYTHONPATH"] = str(HERE.parent)
    try:
        with busy(args.busy):
            Bench(args).table()
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
