"""Small models with random weights, in the shapes that public bug reports describe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import student_of, teacher_config
from hxaconv.model.names import stored_name

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM"}
CLASSES |= {"qwen2": "Qwen2ForCausalLM", "phi3": "Phi3ForCausalLM", "smollm3": "SmolLM3ForCausalLM"}


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json; a value of `...` leaves the key out."""
    raw = {"model_type": family, "architectures": [CLASSES.get(family, "X")], **SIZES, "rms_norm_eps": 1e-6}
    raw |= {"rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    return {key: value for key, value in (raw | changes).items() if value is not ...}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random values."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * 0.1).to(dtype)


def tensors(family: str = "llama", *, head: bool = True) -> dict[str, Tensor]:
    """A teacher's weights under the names of transformers."""
    qk_norm = {"q_norm": (8,), "k_norm": (8,)} if family == "qwen3" else {}
    made = {"model.embed_tokens.weight": noise(64, 32)}
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}
        shapes |= {"self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32)}
        shapes |= {"mlp.down_proj": (32, 48), "input_layernorm": (32,), "post_attention_layernorm": (32,)}
        shapes |= {f"self_attn.{name}": shape for name, shape in qk_norm.items()}
        made |= {f"{prefix}.{name}.weight": noise(*shape, seed=layer) for name, shape in shapes.items()}
    made["model.norm.weight"] = noise(32)
    return made | ({"lm_head.weight": noise(64, 32, seed=9)} if head else {})


def folder(path: Path, raw: Mapping[str, Any] | None, weights: Mapping[str, Tensor], **files: str | bytes) -> Path:
    """A folder with config.json, model.safetensors, and more files (their names with `__` for a dot)."""
    path.mkdir(parents=True, exist_ok=True)
    if raw is not None:
        (path / "config.json").write_text(json.dumps(raw))
    if weights:
        save_file(dict(weights), path / "model.safetensors", {"format": "pt"})
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (path / name.replace("__", ".")).write_bytes(data)
    return path


def shards(path: Path, raw: Mapping[str, Any], parts: list[dict[str, Tensor]], index: Mapping[str, int] | None) -> Path:
    """A folder of shards; `index` maps names to the number of their shard, from 1."""
    folder(path, raw, {})
    name = "model-{:05}-of-" + f"{len(parts):05}.safetensors"
    for number, part in enumerate(parts, 1):
        save_file(part, path / name.format(number), {"format": "pt"})
    if index is not None:
        weight_map = {key: name.format(number) for key, number in index.items()}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def halves(weights: Mapping[str, Tensor]) -> tuple[list[dict[str, Tensor]], dict[str, int]]:
    """Two shards, and the index that fits them."""
    names = list(weights)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    parts = [{name: weights[name] for name in part} for part in (first, second)]
    return parts, dict.fromkeys(first, 1) | dict.fromkeys(second, 2)


def teacher(path: Path, family: str = "llama", **changes: Any) -> Path:
    """A teacher's folder that has nothing wrong with it."""
    return folder(path, config(family, **changes), tensors(family))


def mixers(kinds: str = "R-R", *, key_format: str = "training", seed: int = 1) -> dict[str, Tensor]:
    """Trained mixers of the layers that `kinds` (one letter each: R, G, or - for absent) names."""
    base = teacher_config(config(), where="x")
    student = student_of(base, tuple(i for i, kind in enumerate(kinds) if kind != "R"))
    made = {}
    for name, shape in expected_tensors(student).items():
        layer = int(name.split(".")[2]) if ".self_attn." in name else None
        if layer is not None and kinds[layer] != "-":
            made[stored_name(name, key_format)] = noise(*shape, seed=seed + layer) if shape else torch.tensor(1.0)
    return {name: value.to(torch.bfloat16) for name, value in made.items()}
