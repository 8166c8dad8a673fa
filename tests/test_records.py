"""What outputs tell of how their layers came about, and what conversions carry on of it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hxaconv.calibration import CalibrationReport, LayerReport
from hxaconv.calibration.report import Distances
from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.save.card import CALIBRATED, UNTRAINED
from hxaconv.save.records import FITTED, INITIAL, calibration_of, history_of, layer_states

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


@pytest.fixture
def fit(tiny_teacher: Path) -> list[object]:
    return ["--input-ids", tiny_teacher / "calibration_tokens.npy", "--tokens", 64, "--refine-steps", 0]


def trained(folder: Path, layer: int = 0) -> Path:
    """The folder after a trainer has written into it: other weights beside the same record."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.{layer}.self_attn.r_k"] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_a_record_names_the_layers_that_were_initialised(make: Make) -> None:
    first = make("init-from-teacher", None, "a", "--gqa-layers", "1,5", "--seed", 7)
    assert record(first)["init"]["layers"] == [0, 2, 3, 4]
    second = record(make("pick-gqa-layers", first, "b", "--layers", "2"))
    assert second["init"]["layers"] == [1, 5]
    (step,) = second["sources"]["source"]["history"]
    assert step == {"gqa_layers": [1, 5], "init": record(first)["init"]}
    more_gqa = record(make("pick-gqa-layers", first, "c", "--layers", "1,2,5"))
    assert "init" not in more_gqa
    assert more_gqa["changed_layers"] == [2]
    assert more_gqa["sources"]["source"]["history"] == [step]


def test_the_card_says_which_layers_are_not_trained(make: Make) -> None:
    plain = make("init-from-teacher", None, "a", "--gqa-layers", "1,5")
    assert UNTRAINED in card(make("pick-gqa-layers", plain, "b", "--layers", "2"))
    assert f"By the record of its source, i{UNTRAINED[1:]}" in card(
        make("pick-gqa-layers", plain, "c", "--layers", "1,2,5")
    )
    own = trained(plain)
    others = "newly initialised from the teacher's attention and not trained yet; the others are the source's."
    assert f"Its RWKV layers 1, 5 are {others}" in card(make("pick-gqa-layers", own, "d", "--layers", "2"))
    assert f"Its RWKV layer 1 is {others}" in card(make("pick-gqa-layers", own, "e", "--layers", "2,5"))
    assert "trained yet" not in card(make("pick-gqa-layers", own, "f", "--layers", "1,2,5"))
    every = make("pick-gqa-layers", make("init-from-teacher", None, "g", "--gqa-layers", "all"), "h", "--layers", "2")
    assert UNTRAINED in card(every)


@pytest.mark.parametrize("command", ["to-hf", "to-pth", "to-training"])
def test_conversions_carry_the_story_on(make: Make, fit: list[object], command: str) -> None:
    source = make("calibrate", make("init-from-teacher", None, "a", "--gqa-layers", "1,5"), "c.pth", *fit)
    told = record(make(command, source, "d" if command == "to-hf" else "d.pth"))["sources"]["source"]["history"]
    assert [step.keys() for step in told] == [{"gqa_layers", "init"}, {"gqa_layers", "calibration"}]
    original = record(source)["calibration"]
    assert told[1]["calibration"]["kl_teacher_student"] == original["kl_teacher_student"]
    assert len(told[1]["calibration"]["layers"]) == len(original["layers"]) == 4


def test_a_calibrated_student_keeps_its_section_of_the_card(make: Make, fit: list[object]) -> None:
    plain = make("init-from-teacher", None, "a", "--gqa-layers", "1,5")
    direct, pth = make("calibrate", plain, "c", *fit), make("calibrate", plain, "c.pth", *fit)
    again = make("to-hf", make("to-pth", make("to-hf", pth, "d"), "e.pth"), "f")
    assert f"By the record of its source, i{CALIBRATED[1:]}" in card(again)

    def rows(folder: Path) -> list[list[str]]:
        lines = (folder / "README.md").read_text().splitlines()
        # Figures in records are rounded once already.
        return [line.split(" | ")[:2] for line in lines if line.startswith("| ")]

    assert rows(again) == rows(direct)
    assert any("| calibrated" in row for row in rows(again))
    # After another choice the figures are those of another model.
    picked = make("to-hf", make("pick-gqa-layers", direct, "g", "--layers", "1,2,5"), "h")
    assert "## Calibration" not in card(picked)


def test_steps_from_choice_to_choice(make: Make, fit: list[object]) -> None:
    a = make("calibrate", make("init-from-teacher", None, "a", "--gqa-layers", "1,5"), "b", *fit)
    picked = make("pick-gqa-layers", a, "c", "--layers", "2,5")
    states = layer_states(history_of(open_checkpoint(picked)))
    assert states == {0: FITTED, 1: INITIAL, 3: FITTED, 4: FITTED}
    # A layer from a donor is nobody's initial value.
    donor = make("init-from-teacher", None, "d", "--gqa-layers", "none")
    taken = make("pick-gqa-layers", picked, "e", "--layers", "1,5", "--from", donor)
    assert layer_states(history_of(open_checkpoint(taken))) == {0: FITTED, 3: FITTED, 4: FITTED}


def test_layers_made_otherwise_than_the_others_are_warned_about(
    make: Make, cli: Cli, tiny_teacher: Path, tmp_path: Path, fit: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    source = make("init-from-teacher", None, "a", "--gqa-layers", "1,5", "--seed", 7, "--scale", "key=0.25")
    calibrated = make("calibrate", source, "b", *fit)

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
    assert "layer 1: plain among calibrated layers" in warned(calibrated, "2,5", *same)
    assert "--gqa-layers 2,5 --init calibrated" in warned(calibrated, "2,5", *same)
    assert "Warning" not in warned(calibrated, "1,2,5")
    assert "Warning" not in warned(trained(source), "2")


def example() -> dict[str, Any]:
    layer = LayerReport(layer=0, kind="rwkv", error_before=1.0, error_after=0.2, decay=(0.5,), warnings=("/home/me",))
    settings = {"chunk": 2048, "refine_steps": 0, "refit_output": "auto", "fold_rope": False, "device": "cuda:1"}
    told = CalibrationReport(
        tokens=4,
        fitted_tokens=3,
        settings=settings,
        layers=(layer,),
        warnings=("/home/me/text",),
        distances=Distances(1, 0.1, float("inf"), 2.0),
    )
    factors = dict.fromkeys(("receptance", "key", "value", "output"), 1.0)
    init = {"method": "openmose", "preset": "openmose-stage2", "factors": factors, "seed": 3, "layers": [0]}
    steps = [{"gqa_layers": [1], "init": init, "calibration": told.json(), "command_line": "rm -rf /"}]
    own = {"hxaconv": "9", "gqa_layers": [1], "init": {**init, "code": "x"}, "changed_layers": [0], "tensors": {}}
    return {**own, "sources": {"source": {"name": "/home/me/x", "history": steps}}}


ODD: tuple[Any, ...] = (None, True, -1, 10**30, 1e999, "x" * 9, "/home/me", [], [[]], [-1], {}, {"a": {}}, "nan")


def mutated(value: Any) -> Iterator[Any]:
    """The value with every part of it in turn left out, or replaced by something odd."""
    if not isinstance(value, dict | list):
        return
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        for odd in (*ODD, *mutated(value[key])):
            changed = copy.copy(value)
            changed[key] = odd
            yield changed
        changed = copy.copy(value)
        del changed[key]
        yield changed


def test_records_of_strangers_are_taken_over_as_figures_or_not_at_all(golden: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden / "reka_tiny" / "student_hf", tmp_path / "student")
    place = folder / "hxaconv.json"
    place.write_text("{}")
    checkpoint = open_checkpoint(folder)
    assert history_of(checkpoint) == []
    count = 0
    for content in (example(), *mutated(example())):
        place.write_text(json.dumps(content))
        history = history_of(open_checkpoint(folder))
        calibration_of(history)
        layer_states(history)
        text = json.dumps(history, allow_nan=False)
        assert "home" not in text
        assert "rm -rf" not in text
        assert "code" not in text
        count += bool(history)
    assert count > 100
    place.write_text(json.dumps(example()))
    (told, own) = history_of(open_checkpoint(folder))
    assert "warnings" not in told["calibration"]
    assert own.keys() == {"gqa_layers", "init", "changed_layers"}
    report = calibration_of([told])
    assert report is not None
    assert report.distances == Distances(1, 0.1, float("inf"), 2.0)
    for text in ("", "[]", "{", "[" * 100_000, '"x"'):
        place.write_text(text)
        assert history_of(open_checkpoint(folder)) == []


def test_a_record_of_other_weights_is_nobody_s(make: Make) -> None:
    plain = make("init-from-teacher", None, "a", "--gqa-layers", "1,5")
    assert history_of(open_checkpoint(plain))
    assert history_of(open_checkpoint(trained(plain))) == []
