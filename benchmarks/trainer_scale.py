"""What a trainer's folder costs to convert: memory on a sparse ZeRO-3 folder of 40 GB, time against `cp` at 2 GB.

    python benchmarks/trainer_scale.py [--folder DIR] [--steps memory,speed]

The sparse folder is holes, so that it says nothing about speed. Outputs are removed before the next step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import synthetic
from measure import say

ROOT = Path(__file__).resolve().parents[1]
HXACONV = (sys.executable, "-m", "hxaconv")
TOLD = ("--rope-theta", "8e6", "--rms-norm-eps", "1e-5", "--no-tie-word-embeddings", "--no-verify", "--quiet")
RANKS, PAIRS = 8, 5


def shapes(nbytes: int, itemsize: int) -> dict[str, tuple[int, ...]]:
    """A student like Reka's, narrowed to this size: names of a training checkpoint."""
    from hxaconv.model.architecture import expected_tensors
    from hxaconv.model.config import student_of, teacher_config
    from hxaconv.model.names import stored_name

    teacher = teacher_config(synthetic.scaled_reka(nbytes, itemsize), where="benchmark")
    layers = teacher.num_hidden_layers
    student = student_of(teacher, tuple(range(layers // 7, layers, 7)))
    return {stored_name(name, "training"): shape for name, shape in expected_tensors(student).items()}


def sparse(folder: Path, nbytes: int, kind: str) -> int:
    """A folder whose master weights have this size, as holes; its bytes, moments of the optimizer included."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    sys.path.insert(0, str(ROOT))
    from tests.trainer_folders import cut_rows, dcp_folder, zero_folder

    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        masters = {name: torch.empty(shape) for name, shape in shapes(nbytes, 4).items()}
        if kind == "zero":
            zero_folder(folder, masters, stage=3, ranks=RANKS)
        else:
            dcp_folder(folder, {"model": masters}, cut_rows(RANKS), ranks=RANKS)
    return sum(path.stat().st_size for path in folder.rglob("*.pt"))


def filled(folder: Path) -> None:
    """Random bits where the master weights stand, none of them NaN."""
    import numpy as np

    from hxaconv.load.checkpoint import find_trained
    from hxaconv.model.plan import Ranges

    trained = find_trained(folder, str(folder))
    assert trained is not None
    files, contents = trained.read(None)
    random = np.random.default_rng(0)
    for recipe in contents.tensors.values():
        assert isinstance(recipe.make, Ranges)
        for extent in recipe.make.extents:
            assert extent.file is not None and extent.file.path is not None
            values = random.standard_normal(extent.nbytes // 4, dtype=np.float32) * 0.02
            with open(extent.file.path, "r+b") as file:
                file.seek(extent.offset)
                file.write(values.tobytes())
    for opened in files:
        opened.close()


def memory(folder: Path) -> list[dict[str, Any]]:
    """inspect, and to-hf in bf16, of a sparse ZeRO-3 folder of 40 GB."""
    source, out = folder / "sparse", folder / "out"
    total = sparse(source, 40_000_000_000 // 3, "zero")
    rows = []
    for name, command in (
        ("inspect", [*HXACONV, "inspect", str(source)]),
        ("to-hf --dtype bfloat16", [*HXACONV, "to-hf", str(source), str(out), "--dtype", "bfloat16", *TOLD]),
    ):
        sample = measure.run(command)
        rows.append({"row": name, "bytes": total, "seconds": round(sample.wall, 1), **measure.peaks([sample])})
        say(json.dumps(rows[-1]))
        shutil.rmtree(out, ignore_errors=True)
    return rows


def speed(folder: Path) -> list[dict[str, Any]]:
    """to-hf of 2 GB of master weights against cp of as many bytes, and a LoRA of every projection merged into them."""
    rows = []
    source, out, copied = folder / "real", folder / "out", folder / "copied"
    sparse(source, 2_000_000_000, "zero")
    filled(source)
    convert = [*HXACONV, "to-hf", str(source), str(out), *TOLD]
    measure.run(convert)
    written = sum(path.stat().st_size for path in out.iterdir())

    def ours() -> measure.Sample:
        shutil.rmtree(out, ignore_errors=True)
        return measure.run(convert)

    def copy() -> measure.Sample:
        shutil.rmtree(copied, ignore_errors=True)
        return measure.run(["sh", "-c", f"cp -r '{out}' '{copied}' && sync -f '{copied}'"])

    found = measure.in_turn({"to-hf": ours, "cp": copy}, PAIRS)
    seconds, ratio = round(measure.median_wall(found["to-hf"]), 1), round(measure.ratio(found["to-hf"], found["cp"]), 2)
    peaks = measure.peaks(found["to-hf"])
    rows.append({"row": "to-hf, float32", "bytes": written, "seconds": seconds, "ratio": ratio, **peaks})
    say(json.dumps(rows[-1]))
    shutil.rmtree(copied, ignore_errors=True)
    adapter = lora(folder / "adapter.pth", source)
    merged = [*convert, "--adapter", str(adapter), "--adapter-scale", "0.5"]
    shutil.rmtree(out)
    sample = measure.run(merged)
    row = {"row": "to-hf, LoRA of rank 32 on every projection", "bytes": written, "seconds": round(sample.wall, 1)}
    rows.append({**row, **measure.peaks([sample])})
    say(json.dumps(rows[-1]))
    return rows


def lora(path: Path, source: Path) -> Path:
    """An adapter of every projection and MLP matrix."""
    import torch

    from hxaconv.load.checkpoint import find_trained

    trained = find_trained(source, str(source))
    assert trained is not None
    tensors = {}
    for name, recipe in trained.read(None)[1].tensors.items():
        module = name.removesuffix(".weight")
        if module != name and len(recipe.shape) == 2 and ("_proj" in name or "student_attn" in name):
            tensors[f"{module}.lora_A"] = torch.randn(32, recipe.shape[1]) * 0.01
            tensors[f"{module}.lora_B"] = torch.randn(recipe.shape[0], 32) * 0.01
    torch.save(tensors, path)
    return path


def main() -> None:
    """Run the steps asked for; one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where there is room for 20 GB")
    parser.add_argument("--steps", default="memory,speed")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for step in options.steps.split(","):
            place = Path(folder) / step
            place.mkdir()
            {"memory": memory, "speed": speed}[step](place)
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
