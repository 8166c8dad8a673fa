"""What calibrating one layer of Reka Flash 3's shape costs: seconds, CPU seconds and peak memory.

    python benchmarks/calibration_cost.py [--tokens 1024] [--steps 100] [--workers 2]

The weights are random and made when they are asked for, so that nothing but the calibration is in memory. Time and
memory do not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from hxaconv.calibration.streaming import calibrate
from hxaconv.formats.files import SourceFile
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import TeacherConfig, student_of
from hxaconv.model.model import Model
from hxaconv.model.plan import Buffers, Recipe
from hxaconv.options import Fit
from hxaconv.surgery.init import PRESETS, InitSettings, init_from_teacher


@dataclass(frozen=True, slots=True)
class Random:
    """Bytes of a random weight, in pieces as from a file."""

    name: str
    shape: tuple[int, ...]
    kind: str = "random"

    def pieces(self, buffers: Buffers) -> Iterator[memoryview]:
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


def teacher() -> Model:
    """One layer of Reka Flash 3 under a small vocabulary."""
    config = TeacherConfig(
        num_hidden_layers=1,
        hidden_size=6144,
        intermediate_size=19648,
        vocab_size=512,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=96,
        rms_norm_eps=1e-5,
        rope_theta=8e6,
        tie_word_embeddings=True,
        model_type="llama",
    )
    shapes = expected_tensors(config).items()
    plan = {n: Recipe("BF16", shape, Random(n, shape), "random") for n, shape in shapes}
    return Model(config, plan, "one layer of Reka's shape")


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    model = teacher()
    config = student_of(model.config, ())
    settings = InitSettings(PRESETS["openmose-stage1"], 0, "BF16")
    student = Model(config, init_from_teacher(model.plan, config, settings), "student")
    ids = torch.randint(0, 512, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF)
    wall, cpu = time.perf_counter(), time.process_time()
    done = calibrate(model, student, ids, Fit(refine_steps=options.steps), workers=options.workers)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {
                "tokens": options.tokens,
                "steps": options.steps,
                "workers": options.workers,
                "seconds": round(wall, 1),
                "cpu_seconds": round(cpu, 1),
                "peak_mib": round(peak / 1024),
                "mib_before": round(before.ru_maxrss / 1024),
                "error_after": round(done.report.layers[0].error_after, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
