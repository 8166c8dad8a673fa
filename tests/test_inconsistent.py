"""Checkpoints whose tensors and settings do not make one model: `verify` fails them, conversions refuse them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import conversion
from safetensors.torch import load_file, save_file

Cli = Callable[..., int]
Edit = Callable[[dict[str, Any]], object]

TWO_THETAS = {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}


@pytest.fixture
def folder(cli: Cli, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A golden student as `to-hf` writes it."""
    case = golden / "reka_tiny"
    assert cli(*conversion("to-hf", case, tmp_path / "hf")) == 0
    capsys.readouterr()
    return tmp_path / "hf"


def edit_config(folder: Path, change: Edit) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


CONFIGS: dict[str, tuple[Edit, str]] = {
    "another variant": (lambda c: c.update(rwkv_architecture="hxa07b"), "'hxa07b' by config.json"),
    "no variant": (lambda c: c.pop("rwkv_architecture"), "there is no rwkv_architecture"),
    "RoPE in GQA layers": (
        lambda c: c.update(nope_in_transformer=False),
        "nope_in_transformer is False, expected True",
    ),
    "no RoPE in RWKV layers": (lambda c: c.update(nope_in_rwkv=True), "nope_in_rwkv is True, expected False"),
    "activation": (lambda c: c.update(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
    "layer kinds": (lambda c: c.update(rwkv_layers=[0]), "rwkv_layers [0] and transformer_layers [2, 4]"),
    "two thetas": (lambda c: c.update(TWO_THETAS), "10000.0 by config.json, 500000.0 by rope_parameters"),
    "records": (lambda c: c.update(has_layer_records=False), "layer_records is True by the tensors, False by config"),
    "sizes": (lambda c: c.update(intermediate_size=99), "intermediate_size is 80 by the tensors, 99 by config.json"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_a_config_of_another_model_fails_the_check(
    cli: Cli, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    change, said = CONFIGS[fault]
    assert cli("verify", folder, "--json") == 0
    capsys.readouterr()
    edit_config(folder, change)
    assert cli("verify", folder, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    (failed,) = [check for check in report["checks"] if not check["passed"]]
    assert said in failed["detail"] and "hf" in failed["detail"]
    assert {verdict["loader"].split(",")[0] for verdict in report["findings"]} >= {"transformers", "RWKV-Infer"}
    assert cli("to-pth", folder, tmp_path / "o.pth") == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o.pth").exists()


def drop(name: str) -> Edit:
    return lambda tensors: tensors.pop(f"model.layers.{name}")


def narrow(name: str) -> Edit:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


TENSORS: dict[str, tuple[Edit, str]] = {
    "one k0": (drop("1.self_attn.k0"), "model.layers.1.self_attn.k0"),
    "one r_k": (drop("1.self_attn.r_k"), "model.layers.1.self_attn.r_k"),
    "one norm": (drop("0.input_layernorm.weight"), "model.layers.0.input_layernorm.weight"),
    "every g1": (lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith(".g1")], "lora_rank_gate"),
    "a short norm": (narrow("model.norm.weight"), "model.norm.weight"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_missing_and_misshapen_tensors_fail_the_check(
    cli: Cli, folder: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    change, said = TENSORS[fault]
    if fault == "every g1":
        edit_config(folder, lambda raw: [raw.pop(key) for key in list(raw) if "gate" in key])
    path = folder / "model.safetensors"
    tensors: dict[str, Any] = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    assert cli("verify", folder) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and said in out.replace("\n", "")


def test_other_checkpoints_that_are_no_model_fail_the_comparison(
    cli: Cli, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "other")
    edit_config(tmp_path / "other", lambda raw: raw.update(hidden_act="gelu"))
    assert cli("verify", folder, "--against", tmp_path / "other") == 1
    assert "hidden_act is 'gelu'" in capsys.readouterr().out


def test_a_teacher_with_two_thetas_is_asked_about(
    cli: Cli, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(golden / "reka_tiny" / "teacher", teacher)
    edit_config(teacher, lambda raw: raw.update(TWO_THETAS))
    words = ["init-from-teacher", teacher, tmp_path / "o", "--gqa-layers", "2,4", "--quiet"]
    assert cli(*words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "rope_theta is 10000.0 at top level, 500000.0 in rope_parameters; pass the right one as --rope-theta" in said
    assert cli(*words, "--rope-theta", "500000") == 0
    assert json.loads((tmp_path / "o" / "config.json").read_text())["rope_theta"] == 500000


def test_a_layer_trained_in_part_is_not_completed_from_the_teacher(
    cli: Cli, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, training = golden / "reka_tiny", tmp_path / "training.safetensors"
    assert cli(*conversion("to-pth", case, tmp_path / "t.pth")) == 0
    tensors = load_file(case / "student_hf" / "model.safetensors")
    kept = {
        n: t for n, t in tensors.items() if ".self_attn." in n and not n.endswith("layers.4.self_attn.k_proj.weight")
    }
    save_file(kept, training)
    capsys.readouterr()
    assert cli("to-hf", training, tmp_path / "o", "--teacher", case / "teacher", "--variant", "hxa079") == 2
    said = capsys.readouterr().err
    assert "only in part" in said and "model.layers.4.self_attn.k_proj.weight is missing" in said
    whole = kept | {n: t for n, t in tensors.items() if n.endswith("layers.4.self_attn.k_proj.weight")}
    save_file(whole, training)
    told = ("--teacher", case / "teacher", "--variant", "hxa079")
    assert cli("to-hf", training, tmp_path / "o", *told, "--quiet") == 0


def test_a_student_of_gqa_layers_alone_is_known_by_its_config(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "o", "--gqa-layers", "all", "--quiet") == 0
    capsys.readouterr()
    assert cli("verify", tmp_path / "o") == 0
    assert "PASSED" in capsys.readouterr().out


def test_an_index_is_checked_where_it_is_one_of_the_model(cli, tiny_teacher, tmp_path, capsys):
    """Without metadata, as some writers leave it; and a stale one beside model.safetensors, which wins over it."""
    init = ("init-from-teacher", tiny_teacher, "--no-verify", "--quiet")
    assert cli(init[0], init[1], tmp_path / "shards", "--max-shard-size", "1MB", *init[2:]) == 0
    (tmp_path / "shards" / "hxaconv.json").unlink()
    index = tmp_path / "shards" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert cli("verify", tmp_path / "shards", "--tokens", 4) == 0
    first = next(iter(weight_map))
    index.write_text(json.dumps({"weight_map": weight_map | {first: list(weight_map.values())[-1]}}))
    assert cli("verify", tmp_path / "shards", "--tokens", 4) == 1
    assert f"the index names other files than hold {first}" in " ".join(capsys.readouterr().err.split())
    assert cli(init[0], init[1], tmp_path / "one", *init[2:]) == 0
    (tmp_path / "one" / index.name).write_text(json.dumps({"weight_map": {first: "gone.safetensors"}}))
    assert cli("verify", tmp_path / "one", "--tokens", 4) == 0


def test_layers_that_an_option_confirms_have_to_be_the_tensors(cli, tiny_teacher, tmp_path, capsys):
    init = ("init-from-teacher", tiny_teacher, tmp_path / "s", "--gqa-layers", "2,5", "--no-verify", "--quiet")
    assert cli(*init) == 0
    assert cli("verify", tmp_path / "s", "--gqa-layers", "2,5", "--tokens", 4) == 0
    assert cli("verify", tmp_path / "s", "--gqa-layers", "2", "--tokens", 4) == 1
    assert "(2, 5) by the tensors, (2,) by --gqa-layers" in " ".join(capsys.readouterr().err.split())
    assert cli("to-pth", tmp_path / "s", tmp_path / "s.pth", "--gqa-layers", "2", "--no-verify") == 2
    assert not (tmp_path / "s.pth").exists()
    capsys.readouterr()
    assert cli("to-pth", tmp_path / "s", tmp_path / "s.pth", "--layer-map", "reka-flash-3", "--no-verify") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.count("by layer map reka-flash-3") == 2 and "leave --layer-map out" in error
    assert "no --gqa-layers" not in error
