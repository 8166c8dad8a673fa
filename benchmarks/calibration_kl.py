"""How near calibration brings a student to its teacher: KL(teacher || student) of the demo's teacher.

    python benchmarks/calibration_kl.py [rwkv/1024/default ...] [--list] [--workers 2] [--results FILE.jsonl]

Students in bf16, fitted to the first sequences of calibration_tokens.npy, judged in nats per token on all 16 sequences
of heldout_tokens.npy. Cases that the file holds are not run again. Ends by writing the table into CALIBRATION.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hxaconv.calibration.streaming import calibrate
from hxaconv.load import load_teacher
from hxaconv.model.config import student_of
from hxaconv.model.model import Model
from hxaconv.options import Fit
from hxaconv.surgery.init import PRESETS, InitSettings, init_from_teacher
from hxaconv.verification.compare import compare_models

TEACHER = Path(__file__).parents[1] / "hxaconv" / "commands" / "embedded" / "teacher"
MARKS = ("<!-- written by calibration_kl.py -->", "<!-- until here -->")
MAPS = {"rwkv": (), "gqa-2-5": (2, 5)}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "closed-form": {"refine_steps": 0},
    "20-steps": {"refine_steps": 20},
    "50-steps": {"refine_steps": 50},
    "refit-never": {"refit_output": "never"},
    "refit-always": {"refit_output": "always"},
    "closed-form-refit-always": {"refine_steps": 0, "refit_output": "always"},
    "chunk-256": {"chunk": 256},
    "chunk-128": {"chunk": 128},
}
RUNS = (
    ("rwkv", 1024, ("default", "closed-form", "20-steps", "50-steps", "refit-always", "chunk-256", "chunk-128")),
    ("rwkv", 4096, ("default", "closed-form", "refit-always", "closed-form-refit-always")),
    ("rwkv", 8192, ("default", "closed-form", "refit-never")),
    ("gqa-2-5", 1024, ("default", "closed-form")),
    ("gqa-2-5", 4096, ("default", "closed-form")),
)
CASES = {f"{name}/{tokens}/{how}": (name, tokens, how) for name, tokens, hows in RUNS for how in hows}


def read(name: str) -> Tensor:
    """Token ids of the demo teacher's text, (16, 512)."""
    return torch.from_numpy(np.load(TEACHER / f"{name}_tokens.npy").astype(np.int64))


def distances(teacher: Model, student: Model) -> dict[str, float]:
    """KL from the teacher to the student, and to itself with attention zeroed, on the held-out sequences."""
    found = compare_models(student, teacher, ids=read("heldout")).logits
    assert found is not None
    assert found.kl_attention_zeroed is not None
    return {"kl": round(found.kl_other_source, 4), "zeroed": round(found.kl_attention_zeroed, 4)}


def measure(case: str, workers: int) -> dict[str, Any]:
    """One line of the table."""
    name, tokens, how = CASES[case]
    teacher = load_teacher(str(TEACHER))
    config = student_of(teacher.config, MAPS[name])
    settings = InitSettings(PRESETS["openmose-stage1"], 0, "BF16")
    plain = Model(config, init_from_teacher(teacher.plan, config, settings), "student")
    begin = time.perf_counter()
    done = calibrate(teacher, plain, read("calibration")[: tokens // 512], Fit(**SETTINGS[how]), workers=workers)
    seconds = time.perf_counter() - begin
    before = distances(teacher, plain)
    after = distances(teacher, replace(plain, plan=plain.plan | done.replaced))
    layers = done.report.layers
    return {
        "case": case,
        "kl": after["kl"],
        "plain": before["kl"],
        "zeroed": before["zeroed"],
        "seconds": round(seconds),
        "errors": [round(layer.error_after, 3) for layer in layers],
        "refitted": [layer.layer for layer in layers if layer.output_refitted],
        "fell_back": [layer.layer for layer in layers if layer.fell_back],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """All results as Markdown, in the order of the cases."""
    lines = ["| layers | tokens | settings | KL | plain | zeroed | ratio to plain |", "|---|--:|---|--:|--:|--:|--:|"]
    for row in sorted(rows, key=lambda row: list(CASES).index(row["case"])):
        name, tokens, how = CASES[row["case"]]
        figures = f"{row['kl']:.3f} | {row['plain']:.2f} | {row['zeroed']:.2f} | {row['kl'] / row['plain']:.3f}"
        lines.append(f"| {name} | {tokens} | {how} | {figures} |")
    return "\n".join(lines)


def write_table(rows: list[dict[str, Any]]) -> None:
    """Between the two marks in CALIBRATION.md."""
    path = Path(__file__).parent / "CALIBRATION.md"
    before, _, rest = path.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    path.write_text(f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{after}")


def main() -> None:
    """Run what is missing, write down what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "calibration_kl.jsonl")
    options = parser.parse_args()
    if options.list:
        print("\n".join(CASES))
        return
    torch.set_num_threads(1)
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    rows = [json.loads(line) for line in lines]
    for case in options.cases:
        if case not in {row["case"] for row in rows}:
            rows.append(measure(case, options.workers))
            with options.results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    write_table(rows)


if __name__ == "__main__":
    main()
