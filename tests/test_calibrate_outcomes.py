"""What a calibration is not: worse than the plain student, fitted to too little, done for another teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_TEACHER
from safetensors.torch import load_file, save_file

from hxaconv.calibration import time_mix
from hxaconv.calibration.report import Distances

Cli = Callable[..., int]
TOKENS = TINY_TEACHER / "calibration_tokens.npy"
PLAIN = ["init-from-teacher", TINY_TEACHER, "--gqa-layers", "none"]
FIT = ["--input-ids", TOKENS, "--tokens", 64, "--refine-steps", 0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain student of the small teacher."""
    import hxaconv

    out = tmp_path_factory.mktemp("plain") / "plain"
    options = hxaconv.Write(verify=False)
    hxaconv.init_from_teacher(str(TINY_TEACHER), str(out), gqa_layers="none", write=options)
    return out


def weights(folder: Path) -> dict[str, bytes]:
    loaded = load_file(folder / "model.safetensors")
    return {name: values.reshape(-1).view(torch.uint8).numpy().tobytes() for name, values in loaded.items()}


def figures(calibrated: float, plain: float) -> Callable[..., Distances]:
    return lambda *_, **__: Distances(16, calibrated, plain, 2.5)


@pytest.mark.parametrize("calibrated", [2.5, 2.25, float("nan")])
def test_a_student_that_is_no_nearer_is_left_plain_and_that_is_said(
    cli: Cli,
    tmp_path: Path,
    plain: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    calibrated: float,
) -> None:
    monkeypatch.setattr("hxaconv.calibration.check.measure", figures(calibrated, 2.25))
    assert cli("calibrate", plain, tmp_path / "o", "--teacher", TINY_TEACHER, *FIT, "--json") == 0
    told = capsys.readouterr()
    assert "Warning: the calibration is NOT USED, every layer keeps its plain values: on the 16 held-out" in told.err
    assert f"{calibrated:.3g} calibrated and 2.25 plain" in told.err
    assert "--refit-output never" in told.err
    story = json.loads(told.out)["calibration"]
    assert story["taken"] is False
    assert all(layer["fell_back"] and layer["error_after"] == layer["error_before"] for layer in story["layers"])
    card = (tmp_path / "o" / "README.md").read_text()
    assert "**The fit is not used**" in card
    assert f"| calibrated, not used | {calibrated:.3g} |" in card
    assert "better starting point" not in card
    assert weights(tmp_path / "o") == weights(plain)


def test_a_student_that_is_nearer_is_taken_as_before(
    cli: Cli, tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["calibrate", plain, tmp_path / "o", "--teacher", TINY_TEACHER, *FIT, "--no-verify"]
    assert cli(*words) == 0
    assert "NOT USED" not in capsys.readouterr().err
    card = (tmp_path / "o" / "README.md").read_text()
    assert "better starting point" in card
    assert "nats per token, on 16 held-out tokens |" in card
    assert weights(tmp_path / "o") != weights(plain)


def test_a_student_without_a_fitted_layer_is_not_called_calibrated(
    cli: Cli, tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time_mix, "fit_gate", lambda y, target, weight, pool: torch.full((y.shape[1],), 50.0))
    monkeypatch.setattr(time_mix, "restoring", lambda said, target: 1.0)
    assert cli("calibrate", plain, tmp_path / "o", "--teacher", TINY_TEACHER, *FIT) == 0
    told = capsys.readouterr().err
    assert told.count("6 of 6 layers keep the plain values") == 1
    card = (tmp_path / "o" / "README.md").read_text()
    assert "not trained yet" in card
    assert "better starting point" not in card
    assert weights(tmp_path / "o") == weights(plain)


def test_tokens_are_counted_as_they_are_found(
    cli: Cli, tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "one.npy", np.array([3]))
    np.save(tmp_path / "few.npy", np.arange(28))
    words = ["calibrate", plain, tmp_path / "o", "--teacher", TINY_TEACHER, "--dry-run", "--input-ids"]
    assert cli(*words, TOKENS, "--tokens", 4) == 2
    assert "4 calibration tokens are too few" in capsys.readouterr().err
    assert cli(*words, tmp_path / "one.npy") == 2
    assert "one.npy holds a single token" in capsys.readouterr().err
    assert cli(*words, tmp_path / "few.npy") == 2
    assert "7 would validate the fit, and 8 are needed" in capsys.readouterr().err
    for asked, said in (
        (1024, "1024 tokens in sequences of 512, 768 to fit and 256 to validate;"),
        (1000, "1000 tokens in sequences of 500,"),
        (1001, "1000 tokens (1001 requested) in sequences of 500,"),
        (99999, "8192 tokens (99999 requested) in sequences of 512,"),
        (3072, "2304 to fit and 768 to validate (the last 512 of them the student as a whole);"),
    ):
        assert cli(*words, TOKENS, "--tokens", asked) == 0
        assert said in capsys.readouterr().err


def test_advice_tells_how_many_tokens_it_uses(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pick-gqa-layers", TINY_TEACHER, "--count", 2, "--strategy", "influence", "--input-ids", TOKENS]
    assert cli(*words, "--tokens", 1001) == 0
    assert "1001 tokens are requested, 1000 are used." in capsys.readouterr().err
    assert cli(*words, "--tokens", 16) == 0
    assert "asked for" not in capsys.readouterr().err


def test_options_that_say_two_things_or_nothing_are_told(
    cli: Cli, tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["calibrate", plain, tmp_path / "o", "--teacher", TINY_TEACHER, *FIT, "--dry-run"]
    assert cli(*words, "--random-tokens") == 2
    assert "--random-tokens and a text both name the tokens" in capsys.readouterr().err
    assert cli(*words, "--fold-rope") == 0
    assert "--fold-rope changes nothing any more" in capsys.readouterr().err
    assert cli(*words) == 0
    assert "--fold-rope" not in capsys.readouterr().err
    assert cli("calibrate", "--help") == 0
    assert "Seed of random tokens." in capsys.readouterr().out


@pytest.mark.parametrize("refit", ["auto", "always"])
def test_a_dry_run_shows_what_may_be_fitted(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], refit: str
) -> None:
    words = ["init-from-teacher", TINY_TEACHER, tmp_path / "o", "--gqa-layers", "2,5", "--init", "calibrated"]
    words += [*FIT, "--refine-steps", 2, "--refit-output", refit]
    assert cli(*words, "--dry-run", "--json") == 0
    told = capsys.readouterr()
    shown = {name for name, entry in json.loads(told.out)["plan"].items() if entry["how"] == "calibrated"}
    assert f"Up to {len(shown)} tensors are fitted" in told.err
    assert cli(*words, "--no-verify", "--quiet") == 0
    before = load_file(tmp_path / "o" / "model.safetensors")
    tensors = json.loads((tmp_path / "o" / "hxaconv.json").read_text())["tensors"]
    fitted = {name for name, entry in tensors.items() if "calibrated from" in entry["origin"]}
    story = json.loads((tmp_path / "o" / "hxaconv.json").read_text())["calibration"]["layers"]
    kept = tuple(f"model.layers.{layer['layer']}." for layer in story if layer["fell_back"])
    assert fitted == {name for name in shown if not name.startswith(kept)}
    assert len(kept) < 3
    assert set(before) == set(tensors)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("layers.3.self_attn.q_proj.weight", "a multiple of the teacher's model.layers.3.self_attn.q_proj.weight"),
        ("layers.3.mlp.down_proj.weight", "the teacher's"),
        ("embed_tokens.weight", "the teacher's"),
    ],
)
def test_another_teacher_of_the_same_shapes_is_refused(
    cli: Cli, tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str], part: str, said: str
) -> None:
    shutil.copytree(TINY_TEACHER, tmp_path / "t")
    tensors = load_file(TINY_TEACHER / "model.safetensors")
    tensors[f"model.{part}"] = tensors[f"model.{part}"].flip(0).contiguous()
    save_file(tensors, tmp_path / "t" / "model.safetensors")
    assert cli("calibrate", plain, tmp_path / "o", "--teacher", tmp_path / "t", *FIT, "--quiet") == 2
    told = capsys.readouterr().err
    assert "of 159 tensors, 1 are not as it writes them" in told
    assert f"model.{part} is not {said}".replace("q_proj", "receptance", 1) in told
    assert not list(tmp_path.glob("o*"))


def test_one_token_over_and_over_is_no_text(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "ids.npy", np.full(64, 65))
    words = [*PLAIN, tmp_path / "o", "--init", "calibrated", "--input-ids", tmp_path / "ids.npy"]
    assert cli(*words, "--tokens", 64, "--refine-steps", 0, "--no-verify", "--quiet") == 0
    assert "100% of the calibration tokens are one and the same (id 65)" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [0, 2])
def test_a_calibrated_student_is_held_against_its_teacher(cli: Cli, tmp_path: Path, steps: int) -> None:
    init = ["init-from-teacher", TINY_TEACHER, tmp_path / "o", "--gqa-layers", "2,5", "--init", "calibrated", *FIT]
    assert cli(*init, "--refine-steps", steps, "--quiet") == 0
    checks = json.loads((tmp_path / "o" / "hxaconv.json").read_text())["verification"]["checks"]
    names = {check["name"] for check in checks}
    assert {"copied tensors", "nothing lost", "initial values"} <= names
    # With steps every projection is trained, and what stayed attention is no longer the teacher's without positions.
    assert names.isdisjoint({"scaled projections", "GQA layers"}) if steps else {"GQA layers"} < names


def test_a_polished_student_says_so_and_can_be_polished_again(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # All eight would take half a minute.
    monkeypatch.setattr("hxaconv.calibration.polish.PASSES", 2)
    words = ["--input-ids", TOKENS, "--tokens", 64, "--refine-steps", 0, "--polish-tokens"]
    init = ["init-from-teacher", TINY_TEACHER, tmp_path / "o", "--gqa-layers", "2", "--init", "calibrated", *words]
    assert cli(*init, 63) == 2
    assert "are among them" in capsys.readouterr().err
    assert cli(*init, 2048, "--dry-run") == 0
    assert "Polish: 3 sequences of 512, 1 held out; 4 steps" in " ".join(capsys.readouterr().err.split())
    assert cli(*init, 2048, "--quiet") == 0
    story = json.loads((tmp_path / "o" / "hxaconv.json").read_text())["calibration"]
    kl = dict(story["polish"]["curve"])
    assert story["polish"]["best_step"] and kl[story["polish"]["best_step"]] < kl[0]
    assert story["kl_teacher_student"]["calibrated"] == pytest.approx(kl[story["polish"]["best_step"]], rel=0.02)
    assert "Polish: KL on the held-out sequences" in (tmp_path / "o" / "README.md").read_text()
    again = ["calibrate", tmp_path / "o", tmp_path / "p", "--teacher", TINY_TEACHER, *words]
    assert cli(*again, 0, "--polish-only", "--quiet") == 2
    assert "--polish-only needs --polish-tokens" in capsys.readouterr().err
    assert cli(*again, 2048, "--polish-only", "--quiet") == 0
    further = json.loads((tmp_path / "p" / "hxaconv.json").read_text())["calibration"]
    assert further["kl_teacher_student"]["calibrated"] < story["kl_teacher_student"]["calibrated"]
    assert not further["layers"]
    assert not list(tmp_path.glob("*.calibration"))
