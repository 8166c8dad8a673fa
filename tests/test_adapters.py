"""Adapters merged while a checkpoint is read: each kind by its formula in float32, rounded once, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import expected
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from hxaconv.errors import HxaconvError
from hxaconv.forward import hxa079, llama
from hxaconv.load import load_student, load_teacher
from hxaconv.model.model import Model
from hxaconv.model.plan import rows
from hxaconv.options import Settings
from hxaconv.surgery import merging
from hxaconv.surgery.arithmetic import cast, scaled, tensor

GOLDEN = Path(__file__).parent / "golden" / "reka_tiny"
STUDENT, TEACHER = GOLDEN / "student.pth", GOLDEN / "teacher"
TOLD = {"rope_theta": 8e6, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "variant": "hxa079"}
RECEPTANCE, UP = "model.layers.1.self_attn.receptance.weight", "model.layers.0.mlp.up_proj.weight"
RWKV = {RECEPTANCE: "blocks.1.att.receptance", UP: "blocks.0.ffn.up"}
RANK = 4


def student(*adapters: Path, scales: tuple[float, ...] = (), source: Path = STUDENT) -> Model:
    return load_student(source, Settings(adapter=adapters, adapter_scale=scales, **TOLD))


def teacher(*adapters: Path, scales: tuple[float, ...] = ()) -> Model:
    return load_teacher(TEACHER, Settings(adapter=adapters, adapter_scale=scales))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lora(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    a, b = noise(RANK, w.shape[1]), noise(w.shape[0], RANK)
    return {"lora_A": a, "lora_B": b}, w + (b @ a) * 0.5


def dora(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    parts, sum_ = lora(w)
    m = noise(1, w.shape[1], seed=3) + 1
    return parts | {"lora_M": m}, sum_ * (m.double() / (sum_.double().norm(dim=0, keepdim=True) + 1e-6)).float()


def pissa(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    first, second = (noise(RANK, w.shape[1], seed=s) for s in (4, 5))
    left, right = (noise(w.shape[0], RANK, seed=s) for s in (4, 5))
    parts = {"init_lora_A": first, "init_lora_B": left, "lora_A": second, "lora_B": right}
    return parts, w - left @ first + right @ second


def repeated(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    matrix = noise(5, w.shape[0])  # 5 divides no width here
    columns = torch.arange(w.shape[1]) % 5
    return {"disha": matrix}, w + matrix.T[:, columns]


def blockwise(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    d = noise(w.shape[1] // RANK, RANK, RANK)
    changed = w.clone()
    for i in range(0, w.shape[0], RANK):
        for j in range(w.shape[1] // RANK):
            block = w[i : i + RANK, j * RANK : (j + 1) * RANK]
            changed[i : i + RANK, j * RANK : (j + 1) * RANK] = block + (block @ d[j] + d[j])
    return {"bone": d}, changed


KINDS = {"lora": lora, "dora": dora, "pissa": pissa, "repeated": repeated, "blockwise": blockwise}


def rwkv_file(path: Path, kind: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]) -> dict[str, Tensor]:
    """An adapter of an RWKV trainer for two weights; returns what they become."""
    base = student().plan
    stored, merged = {}, {}
    for name, short in RWKV.items():
        parts, merged[name] = kind(tensor(base[name], dtype=torch.float32))
        stored |= {f"{short}.{part}": x for part, x in parts.items()}
    first = {f"model.{name}": stored.pop(name) for name in list(stored) if ".init_" in name}
    torch.save(stored, path)
    if first:
        torch.save(first, path.parent / "init_pissa.pth")
    return merged


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_by_its_formula(tmp_path: Path, kind: str) -> None:
    merged = rwkv_file(tmp_path / "rwkv-1.pth", KINDS[kind])
    scales = (0.5,) if kind in ("lora", "dora") else ()
    model, base = student(tmp_path / "rwkv-1.pth", scales=scales), student()
    for name, recipe in model.plan.items():
        found = tensor(recipe)
        if name in merged:
            assert torch.equal(found, merged[name].bfloat16())
            assert not torch.equal(found, tensor(base.plan[name]))
            exact = tensor(cast(recipe, "F32"))  # rounded once, whatever dtype is asked for
            assert torch.allclose(exact, merged[name], rtol=0, atol=1e-6) and not torch.equal(exact, found.float())
            assert torch.equal(tensor(scaled(recipe, 0.3, "BF16", "")), (exact * 0.3).bfloat16())
        else:
            assert recipe.make.kind == "copy" and torch.equal(found, tensor(base.plan[name]))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_merged_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(merging, "BLOCK_ELEMENTS", 700)  # several blocks, none of them the whole weight
    merged = rwkv_file(tmp_path / "rwkv-1.pth", KINDS[kind])
    recipe = student(tmp_path / "rwkv-1.pth", scales=(0.5,) if kind in ("lora", "dora") else ()).plan[UP]
    whole = merged[UP].bfloat16()
    assert torch.equal(tensor(recipe), whole)
    for start, stop in ((0, 1), (3, 10), (len(whole) - 1, len(whole)), (5, 70)):
        assert torch.equal(tensor(rows(recipe, start, stop, "")), whole[start:stop])


def test_several_adapters_and_whole_tensors(tmp_path: Path) -> None:
    first = rwkv_file(tmp_path / "one.pth", lora)
    norm = noise(48, seed=8) + 1
    second, _ = lora(first[UP])
    torch.save(
        {f"{RWKV[UP]}.{part}": x for part, x in second.items()} | {"blocks.2.ln1.weight": norm}, tmp_path / "two"
    )
    plan = student(tmp_path / "one.pth", tmp_path / "two", scales=(0.5, 0.25)).plan
    both = first[UP] + (second["lora_B"] @ second["lora_A"]) * 0.25
    assert torch.equal(tensor(plan[UP]), both.bfloat16())
    assert torch.equal(tensor(plan["model.layers.2.input_layernorm.weight"]), norm.bfloat16())


def peft_folder(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """An adapter as PEFT saves it."""
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": x.contiguous() for name, x in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["q_proj"], "lora_dropout": 0.1}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def pair(module: str, shape: tuple[int, ...], rank: int = RANK) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": noise(rank, shape[1]), f"{module}.lora_B.weight": noise(shape[0], rank)}


@pytest.mark.parametrize(
    ("config", "rank", "factor"),
    [
        ({}, RANK, 6 / 4),
        ({"use_rslora": True}, RANK, 6 / 2),
        ({"rank_pattern": {"1.self_attn.q_proj": 2}}, 2, 6 / 2),
        ({"rank_pattern": {"2.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 10}}, RANK, 10 / 4),
        ({"fan_in_fan_out": True}, RANK, 6 / 4),
    ],
)
def test_lora_of_peft(tmp_path: Path, config: dict[str, Any], rank: int, factor: float) -> None:
    module = "model.layers.1.self_attn.q_proj"
    base = teacher().plan[f"{module}.weight"]
    tensors = pair(module, base.shape, rank)
    folder = peft_folder(tmp_path / "adapter", tensors, **config)
    a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
    for scale in (1.0, 0.5):
        merged = teacher(folder, scales=(scale,) if scale != 1.0 else ()).plan[f"{module}.weight"]
        assert torch.equal(tensor(merged), (tensor(base, dtype=torch.float32) + (b @ a) * factor * scale).bfloat16())


def test_dora_embedding_and_saved_modules_of_peft(tmp_path: Path) -> None:
    plain = {name: tensor(recipe, dtype=torch.float32) for name, recipe in teacher().plan.items()}
    module, embedding = "model.layers.0.mlp.gate_proj", "model.embed_tokens"
    w, table = plain[f"{module}.weight"], plain[f"{embedding}.weight"]
    m, head = noise(w.shape[0]) + 1, noise(*plain["lm_head.weight"].shape)
    parts = pair(module, tuple(w.shape))
    small = {
        f"{embedding}.lora_embedding_A": noise(RANK, table.shape[0]),
        f"{embedding}.lora_embedding_B": noise(48, RANK),
    }
    tensors = {**parts, f"{module}.lora_magnitude_vector": m, **small, "lm_head.modules_to_save.weight": head}
    plan = teacher(peft_folder(tmp_path / "adapter", tensors, use_dora=True)).plan
    a, b = parts.values()
    sum_ = w + (b @ a) * 1.5
    assert torch.equal(tensor(plan[f"{module}.weight"]), (sum_ * (m / sum_.norm(dim=1)).view(-1, 1)).bfloat16())
    a, b = small.values()
    assert torch.equal(tensor(plan[f"{embedding}.weight"]), (table + (b @ a).T * 1.5).bfloat16())
    assert torch.equal(tensor(plan["lm_head.weight"]), head.bfloat16())


class WithPair:
    """A weight with its adapter beside it: linear(x) = x W^T + s (x A^T) B^T."""

    def __init__(self, w: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        self.w, self.a, self.b, self.scale = w, a, b, scale

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is functional.linear
        x, weight, *bias = args
        low = functional.linear(functional.linear(x, weight.a), weight.b)
        return functional.linear(x, weight.w, *bias) + weight.scale * low


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_base_with_the_adapter_beside_it_computes_what_the_merged_model_does(tmp_path: Path, which: str) -> None:
    run = hxa079.forward if which == "student" else llama.forward
    targets = ("receptance", "output") if which == "student" else ("q_proj", "o_proj")
    modules = [f"model.layers.1.self_attn.{target}" for target in targets] + ["model.layers.1.mlp.down_proj"]
    base = student() if which == "student" else teacher()
    tensors = {name: x for module in modules for name, x in pair(module, base.plan[f"{module}.weight"].shape).items()}
    folder = peft_folder(tmp_path / "adapter", tensors)
    merged = student(folder) if which == "student" else teacher(folder)
    ids = expected("reka_tiny")["input_ids"]

    def beside(name: str) -> Any:
        w, module = tensor(base.plan[name], dtype=torch.float64), name.removesuffix(".weight")
        if module not in modules:
            return w
        a, b = (tensors[f"{module}.lora_{part}.weight"].double() for part in "AB")
        return WithPair(w, a, b, 1.5)

    def logits(get: Callable[[str], Any]) -> Tensor:
        return run(ids, get, merged.config)[0]

    wanted = logits(beside)
    exact = logits(lambda name: tensor(cast(merged.plan[name], "F32"), dtype=torch.float64))
    rounded = logits(lambda name: tensor(merged.plan[name], dtype=torch.float64))
    without = logits(lambda name: tensor(base.plan[name], dtype=torch.float64))
    assert (exact - wanted).abs().max() < 1e-5
    assert (rounded - wanted).abs().max() < 0.02 < 0.2 < (without - wanted).abs().max()


def test_an_adapter_of_the_mlp_needs_the_teacher_that_has_it(tmp_path: Path) -> None:
    merged = rwkv_file(tmp_path / "a.pth", lora)
    settings = Settings(adapter=tmp_path / "a.pth", adapter_scale=0.5)
    whole = load_student(GOLDEN / "trained_attention.pth", settings, teacher=TEACHER)
    assert torch.equal(tensor(whole.plan[UP]), merged[UP].bfloat16())
    assert whole.base is not None and torch.equal(tensor(whole.base.plan[UP]), tensor(student().plan[UP]))
    with pytest.raises(HxaconvError, match=r"1 of them are not in .*\n.*up_proj"):
        load_student(GOLDEN / "trained_attention.pth", settings, teacher=TEACHER, whole=False)


def refusal(folder: Path, tensors: dict[str, Tensor], scales: tuple[float, ...] = (), **config: Any) -> str:
    if config:
        peft_folder(folder / "adapter", tensors, **config)
    else:
        torch.save(tensors, folder / "adapter")
    with pytest.raises(HxaconvError) as caught:
        (teacher if config else student)(folder / "adapter", scales=scales)
    return str(caught.value)


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (pair(Q, (48, 48)), {"peft_type": "IA3"}, ["IA3", "merge_and_unload"]),
        (pair(Q, (48, 48)), {"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4", "changed the base"]),
        (pair(Q, (48, 48)), {"layer_replication": [[0, 2]]}, ["layer_replication"]),
        (pair(Q, (48, 48)), {"r": 8}, ["has rank 8"]),
        (pair(Q, (48, 40)), {"r": RANK}, [f"{Q}.weight", "[4, 40]"]),
        (pair("model.layers.9.self_attn.q_proj", (48, 48)), {"r": RANK}, ["model.layers.9.self_attn.q_proj.weight"]),
        (pair("model.layers.1.self_attn.wq", (48, 48)), {"r": RANK}, ["model.layers.1.self_attn.wq.weight"]),
        ({f"{Q}.lora_A.weight": noise(4, 48)}, {"r": RANK}, [f"{Q} has lora_A"]),
        (pair(Q, (48, 48)) | pair("lm_head", (97, 48)), {"r": RANK, "lora_alpha": None}, ["make no scale"]),
    ],
)
def test_adapters_of_peft_that_are_not_merged(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], said: list[str]
) -> None:
    message = refusal(tmp_path, tensors, **config)
    assert all(text in message for text in said), message


@pytest.mark.parametrize(
    ("tensors", "scales", "said"),
    [
        ({"blocks.0.ffn.up.lora_A": noise(4, 48), "blocks.0.ffn.up.lora_B": noise(80, 4)}, (), "--adapter-scale"),
        ({"blocks.0.ffn.up.lora_A": noise(4, 48)}, (1.0,), "blocks.0.ffn.up has lora_A"),
        ({"blocks.0.ffn.up.bone": noise(12, 4, 4)}, (1.0,), "has no scale"),
        ({"blocks.0.ffn.up.bone": noise(12, 5, 5)}, (), "the adapter [12, 5, 5]"),
        ({"blocks.0.att.time_state": noise(4, 4)}, (), "time_state"),
        ({"blocks.0.att.receptance.weight": noise(48, 48)}, (), "whole tensors only"),
        (
            {"blocks.0.att.receptance.lora_A": noise(4, 48), "blocks.0.att.receptance.lora_B": noise(48, 4)},
            (1, 2),
            "given are 1 and 2",
        ),
    ],
)
def test_adapters_of_rwkv_trainers_that_are_not_merged(
    tmp_path: Path, tensors: dict[str, Tensor], scales: tuple[float, ...], said: str
) -> None:
    assert said in refusal(tmp_path, tensors, scales)


def test_an_adapter_of_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    shape = (97, 48)
    folder = peft_folder(tmp_path / "adapter", {"model.embed_tokens.weight": noise(*shape)} | pair(Q, (48, 48)))
    assert load_teacher(TEACHER, Settings(adapter=folder)).plan
    with pytest.raises(HxaconvError, match="ties its head to the embedding"):
        load_teacher(TEACHER, Settings(adapter=folder, tie_word_embeddings=True))


def test_an_adapter_without_its_config_or_nowhere(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "adapter", pair(Q, (48, 48)))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(HxaconvError, match=r"without its adapter_config\.json"):
        teacher(folder)
    with pytest.raises(HxaconvError, match="does not exist"):
        teacher(tmp_path / "nowhere")


def test_the_commands_merge(tmp_path: Path, cli: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    merged = rwkv_file(tmp_path / "a.pth", lora)
    told = ("--rope-theta", "8e6", "--rms-norm-eps", "1e-5", "--no-tie-word-embeddings", "--variant", "hxa079")
    adapter = ("--adapter", tmp_path / "a.pth", "--adapter-scale", "0.5")
    assert cli("to-hf", STUDENT, tmp_path / "hf", *told, *adapter) == 0
    assert "2 tensors are merged with" in "".join(capsys.readouterr())
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(written[name], x.bfloat16()) for name, x in merged.items())
    record = (tmp_path / "hf" / "hxaconv.json").read_text()
    assert "--adapter a.pth --adapter-scale 0.5" in record and str(tmp_path) not in record
    assert json.loads(record)["tensors"][UP]["origin"].endswith("+ a.pth x 0.5")

    identical = ("--expect", "identical", "--tokens", "8", "--quiet")
    assert cli("verify", STUDENT, *told, *adapter, "--against", tmp_path / "hf", *identical) == 0
    assert cli("verify", STUDENT, *told, "--against", tmp_path / "hf", *identical) == 1


def test_a_merged_teacher_is_initialised_from(tmp_path: Path, cli: Callable[..., int]) -> None:
    folder = peft_folder(tmp_path / "adapter", pair(Q, (48, 48)))
    initialise = ("init-from-teacher", TEACHER, "--gqa-layers", "2", "--quiet")
    assert cli(*initialise[:2], tmp_path / "with", *initialise[2:], "--adapter", folder) == 0
    assert cli(*initialise[:2], tmp_path / "without", *initialise[2:]) == 0
    adapted, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    different = [name for name in plain if not torch.equal(plain[name], adapted[name])]
    assert different == ["model.layers.1.self_attn.receptance.weight"]
    exact = tensor(cast(teacher(folder).plan[f"{Q}.weight"], "F32"))
    assert torch.equal(adapted[different[0]], (exact * 0.5).bfloat16())
