"""What is published names no local folder and no token, whatever was typed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., int]
TOKEN = "hf_SecretTokenOfSomebodySomewhere"


def texts(folder: Path) -> dict[str, bytes]:
    """Every file under a folder but weights in safetensors."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_outputs_hold_no_local_paths_and_no_tokens(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    home, outputs = tmp_path / "alice-home" / "inner", tmp_path / "alice-home" / "outputs"
    home.mkdir(parents=True)
    outputs.mkdir()
    teacher, layer_map = home / "teacher", home / "map.toml"
    shutil.copytree(tiny_teacher, teacher)
    config = (teacher / "config.json").read_text()
    (teacher / "config.json").write_text('{"_name_or_path": "/alice-home/teacher",' + config.lstrip()[1:])
    layer_map.write_text("gqa_layers = [2, 5]\n")
    fit = ["--input-ids", teacher / "calibration_tokens.npy", "--tokens", "64", "--refine-steps", "0"]
    s, pth = outputs / "s", outputs / "s.pth"
    for words in (
        ("init-from-teacher", teacher, s, "--layer-map", layer_map),
        ("init-from-teacher", teacher, outputs / "c", "--init", "calibrated", *fit),
        ("calibrate", s, outputs / "c.pth", "--teacher", home / ".." / "inner" / "teacher", *fit),
        ("to-pth", s, pth),
        ("to-hf", pth, outputs / "h", "--teacher", teacher),
        ("to-training", s, outputs / "t.pth"),
        ("pick-gqa-layers", s, outputs / "p", "--layers", "1,5", "--teacher", teacher, "--from", pth),
    ):
        assert cli(*words, "--quiet") == 0, capsys.readouterr().err
    found = texts(outputs)
    assert len(found) > 20
    for name, content in found.items():
        assert b"alice-home" not in content, name
        assert str(tmp_path).encode() not in content, name
        assert b"SecretToken" not in content, name
    assert b"--layer-map map.toml" in found[str(s / "hxaconv.json")]
