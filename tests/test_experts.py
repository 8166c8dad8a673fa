"""Mixtures of experts around hxa079, held against transformers where it is there."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hxaconv.errors import HxaconvError
from hxaconv.forward import hxa079, llama
from hxaconv.load import load_model
from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.load.inspection import inspect
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import TeacherConfig, teacher_config
from hxaconv.surgery.arithmetic import tensor

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [2],
    "decoder_sparse_step": 1,
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
PARAMETERS = ("w1", "a1", "v1", "k1", "g1", "w0", "a0", "v0", "k0", "r_k")


def make_teacher(folder: Path, **changes: Any) -> Path:
    """Random weights of every tensor that the config asks for."""
    config = CONFIG | changes
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in expected_tensors(teacher_config(config, where="test")).items():
        x = torch.randn(shape, generator=draw)
        tensors[name] = (1 + 0.1 * x if "norm" in name else x * (0.5 if ".gate." in name else 0.1)).bfloat16()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fused(folder: Path, out: Path, *, transposed: bool) -> Path:
    """The same teacher with all experts of a layer in two tensors."""
    tensors = load_file(folder / "model.safetensors")
    for layer in (0, 1, 3):
        base = f"model.layers.{layer}.mlp.experts."
        parts: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
        for expert in range(CONFIG["num_experts"]):
            gate, up, down = (tensors.pop(f"{base}{expert}.{part}_proj.weight") for part in ("gate", "up", "down"))
            parts["gate_up_proj"].append(torch.cat([gate, up]))
            parts["down_proj"].append(down)
        for name, matrices in parts.items():
            whole = torch.stack(matrices)
            tensors[base + name] = (whole.mT if transposed else whole).contiguous()
    out.mkdir()
    shutil.copy(folder / "config.json", out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def trained(folder: Path) -> None:
    """Move a student's weights away from their initial values."""
    tensors, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    for name, x in tensors.items():
        if name.rsplit(".", 1)[-1] in PARAMETERS:
            x += (torch.randn(x.shape, generator=draw) * 0.1).to(x.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("experts") / "teacher")


@pytest.fixture(scope="module")
def student(teacher: Path) -> Path:
    import hxaconv

    out = teacher.with_name("student")
    hxaconv.init_from_teacher(str(teacher), str(out), gqa_layers="1,3")
    trained(out)
    return out


def logits(folder: Path, ids: Tensor, **changes: Any) -> Tensor:
    """By the reference, in float64."""
    import dataclasses

    model = load_model(str(folder))
    config = model.config
    if changes:
        assert config.experts is not None
        config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, **changes))
    forward: Any = llama.forward if isinstance(config, TeacherConfig) else hxa079.forward
    found: Tensor = forward(ids, lambda name: tensor(model.plan[name], dtype=torch.float64), config)[0]
    return found


IDS = torch.randint(0, 131, (2, 17), generator=torch.Generator().manual_seed(2))


def published(folder: Path, **how: Any) -> Any:
    """The model as transformers loads it, in float64."""
    transformers = pytest.importorskip("transformers")
    # Grouped products know no float64.
    eager = {"experts_implementation": "eager"} if int(transformers.__version__.split(".")[0]) >= 5 else {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float64, output_loading_info=True, **(how or eager)
    )
    assert not any(info.values()), info
    return model


class Wide:
    """torch, with float64 where code asks for float32."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def in_float64(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever transformers' Qwen3Moe computes in float32 it computes in float64."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    monkeypatch.setattr(modeling_qwen3_moe, "torch", Wide())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    powers = torch.arange(0, CONFIG["head_dim"], 2, dtype=torch.float64) / CONFIG["head_dim"]
    model.model.rotary_emb.inv_freq = CONFIG["rope_theta"] ** -powers


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False, "num_experts_per_tok": 3},
        {"decoder_sparse_step": 2, "mlp_only_layers": []},
    ],
)
def test_a_teacher_with_experts_is_that_of_transformers(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_teacher(tmp_path / "t", **changes)
    model = published(folder)
    with torch.no_grad():
        expected = model(IDS).logits
        # Norms, angles and the softmax over experts it takes in float32, whatever the weights are in.
        assert float((logits(folder, IDS) - expected).abs().max()) < 1e-6
        in_float64(model, monkeypatch)
        expected = model(IDS).logits
        monkeypatch.undo()
    scale = float(expected.abs().max())
    assert float((logits(folder, IDS) - expected).abs().max()) < 1e-12 * scale
    norm = not (CONFIG | changes)["norm_topk_prob"]
    assert float((logits(folder, IDS, norm_topk_prob=norm) - expected).abs().max()) > 1e-3 * scale
    assert float((logits(folder, IDS, num_experts_per_tok=1) - expected).abs().max()) > 1e-3 * scale


def test_a_student_with_experts_loads_in_transformers(student: Path, modules_cache: None) -> None:
    model = published(student, trust_remote_code=True)
    with torch.no_grad():
        expected = model(IDS).logits
    assert float((logits(student, IDS) - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 0
    assert any(e.up_proj.weight.grad is not None for e in model.model.layers[0].mlp.experts)
    assert model.model.layers[2].mlp.up_proj.weight.shape == (80, 48)
    packed = torch.cat([IDS[:1, :9], IDS[1:, :8]], 1)
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None]
    with torch.no_grad():
        alone = torch.cat([model(IDS[:1, :9]).logits, model(IDS[1:, :8]).logits], 1)
        assert float((model(packed, position_ids=positions).logits - alone).abs().max()) < 1e-12


def test_experts_go_through_conversion_bit_by_bit(student: Path, teacher: Path, tmp_path: Path) -> None:
    import hxaconv

    hxaconv.to_hf(str(student), str(tmp_path / "again"))
    hxaconv.to_training(str(student), str(tmp_path / "trained.pth"))
    hxaconv.to_hf(str(tmp_path / "trained.pth"), str(tmp_path / "whole"), teacher=str(teacher))
    expected, mlps = load_file(student / "model.safetensors"), load_file(teacher / "model.safetensors")
    for out in ("again", "whole"):
        found = load_file(tmp_path / out / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert all(torch.equal(expected[name], x) for name, x in mlps.items() if ".mlp." in name)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: config[key] for key in ("num_experts", "num_experts_per_tok", "norm_topk_prob")} == {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    assert (config["moe_intermediate_size"], config["mlp_only_layers"], config["decoder_sparse_step"]) == (24, [2], 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_are_split_bit_by_bit(transposed: bool, teacher: Path, tmp_path: Path) -> None:
    folder = fused(teacher, tmp_path / "fused", transposed=transposed)
    expected = load_file(teacher / "model.safetensors")
    model = load_model(str(folder))
    assert list(model.plan) == list(load_model(str(teacher)).plan)
    assert all(torch.equal(tensor(recipe), expected[name]) for name, recipe in model.plan.items())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 20}))
    with pytest.raises(HxaconvError, match=r"_proj: shape .* the config implies \(6, "):
        load_model(str(folder))
    shutil.copy(teacher / "config.json", folder)
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    both = load_file(folder / "model.safetensors") | {name: expected[name]}
    save_file(both, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HxaconvError, match=f"{name} is there twice"):
        load_model(str(folder))


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_that_are_views_of_others_are_refused(transposed: bool, teacher: Path, tmp_path: Path) -> None:
    folder = fused(teacher, tmp_path / "fused", transposed=transposed)
    tensors = load_file(folder / "model.safetensors")
    views = {name: x.mT.contiguous().mT if ".experts." in name else x for name, x in tensors.items()}
    torch.save(views, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(HxaconvError, match="not stored contiguously"):
        load_model(str(folder))


def test_fused_experts_as_transformers_saves_them(teacher: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("version 4 has no fused experts")
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert stored["model.layers.0.mlp.experts.gate_up_proj"].shape == (6, 48, 48)
    expected = load_file(teacher / "model.safetensors")
    plan = load_model(str(tmp_path / "saved")).plan
    assert plan.keys() == expected.keys()
    assert all(torch.equal(tensor(recipe), expected[name]) for name, recipe in plan.items())


def test_only_experts_that_tokens_go_to_are_read(student: Path) -> None:
    model, asked = load_model(str(student)), []

    def get(name: str) -> Tensor:
        asked.append(name)
        return tensor(model.plan[name], dtype=torch.float32)

    hxa079.forward(torch.tensor([[5]]), get, model.student)
    for layer in (0, 1, 3):
        read = {name.split(".")[5] for name in asked if name.startswith(f"model.layers.{layer}.mlp.experts.")}
        assert len(read) == 2


def test_an_expert_that_differs_is_found_though_no_token_goes_to_it(
    student: Path, tmp_path: Path, cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(student, tmp_path / "other")
    assert cli("verify", student, "--against", other, "--expect", "identical") == 0
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.3.mlp.experts.5.up_proj.weight"
    tensors[name][0, 0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert cli("verify", student, "--against", other, "--expect", "identical") == 1
    assert name in "".join(capsys.readouterr())
    tensors[name][0, 0] = float("nan")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert cli("verify", other) == 1
    assert name in "".join(capsys.readouterr())


def test_no_pth_carries_experts(
    student: Path, teacher: Path, tmp_path: Path, cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ("to-pth", student, tmp_path / "x.pth"),
        ("init-from-teacher", teacher, tmp_path / "x.pth", "--format", "pth", "--gqa-layers", "1,3"),
    ):
        assert cli(*arguments) == 2
        assert "a .pth cannot carry experts" in "".join(capsys.readouterr())
    for command in ("inspect", "verify"):
        assert cli(command, student) == 0
        assert "to-pth" not in "".join(capsys.readouterr())
    assert not (tmp_path / "x.pth").exists()


def test_layers_are_repicked_and_ranked(student: Path, teacher: Path, tmp_path: Path, cli: Callable[..., int]) -> None:
    more = ("--teacher", teacher, "--quiet")
    assert cli("pick-gqa-layers", student, tmp_path / "three", "--layers", "1,2,3", *more) == 0
    found, mlps = (load_file(x / "model.safetensors") for x in (tmp_path / "three", teacher))
    assert all(torch.equal(found[name], x) for name, x in mlps.items() if ".mlp." in name or ".layers.2." in name)
    text = tmp_path / "ids.json"
    text.write_text(json.dumps(IDS.tolist()))
    for strategy in ("influence", "kl"):
        assert cli("pick-gqa-layers", teacher, "--strategy", strategy, "--count", 1, "--input-ids", text, "-q") == 0


def test_a_student_with_experts_is_calibrated(
    teacher: Path, tmp_path: Path, cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tmp_path / "fresh"
    assert cli("init-from-teacher", teacher, student, "--gqa-layers", "1,3", "-q") == 0
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(torch.randint(0, 131, (8, 64), generator=torch.Generator().manual_seed(3)).tolist()))
    fit = ["--teacher", teacher, "--input-ids", ids, "--refine-steps", 2, "-q"]
    assert cli("calibrate", student, tmp_path / "fitted", *fit) == 0
    found, mlps = (load_file(x / "model.safetensors") for x in (tmp_path / "fitted", teacher))
    assert all(torch.equal(found[name], x) for name, x in mlps.items() if ".mlp." in name)
    before = load_file(student / "model.safetensors")
    assert any(not torch.equal(found[name], x) for name, x in before.items() if ".self_attn." in name)
    monkeypatch.setattr("hxaconv.calibration.polish.LENGTH", 64)
    assert cli("calibrate", student, tmp_path / "polished", *fit, "--polish-only", "--polish-tokens", 512) == 0
    curve = dict(json.loads((tmp_path / "polished" / "hxaconv.json").read_text())["calibration"]["polish"]["curve"])
    assert min(curve.values()) < curve[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2_moe", "shared_expert_intermediate_size": 32}, "mixture of experts of 'qwen2_moe'"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts of 'mixtral'"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 of num_experts 6"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is None"),
        ({"mlp_only_layers": []}, "model.layers.2.mlp.gate.weight is missing"),
        ({"decoder_sparse_step": 2}, "model.layers.0.mlp.experts.0.up_proj.weight is not part of the architecture"),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding_window is 64"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: str, teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "t")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(HxaconvError, match=words.replace("(", r"\(")):
        load_model(str(folder))


def test_transformers_5_writes_num_local_experts(teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "t")
    raw = {key: value for key, value in CONFIG.items() if key != "num_experts"} | {"num_local_experts": 6}
    (folder / "config.json").write_text(json.dumps(raw))
    assert load_model(str(folder)).config.experts == load_model(str(teacher)).config.experts


def sparse_folder(folder: Path) -> int:
    """A student of Qwen3-30B-A3B by names and shapes, its bytes never written; returns their number."""
    layers = range(48)
    gqa = [i for i in layers if i % 6 == 5]
    config: dict[str, Any] = CONFIG | {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "mlp_only_layers": [],
        "rwkv_architecture": "hxa079",
        "transformer_layers": gqa,
        "rwkv_layers": [i for i in layers if i not in gqa],
        "enable_qk_norm": True,
        "has_layer_records": True,
        "lora_rank_decay": 256,
        "lora_rank_iclr": 128,
        "lora_rank_value_residual_mix": 96,
        "lora_rank_key_residual_mix": 96,
        "lora_rank_gate": 256,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    from hxaconv.load.student import SettingsSource, config_settings, resolve

    shapes = expected_tensors(
        resolve([SettingsSource("", {}), SettingsSource("config.json", config_settings(config, "test"))], "test")
    )
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    data = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + place)
    return place


def test_twenty_thousand_tensors_are_planned_in_two_seconds(tmp_path: Path) -> None:
    nbytes = sparse_folder(tmp_path / "big")
    assert nbytes == 61_419_204_768
    begin = time.process_time()
    report = inspect(open_checkpoint(tmp_path / "big"))
    opened = time.process_time()
    model = load_model(str(tmp_path / "big"))
    assert time.process_time() - opened < 2
    assert opened - begin < 2
    assert (report["variant"], report["bytes"], report["problem"]) == ("hxa079", nbytes, None)
    assert (report["tensors"], report["dimensions"]["num_experts"]) == (19_547, 128)
    assert model.student.gqa_layers == (5, 11, 17, 23, 29, 35, 41, 47)
