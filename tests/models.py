"""Golden models for the tests of the reference forward and of verify, opened the way the package opens them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from hxaconv.checkpoint import open_checkpoint
from hxaconv.model import Model
from hxaconv.student import student_model
from hxaconv.surgery import graft
from hxaconv.teacher import open_teacher

GOLDEN = Path(__file__).parent / "golden"
CASES = ("reka_tiny", "reka_tiny_init", "qwen3_tiny")
CONTAINERS = ("student.pth", "student_hf", "trained_attention.pth")

AGREEMENT = 5e-6
"""The published code drops to float32 in the RMSNorms inside attention; ours stays in float64."""


def case(name: str) -> dict[str, Any]:
    """Settings of a golden case."""
    content: dict[str, Any] = json.loads((GOLDEN / name / "case.json").read_text())
    return content


def expected(name: str) -> dict[str, Tensor]:
    """input_ids, teacher_logits, student_logits, student_hidden of a golden case, float64."""
    return load_file(GOLDEN / name / "expected.safetensors")


def teacher(name: str) -> Model:
    """The teacher of a golden case."""
    return open_teacher(open_checkpoint(GOLDEN / name / "teacher"))


def student(name: str, container: str = "student.pth") -> Model:
    """The student of a golden case; a training checkpoint is completed by the teacher."""
    base = teacher(name)
    model = student_model(open_checkpoint(GOLDEN / name / container), teacher=base.teacher)
    if container != "trained_attention.pth":
        return model
    return Model(model.config, graft(model.plan, base.plan, model.student).plan, model.label)
