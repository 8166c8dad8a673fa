"""What every command does with every variant: run here, and written down in docs/variants.md.

`python tests/test_variant_matrix.py` writes the table anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from hxaconv.cli.app import run
from hxaconv.load import load_teacher
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import StudentConfig, student_of
from hxaconv.model.variants import VARIANTS
from hxaconv.model.variants.base import Ranks
from hxaconv.save.documents import student_json

PAGE = Path(__file__).resolve().parent.parent / "docs" / "variants.md"
TEACHER = Path(__file__).resolve().parent.parent / "hxaconv" / "commands" / "embedded" / "teacher"
RANKS = Ranks(decay=32, iclr=32, value=32, key=32, gate=32, own_value=32)
TOKENS = ("--input-ids", TEACHER / "calibration_tokens.npy", "--tokens", "128", "--chunk", "64")
STUDENT, PTH, TRAINED = "@student", "@student.pth", "@trained.pth"
COMMANDS: dict[str, tuple[Any, ...]] = {
    "init-from-teacher": ("init-from-teacher", TEACHER, "@init", "--gqa-layers", "2,5", "--variant", "VARIANT"),
    "init-from-teacher --init calibrated": (
        *("init-from-teacher", TEACHER, "@fitted", "--gqa-layers", "2,5", "--variant", "VARIANT"),
        *("--init", "calibrated", "--refine-steps", "2", *TOKENS),
    ),
    "inspect": ("inspect", STUDENT),
    "verify": ("verify", STUDENT),
    "verify --against TEACHER": ("verify", STUDENT, "--against", TEACHER, "--tokens", "16"),
    "to-hf": ("to-hf", STUDENT, "@hf"),
    "to-pth": ("to-pth", STUDENT, PTH),
    "to-hf, from a `.pth` without its JSON file": (
        *("to-hf", "@bare.pth", "@back", "--rope-theta", "1e4", "--rms-norm-eps", "1e-6", "--no-tie-word-embeddings"),
        *("--teacher", TEACHER),
    ),
    "to-training": ("to-training", STUDENT, TRAINED),
    "to-hf, from a training checkpoint without its JSON file": ("to-hf", "@bare_t.pth", "@whole", "--teacher", TEACHER),
    "pick-gqa-layers": ("pick-gqa-layers", STUDENT, "@picked", "--layers", "1,5", "--teacher", TEACHER),
    "pick-gqa-layers --strategy kl": (
        *("pick-gqa-layers", STUDENT, "@ranked", "--strategy", "kl", "--count", "2", "--teacher", TEACHER),
        *("--input-ids", TEACHER / "calibration_tokens.npy", "--tokens", "32"),
    ),
    "calibrate": ("calibrate", "@init", "@calibrated", "--teacher", TEACHER, "--refine-steps", "2", *TOKENS),
}
"""Row of the table -> words: VARIANT is the variant, @ begins names in a folder. Later rows use what earlier wrote."""


def student_folder(folder: Path, name: str) -> StudentConfig:
    """A student of that variant: the tiny teacher's, with random mixers, at ranks of our own."""
    teacher = load_teacher(str(TEACHER))
    config = student_of(teacher.config, (2, 5), RANKS, variant=name)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(TEACHER / "model.safetensors")
    kept = {key: tensors.get(key) for key in expected_tensors(config)}
    for key, shape in expected_tensors(config).items():
        if kept[key] is None:
            kept[key] = (torch.randn(shape, generator=generator) * 0.1).bfloat16()
    folder.mkdir()
    save_file({key: value for key, value in kept.items() if value is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(student_json(config, teacher.raw, "BF16")))
    return config


def outcome(words: tuple[Any, ...], folder: Path, name: str) -> str:
    """`works`, or the first line of what the command says."""
    argv = [str(folder / word.removeprefix("@")) if str(word).startswith("@") else str(word) for word in words]
    argv = [name if word == "VARIANT" else word for word in argv]
    quiet = [] if words[0] in ("inspect", "verify") else ["--quiet"]
    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch("sys.argv", ["hxaconv", *argv, *quiet]),
    ):
        code = run()
    if code == 0:
        made = Path(argv[2] if len(argv) > 2 else "") / "config.json"
        taken = json.loads(made.read_text())["rwkv_architecture"] if made.is_file() else name
        return "works" if taken == name else f"taken for {taken}, with a note"
    text = re.sub(r"\s+", " ", said.getvalue().replace(f"{folder}/", "")).removeprefix("Error: ")
    return text.partition(" What to do:")[0].strip()


def column(name: str, folder: Path) -> dict[str, str]:
    """Command -> outcome, for one variant."""
    student_folder(folder / "student", name)
    results = {}
    for row, words in COMMANDS.items():
        for bare, made in (("bare.pth", "student.pth"), ("bare_t.pth", "trained.pth")):
            if f"@{bare}" in words:
                (folder / bare).write_bytes((folder / made).read_bytes())
        if row == "calibrate" and not (folder / "init").exists():
            words = ("calibrate", STUDENT, *words[2:])  # nothing begins this variant: one that was trained
        results[row] = outcome(words, folder, name)
    return results


def as_table(columns: dict[str, dict[str, str]]) -> str:
    """Markdown, with what is said of refusals below the table."""
    notes: list[str] = []

    def cell(text: str) -> str:
        if text.startswith(("works", "taken")):
            return text
        if text not in notes:
            notes.append(text)
        return f"no ({notes.index(text) + 1})"

    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in COMMANDS:
        lines.append(f"| {row} | {' | '.join(cell(columns[name][row]) for name in columns)} |")
    return "\n".join([*lines, "", *(f"{i}. {text}" for i, text in enumerate(notes, 1))])


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The whole matrix."""
    return {name: column(name, tmp_path_factory.mktemp(name)) for name in VARIANTS}


def test_the_page_says_what_happens(columns: dict[str, dict[str, str]]) -> None:
    shown = PAGE.read_text().split("<!-- matrix -->\n")[1].split("<!-- /matrix -->")[0].strip()
    assert shown == as_table(columns), "python tests/test_variant_matrix.py writes it anew"


def test_only_what_is_not_published_or_not_told_is_refused(columns: dict[str, dict[str, str]]) -> None:
    refused = {
        (name, row)
        for name, rows in columns.items()
        for row, text in rows.items()
        if not text.startswith(("works", "ta"))
    }
    begin = [row for row in COMMANDS if row.startswith(("init", "pick", "calibrate"))]
    expected = {(name, row) for name in ("hxa07d", "hxa07e") for row in begin}
    bare, trained = (row for row in COMMANDS if "without its JSON file" in row)
    expected |= {(name, bare) for name in ("hxa079", "hxa07b", "hxa07c", "hxa07d")}
    assert refused == expected | {(name, trained) for name in ("hxa07b", "hxa07c")}
    assert {name for name, rows in columns.items() if rows[trained].startswith("taken")} == {"hxa07d"}


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        for variant in VARIANTS:
            (Path(root) / variant).mkdir()
        table = as_table({name: column(name, Path(root) / name) for name in VARIANTS})
    before, _, rest = PAGE.read_text().partition("<!-- matrix -->\n")
    PAGE.write_text(f"{before}<!-- matrix -->\n{table}\n<!-- /matrix -->{rest.partition('<!-- /matrix -->')[2]}")
    sys.stdout.write(table + "\n")
