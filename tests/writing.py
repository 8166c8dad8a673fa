"""What tests of the writer share: sources with known bytes, small outputs, trees of bytes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hxaconv.calls import Call
from hxaconv.formats.files import SourceFile
from hxaconv.model.plan import Plan, stored
from hxaconv.options import Write
from hxaconv.progress import Result
from hxaconv.save import fill, writer
from hxaconv.save.output import Output, Record, layouts

TARGETS = ("out", "out.pth")


def finite_floats(count: int, seed: int = 0) -> bytes:
    """float32 values without NaN or infinity."""
    rng = random.Random(seed)
    return struct.pack(f"<{count}f", *(rng.uniform(-1, 1) for _ in range(count)))


def source(folder: Path, count: int = 60_000, seed: int = 0) -> SourceFile:
    """A file of `count` float32 values."""
    path = folder / f"source-{seed}.bin"
    if not path.exists():
        path.write_bytes(finite_floats(count, seed))
    return SourceFile.local(path)


def plan_over(file: SourceFile, tensors: int = 24) -> Plan:
    """Float32 tensors of uneven sizes that tile the file."""
    total, plan, start = file.size // 4, {}, 0
    weights = [1 + (7 * i) % 5 for i in range(tensors)]
    for i, weight in enumerate(weights):
        size = total * weight // sum(weights) if i < tensors - 1 else total - start
        plan[f"t.{i}"] = stored("F32", (size,), file, 4 * start, f"t.{i} in {file.name}")
        start += size
    return plan


def output(target: Path, plan: Plan, *, max_shard_bytes: int = 40_000, **changes: Any) -> Output:
    """An output in several shards, with documents."""
    format = "pth" if target.suffix == ".pth" else "hf"
    settings: dict[str, Any] = {
        "documents": {f"{target.stem}.json": b'{"rope_theta": 1}'} if format == "pth" else {"config.json": b"{}"},
        "provenance": {"hxaconv": "test"},
        "files": layouts(target, format, plan, max_shard_bytes),
        "record": Record(call=Call("test")),
    }
    return Output(target=target, format=format, tensors=plan, **(settings | changes))


def with_plan(out: Output, plan: Plan) -> Output:
    """The output with other tensors."""
    return replace(out, tensors=plan, files=layouts(out.target, out.format, plan, 40_000))


def tree(target: Path) -> dict[str, bytes]:
    """Every published file by name; for a `.pth`, its sidecar too."""
    if target.is_dir():
        return {str(path.relative_to(target)): path.read_bytes() for path in sorted(target.rglob("*"))}
    beside = [target, target.with_suffix(".json")]
    return {path.name: path.read_bytes() for path in beside if path.exists()}


def leftovers(target: Path) -> list[str]:
    """Anything beside the target that a run left: work folders, locks."""
    return [path.name for path in target.parent.iterdir() if "partial-" in path.name or "lock" in path.name]


def partials(folder: Path) -> list[Path]:
    """Work folders in a folder."""
    return [path for path in folder.iterdir() if ".partial-" in path.name]


class Verdict(Result):
    """What `look` said of an output, as a report."""

    def __init__(self, said: dict[str, Any]) -> None:
        self.said = said

    def verdict(self) -> dict[str, Any]:
        return self.said


class Look:
    """A check that finds nothing wrong with settings, and lets `look` see what is staged."""

    def __init__(self, look: Callable[[Path], dict[str, Any]]) -> None:
        self.look = look

    def settings(self, output: Output, raw: Mapping[str, Any], where: str) -> list[str]:
        return []

    def report(self, output: Output, staged: Path, *, allow_nonfinite: bool) -> Any:
        return Verdict(self.look(staged))


def write(out: Output, options: Write, verify: Callable[[Path], dict[str, Any]] | None = None) -> None:
    """Write an output; `verify` sees what is staged, and says what it finds or raises."""
    look: Any = None if verify is None else Look(verify)
    writer.write(out, options, check=look)


def verified(out: Output, **options: Any) -> None:
    """Write with a verification that is content."""
    write(out, Write(**options), verify=lambda path: {"ok": True})


def reference(folder: Path, name: str, **changes: Any) -> dict[str, bytes]:
    """What an undisturbed run of the same output publishes."""
    place = folder / "reference"
    place.mkdir(exist_ok=True)
    out = output(place / name, plan_over(source(folder)), **changes)
    verified(out)
    return tree(out.target)


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Make the count-th write of a tensor's bytes fail."""
    real, calls = fill.write_from, iter(range(10**9))

    def write_from(fd: int, data: memoryview, offset: int) -> None:
        if next(calls) >= count:
            raise error
        real(fd, data, offset)

    monkeypatch.setattr(fill, "write_from", write_from)
