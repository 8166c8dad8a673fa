"""Reka Flash 3's 41.8 GB, made sparse: the whole job at full size, in memory and layout, and what needs headers only.

    python benchmarks/reka_sparse.py [--folder DIR] [--steps headers,init,to-pth]

The source is holes, so nothing here is a claim about speed: holes are not disk reads. The output is real, 43 GB
at a time, checked by readers that share no code with the package, and removed before the next step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import mmap
import os
import shutil
import statistics
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measure
import synthetic
from measure import say

HERE = Path(__file__).resolve().parent
HXACONV = str(Path(sys.executable).parent / "hxaconv")
OUTPUT_BYTES = 43_000_000_000
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4}
REPEATS = 9


def headers(folder: Path) -> list[dict[str, Any]]:
    """`--help`, and `inspect` of one sparse .pth of 42 GB: median wall and CPU time."""
    path = folder / "student.pth"
    nbytes = synthetic.make(path, synthetic.Wanted(kind="student", container="pth", sparse=True))
    rows = []
    for name, command in (("--help", ["--help"]), ("inspect", ["inspect", str(path)])):
        measure.run([HXACONV, *command])
        runs = [measure.run([HXACONV, *command]) for _ in range(REPEATS)]
        rows.append(
            {
                "row": name,
                "seconds": round(measure.median_wall(runs), 3),
                "best_seconds": round(min(sample.wall for sample in runs), 3),
                "cpu_seconds": round(statistics.median(sample.cpu for sample in runs), 3),
                "load": round(statistics.median(sample.load for sample in runs), 1),
                **({"bytes": nbytes} if name == "inspect" else {}),
                **measure.peaks(runs),
            }
        )
    path.unlink()
    return rows


def init(folder: Path) -> list[dict[str, Any]]:
    """init-from-teacher of a sparse teacher; the student checked."""
    teacher, out = folder / "teacher", folder / "student"
    synthetic.make(teacher, synthetic.Wanted(kind="teacher", sparse=True, max_shard_bytes=5_000_000_000))
    command = [HXACONV, "init-from-teacher", str(teacher), str(out), "--no-verify", "--quiet"]
    return [_measured("init-from-teacher", command, lambda: check_folder(out), out)]


def to_pth(folder: Path) -> list[dict[str, Any]]:
    """to-pth of a sparse student; the file checked."""
    source, out = folder / "student", folder / "student.pth"
    synthetic.make(source, synthetic.Wanted(kind="student", sparse=True, max_shard_bytes=5_000_000_000))
    command = [HXACONV, "to-pth", str(source), str(out), "--no-verify", "--quiet"]
    expected = json.loads((source / "config.json").read_text())
    rows = [_measured("to-pth", command, lambda: check_pth(out, expected), out, out.with_suffix(".json"))]
    shutil.rmtree(source)
    return rows


def _measured(name: str, command: list[str], check: Any, *outputs: Path) -> dict[str, Any]:
    free = shutil.disk_usage(outputs[0].parent).free
    if free < OUTPUT_BYTES + 5_000_000_000:
        raise SystemExit(f"{free:,} bytes are free, {OUTPUT_BYTES:,} and some to spare are needed")
    say(name)
    try:
        sample = measure.run(command)
        say(f"  {sample.wall:.0f} s; checking")
        found = check()
    finally:
        for path in outputs:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return {
        "row": name,
        "seconds": round(sample.wall, 1),
        "cpu_seconds": round(sample.cpu, 1),
        "load": round(sample.load, 1),
        **measure.peaks([sample]),
        **found,
    }


def student_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What the specification demands of Reka's student, by the shapes in its config, counted by hand."""
    from hxaconv.model.architecture import expected_tensors
    from hxaconv.model.config import student_of, teacher_config

    teacher = teacher_config(synthetic.REKA, where="benchmark")
    return expected_tensors(student_of(teacher, tuple(config["transformer_layers"])))


def check_folder(out: Path) -> dict[str, Any]:
    """Every shard's header against index, shapes and file size; a random matrix against its promise."""
    config = json.loads((out / "config.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in sorted(out.glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__")
        position = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            assert start == position and end - start == math.prod(entry["shape"]) * ITEMSIZE[entry["dtype"]], name
            assert index["weight_map"][name] == path.name and name not in found, name
            found[name] = path, 8 + length + start, entry
            position = end
        assert path.stat().st_size == 8 + length + position, path
    shapes = {name: tuple(entry["shape"]) for name, (_, _, entry) in found.items()}
    assert shapes == student_shapes(config)
    _check_orthogonal(*found["model.layers.37.self_attn.g2"])
    return {"bytes": index["metadata"]["total_size"], "tensors": len(found), "layout": "right"}


def _check_orthogonal(path: Path, offset: int, entry: dict[str, Any]) -> None:
    import torch

    rows, columns = entry["shape"]
    with open(path, "rb") as file:
        file.seek(offset)
        values = torch.frombuffer(bytearray(file.read(2 * rows * columns)), dtype=torch.bfloat16)
    matrix = values.view(rows, columns).double()
    # 0.1 squared, within what bf16's eight bits leave of a sum over 6144 columns.
    assert torch.allclose(matrix @ matrix.T, 0.01 * torch.eye(rows, dtype=torch.double), atol=2e-4)


def check_pth(out: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """torch maps the file and finds the shapes; zipfile finds entries aligned, and checksums of some right."""
    import torch

    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    state = torch.load(out, mmap=True, weights_only=True)
    shapes = sorted(tuple(value.shape) for value in state.values())
    assert shapes == sorted(student_shapes(config).values())
    assert not any(value.flatten()[:: max(1, value.numel() // 64)].any() for value in state.values())
    nbytes, count = sum(value.nbytes for value in state.values()), len(state)
    del state
    with zipfile.ZipFile(out) as archive, open(out, "rb") as file:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        assert len(entries) == count and all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        for entry in entries:
            file.seek(entry.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            assert (entry.header_offset + 30 + name + extra) % 64 == 0, entry.filename
        for entry in (entries[0], entries[len(entries) // 2], entries[-1]):
            crc = 0
            with archive.open(entry) as stream:  # raises BadZipFile itself at the end
                while piece := stream.read(measure.MIB):
                    crc = zlib.crc32(piece, crc)
            assert crc == entry.CRC, entry.filename
    return {"bytes": nbytes, "tensors": count, "layout": "right"}


STEPS = {"headers": headers, "init": init, "to-pth": to_pth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-files"))
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "reka_sparse.jsonl")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    try:
        for step in args.steps.split(","):
            for row in STEPS[step](folder):
                say(json.dumps(row))
                with open(args.results, "a") as file:
                    file.write(json.dumps({**row, "machine": measure.machine()}) + "\n")
            os.sync()
            time.sleep(1)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
