"""Runs the checks on wrong checkpoints of three students."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from hxaconv.errors import HxaconvError
from hxaconv.forward.tokens import probe_tokens
from hxaconv.load import open_checkpoint
from hxaconv.load.models import load_student, load_teacher
from hxaconv.model.config import student_of
from hxaconv.model.model import Model
from hxaconv.options import Settings
from hxaconv.save.documents import student_json
from hxaconv.surgery.arithmetic import tensor
from hxaconv.surgery.init import PRESETS, InitSettings, init_from_teacher
from hxaconv.verification.compare import verify_model
from hxaconv.verification.invariants import History, Made, check_against, check_converted, check_initialised
from hxaconv.verification.report import Report
from hxaconv.verification.written import check_output, check_own
from mutations.kinds import Case, Kind

FACTORS = PRESETS["openmose-stage1"]
GOLDEN = Path(__file__).parents[1] / "golden"
CHECKS = ("after init", "after a conversion", "--against, record", "--against", "alone")


def biased_teacher(folder: Path) -> Path:
    """A teacher of random weights with every bias there is, head_dim 12, A not C."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "num_hidden_layers": 5,
        "hidden_size": 40,
        "intermediate_size": 56,
        "vocab_size": 83,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "torch_dtype": "bfloat16",
    }
    from hxaconv.model.architecture import expected_tensors
    from hxaconv.model.config import teacher_config

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_tensors(teacher_config(config, where="here", allow_output_bias=True))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.2 + (1.0 if "norm" in name else 0.0)).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Student:
    """A right student beside its teacher, on disk, and the checks that can be made of a changed copy."""

    def __init__(self, name: str, teacher: Path, folder: Path, gqa: tuple[int, ...]) -> None:
        settings = Settings(allow_output_bias=True)
        self.name, self.folder = name, folder
        self.teacher = load_teacher(str(teacher), settings)
        config = student_of(self.teacher.config, gqa)
        plan = init_from_teacher(self.teacher.plan, config, InitSettings(FACTORS, 0, "BF16"))
        self.asked = Model(config, plan, "asked", self.teacher.raw)
        folder.mkdir()
        tensors = {name: tensor(recipe) for name, recipe in plan.items()}
        document = student_json(config, self.teacher.raw, "BF16")
        Case(tensors, json.loads(json.dumps(document))).write(folder)
        self.right = load_student(str(folder), Settings())
        self.made = [Made(layers=frozenset(config.rwkv_layers), factors=FACTORS, seed=0)]

    def mutant(self, kind: Kind, folder: Path) -> bool:
        """A changed copy; False where the kind does not apply."""
        shutil.copytree(self.folder, folder)
        case = Case.read(folder)
        applies = kind.change(case) is not False
        case.write(folder)
        return applies

    def judged(self, folder: Path, checks: Sequence[str] = CHECKS) -> dict[str, list[str]]:
        """Check -> what of it fails; empty where it passes."""
        ids = probe_tokens(self.right.config.vocab_size, tokens=16)

        def written(verify: Callable[[Model], Report]) -> Report:
            checkpoint = open_checkpoint(str(folder))
            return check_output(checkpoint, self.asked, list(self.asked.plan), "BF16", "mutant", verify)

        def against(made: list[Made]) -> Report:
            model = load_student(str(folder), Settings())
            report = check_against(model, self.teacher, history=History(made), ids=ids)
            check_own(report, open_checkpoint(str(folder)), {})
            return report

        def alone() -> Report:
            report = verify_model(load_student(str(folder), Settings()), ids=ids)
            check_own(report, open_checkpoint(str(folder)), {})
            return report

        runs: Mapping[str, Callable[[], Report]] = {
            "after init": lambda: written(lambda m: check_initialised(self.teacher, m, factors=FACTORS, seed=0)),
            "after a conversion": lambda: written(lambda m: check_converted(self.right, m)),
            "--against, record": lambda: against(self.made),
            "--against": lambda: against([]),
            "alone": alone,
        }
        return {name: _failing(runs[name]) for name in checks}


def _failing(run: Callable[[], Report]) -> list[str]:
    try:
        report = run()
    except HxaconvError:
        return ["refused"]
    return [check.name for check in report.checks if not check.passed]


def students(folder: Path) -> Iterator[Student]:
    """The three."""
    yield Student("llama, untied", GOLDEN / "reka_tiny" / "teacher", folder / "reka", (2, 4))
    yield Student("qwen3, tied, q/k norm", GOLDEN / "qwen3_tiny" / "teacher", folder / "qwen3", (1,))
    yield Student("all biases", biased_teacher(folder / "biased-teacher"), folder / "biased", (2,))
