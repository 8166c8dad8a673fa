"""What outputs tell of how they were made, and what conversions carry on of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hxaconv.load import open_checkpoint
from hxaconv.save.documents import CALIBRATED, CONVERTED, MAX_STEPS, UNTRAINED, history_of

Cli = Callable[..., int]
Make = Callable[..., Path]


def record(path: Path) -> dict[str, Any]:
    if path.is_dir():
        found: dict[str, Any] = json.loads((path / "hxaconv.json").read_text())
        return found
    inside: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())["hxaconv"]
    return inside


def card(folder: Path) -> str:
    return " ".join((folder / "README.md").read_text().split())


@pytest.fixture
def make(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> Make:
    def run(command: str, source: Path | None, name: str, *options: object) -> Path:
        out = tmp_path / name
        words = [command, source or tiny_teacher, out, *options, "--quiet", "--no-verify"]
        if command in ("pick-gqa-layers", "calibrate"):
            words += ["--teacher", tiny_teacher]
        assert cli(*words) == 0
        return out

    return run


def test_a_record_names_the_layers_that_were_initialised(make: Make) -> None:
    first = make("init-from-teacher", None, "a", "--gqa-layers", "1,5", "--seed", 7)
    assert record(first)["init"]["layers"] == [0, 2, 3, 4]
    second = record(make("pick-gqa-layers", first, "b", "--layers", "2"))
    assert second["init"]["layers"] == [1, 5]
    (step,) = second["sources"]["source"]["history"]
    assert step["init"] == record(first)["init"]
    assert step["command_line"] == record(first)["command_line"]
    more_gqa = record(make("pick-gqa-layers", first, "c", "--layers", "1,2,5"))
    assert "init" not in more_gqa
    assert more_gqa["changed_layers"] == [2]


def test_the_card_says_what_this_step_did(make: Make) -> None:
    plain = make("init-from-teacher", None, "a", "--gqa-layers", "1,5")
    assert UNTRAINED in card(plain)
    converted = card(make("to-hf", plain, "b"))
    assert CONVERTED in converted
    assert UNTRAINED not in converted
    others = "newly initialised from the teacher's attention and not trained yet; the others are the source's."
    assert f"Its RWKV layers 1, 5 are {others}" in card(make("pick-gqa-layers", plain, "d", "--layers", "2"))
    assert f"Its RWKV layer 1 is {others}" in card(make("pick-gqa-layers", plain, "e", "--layers", "2,5"))
    assert "trained yet" not in card(make("pick-gqa-layers", plain, "f", "--layers", "1,2,5"))
    every = make("pick-gqa-layers", make("init-from-teacher", None, "g", "--gqa-layers", "all"), "h", "--layers", "2")
    assert UNTRAINED in card(every)


def test_conversions_carry_earlier_steps_on_as_they_are(make: Make, tiny_teacher: Path) -> None:
    fit = ["--input-ids", tiny_teacher / "calibration_tokens.npy", "--tokens", 64, "--refine-steps", 0]
    calibrated = make("calibrate", make("init-from-teacher", None, "a", "--gqa-layers", "1,5"), "c", *fit)
    assert CALIBRATED in card(calibrated)
    told = record(make("to-hf", make("to-pth", calibrated, "d.pth"), "e"))["sources"]["source"]["history"]
    assert [step["command_line"].split()[1] for step in told] == ["init-from-teacher", "calibrate", "to-pth"]
    assert told[1]["calibration"] == record(calibrated)["calibration"]


def test_layers_made_otherwise_than_the_others_are_warned_about(
    make: Make, cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make("init-from-teacher", None, "a", "--gqa-layers", "1,5", "--seed", 7, "--scale", "key=0.25")

    def warned(student: Path, layers: str, *options: object) -> str:
        capsys.readouterr()
        words = ["pick-gqa-layers", student, tmp_path / "x", "--layers", layers, "--teacher", tiny_teacher, *options]
        assert cli(*words, "--dry-run") == 0
        return " ".join(capsys.readouterr().err.split())

    same = ("--scale", "key=0.25", "--seed", 7)
    assert (
        "layers 1, 5: initialised with --preset openmose-stage1 --seed 0, the student by its record with"
        " --preset openmose-stage1 --scale key=0.25 --seed 7" in warned(source, "2")
    )
    assert "Warning" not in warned(source, "2", *same)
    assert "Warning" not in warned(source, "1,2,5")
    told = record(source)
    (source / "hxaconv.json").write_text(json.dumps({**told, "calibration": {}}))
    assert "layer 1: plain among calibrated layers" in warned(source, "2,5", *same)
    (source / "hxaconv.json").write_text(json.dumps({**told, "init": {"preset": "x", "factors": [], "seed": {}}}))
    assert "Warning" not in warned(source, "2")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "[" * 100_000, '"x"', "{}", '{"sources": 1}', '{"sources": {"source": []}}', '{"tensors": {}}'],
)
def test_records_of_strangers_may_say_anything(golden: Path, tmp_path: Path, content: str) -> None:
    folder = shutil.copytree(golden / "reka_tiny" / "student_hf", tmp_path / "student")
    (folder / "hxaconv.json").write_text(content)
    assert history_of(open_checkpoint(str(folder))) == []


def test_a_history_does_not_grow_without_end(golden: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden / "reka_tiny" / "student_hf", tmp_path / "student")
    steps = [{"command_line": str(i)} for i in range(100)]
    own = {"command_line": "own", "sources": {"source": {"history": [*steps, "no step"]}}}
    (folder / "hxaconv.json").write_text(json.dumps(own))
    found = history_of(open_checkpoint(str(folder)))
    assert found == [*steps[-MAX_STEPS + 1 :], {"command_line": "own"}]
