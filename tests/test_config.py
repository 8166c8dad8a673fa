"""Configs: both spellings, refusals that name the reason, and the published sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hxaconv.errors import HxaconvError
from hxaconv.formats.dtypes import num_bytes
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import student_of, teacher_config
from hxaconv.model.variants import hxa079
from hxaconv.model.variants.base import Ranks

BASE: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "intermediate_size": 80,
    "vocab_size": 97,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
REKA = Path(__file__).parents[2] / "shared" / "reka-flash-3"


def test_both_spellings_of_rope_theta() -> None:
    new = {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del new["rope_theta"]
    assert teacher_config(new, where="x").rope_theta == 5e5
    assert teacher_config(BASE, where="x").rope_theta == 1e4


@pytest.mark.parametrize(("key", "value"), [("dtype", "bfloat16"), ("torch_dtype", "torch.bfloat16")])
def test_both_spellings_of_dtype(key: str, value: str) -> None:
    assert teacher_config({**BASE, key: value}, where="x").dtype == "bfloat16"


REFUSED = [
    ({"num_local_experts": 8, "model_type": "mixtral"}, "mixture of experts"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "--drop-rope-scaling"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor is None"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "longrope"),
    ({"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
    ({"sliding_window": 64, "max_position_embeddings": 128, "model_type": "mistral"}, "sliding"),
    ({"max_position_embeddings": 8192, "model_type": "mistral"}, "the default of this family"),
    ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_scaling"),
    ({"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"layer_types": ["sliding_attention", "full_attention"], "model_type": "qwen3"}, "sliding"),
    ({"residual_multiplier": 0.22, "model_type": "granite"}, "residual_multiplier is 0.22"),
    ({"model_type": "olmo2"}, "olmo2 is no Llama: it norms what attention and MLP give"),
    ({"hidden_act": "gelu"}, "SwiGLU"),
    ({"attention_bias": True}, "--allow-output-bias"),
    ({"mlp_bias": True}, "--allow-output-bias"),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ({"model_type": "gemma2"}, "gemma2"),
    ({"text_config": {}}, "text_config"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_refusals_say_why(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(HxaconvError) as caught:
        teacher_config({**BASE, **change}, where="teacher")
    assert reason in str(caught.value)


def test_refusals_come_all_at_once() -> None:
    with pytest.raises(HxaconvError) as caught:
        teacher_config({**BASE, "hidden_act": "gelu", "partial_rotary_factor": 0.5}, where="teacher")
    assert "gelu" in str(caught.value)
    assert "partial" in str(caught.value)


def test_flags_let_through_what_they_name() -> None:
    scaled = {**BASE, "rope_scaling": {"rope_type": "llama3", "factor": 8}}
    config = teacher_config(scaled, where="x", drop_rope_scaling=True)
    assert "llama3" in config.warnings[0]
    assert teacher_config({**BASE, "attention_bias": True}, where="x", allow_output_bias=True).output_bias


@pytest.mark.parametrize(("key", "option"), [("rope_theta", "--rope-theta"), ("rms_norm_eps", "--rms-norm-eps")])
def test_nothing_is_guessed(key: str, option: str) -> None:
    raw = {k: v for k, v in BASE.items() if k != key}
    with pytest.raises(HxaconvError, match=option):
        teacher_config(raw, where="x")


def test_tying_without_a_word_is_the_familys() -> None:
    raw = {k: v for k, v in BASE.items() if k != "tie_word_embeddings"}
    assert not teacher_config(raw, where="x").tie_word_embeddings
    assert teacher_config(raw | {"model_type": "smollm3"}, where="x").tie_word_embeddings
    with pytest.raises(HxaconvError, match="no_rope_layers has 1 entries for"):
        teacher_config(raw | {"model_type": "smollm3", "no_rope_layers": [1]}, where="x")
    assert teacher_config(raw, where="x", tie_word_embeddings=True).tie_word_embeddings


def test_windows_that_see_everything_are_not_in_force() -> None:
    for change in (
        {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "phi3", "sliding_window": 4096, "max_position_embeddings": 4096},
    ):
        teacher_config({**BASE, **change}, where="x")


def test_a_student_is_no_teacher() -> None:
    with pytest.raises(HxaconvError, match="already"):
        teacher_config({**BASE, "rwkv_architecture": "hxa079"}, where="x")


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(HxaconvError) as caught:
        teacher_config({**BASE, "hidden_size": "48", "vocab_size": -1}, where="x")
    assert "hidden_size is '48'" in str(caught.value)
    assert "vocab_size is -1" in str(caught.value)
    with pytest.raises(HxaconvError, match="does not divide"):
        teacher_config({**BASE, "num_key_value_heads": 3}, where="x")


def test_published_ranks() -> None:
    assert hxa079.ranks(6144) == Ranks(decay=320, iclr=128, value=96, key=96, gate=384)
    assert hxa079.ranks(48) == Ranks(decay=256, iclr=32, value=32, key=32, gate=256)


@pytest.mark.skipif(not REKA.exists(), reason="Reka's published config is not beside the checkout")
def test_reka_flash_3_is_planned_to_the_byte() -> None:
    raw = json.loads((REKA / "config.json").read_text())
    index = json.loads((REKA / "model.safetensors.index.json").read_text())
    teacher = teacher_config(raw, where="reka-flash-3")
    expected = expected_tensors(teacher)
    assert set(expected) == set(index["weight_map"])
    assert len(expected) == 399
    assert sum(num_bytes("BF16", shape) for shape in expected.values()) == index["metadata"]["total_size"]
    assert index["metadata"]["total_size"] == 41_810_964_480
    student = student_of(teacher, (8, 15, 22, 29, 36, 43))
    assert student.strip == "RRRRRRRRG" + "RRRRRRG" * 5


def test_a_variant_without_the_trainers_records_has_none() -> None:
    base = teacher_config(BASE, where="x")
    assert student_of(base, (1,)).layer_records
    assert not student_of(base, (1,), variant="hxa07a").layer_records
