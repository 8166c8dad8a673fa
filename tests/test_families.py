"""Tiny models that transformers itself builds and saves: its logits are those of the reference forward."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hxaconv.forward import llama
from hxaconv.load import load_teacher
from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.model.rope import Rope
from hxaconv.options import Settings
from hxaconv.surgery.arithmetic import tensor

transformers = pytest.importorskip("transformers")

AGREEMENT = 1e-5
"""transformers drops to float32 in RMSNorm, RoPE angles and softmax, even in a float64 model."""

SIZES = {
    "hidden_size": 42,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 89,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    # Large weights, so that attention is far from uniform.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
MSCALE = {"mscale": 0.8, "mscale_all_dim": 0.3, "beta_fast": 8, "beta_slow": 2, "truncate": False}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}

FAMILIES = {
    "llama": ("LlamaConfig", {"head_dim": 12, "rope_theta": 8e6}),
    "llama with all biases": ("LlamaConfig", {"head_dim": 12, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"head_dim": 8, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"hidden_size": 48, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 with biases": ("Qwen3Config", {"head_dim": 10, "attention_bias": True}),
    "phi3": ("Phi3Config", {"hidden_size": 48}),
    "seed-oss": ("SeedOssConfig", {"head_dim": 12, "residual_dropout": 0.1}),
    "seed-oss with all biases": ("SeedOssConfig", {"head_dim": 12, "attention_out_bias": True}),
    "smollm3": ("SmolLM3Config", {"hidden_size": 48, "no_rope_layer_interval": 2}),
    "smollm3 by list": ("SmolLM3Config", {"hidden_size": 48, "no_rope_layers": [0, 1, 0]}),
    "granite without multipliers": ("GraniteConfig", {"hidden_size": 48, "attention_multiplier": 8**-0.5}),
    "llama3 scaling": ("LlamaConfig", {"head_dim": 12, "rope_parameters": LLAMA3}),
    "yarn": ("Qwen3Config", {"head_dim": 16, "rope_parameters": YARN}),
    "yarn with mscale": ("Qwen3Config", {"head_dim": 16, "rope_parameters": YARN | MSCALE}),
    "linear scaling": ("LlamaConfig", {"head_dim": 12, "rope_parameters": LINEAR}),
}


def build(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Save a random float64 model in `folder`; (ids, its own logits)."""
    config_class, special = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(SIZES | special))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float64).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Fresh norms are 1 and fresh biases 0: neither would be missed.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in parameter_name else 0.5))
    model.save_pretrained(folder)
    ids = torch.randint(config.vocab_size, (2, 23))
    with torch.no_grad():
        return ids, model(ids).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_agrees(name: str, tmp_path: Path) -> None:
    ids, expected = build(tmp_path, name)
    model = load_teacher(tmp_path, Settings(allow_output_bias=True))
    get = lambda name: tensor(model.plan[name], dtype=torch.float64)  # noqa: E731
    logits, _ = llama.forward(ids, get, model.config)
    assert logits.dtype == expected.dtype == torch.float64
    assert (logits - expected).abs().max() < AGREEMENT
    unrotated, _ = llama.forward(ids, get, model.config, rope=False)
    assert (unrotated - expected).abs().max() > 1e-2
    if model.config.rope_scaling is not None:
        unscaled, _ = llama.forward(ids, get, replace(model.config, rope_scaling=None))
        assert (unscaled - expected).abs().max() > 1e-2
    if model.config.nope_layers:
        rotated, _ = llama.forward(ids, get, replace(model.config, nope_layers=()))
        assert (rotated - expected).abs().max() > 1e-2


VISION = {"hidden_size": 16, "intermediate_size": 24}
MROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True, "rope_theta": 5e6}
TEXT = SIZES | {"hidden_size": 48, "head_dim": 12, "num_attention_heads": 4}
SHELLS = {
    "Mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": None},
        "vision_config": VISION
        | {"model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "head_dim": 8},
        "image_token_index": 88,
        "tie_word_embeddings": False,
    },
    "Qwen3VL": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": VISION
        | {"depth": 1, "num_heads": 2, "out_hidden_size": 48, "deepstack_visual_indexes": [0], "patch_size": 16},
        "image_token_id": 80,
    },
}


@pytest.mark.parametrize("name", SHELLS)
def test_the_text_model_of_a_shell_is_taken(
    name: str, tmp_path: Path, cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    shell = tmp_path / "shell"
    config = getattr(transformers, f"{name}Config")(**SHELLS[name])
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).double().eval()
    model.save_pretrained(shell)
    ids = torch.randint(80, (2, 17))
    with torch.no_grad():
        expected = model(ids).logits
    checkpoint = open_checkpoint(shell)
    teacher = load_teacher(checkpoint)
    found, _ = llama.forward(ids, lambda key: tensor(teacher.plan[key], dtype=torch.float64), teacher.config)
    assert (found - expected).abs().max() < AGREEMENT
    parts = {"Mistral3": ("vision_tower", "multi_modal_projector"), "Qwen3VL": ("visual",)}[name]
    assert set(checkpoint.shell).isdisjoint(checkpoint.stored_names.values())
    assert len(checkpoint.shell) + len(teacher.plan) == sum(1 for _ in model.state_dict())
    (shell / "preprocessor_config.json").write_text("{}")
    words = ("init-from-teacher", shell, tmp_path / "carried", "--gqa-layers", "1", "--keep-shell", "--quiet")
    assert cli(*words) == 0
    assert cli("inspect", tmp_path / "carried") == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "Beside the text model" in said and all(f"tensors of {part}" in said for part in parts)
    assert cli("to-hf", tmp_path / "carried", tmp_path / "again", "--keep-shell", "--quiet") == 0
    pick = ("pick-gqa-layers", tmp_path / "carried", tmp_path / "picked", "--layers", "0,1", "--teacher", shell)
    assert cli(*pick, "--allow-gqa-layer-0", "--keep-shell", "--quiet") == 0
    assert "left out" not in "".join(capsys.readouterr())
    for command, out in (("to-hf", "alone"), ("to-pth", "alone.pth")):
        assert cli(command, tmp_path / "carried", tmp_path / out, "--quiet") == 0
        said = " ".join("".join(capsys.readouterr()).split())
        assert all(f"tensors of {part}" in said for part in parts) and "left out" in said
    source = load_file(shell / "model.safetensors")
    for folder in (tmp_path / "picked", tmp_path / "carried", tmp_path / "again"):
        written = load_file(folder / "model.safetensors")
        assert all(torch.equal(written[key], source[key]) for key in checkpoint.shell)
        assert json.loads((folder / "config.json").read_text())["vision_config"]
        assert (folder / "preprocessor_config.json").is_file()
    assert load_file(tmp_path / "alone" / "model.safetensors").keys() == written.keys() - checkpoint.shell.keys()
    assert cli("init-from-teacher", shell, tmp_path / "x.pth", "--gqa-layers", "1", "--keep-shell", "--quiet") == 2


def test_what_remains_is_the_float32_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With RMSNorm, angles and softmax in float32 here too, the two agree to rounding in float64."""

    def float32_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        narrow = x.float()
        return weight * (narrow * torch.rsqrt(narrow.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def float32_rotate(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
        size = x.shape[-1]
        inverse = 1.0 / (rope.theta ** (torch.arange(0, size, 2).float() / size))
        angles = (positions.float()[:, None] * inverse).repeat(1, 2)
        turned = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1)
        return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)

    def float32_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
        future = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
        return scores.masked_fill(future, -torch.inf).softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v

    ids, expected = build(tmp_path, "llama")
    model = load_teacher(tmp_path)
    get = lambda name: tensor(model.plan[name], dtype=torch.float64)  # noqa: E731
    before = (llama.forward(ids, get, model.config)[0] - expected).abs().max()
    monkeypatch.setattr(llama, "rmsnorm", float32_norm)
    monkeypatch.setattr(llama, "rotate", float32_rotate)
    monkeypatch.setattr(llama, "attend", float32_attend)
    after = (llama.forward(ids, get, model.config)[0] - expected).abs().max()
    assert before > 1e-8
    assert after < 1e-12
