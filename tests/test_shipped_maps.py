"""Every shipped layer map against the first model it is for: its config.json as published, weights as empty files."""

from __future__ import annotations

import json
import shutil
import struct
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hxaconv.formats.dtypes import num_bytes
from hxaconv.load import load_teacher
from hxaconv.model import layer_maps
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import teacher_config

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rope_scaling": None,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}
RELEASED = {"max_position_embeddings": 262144}
"""Qwen3 of July 2025."""
MISTRAL = {"attention_dropout": 0.0, "hidden_act": "silu", "max_position_embeddings": 131072, "sliding_window": None}
REKA = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "pretraining_tp": 1}
REKA |= {"max_position_embeddings": 32768, "rope_scaling": None, "torch_dtype": "bfloat16"}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": QWEN3 | {"max_window_layers": 28},
    "Qwen/Qwen3-1.7B": QWEN3 | {"max_window_layers": 28},
    "Qwen/Qwen3-4B": QWEN3 | {"max_window_layers": 36},
    "Qwen/Qwen3-4B-Instruct-2507": QWEN3 | RELEASED | {"max_window_layers": 36},
    "Qwen/Qwen3-8B": QWEN3 | {"max_window_layers": 36},
    "Qwen/Qwen3-32B": QWEN3 | {"max_window_layers": 64},
    "Qwen/Qwen3-30B-A3B-Instruct-2507": QWEN3
    | RELEASED
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
    "ByteDance-Seed/Seed-OSS-36B-Instruct": {
        "architectures": ["SeedOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.1,
        "attention_out_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 524288,
        "mlp_bias": False,
        "residual_dropout": 0.1,
        "rope_scaling": {"rope_type": "default"},
        "torch_dtype": "bfloat16",
    },
    "mistralai/Devstral-Small-2507": MISTRAL | {"architectures": ["MistralForCausalLM"], "torch_dtype": "bfloat16"},
    "mistralai/Magistral-Small-2509": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": MISTRAL,
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1024, "model_type": "pixtral", "num_hidden_layers": 24, "patch_size": 14},
        "vision_feature_layer": -1,
    },
    "RekaAI/reka-flash-3": REKA,
}
"""What each config.json says beside the sizes, which the map states."""

Usage = namedtuple("Usage", "total used free")
VISION = {"vision_tower.patch_conv.weight": (1024, 3, 14, 14), "multi_modal_projector.norm.weight": (1024,)}


def published(folder: Path, name: str) -> str:
    """A folder with that model's config.json and weights that take no room; its Hub id."""
    found = layer_maps.load(name)
    model_id = found.model_ids[0]
    raw, sizes = dict(CONFIGS[model_id]), dict(found.model)
    sizes.setdefault("tie_word_embeddings", False)
    text = raw["text_config"] | sizes if "text_config" in raw else raw | sizes
    shapes = expected_tensors(teacher_config(text | {"torch_dtype": "bfloat16"}, where=name))
    if "text_config" in raw:
        raw["text_config"] = text
        shapes = {f"language_model.{key}": shape for key, shape in shapes.items()} | VISION
    else:
        raw = text
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    header, end = dict[str, Any](), 0
    for key, shape in shapes.items():
        begin, end = end, end + num_bytes("BF16", shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text_header = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text_header)) + text_header)
        file.truncate(8 + len(text_header) + end)
    return model_id


@pytest.mark.parametrize("name", layer_maps.shipped())
def test_its_first_model_passes_a_dry_run(
    name: str,
    cli: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10**12))
    folder = tmp_path / layer_maps.load(name).model_ids[0].rsplit("/", 1)[-1]
    published(folder, name)
    assert cli("init-from-teacher", folder, tmp_path / "out", "--layer-map", name, "--dry-run", "--no-verify") == 0
    layers = layer_maps.load(name)
    shown = capsys.readouterr()
    assert f"layer map {name}" in shown.out + shown.err
    teacher = load_teacher(folder)
    assert layer_maps.fits(layers, teacher.config)
    if layers.default:
        assert layer_maps.match(teacher.config, [folder.name]) == layers, "taken without being asked for"
