"""`calibrate` and `init-from-teacher --init calibrated` as commands: what they refuse, keep, share, tell and draw."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TINY_TEACHER
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hxaconv
from hxaconv.calibration.report import CalibrationReport, Distances, LayerReport
from hxaconv.calibration.store import Store
from hxaconv.commands.plots import check_plot
from hxaconv.commands.plots import draw_calibration as plot
from hxaconv.errors import HxaconvError
from hxaconv.formats.json_files import plain_data
from hxaconv.save.documents import calibration_section

Cli = Callable[..., int]
TOKENS = TINY_TEACHER / "calibration_tokens.npy"
QUICK = ["--init", "calibrated", "--input-ids", TOKENS, "--tokens", 128, "--refine-steps", 2, "--gqa-layers", "none"]
PARTS = ["--max-shard-size", "1MB", "--no-verify", "--quiet"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one machine makes in several shards."""
    out = tmp_path_factory.mktemp("whole") / "student"
    subprocess.run(command(out), check=True, env=environment())
    return out


def command(out: Path, *more: object) -> list[str]:
    words = ["init-from-teacher", TINY_TEACHER, out, *QUICK, *PARTS, *more]
    return [sys.executable, "-m", "hxaconv", *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_every_number_without_sense_is_told_before_anything_is_done(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--chunk", "0", "--tokens", "1", "--refine-steps", "-1", "--refit-output", "maybe"]
    assert cli("init-from-teacher", TINY_TEACHER, tmp_path / "o", "--init", "calibrated", *words, "--dry-run") == 2
    told = capsys.readouterr().err
    for text in ("--chunk: 0 is", "--tokens: 1 is", "--refine-steps: -1 is", "--refit-output: 'maybe' is"):
        assert text in told
    assert cli("init-from-teacher", TINY_TEACHER, tmp_path / "o", "--init", "calibrated", "--dry-run") == 2
    told = capsys.readouterr().err
    assert "no text" in told and "--random-tokens" in told
    assert cli("init-from-teacher", TINY_TEACHER, tmp_path / "plain", "--gqa-layers", "none", "--quiet") == 0
    more = ["--teacher", TINY_TEACHER, "--input-ids", TOKENS, "--dry-run"]
    other = GOLDEN / "reka_tiny" / "student_hf"
    assert cli("calibrate", other, tmp_path / "o", *more) == 2
    assert cli("calibrate", tmp_path / "plain", tmp_path / "o", *more, "--chunk", "0") == 2
    assert cli("calibrate", tmp_path / "plain", tmp_path / "o", *more) == 0
    assert "1024 tokens in sequences of 512, 768 to fit and 256 to validate" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_options_of_a_calibration_that_is_not_done_are_refused(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["init-from-teacher", TINY_TEACHER, tmp_path / "o", "--dry-run", "--input-ids", TOKENS]
    assert cli(*words, "--refine-steps", "5") == 2
    assert "--input-ids, --refine-steps: for a calibration only" in capsys.readouterr().err
    assert cli(*words, "--init", "calibrated", "--gqa-layers", "all") == 0
    assert cli(*words[:4]) == 0


def test_the_card_and_the_provenance_tell_of_every_layer(whole: Path) -> None:
    card, story = (whole / "README.md").read_text(), json.loads((whole / "hxaconv.json").read_text())["calibration"]
    rows = [line.split(" | ") for line in card.splitlines() if "| rwkv |" in line]
    assert len(rows) == len(story["layers"]) == 6
    for row, layer in zip(rows, story["layers"], strict=True):
        assert row[0] == f"| {layer['layer']}"
        assert row[2] == f"{layer['error_before']:.3f}"
        assert float(row[3]) == pytest.approx(layer["error_after"], abs=6e-4)
        assert row[4] == f"{min(layer['decay']):.3g} to {max(layer['decay']):.3g}"
    for name, key in (("calibrated", "calibrated"), ("plain", "plain"), ("attention zeroed", "attention_zeroed")):
        assert f"| {name} | {story['kl_teacher_student'][key]:.3g} |" in card
    assert story["kl_teacher_student"]["tokens"] == 32
    assert "no more" not in card


def report(**changes: Any) -> CalibrationReport:
    layer = LayerReport(layer=0, kind="rwkv", error_before=1.0, error_after=0.25, decay=(0.9, 0.996), iclr=(0.1, 0.3))
    kept = LayerReport(layer=1, kind="rwkv", error_before=1.0, error_after=1.0, fell_back=True, decay=(0.5, 0.6))
    gqa = LayerReport(layer=2, kind="gqa", error_before=0.8, error_after=0.5, output_refitted=True)
    settings: dict[str, Any] = {"tokens": 100, "fitted_tokens": 75, "settings": {}, "layers": (layer, kept, gqa)}
    return CalibrationReport(**(settings | changes))


def test_a_layer_that_kept_its_values_and_one_that_stays_attention_are_told_apart() -> None:
    lines = calibration_section(report()).splitlines()
    assert lines[-3:] == [
        "| 0 | rwkv | 1.000 | 0.250 | 0.9 to 0.996 | 0.1 to 0.3 | 0.0% | no |",
        "| 1 | rwkv, fell back | 1.000 | 1.000 | 0.5 to 0.6 |  | 0.0% | no |",
        "| 2 | gqa | 0.800 | 0.500 |  |  | 0.0% | yes |",
    ]
    assert not any("KL" in line for line in lines)
    assert any(
        "KL" in line for line in calibration_section(report(distances=Distances(25, 1.0, 2.0, 3.0))).splitlines()
    )


def test_stored_figures_are_json_that_everybody_reads() -> None:
    told = report(distances=Distances(25, 0.123456, float("nan"), 2.0)).json()
    figures = {"tokens": 25, "calibrated": 0.123, "plain": "nan", "attention_zeroed": 2.0, "recall": []}
    assert told["kl_teacher_student"] == figures
    assert told["layers"][0]["decay"] == [0.9, 0.996]
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert plain_data({"a": (1.23456, 1)}, 4) == {"a": [1.235, 1]}


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_plot_is_drawn_and_the_same_each_time(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    told = report(distances=Distances(25, 0.1, 2.0, 2.0))
    plot(told, tmp_path / f"a{suffix}")
    assert (tmp_path / f"a{suffix}").stat().st_size > 5000
    if suffix == ".svg":
        plot(told, tmp_path / "b.svg")
        plot(report(), tmp_path / "c.svg")
        assert files(tmp_path)["a.svg"] == files(tmp_path)["b.svg"] != files(tmp_path)["c.svg"]
        assert "fell back" in (tmp_path / "a.svg").read_text()
        plot(told.not_taken(), tmp_path / "d.svg")
        assert "nats, not used" in (tmp_path / "d.svg").read_text()
        assert "not used" not in (tmp_path / "a.svg").read_text()


def test_a_plot_that_cannot_be_is_refused_first(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.png").write_text("")
    words = ["init-from-teacher", TINY_TEACHER, tmp_path / "o", *QUICK, "--quiet", "--plot"]
    for name, said in (("a.gif", ".png, .svg, .pdf"), ("no/a.png", "not a folder"), ("there.png", "exists")):
        assert cli(*words, tmp_path / name) == 2
        assert said in capsys.readouterr().err
    assert cli("init-from-teacher", TINY_TEACHER, tmp_path / "o", "--plot", tmp_path / "a.png") == 2
    assert "--init calibrated" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HxaconvError, match="needs matplotlib"):
        check_plot(tmp_path / "a.png", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]


def test_the_plot_of_a_command(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert cli("init-from-teacher", TINY_TEACHER, tmp_path / "plain", "--gqa-layers", "none", "--quiet") == 0
    words = ["calibrate", tmp_path / "plain", tmp_path / "o", "--teacher", TINY_TEACHER, *QUICK[2:-2], "--quiet"]
    assert cli(*words, "--plot", tmp_path / "o.svg", "--dry-run") == 0
    assert not (tmp_path / "o.svg").exists()
    assert cli(*words, "--plot", tmp_path / "o.svg") == 0
    assert (tmp_path / "o.svg").read_text().count("<path") > 20
    # It is nothing that the output depends on.
    assert "plot" not in (tmp_path / "o" / "hxaconv.json").read_text()


def test_the_plot_is_drawn_though_nobody_reads_the_output(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")

    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("hxaconv.cli.console.Talk.write", closed)
    plots = [tmp_path / "a.svg", tmp_path / "b.svg", tmp_path / "c.svg"]
    words = ["init-from-teacher", TINY_TEACHER, tmp_path / "a", *QUICK, "--no-verify", "--plot", plots[0]]
    assert cli(*words) == 0
    assert cli("init-from-teacher", TINY_TEACHER, tmp_path / "p", "--gqa-layers", "none", "--no-verify") == 0
    words = ["calibrate", tmp_path / "p", tmp_path / "b", "--teacher", TINY_TEACHER, *QUICK[2:-2], "--no-verify"]
    assert cli(*words, "--plot", plots[1]) == 0
    assert cli("verify", tmp_path / "a", "--against", TINY_TEACHER, "--plot", plots[2]) == 0
    assert all(path.is_file() for path in plots)


def test_a_second_run_is_refused_while_the_first_calibrates(cli: Cli, tmp_path: Path) -> None:
    from hxaconv.calibration.store import locked

    out = tmp_path / "student"
    with locked(Path(f"{out}.calibration")):
        done = subprocess.run(command(out), env=environment(), stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert f"process {os.getpid()}" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_interruption_says_what_is_kept_and_the_same_command_gives_the_same_bytes(
    whole: Path, tmp_path: Path, number: int
) -> None:
    out, folder = tmp_path / "student", tmp_path / "student.calibration"
    process = subprocess.Popen(command(out), env=environment(), stderr=subprocess.PIPE, text=True)
    while not (folder / "layer-000.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    told = process.communicate()[1]
    assert process.returncode == 128 + number
    assert " ".join(told.split()).startswith("Interrupted. ")
    assert f"Layers are kept in {folder} (" in told
    assert "the same command continues." in told
    assert not out.exists()
    subprocess.run(command(out), env=environment(), check=True)
    assert files(out) == files(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_divergences_are_measured_once(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    """A run that goes on after the calibration tells what the first one measured, bit for bit."""

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words = ["init-from-teacher", TINY_TEACHER, tmp_path / "student", *QUICK, *PARTS]
    with monkeypatch.context() as patch:
        patch.setattr("hxaconv.commands.calibrated.save", die)
        assert cli(*words) == 130
    path = tmp_path / "student.calibration" / "distances.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["state"] = json.dumps({**json.loads(metadata["state"]), "calibrated": 0.777})
    save_file({"": torch.zeros(1)}, path, metadata)
    assert cli(*words) == 0
    assert "| calibrated | 0.777 |" in (tmp_path / "student" / "README.md").read_text()
    assert "0.777" not in (whole / "README.md").read_text()


def test_nan_in_the_teacher_ends_the_command_at_its_layer(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(TINY_TEACHER, tmp_path / "t")
    tensors, name = load_file(TINY_TEACHER / "model.safetensors"), "model.layers.2.self_attn.k_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "t" / "model.safetensors")
    words = ["init-from-teacher", tmp_path / "t", tmp_path / "o", *QUICK, "--quiet"]
    assert cli(*words) == 2
    told = capsys.readouterr().err
    assert "layer 2 is not finite" in told
    assert name in told
    assert len(list((tmp_path / "o.calibration").glob("layer-*"))) == 2
    assert cli(*words, "--allow-nonfinite") == 0
    story = json.loads((tmp_path / "o" / "hxaconv.json").read_text())["calibration"]
    assert [layer["fell_back"] for layer in story["layers"]] == [False, False, True, True, True, True]


def test_a_calibrated_student_in_transformers_is_as_near_as_the_report_says(
    tmp_path: Path, modules_cache: None
) -> None:
    transformers = pytest.importorskip("transformers")
    from test_hf_modeling import DTYPE_KEY

    calibration = hxaconv.Fit(input_ids=str(TOKENS), tokens=1024, refine_steps=2)
    settings: dict[str, Any] = {"gqa_layers": "none", "format": "pth"}
    quiet = hxaconv.Write(verify=False)
    outcome = hxaconv.init_from_teacher(
        str(TINY_TEACHER), str(tmp_path / "c.pth"), init="calibrated", calibration=calibration, write=quiet, **settings
    )
    hxaconv.init_from_teacher(str(TINY_TEACHER), str(tmp_path / "p.pth"), write=quiet, **settings)
    assert outcome.calibration is not None
    told = outcome.calibration.distances
    assert told is not None
    ids = torch.from_numpy(np.load(TOKENS)[:2].astype(np.int64)).flatten()[-256:][None]
    assert told.tokens == ids.numel()

    def logits(folder: Path) -> torch.Tensor:
        options: dict[str, Any] = {DTYPE_KEY: torch.float32, "trust_remote_code": True, "local_files_only": True}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        with torch.no_grad():
            found: torch.Tensor = model(ids).logits
        return found.double().log_softmax(dim=-1)

    teacher, found = logits(TINY_TEACHER), {}
    for name in "cp":
        hxaconv.to_hf(str(tmp_path / f"{name}.pth"), str(tmp_path / name), write=quiet)
        student = logits(tmp_path / name)
        found[name] = float((teacher.exp() * (teacher - student)).sum(dim=-1).mean())
    # Both sum in float32, in another order, and transformers rounds to it inside attention and norms.
    assert found["c"] == pytest.approx(told.calibrated, rel=2e-3)
    assert found["p"] == pytest.approx(told.plain, rel=2e-3)
    assert found["c"] < 0.4 * found["p"]


def test_what_another_machine_has_begun_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, "key")
    store.save("stream-0", {"x": torch.zeros(2)}, {"layer": 1})
    assert store.facts("stream-0") == {"layer": 1}
    monkeypatch.setattr("hxaconv.forward.state.computed_with", lambda *_: {"torch": "2.0", "instructions": "AVX9"})
    with pytest.raises(HxaconvError, match=r"was begun with .*; here it is 2\.0, AVX9, and sums differ"):
        store.load("stream-0")


def test_a_record_tells_what_calibrated_values_depend_on(whole: Path) -> None:
    told = json.loads((whole / "hxaconv.json").read_text())["calibration"]["computed_with"]
    assert told == {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability()}
