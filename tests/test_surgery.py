"""The operations on plans: initialisation against the golden case, graft, another choice of layers, padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hxaconv.errors import HxaconvError
from hxaconv.formats.files import SourceFile
from hxaconv.load import load_teacher
from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.load.tensors import graft
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import student_of, teacher_config
from hxaconv.model.model import Model
from hxaconv.model.names import layer_kinds
from hxaconv.model.plan import Plan, same_bytes, stored
from hxaconv.save.output import stored_plan
from hxaconv.surgery.arithmetic import tensor
from hxaconv.surgery.init import PRESETS, InitSettings, init_from_teacher, parse_scale
from hxaconv.surgery.reshape import pad_ffn, repick

RANDOM = {"w2", "a2", "v2", "k2", "g2"}
SETTINGS = InitSettings(PRESETS["openmose-stage1"], 0, "BF16")


def teacher_of(golden: Path, case: str) -> Model:
    return load_teacher(golden / case / "teacher")


def initialised(teacher: Model, layers: tuple[int, ...], settings: InitSettings = SETTINGS) -> Plan:
    return init_from_teacher(teacher.plan, student_of(teacher.config, layers), settings)


def references(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "pth": torch.load(folder / "student.pth", weights_only=True),
        "hf": load_file(folder / "student_hf" / "model.safetensors"),
        "training": torch.load(folder / "trained_attention.pth", weights_only=True),
    }


@pytest.mark.parametrize("format", ["pth", "hf", "training"])
def test_the_golden_initialisation_is_reproduced_bit_for_bit(golden: Path, format: str) -> None:
    plan = initialised(teacher_of(golden, "reka_tiny_init"), (2, 4))
    ours = stored_plan(plan, format, whole=format != "training")
    theirs = references(golden / "reka_tiny_init")[format]
    assert set(ours) == set(theirs)
    compared = 0
    for name, expected in theirs.items():
        made = tensor(ours[name])
        assert made.shape == expected.shape
        if name.rsplit(".", 1)[-1] in RANDOM:
            assert_orthogonal(made.double())
            assert_orthogonal(expected.double())
        else:
            assert torch.equal(made, expected), name
            compared += 1
    assert compared > 50


def assert_orthogonal(matrix: torch.Tensor) -> None:
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    gain = 0.01 * max(1.0, rows / columns)
    # bf16 keeps 8 bits: entries of size g/sqrt(n) are off by 2**-9 of themselves, their sums by less.
    assert (gram - gain * torch.eye(len(gram), dtype=gram.dtype)).abs().max() < 2**-8 * gain


def test_a_factor_that_differs_is_seen(golden: Path) -> None:
    teacher = teacher_of(golden, "reka_tiny_init")
    wrong = InitSettings({**SETTINGS.factors, "value": 0.5}, 0, "BF16")
    name = "model.layers.0.self_attn.value.weight"
    right = tensor(initialised(teacher, (2, 4))[name])
    assert not torch.equal(tensor(initialised(teacher, (2, 4), wrong)[name]), right)


def test_norms_and_unequal_widths_become_a_whole_student(golden: Path) -> None:
    teacher = teacher_of(golden, "qwen3_tiny")
    config = student_of(teacher.config, (1, 3))
    plan = initialised(teacher, (1, 3))
    assert list(plan) == list(expected_tensors(config))
    assert same_bytes(
        plan["model.layers.0.self_attn.r_norm.weight"], teacher.plan["model.layers.0.self_attn.q_norm.weight"]
    )


def test_picking_other_layers_equals_initialising_with_them(golden: Path) -> None:
    teacher = teacher_of(golden, "qwen3_tiny")
    first, second = student_of(teacher.config, (1, 3)), student_of(teacher.config, (2, 3))
    picked = repick(initialised(teacher, (1, 3)), teacher.plan, first, second, SETTINGS)
    direct = initialised(teacher, (2, 3))
    assert list(picked) == list(direct)
    assert all(torch.equal(tensor(picked[name]), tensor(direct[name])) for name in direct)


def test_picking_keeps_what_was_trained(golden: Path) -> None:
    teacher = teacher_of(golden, "reka_tiny")
    old, new = student_of(teacher.config, (2, 4)), student_of(teacher.config, (1, 4))
    trained = graft(open_checkpoint(golden / "reka_tiny" / "trained_attention.pth").plan, teacher.plan, old)
    picked = repick(trained, teacher.plan, old, new, SETTINGS)
    for name in picked:
        changed = ".layers.1.self_attn" in name or ".layers.2.self_attn" in name
        if not changed:
            assert picked[name] is trained[name]
    assert "model.layers.1.self_attn.q_proj.weight" in picked
    assert "model.layers.2.self_attn.r_k" in picked


def test_a_layer_can_come_from_another_trained_checkpoint(golden: Path) -> None:
    teacher = teacher_of(golden, "reka_tiny")
    old, new = student_of(teacher.config, (4,)), student_of(teacher.config, (2, 4))
    student = initialised(teacher, (4,))
    source_student = open_checkpoint(golden / "reka_tiny" / "student.pth").plan
    picked = repick(student, {}, old, new, SETTINGS, Model(new, source_student, "source_student"))
    name = "model.layers.2.self_attn.q_proj.weight"
    assert same_bytes(picked[name], source_student[name])
    assert not same_bytes(picked[name], teacher.plan[name])


def test_a_graft_reproduces_the_golden_student(golden: Path) -> None:
    for case, layers in (("reka_tiny", (2, 4)), ("qwen3_tiny", (1, 3))):
        teacher = teacher_of(golden, case)
        trained = open_checkpoint(golden / case / "trained_attention.pth").plan
        grafted = graft(trained, teacher.plan, student_of(teacher.config, layers))
        expected = load_file(golden / case / "student_hf" / "model.safetensors")
        assert set(grafted) == set(expected)
        assert all(torch.equal(tensor(grafted[name]), value) for name, value in expected.items())
        assert grafted["model.norm.weight"] is teacher.plan["model.norm.weight"]


def test_an_unused_trained_tensor_is_an_error(golden: Path) -> None:
    teacher = teacher_of(golden, "reka_tiny")
    trained = dict(open_checkpoint(golden / "reka_tiny" / "trained_attention.pth").plan)
    trained["model.layers.2.self_attn.r_k"] = trained["model.layers.0.self_attn.r_k"]
    with pytest.raises(HxaconvError, match=r"layers\.2\.self_attn\.r_k"):
        graft(trained, teacher.plan, student_of(teacher.config, (2, 4)))


def test_padding_adds_zeros_only(golden: Path) -> None:
    teacher = teacher_of(golden, "reka_tiny")
    config = student_of(teacher.config, (2, 4))
    plan, size = pad_ffn(initialised(teacher, (2, 4)), config, 256)
    assert size == 256
    down = tensor(plan["model.layers.0.mlp.down_proj.weight"])
    assert down.shape == (48, 256)
    assert torch.equal(down[:, :80], tensor(teacher.plan["model.layers.0.mlp.down_proj.weight"]))
    assert not down[:, 80:].any()
    up = tensor(plan["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(up[:80], tensor(teacher.plan["model.layers.0.mlp.up_proj.weight"]))
    assert not up[80:].any()


def test_scale_says_everything_that_is_wrong() -> None:
    assert parse_scale("value=1", "openmose-stage1")["value"] == 1.0
    with pytest.raises(HxaconvError) as caught:
        parse_scale("valu=1,key=x", "openmose-stage1")
    with pytest.raises(HxaconvError, match="receptance is given twice"):
        parse_scale("receptance=0.5,receptance=0.6", "openmose-stage1")
    assert "valu=1" in str(caught.value)
    assert "key=x" in str(caught.value)


def test_reka_is_planned_at_full_size_from_its_config(tmp_path: Path) -> None:
    raw = {
        "model_type": "llama",
        "num_hidden_layers": 44,
        "hidden_size": 6144,
        "intermediate_size": 19648,
        "vocab_size": 100352,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 8e6,
    }
    teacher = teacher_config(raw, where="reka")
    (tmp_path / "weights").write_bytes(b"")
    file = SourceFile.local(tmp_path / "weights")
    source = {name: stored("BF16", shape, file, 0, name) for name, shape in expected_tensors(teacher).items()}
    config = student_of(teacher, (8, 15, 22, 29, 36, 43))
    plan = init_from_teacher(source, config, SETTINGS)
    assert len(plan) == 3 + 44 * 5 + 38 * 21 + 6 * 4
    assert plan["model.layers.0.self_attn.w1"].shape == (6144, 320)
    assert plan["model.layers.0.self_attn.g2"].shape == (384, 6144)
    small = {name: recipe for name, recipe in plan.items() if recipe.numel < 10_000 and recipe.make.kind == "init"}
    assert {tuple(tensor(recipe).shape) == recipe.shape for recipe in small.values()} == {True}


def test_cases_describe_their_layers(golden: Path) -> None:
    for case in golden.iterdir():
        facts = json.loads((case / "case.json").read_text())
        kinds = layer_kinds(open_checkpoint(case / "student.pth").plan)
        assert facts["gqa_layers"] == [i for i, kind in kinds.items() if kind == "gqa"]
