"""Golden models for the tests of the reference forward and of verify, opened the way the package opens them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hxaconv.formats.files import SourceFile
from hxaconv.forward.tokens import probe_tokens
from hxaconv.load import load_teacher
from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.load.student import student_model
from hxaconv.load.tensors import graft
from hxaconv.model.config import student_of
from hxaconv.model.model import Model
from hxaconv.model.plan import Buffers
from hxaconv.options import Settings
from hxaconv.surgery.arithmetic import computed, tensor
from hxaconv.surgery.init import PRESETS, InitSettings, init_from_teacher
from hxaconv.verification.report import Report

# Matrices this small are slower on several threads.
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"
CASES = ("reka_tiny", "reka_tiny_init", "qwen3_tiny")
CONTAINERS = ("student.pth", "student_hf", "trained_attention.pth")

FACTORS = PRESETS["openmose-stage1"]

AGREEMENT = 5e-6
"""The published code drops to float32 in the RMSNorms inside attention; ours stays in float64."""


def conversion(command: str, folder: Path, out: Path) -> list[object]:
    """The words that convert a golden case's `.pth`, whose settings its teacher and the variant complete."""
    return [command, folder / "student.pth", out, "--teacher", folder / "teacher", "--variant", "hxa079", "--quiet"]


def case(name: str) -> dict[str, Any]:
    """Settings of a golden case."""
    content: dict[str, Any] = json.loads((GOLDEN / name / "case.json").read_text())
    return content


def expected(name: str) -> dict[str, Tensor]:
    """input_ids, teacher_logits, student_logits, student_hidden of a golden case, float64."""
    return load_file(GOLDEN / name / "expected.safetensors")


def teacher(name: str) -> Model:
    """The teacher of a golden case."""
    return load_teacher(GOLDEN / name / "teacher")


def student(name: str, container: str = "student.pth") -> Model:
    """The student of a golden case; a training checkpoint is completed by the teacher."""
    base = teacher(name)
    settings = Settings(variant="hxa079")
    model = student_model(open_checkpoint(GOLDEN / name / container), settings, teacher=base.teacher)
    if container != "trained_attention.pth":
        return model
    return Model(model.config, graft(model.plan, base.plan, model.student), model.label)


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder of safetensors files."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def ids(model: Model, tokens: int = 12) -> Tensor:
    """Probe tokens for a model."""
    return probe_tokens(model.config.vocab_size, tokens=tokens)


def changed(model: Model, name: str, change: Callable[[Tensor], Tensor], dtype: str = "BF16") -> Model:
    """The model with one tensor replaced."""
    recipe = model.plan[name]
    made = computed(lambda: change(tensor(recipe)), dtype, recipe.shape, f"{name}, changed")
    return dataclasses.replace(model, plan=model.plan | {name: made}, label="changed")


def fresh(name: str = "qwen3_tiny", dtype: str = "BF16", gqa_layers: tuple[int, ...] = (1, 3)) -> tuple[Model, Model]:
    """(teacher, a student initialised from it)."""
    base = teacher(name)
    config = student_of(base.config, gqa_layers)
    plan = init_from_teacher(base.plan, config, InitSettings(FACTORS, 0, dtype))
    return base, Model(config, plan, "fresh")


def failed(report: Report) -> dict[str, str]:
    """Failed checks and their details."""
    return {check.name: check.detail for check in report.checks if not check.passed}


@dataclasses.dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that are at hand."""

    data: bytes
    kind: str = "init"

    def chunks(self, buffers: Buffers) -> Iterator[memoryview]:
        """The bytes in one chunk."""
        yield memoryview(self.data)

    def sources(self) -> Iterable[SourceFile]:
        """No files."""
        return []
