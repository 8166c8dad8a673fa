"""`verify STUDENT --against TEACHER`: every claim that can be made, by the student's record or without one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hxaconv
from hxaconv.errors import HxaconvError
from hxaconv.verification.report import Report

TEACHER = Path(__file__).parent / "golden" / "reka_tiny" / "teacher"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "student"
    hxaconv.init_from_teacher(str(TEACHER), str(path), gqa_layers="2,4", verify=False)
    return path


def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def change(folder: Path, name: str, function: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = function(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def verify(folder: Path, **options: str) -> Report:
    report = hxaconv.verify(str(folder), against=str(TEACHER), **options)
    assert isinstance(report, Report)
    return report


def failing(report: Report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def test_the_record_says_what_to_expect(made: Path, tmp_path: Path) -> None:
    report = verify(made)
    assert report.passed and report.expect == "untrained", report.reason
    assert report.attention == {0: "untrained", 1: "untrained", 2: "kept", 3: "untrained", 4: "kept"}
    folder = copy(made, tmp_path)
    (folder / "hxaconv.json").unlink()
    without = verify(folder)
    assert without.passed and without.expect == "attention-trained"
    # A random matrix of another seed is known from the record alone.
    change(folder, "model.layers.1.self_attn.g2", lambda values: values.flip(0))
    assert verify(folder).passed
    shutil.copy(made / "hxaconv.json", folder)
    assert "initial values" in failing(verify(folder))


def test_after_training_only_attention_may_have_changed(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path)
    change(folder, "model.layers.1.self_attn.w1", lambda values: values + 0.01)
    change(folder, "model.layers.3.self_attn.w0", lambda values: values + 0.1)
    change(folder, "model.layers.4.self_attn.q_proj.weight", lambda values: values * 1.01)
    report = verify(folder, expect="attention-trained")
    assert report.passed, report.reason
    assert report.attention == {0: "untrained", 1: "trained", 2: "kept", 3: "trained", 4: "trained"}
    assert "trained: layers 1, 3-4;" in next(check.detail for check in report.checks if check.name == "attention")
    assert {"as untrained", "initial values", "copied tensors"} <= failing(verify(folder))
    for name in (
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ):
        wrong = Path(shutil.copytree(folder, tmp_path / name))
        change(wrong, name, lambda values: values * 1.01)
        found = verify(wrong, expect="attention-trained")
        assert failing(found) >= {"copied tensors"} and name in found.reason


@pytest.mark.parametrize("setting", ["rope_theta", "rms_norm_eps"])
def test_settings_are_the_teachers(made: Path, tmp_path: Path, setting: str) -> None:
    folder = copy(made, tmp_path)
    (folder / "hxaconv.json").unlink()
    raw = json.loads((folder / "config.json").read_text())
    raw[setting] *= 2
    if setting == "rope_theta":
        raw["rope_parameters"][setting] *= 2
    (folder / "config.json").write_text(json.dumps(raw))
    report = verify(folder)
    assert "settings" in failing(report) and setting in report.reason


def test_a_calibrated_student_is_expected_as_such(tmp_path: Path) -> None:
    path = tmp_path / "student"
    ids = tmp_path / "ids.json"
    generator = torch.Generator().manual_seed(0)
    ids.write_text(json.dumps(torch.randint(97, (2, 64), generator=generator).tolist()))
    hxaconv.init_from_teacher(
        str(TEACHER), str(path), gqa_layers="2,4", init="calibrated", input_ids=str(ids), refine_steps=0, verify=False
    )
    report = verify(path)
    assert report.passed, report.reason
    assert report.expect in ("calibrated", "untrained")
    if report.expect == "calibrated":
        assert "as untrained" in failing(verify(path, expect="untrained"))


def test_kept_layers_may_change_by_a_calibration_alone(tmp_path: Path) -> None:
    """The record names those that were calibrated, and in these only the mixer has changed."""
    ids, path = tmp_path / "ids.json", tmp_path / "student"
    ids.write_text(json.dumps(torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(0)).tolist()))
    fit = {"init": "calibrated", "input_ids": str(ids), "refine_steps": 8, "verify": False}
    hxaconv.init_from_teacher(str(TEACHER), str(path), gqa_layers="2,4", **fit)
    record = json.loads((path / "hxaconv.json").read_text())
    layers = {layer["layer"]: layer for layer in record["calibration"]["layers"]}
    assert all(layers[i]["error_after"] < layers[i]["error_before"] for i in (2, 4))
    report = verify(path, expect="calibrated")
    assert report.passed and report.attention[2] == report.attention[4] == "calibrated", report.reason
    assert "as untrained" in failing(verify(path, expect="untrained"))
    # Of a layer that the record does not name, the same tensors are nobody's work.
    layers[4]["fell_back"] = True
    (path / "hxaconv.json").write_text(json.dumps(record))
    wrong = verify(path)
    assert {"as calibrated", "copied tensors"} <= failing(wrong) and "layer 4 is trained" in wrong.reason
    layers[4]["fell_back"] = False
    (path / "hxaconv.json").write_text(json.dumps(record))
    change(path, "model.layers.2.post_attention_layernorm.weight", lambda values: values * 1.01)
    assert "copied tensors" in failing(verify(path))


def test_who_asks_for_a_calibrated_student_gets_none_that_never_was(made: Path, tmp_path: Path) -> None:
    report = verify(made, expect="calibrated")
    assert failing(report) == {"as calibrated"} and "no layer is calibrated (untrained: " in report.reason
    trained = verify(made, expect="attention-trained")
    copies = next(check.detail for check in trained.checks if check.name == "copied tensors")
    assert trained.passed and copies.endswith("only attention may have changed")
    # A calibration that was no better than the plain values leaves a record, and nothing is asked beyond it.
    record = json.loads((made / "hxaconv.json").read_text())
    folder = copy(made, tmp_path)
    layers = [{"layer": layer, "kind": "rwkv", "fell_back": True} for layer in (0, 1, 3)]
    record["calibration"] = {"layers": layers, "polish": None}
    (folder / "hxaconv.json").write_text(json.dumps(record))
    assert verify(folder).passed
    # And where its record names a layer that holds its plain values, only who asks for calibrated ones is refused.
    layers[0]["fell_back"] = False
    (folder / "hxaconv.json").write_text(json.dumps(record))
    default = verify(folder)
    assert default.passed and default.expect == "calibrated"
    assert "as calibrated" in failing(verify(folder, expect="calibrated"))


def test_a_student_is_never_identical_to_its_teacher(made: Path) -> None:
    report = verify(made, expect="identical")
    tensors = next(check.detail for check in report.checks if check.name == "tensors")
    assert not report.passed and tensors.count("; ") == 3 and tensors.endswith(" more")
    assert any("never identical" in note for note in report.notes)
    same = hxaconv.verify(str(made), against=str(made), expect="identical")
    assert same.passed and not any("never identical" in note for note in same.notes)


def test_expectations_of_students_need_one(made: Path) -> None:
    with pytest.raises(HxaconvError, match="a student and its teacher"):
        hxaconv.verify(str(TEACHER), against=str(TEACHER), expect="untrained")
    with pytest.raises(HxaconvError, match="expect"):
        hxaconv.verify(str(made), against=str(TEACHER), expect="perfect")


def test_files_of_a_folder_are_held_against_its_record_and_its_tensors(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 2e-5}, indent=2) + "\n")
    report = hxaconv.verify(str(folder))
    assert failing(report) == {"recorded files"}
    with pytest.raises(HxaconvError, match=r"config\.json has"):
        hxaconv.verify(str(folder), digests=True).raise_if_failed()
    (folder / "hxaconv.json").unlink()
    assert hxaconv.verify(str(folder)).passed
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float16"}))
    assert failing(hxaconv.verify(str(folder))) == {"config and tensors"}


def test_the_wrong_order_is_turned_round(made: Path, tmp_path: Path) -> None:
    turned = hxaconv.verify(str(TEACHER), against=str(made))
    assert isinstance(turned, Report)
    assert turned.passed and turned.expect == "untrained" and turned.source == str(made)
    assert any("Turned round" in note for note in turned.notes)
    assert [check.name for check in turned.checks] == [check.name for check in verify(made).checks]
    wrong = copy(made, tmp_path)
    change(wrong, "model.norm.weight", lambda values: values + 1)
    assert "copied tensors" in failing(hxaconv.verify(str(TEACHER), against=str(wrong)))
    with pytest.raises(HxaconvError, match="is of SOURCE"):
        hxaconv.verify(str(TEACHER), against=str(made), logits_out=str(tmp_path / "logits.safetensors"))
    assert not (tmp_path / "logits.safetensors").exists()


def test_a_student_trained_in_place_is_told_what_to_expect(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path)
    change(folder, "model.layers.1.self_attn.w1", lambda values: values + 0.01)
    report = verify(folder)
    assert "as untrained" in failing(report) and "--expect attention-trained" in report.reason
    assert verify(folder, expect="attention-trained").passed  # the advice
    assert "--expect attention-trained" not in str(verify(made).to_dict())


def test_a_report_is_never_called_passed_and_nan_fails_it(made: Path, tmp_path: Path) -> None:
    report = verify(made, expect="report")
    assert report.passed and report.outcome == report.to_dict()["outcome"] == "only reported"
    assert verify(made).outcome == "passed"
    folder = copy(made, tmp_path)
    change(folder, "model.layers.1.self_attn.head_size_record", lambda values: values * float("nan"))
    assert failing(verify(folder, expect="report")) == {"finite weights"}


RECORDED = "model.layers.1.self_attn.w0"


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_tensor_in_another_dtype_is_told_of(made: Path, tmp_path: Path, record: bool, dtype: torch.dtype) -> None:
    folder = copy(made, tmp_path)
    if not record:
        (folder / "hxaconv.json").unlink()
    change(folder, RECORDED, lambda values: values.to(dtype))
    report = hxaconv.verify(str(folder))
    assert isinstance(report, Report)
    noted = [note for note in report.notes if RECORDED in note]
    if dtype == torch.bfloat16:  # as it was
        assert report.passed and not noted
    elif record or dtype == torch.float16:
        assert failing(report) == {"dtypes and config"} and RECORDED in report.reason
    else:  # trainers leave some in float32
        assert report.passed and len(noted) == 1 and "are not BF16" in noted[0]


def test_what_was_written_in_two_dtypes_is_as_it_was_written(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path)
    (folder / "hxaconv.json").unlink()
    change(folder, RECORDED, lambda values: values.float())
    for out in ("folder", "file.pth"):
        (hxaconv.to_pth if out.endswith(".pth") else hxaconv.to_hf)(str(folder), str(tmp_path / out), verify=False)
        report = hxaconv.verify(str(tmp_path / out))
        assert isinstance(report, Report)
        assert report.passed and any(RECORDED in note for note in report.notes), report.reason
    change(tmp_path / "folder", RECORDED, lambda values: values.half())
    assert failing(hxaconv.verify(str(tmp_path / "folder"))) == {"dtypes and config"}
    # The same bytes under another dtype, which a digest of bytes does not see.
    change(tmp_path / "folder", RECORDED, lambda values: values.float().bfloat16())
    hxaconv.to_hf(str(tmp_path / "folder"), str(tmp_path / "again"), verify=False)
    change(tmp_path / "again", RECORDED, lambda values: values.view(torch.float16))
    assert failing(hxaconv.verify(str(tmp_path / "again"))) == {"dtypes and config"}


def test_only_a_record_makes_a_change_a_calibration(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path)
    change(folder, "model.layers.1.self_attn.r_k", lambda values: values * 2)
    assert verify(folder, expect="attention-trained").attention[1] == "trained"
    record = json.loads((folder / "hxaconv.json").read_text())
    layers = [{"layer": 1, "kind": "rwkv", "fell_back": False}, {"layer": 3, "kind": "rwkv", "fell_back": True}]
    (folder / "hxaconv.json").write_text(json.dumps(record | {"calibration": {"layers": layers}}))
    report = verify(folder)
    assert report.expect == "calibrated" and report.attention[1] == "calibrated", report.reason
    assert report.attention[3] == "untrained" and report.passed
    # What was polished was trained, all mixers of it.
    (folder / "hxaconv.json").write_text(
        json.dumps(record | {"calibration": {"layers": layers, "polish": {"best_step": 2}}})
    )
    polished = verify(folder)
    assert polished.expect == "attention-trained" and polished.passed
    assert any("polished" in note for note in polished.notes)
    change(folder, "model.layers.2.mlp.up_proj.weight", lambda values: values * 1.01)
    assert "copied tensors" in failing(verify(folder))


@pytest.mark.parametrize("file", ["config.json", "hxaconv.json", "model.safetensors.index.json", "header", "map.toml"])
def test_numbers_of_thousands_of_digits_are_called_that(file: str, made: Path, tmp_path: Path) -> None:
    folder, digits, options = copy(made, tmp_path), "9" * 5000, dict[str, str]()
    weights = folder / "model.safetensors"
    if file == "header":
        header = f'{{"a": {{"dtype": "F32", "shape": [{digits}], "data_offsets": [0, 4]}}}}'.encode()
        weights.write_bytes(len(header).to_bytes(8, "little") + header)
    elif file == "map.toml":
        (tmp_path / file).write_text(f"gqa_layers = [{digits}]")
        options = {"layer_map": str(tmp_path / file)}
    else:
        text = (folder / file).read_text() if (folder / file).is_file() else '{"weight_map": {}}'
        (folder / file).write_text(text.rstrip()[:-1] + f', "number": {digits}}}')
    with pytest.raises(HxaconvError, match="a number of thousands of digits") as caught:
        hxaconv.verify(str(folder), **options)
    assert "sys." not in str(caught.value)


def test_a_record_of_initial_values_that_the_variant_does_not_have(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"rwkv_architecture": "hxa07d"}))  # the tensors are alike
    assert {"initial values", "recorded files"} <= failing(verify(folder))


def test_a_tensor_that_the_record_lists_is_missed_though_a_teacher_has_it(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "student.pth"
    hxaconv.to_pth(str(made), str(path), verify=False)
    assert hxaconv.verify(str(path), teacher=str(TEACHER)).passed
    state = torch.load(path, weights_only=True)
    del state["head.weight"]
    torch.save(state, path)
    report = hxaconv.verify(str(path), teacher=str(TEACHER))
    assert "head.weight is recorded and not there" in report.reason


def test_a_zero_of_the_other_sign_is_not_to_the_bit(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path)
    change(folder, "model.layers.1.self_attn.w1", lambda values: -values)
    assert failing(verify(folder)) == {"initial values"}
