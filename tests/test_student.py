"""A student's config from tensors, config.json, sidecar, teacher, layer map and options: named, never guessed."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hxaconv.errors import HxaconvError, Inconsistent
from hxaconv.formats.json_files import as_bytes
from hxaconv.load import load_teacher
from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.load.student import SettingsSource, student_model
from hxaconv.load.tensors import complete
from hxaconv.model.plan import Recipe
from hxaconv.options import Settings
from hxaconv.save.documents import student_json

VARIANT = Settings(variant="hxa079")
GIVEN = Settings(variant="hxa079", rope_theta=8e6, rms_norm_eps=1e-5, tie_word_embeddings=False)


def test_a_pth_says_its_dimensions_and_asks_for_the_rest(golden: Path) -> None:
    checkpoint = open_checkpoint(golden / "reka_tiny" / "student.pth")
    with pytest.raises(HxaconvError) as caught:
        student_model(checkpoint)
    for flag in ("--rope-theta", "--rms-norm-eps", "--tie-word-embeddings", "--variant"):
        assert flag in str(caught.value)
    config = student_model(checkpoint, GIVEN).student
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 12)
    assert config.gqa_layers == (2, 4)
    assert config.intermediate_size == 80


def test_a_teacher_or_a_layer_map_says_it(golden: Path) -> None:
    checkpoint = open_checkpoint(golden / "qwen3_tiny" / "student.pth")
    teacher = load_teacher(golden / "qwen3_tiny" / "teacher").teacher
    model = student_model(checkpoint, VARIANT, teacher=teacher)
    assert model.config.rope_theta == 1e6
    assert model.config.tie_word_embeddings
    assert "lm_head.weight" not in model.plan
    values = {"rope_theta": 5e5, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rwkv_architecture": "hxa079"}
    named = SettingsSource("layer map x", values)
    assert student_model(checkpoint, other=named).config.rope_theta == 5e5


def test_sources_that_contradict_are_an_error_unless_an_option_decides(golden: Path) -> None:
    checkpoint = open_checkpoint(golden / "reka_tiny" / "student.pth")
    teacher = load_teacher(golden / "reka_tiny" / "teacher").teacher
    wrong = SettingsSource("layer map x", {"rope_theta": 1e6})
    with pytest.raises(HxaconvError, match=r"8000000\.0 by the teacher, 1000000\.0 by layer map x"):
        student_model(checkpoint, VARIANT, teacher=teacher, other=wrong)
    decided = student_model(checkpoint, replace(VARIANT, rope_theta=1e6), teacher=teacher, other=wrong)
    assert decided.config.rope_theta == 1e6


def test_a_head_that_is_not_the_embedding_cannot_be_tied(golden: Path) -> None:
    checkpoint = open_checkpoint(golden / "reka_tiny" / "student.pth")
    with pytest.raises(HxaconvError, match="differs"):
        student_model(checkpoint, replace(GIVEN, tie_word_embeddings=True))


def test_attention_alone_needs_a_teacher(golden: Path) -> None:
    checkpoint = open_checkpoint(golden / "reka_tiny" / "trained_attention.pth")
    with pytest.raises(HxaconvError, match="attention only"):
        student_model(checkpoint, GIVEN)


def test_config_json_is_read_back(golden: Path, tmp_path: Path) -> None:
    config = student_model(open_checkpoint(golden / "reka_tiny" / "student.pth"), GIVEN).student
    shutil.copy(golden / "reka_tiny" / "student_hf" / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_bytes(as_bytes(student_json(config, {}, "BF16")))
    assert student_model(open_checkpoint(tmp_path)).config == config


def test_a_config_that_lies_about_its_layers_is_caught(golden: Path, tmp_path: Path) -> None:
    config = student_model(open_checkpoint(golden / "reka_tiny" / "student.pth"), GIVEN).student
    shutil.copy(golden / "reka_tiny" / "student_hf" / "model.safetensors", tmp_path)
    raw = student_json(config, {}, "BF16") | {"transformer_layers": [1, 4], "rwkv_layers": [0, 2, 3]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(HxaconvError, match="gqa_layers"):
        student_model(open_checkpoint(tmp_path))


def reshaped(recipe: Recipe, shape: tuple[int, ...]) -> Recipe:
    assert math.prod(shape)
    return Recipe(recipe.dtype, shape, recipe.make, recipe.origin)


def test_layers_of_no_known_variant_are_named_with_the_nearest(golden: Path) -> None:
    checkpoint = open_checkpoint(golden / "reka_tiny" / "student.pth")
    without = replace(checkpoint, plan={n: recipe for n, recipe in checkpoint.plan.items() if not n.endswith(".k0")})
    with pytest.raises(Inconsistent, match="nearest is hxa079, with k0 missing"):
        student_model(without)
    name = "model.layers.0.self_attn.v2"
    wide = replace(checkpoint, plan=checkpoint.plan | {name: reshaped(checkpoint.plan[name], (32, 48))})
    student = student_model(wide, GIVEN)
    with pytest.raises(Inconsistent, match=r"v2 has shape \(32, 48\), the config implies"):
        complete(student)


def test_an_option_does_not_make_one_variant_of_another(golden: Path, tmp_path: Path) -> None:
    config = student_model(open_checkpoint(golden / "reka_tiny" / "student.pth"), GIVEN).student
    shutil.copy(golden / "reka_tiny" / "student_hf" / "model.safetensors", tmp_path)
    raw = student_json(config, {}, "BF16")
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rwkv_architecture": "hxa07d"}))
    assert student_model(open_checkpoint(tmp_path)).student.rwkv_architecture == "hxa07d"
    with pytest.raises(Inconsistent, match=r"'hxa079' by --variant, 'hxa07d' by config\.json"):
        student_model(open_checkpoint(tmp_path), VARIANT)


def test_names_of_the_published_trainer_tell_hxa079_until_somebody_says_otherwise(golden: Path) -> None:
    checkpoint = open_checkpoint(golden / "reka_tiny" / "trained_attention.pth")
    teacher = load_teacher(golden / "reka_tiny" / "teacher").teacher
    taken = student_model(checkpoint, teacher=teacher)
    assert taken.student.rwkv_architecture == "hxa079"
    assert "which trains no hxa07d" in taken.notes[0]
    told = student_model(checkpoint, Settings(variant="hxa07d"), teacher=teacher)
    assert told.student.rwkv_architecture == "hxa07d"
    assert told.notes == ()
