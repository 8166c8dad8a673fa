"""The name table, read in every direction."""

from __future__ import annotations

import pytest

from hxaconv.errors import HxaconvError
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import StudentConfig
from hxaconv.model.names import (
    TABLE,
    canonical_names,
    detect_key_format,
    layer_kinds,
    stored_name,
    template_of,
    unknown_names,
)
from hxaconv.model.variants.base import Ranks

CONFIG = StudentConfig(
    num_hidden_layers=4,
    hidden_size=40,
    intermediate_size=72,
    vocab_size=97,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    qk_norm=True,
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    gqa_layers=(1, 3),
    ranks=Ranks(decay=256, iclr=32, value=32, key=32, gate=256),
)


@pytest.mark.parametrize("key_format", ["hf", "rwkv", "training"])
def test_every_tensor_goes_there_and_back(key_format: str) -> None:
    canonical = list(expected_tensors(CONFIG))
    stored = [stored_name(name, key_format) for name in canonical]
    assert len(set(stored)) == len(stored)
    assert detect_key_format(stored) == key_format
    assert list(canonical_names(stored, key_format, "x")[0].values()) == canonical


def test_ln_r_depends_on_the_layer_kind() -> None:
    names = [stored_name(name, "rwkv") for name in expected_tensors(CONFIG)]
    back, _ = canonical_names(names, "rwkv", "x")
    assert back["blocks.0.att.ln_r.weight"] == "model.layers.0.self_attn.r_norm.weight"
    assert back["blocks.1.att.ln_r.weight"] == "model.layers.1.self_attn.q_norm.weight"
    assert layer_kinds(names) == {0: "rwkv", 1: "gqa", 2: "rwkv", 3: "gqa"}


def test_older_training_names_are_read() -> None:
    new = "model.model.layers.0.self_attn.student_attn.w0"
    old = new.replace("student_attn", "time_mixer")
    assert canonical_names([old], "training", "x")[0] == {old: "model.layers.0.self_attn.w0"}


def test_unknown_names_are_reported_together_with_the_nearest() -> None:
    # The chain of replacements that users had turned the first of these into a name of its own.
    names = ["model.layers.0.pre_feedforward_layernorm.weight", "model.layers.3.mlp.gate_projj.weight"]
    found, unknown = canonical_names(names, "hf", "folder")
    message = unknown_names(unknown, "hf", "folder").message
    assert found == {}
    assert "2 tensor names are not known" in message
    assert all(name in message for name in names)
    assert "nearest: model.layers.3.mlp.gate_proj.weight" in message


@pytest.mark.parametrize("key_format", ["hf", "rwkv", "training"])
@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_forward_module.", "base_model.model.", "_orig_mod.module."],
)
def test_wrappers_are_left_off(key_format: str, prefix: str) -> None:
    canonical = list(expected_tensors(CONFIG))
    stored = [prefix + stored_name(name, key_format) for name in canonical]
    assert detect_key_format(stored) == key_format
    assert list(canonical_names(stored, key_format, "x")[0].values()) == canonical


def test_wrappers_within_names_are_left_off_and_clashes_found() -> None:
    wrapped = "model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp._orig_mod.up_proj.weight"
    plain = "model.layers.0.mlp.up_proj.weight"
    assert canonical_names([wrapped], "hf", "x")[0] == {wrapped: plain}
    with pytest.raises(HxaconvError, match="twice"):
        canonical_names([wrapped, plain], "hf", "x")
    inside = ["model.layers.0.module.mlp.up_proj.weight"]
    assert canonical_names(inside, "hf", "x") == ({}, inside)


def test_rotary_buffers_are_known_and_dropped() -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert canonical_names([name], "hf", "x")[0] == {name: None}


def test_two_names_for_one_tensor_are_refused() -> None:
    names = ["model.model.layers.0.self_attn.student_attn.w0", "model.model.layers.0.self_attn.time_mixer.w0"]
    with pytest.raises(HxaconvError, match="twice"):
        canonical_names(names, "training", "x")


def test_layer_numbers_with_leading_zeros_are_not_layers() -> None:
    assert template_of("model.layers.07.mlp.up_proj.weight")[1] is None


def test_the_table_has_no_row_twice() -> None:
    assert len({row.hf for row in TABLE}) == len(TABLE)
