"""What calibration costs at Reka Flash 3's shape: seconds, CPU seconds and peak memory of fitting one layer, or of
polishing a student of two layers, vocabulary and all.

    python benchmarks/calibration_cost.py [--tokens 1024] [--steps 100] [--workers 2]
    python benchmarks/calibration_cost.py --polish [--folder DIR] [--workers 2]

The weights are random: time and memory do not depend on their values. Those of a fit are made when they are asked
for; a polish reads 4 GB from files that other processes make first, so that nothing but the work is in memory. Of a
whole model, a polish keeps 42 layers' streams more, which is added.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from synthetic import REKA

from hxaconv.calibration import polish as module
from hxaconv.calibration.streaming import calibrate
from hxaconv.formats.files import SourceFile
from hxaconv.load import load_student, load_teacher
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import student_of, teacher_config
from hxaconv.model.model import Model
from hxaconv.model.plan import Buffers, Recipe
from hxaconv.options import Fit
from hxaconv.progress import Progress
from hxaconv.surgery.init import PRESETS, InitSettings, init_from_teacher


@dataclass(frozen=True, slots=True)
class Random:
    """Bytes of a random weight, in pieces as from a file."""

    name: str
    shape: tuple[int, ...]
    kind: str = "random"

    def chunks(self, buffers: Buffers) -> Iterator[memoryview]:
        """Made anew each time."""
        values = weight(self.name, self.shape).reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(values), len(buffers.read)):
            yield memoryview(values[start : start + len(buffers.read)])

    def sources(self) -> Iterable[SourceFile]:
        """None."""
        return ()


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A norm of ones, or a matrix whose products keep their size."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).bfloat16()


def one_layer() -> Model:
    """A teacher of one layer of Reka Flash 3 under a small vocabulary."""
    raw = REKA | {"num_hidden_layers": 1, "vocab_size": 512, "tie_word_embeddings": True}
    config = teacher_config(raw, where="benchmark")
    shapes = expected_tensors(config).items()
    plan = {n: Recipe("BF16", shape, Random(n, shape), "random") for n, shape in shapes}
    return Model(config, plan, "one layer of Reka's shape")


def fit(tokens: int, steps: int, workers: int) -> dict[str, Any]:
    """Of one layer."""
    model = one_layer()
    config = student_of(model.config, ())
    settings = InitSettings(PRESETS["openmose-stage1"], 0, "BF16")
    student = Model(config, init_from_teacher(model.plan, config, settings), "student")
    ids = torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF)
    wall, cpu = time.perf_counter(), time.process_time()
    done = calibrate(model, student, ids, Fit(refine_steps=steps), workers=workers)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "tokens": tokens,
        "steps": steps,
        "workers": workers,
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_mib": round(peak / 1024),
        "mib_before": round(before.ru_maxrss / 1024),
        "error_after": round(done.report.layers[0].error_after, 3),
    }


def build(folder: Path) -> None:
    """Write a teacher of two layers."""
    raw = REKA | {"num_hidden_layers": 2}
    folder.mkdir(parents=True)
    shapes = expected_tensors(teacher_config(raw, where="benchmark"))
    save_file({n: weight(n, shape) for n, shape in shapes.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))


def polish(folder: Path, workers: int) -> dict[str, Any]:
    """Two steps on two sequences; figures of a step."""
    parts = {name: folder / name for name in ("teacher", "student")}
    if not parts["student"].exists():
        script = [sys.executable, __file__, "--build", str(parts["teacher"])]
        subprocess.run(script, check=True)
        words = ["init-from-teacher", str(parts["teacher"]), str(parts["student"]), "--gqa-layers", "none"]
        subprocess.run([sys.executable, "-m", "hxaconv", *words, "--no-verify", "-q"], check=True)
    model, student = load_teacher(parts["teacher"]), load_student(str(parts["student"]))
    ids = torch.randint(0, model.config.vocab_size, (1, 3 * module.LENGTH), generator=torch.Generator().manual_seed(0))
    trained, _ = module.sequences(ids, ids.numel())
    expected, clock = module.cost(student, trained), Clock()
    module.polish(model, student, ids, ids.numel(), folder=folder / "kept", workers=workers, progress=clock)
    shutil.rmtree(folder / "kept")
    (wall, cpu), peak = clock.steps[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    streams = 42 * trained.numel() * student.config.hidden_size * 4 >> 20
    return {
        "polish": "two layers",
        "tokens": trained.numel(),
        "workers": workers,
        "seconds_a_step": round(wall, 1),
        "cpu_seconds_a_step": round(cpu, 1),
        "expected_cpu_seconds_a_step": round(expected.cpu_seconds, 1),
        "peak_mib": peak,
        "peak_mib_of_44_layers": peak + streams,
    }


class Clock(Progress):
    """Wall and CPU seconds of each step."""

    def start(self, title: str, total: int) -> None:
        """The steps begin after the first `advance`."""
        self.steps: list[tuple[float, float]] = []

    def advance(self, n: int, what: str = "") -> None:
        """A step has ended."""
        now = time.perf_counter(), time.process_time()
        if n:
            self.steps.append((now[0] - self.begun[0], now[1] - self.begun[1]))
        print(what, *(self.steps[-1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
        self.begun = now

    def stop(self) -> None:
        """Nothing."""


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--polish", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("build/reka-two-layers"))
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        build(options.build)
        return
    of_polish = functools.partial(polish, options.folder, options.workers)
    print(json.dumps(of_polish() if options.polish else fit(options.tokens, options.steps, options.workers)))


if __name__ == "__main__":
    main()
