"""The loader lint: every obstacle is named, and a clean checkpoint has none."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from models import GOLDEN, Literal, student, teacher
from rich.console import Console

from hxaconv.cli.tables import render_loaders
from hxaconv.formats.dtypes import num_bytes
from hxaconv.formats.files import SourceFile
from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Checkpoint
from hxaconv.model.plan import Plan, Recipe
from hxaconv.model.rwkv_infer import FOLDER, PTH, TABLE, loadmodel_body, working
from hxaconv.save.documents import student_json
from hxaconv.verification.lint import INFER_FOLDER, INFER_PTH, LLAMA_CPP, RWKV_INFER_KEYS, TRANSFORMERS, Verdict, lint


def config() -> StudentConfig:
    """A size that RWKV-Infer takes: hidden_size a multiple of 256."""
    return dataclasses.replace(student("reka_tiny").student, hidden_size=256)


def plan() -> Plan:
    """Headers of a model of that size; the lint reads no weights."""
    old = student("reka_tiny").plan
    shapes = {name: tuple(256 if size == 48 else size for size in recipe.shape) for name, recipe in old.items()}
    return {name: Recipe("BF16", shape, Literal(bytes(num_bytes("BF16", shape))), "") for name, shape in shapes.items()}


def file(name: str) -> SourceFile:
    return SourceFile(name, name, 1)


def folder(raw: Mapping[str, Any] | None = None, **changes: Any) -> Checkpoint:
    """A converted folder, complete but for what `raw` and `changes` say."""
    document = student_json(config(), {}, "BF16") if raw is None else raw
    fields: dict[str, Any] = {
        "label": "out",
        "container": "safetensors",
        "key_format": "hf",
        "plan": plan(),
        "stored_names": {},
        "config": document,
        "files": (file("model.safetensors"),),
        "code_files": {name: file(name) for name in ("configuration_hxa079.py", "modeling_hxa079.py")},
        "root": Path("out"),
        "extra": {"stray_files": ()},
    }
    return Checkpoint(**(fields | changes))


def pth(**changes: Any) -> Checkpoint:
    fields = {
        "label": "student.pth",
        "container": "pth",
        "key_format": "rwkv",
        "config": None,
        "files": (file("student.pth"),),
        "code_files": {},
        "root": Path("student.pth"),
        "extra": {"nested_under": None},
    }
    return folder(**(fields | changes))


def verdict(checkpoint: Checkpoint, loader: str, **more: Any) -> Verdict:
    return next(found for found in lint(checkpoint, **more) if found.loader == loader)


def text(found: Verdict) -> str:
    return "\n".join(f"{f.what} | {f.where} | {f.do}" for f in found.findings)


def without(*names: str) -> Plan:
    return {name: recipe for name, recipe in plan().items() if not name.endswith(names)}


def test_a_converted_folder_is_taken_by_both_its_loaders() -> None:
    for loader in (TRANSFORMERS, INFER_FOLDER):
        found = verdict(folder(), loader, config=config())
        assert found.takes and not found.findings, text(found)
    assert verdict(folder(), TRANSFORMERS).settings == ("trust_remote_code=True",)
    assert not verdict(folder(), INFER_PTH).takes


def test_a_converted_pth_is_taken_with_two_settings_and_a_warning() -> None:
    found = verdict(pth(), INFER_PTH, config=config())
    assert found.takes
    assert found.settings == ("rope_theta=8000000", "rms_norm_eps=1e-05")
    assert "tie_word_embeddings" in text(found) and "2025-09-16" in text(found)
    assert "not in the file" in verdict(pth(), INFER_PTH).settings[0]
    assert not verdict(pth(), TRANSFORMERS).takes and not verdict(pth(), INFER_FOLDER).takes


@pytest.mark.parametrize("key", RWKV_INFER_KEYS)
def test_each_mandatory_key_is_missed(key: str) -> None:
    raw = student_json(config(), {}, "BF16")
    del raw[key]
    for loader in (TRANSFORMERS, INFER_FOLDER):
        found = verdict(folder(raw), loader)
        assert not found.takes and key in text(found)
    if key == "rope_theta":
        assert "only inside rope_parameters" in text(verdict(folder(raw), INFER_FOLDER))


OBSTACLES: dict[str, tuple[Checkpoint, str, str]] = {
    "no code": (folder(code_files={}), TRANSFORMERS, "modeling_hxa079.py, which auto_map names, is not there"),
    "no auto_map": (
        folder({k: v for k, v in student_json(config(), {}, "BF16").items() if k != "auto_map"}),
        TRANSFORMERS,
        "auto_map has no AutoConfig",
    ),
    "no config": (folder(config=None), TRANSFORMERS, "no config.json"),
    "another name": (folder(files=(file("weights.safetensors"),)), TRANSFORMERS, "it looks for model.safetensors"),
    "shards without an index": (
        folder(files=(file("model-00001-of-00002.safetensors"), file("model-00002-of-00002.safetensors"))),
        TRANSFORMERS,
        "it looks for model.safetensors or model.safetensors.index.json",
    ),
    **{
        f"no {key}": (
            folder(
                {k: v for k, v in student_json(config(), {}, "BF16").items() if k != key},
                plan=plan() | {f"model.layers.0.{name}": Recipe("BF16", (256,), Literal(bytes(512)), "")},
            ),
            TRANSFORMERS,
            f"{key} is not true: the modelling code leaves out model.layers.0.{name}",
        )
        for key, name in {
            "enable_qk_norm": "self_attn.r_norm.weight",
            "attention_bias": "self_attn.receptance.bias",
            "attention_out_bias": "self_attn.output.bias",
            "mlp_bias": "mlp.up_proj.bias",
        }.items()
    },
    "stray file": (
        folder(extra={"stray_files": ("consolidated.safetensors",)}),
        INFER_FOLDER,
        "consolidated.safetensors is not part of the model",
    ),
    "a .pth in the path": (folder(root=Path("a.pth.d")), INFER_FOLDER, "the path contains '.pth'"),
    "pytorch files": (folder(container="pth"), INFER_FOLDER, "only *.safetensors"),
    "other variant": (
        folder(student_json(config(), {}, "BF16") | {"rwkv_architecture": "hxa07c"}),
        INFER_FOLDER,
        "'hxa07c'",
    ),
    "rope scaling": (
        folder(student_json(config(), {}, "BF16") | {"rope_scaling": {"rope_type": "yarn", "factor": 4}}),
        INFER_FOLDER,
        "rope_scaling 'yarn' is ignored",
    ),
    "no head in a folder": (folder(plan=without("lm_head.weight")), INFER_FOLDER, "lm_head.weight is missing"),
    "no head": (pth(plan=without("lm_head.weight")), INFER_PTH, "head.weight is missing, and a .pth never ties"),
    "legacy": (pth(container="legacy"), INFER_PTH, "legacy pickle"),
    "nested": (pth(extra={"nested_under": "state_dict"}), INFER_PTH, "nested under 'state_dict'"),
    "not only tensors": (pth(extra={"ignored": ["step"]}), INFER_PTH, "not everything in it is a tensor: step"),
    "other names": (pth(key_format="training"), INFER_PTH, "training key format"),
    "other suffix": (pth(files=(file("student.bin"),)), INFER_PTH, "contains '.pth'"),
    "attention only": (pth(plan=without("embed_tokens.weight")), INFER_PTH, "the embedding is missing"),
    "no low-rank": (pth(plan=without("1.self_attn.v1")), INFER_PTH, "v1 missing | model.layers.1.self_attn"),
    "flat r_k": (
        pth(plan=plan() | {"model.layers.0.self_attn.r_k": Recipe("BF16", (48,), Literal(bytes(96)), "")}),
        INFER_PTH,
        "r_k has shape (48,)",
    ),
    "float32": (
        pth(plan={name: dataclasses.replace(recipe, dtype="F32") for name, recipe in plan().items()}),
        INFER_PTH,
        "matrices are F32",
    ),
    "output bias": (
        pth(plan=plan() | {"model.layers.0.self_attn.output.bias": Recipe("BF16", (256,), Literal(bytes(512)), "")}),
        INFER_PTH,
        "drops silently",
    ),
    "odd size": (pth(plan=dict(student("reka_tiny").plan)), INFER_PTH, "hidden_size 48 is no multiple of 256"),
    "layer 0 GQA": (
        pth(
            plan=without("0.self_attn.receptance.weight")
            | {"model.layers.0.self_attn.q_proj.weight": Recipe("BF16", (48, 256), Literal(bytes(48 * 512)), "")}
        ),
        INFER_PTH,
        "layer 0 is GQA",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_each_obstacle_is_named_and_says_what_to_do(name: str) -> None:
    checkpoint, loader, words = OBSTACLES[name]
    found = verdict(checkpoint, loader)
    assert not found.takes
    assert words in text(found)
    assert all(finding.what and finding.where and finding.do for finding in found.findings)


def test_an_untied_folder_without_head_does_not_load() -> None:
    lacking = folder(plan=without("lm_head.weight"))
    assert "lm_head.weight is missing" in text(verdict(lacking, TRANSFORMERS, config=config()))
    tied = student_json(dataclasses.replace(config(), tie_word_embeddings=True), {}, "BF16")
    assert verdict(folder(tied, plan=without("lm_head.weight")), INFER_FOLDER).takes


def test_a_teacher_is_for_transformers_alone() -> None:
    (found,) = lint(open_checkpoint(GOLDEN / "reka_tiny" / "teacher"), teacher("reka_tiny").config)
    assert found.takes and not found.settings


def test_real_files_are_judged_from_their_headers(tmp_path: Path) -> None:
    found = verdict(open_checkpoint(GOLDEN / "reka_tiny" / "student.pth"), INFER_PTH)
    blocking = [finding.what for finding in found.findings if finding.blocks]
    assert len(blocking) == 1 and "hidden_size 48" in blocking[0]
    shutil.copy(GOLDEN / "reka_tiny" / "student_hf" / "model.safetensors", tmp_path)
    raw = student_json(student("reka_tiny").student, {}, "BF16")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    judged = verdict(open_checkpoint(tmp_path), TRANSFORMERS)
    assert [finding.what for finding in judged.findings] == [
        "configuration_hxa079.py, which auto_map names, is not there",
        "modeling_hxa079.py, which auto_map names, is not there",
    ]


def test_verdicts_are_plain_data_and_fit_a_hundred_columns() -> None:
    data = [found.to_json() for found in lint(open_checkpoint(GOLDEN / "reka_tiny" / "trained_attention.pth"))]
    assert json.loads(json.dumps(data))[0]["loader"] == TRANSFORMERS
    console = Console(width=100, file=io.StringIO(), record=True)
    for part in render_loaders(data):
        console.print(part)
    shown = console.export_text()
    assert "does not take it" in shown and all(len(line) <= 100 for line in shown.splitlines())


def test_a_student_without_rwkv_layers_is_a_student() -> None:
    raw = student_json(dataclasses.replace(config(), gqa_layers=(0, 1, 2, 3)), {}, "BF16")
    held = {name: recipe for name, recipe in plan().items() if ".self_attn." not in name}
    loaders = [TRANSFORMERS, INFER_FOLDER, INFER_PTH, LLAMA_CPP]
    assert [found.loader for found in lint(folder(raw, plan=held))] == loaders
    assert "model_type" not in text(verdict(folder(raw, plan=held), TRANSFORMERS))


def test_an_index_tells_transformers_the_files() -> None:
    shards = (file("model-00001-of-00002.safetensors"), file("model-00002-of-00002.safetensors"))
    assert verdict(folder(files=shards, extra={"index": "model.safetensors.index.json"}), TRANSFORMERS).takes


def test_nothing_is_relabelled() -> None:
    raw = student_json(config(), {}, "BF16")
    for name in ("hxa07b", "hxa07c", "hxa07d", "hxa07e", "hxa07i"):
        for found in lint(folder(raw | {"rwkv_architecture": name})):
            assert "Set it to" not in text(found)
            assert not found.takes or found.loader == TRANSFORMERS
            assert found.loader != INFER_FOLDER or f"{name!r}" in text(found)
    assert "2230605" in verdict(folder(raw | {"rwkv_architecture": "hxa07d"}), LLAMA_CPP).releases[0]
    assert "hxa07d's formula" in text(verdict(folder(raw), LLAMA_CPP))


def test_releases_are_named_with_the_strategies_that_work() -> None:
    assert verdict(pth(), INFER_PTH).releases[-1] == "7684d07 to 4e29bea (2025-08-25 to 2025-09-06): int8"
    assert verdict(folder(), INFER_FOLDER).releases[-1] == "5baa490 (2025-10-22): bf16"
    newest = [releases for releases in TABLE if releases.days >= "2025-08-12"]
    assert not any("bf16" in releases.takes.get(PTH, ()) for releases in newest)
    assert not any(PTH in releases.takes for releases in newest if releases.days >= "2025-09-16")


def test_what_a_release_fails_on_is_named() -> None:
    wide = {name: r for name, r in plan().items() if not name.endswith("receptance.weight")}
    wide |= {f"model.layers.{i}.self_attn.receptance.weight": RECIPE for i in (0, 1, 3)}
    found = verdict(pth(plan=wide), INFER_PTH)
    assert not found.takes and not found.releases
    assert "heads x head_dim is not hidden_size" in text(found) and "Use a folder, with 5baa490." in text(found)
    found = verdict(folder(plan=wide), INFER_FOLDER)
    assert found.takes and found.releases[0].startswith("4947a78") and "dc98a2a" in text(found)

    biased = plan() | {"model.layers.0.self_attn.receptance.bias": VECTOR}
    found = verdict(pth(plan=biased), INFER_PTH)
    assert found.takes and found.releases[-1].startswith("c46bbbf to b53f9a5") and "Use b53f9a5." in text(found)
    last = {name: r for name, r in biased.items() if ".layers.3." not in name}
    assert len(verdict(pth(plan=last), INFER_PTH).releases) == len(working(PTH, ()))

    experts = plan() | {"model.layers.0.mlp.experts.0.up_proj.weight": RECIPE}
    assert not verdict(pth(plan=experts), INFER_PTH).takes
    assert "some layers have experts" in text(verdict(folder(plan=experts), INFER_FOLDER))


RECIPE = Recipe("BF16", (512, 256), Literal(bytes(512 * 512)), "")
VECTOR = Recipe("BF16", (256,), Literal(bytes(512)), "")


def test_the_request_says_what_the_server_needs() -> None:
    reka = dataclasses.replace(config(), vocab_size=100352, hidden_size=6144)
    body = loadmodel_body(reka, plan(), PTH, "x/student.pth")
    assert body == {
        "model_filename": "x/student.pth",
        "model_viewname": "x/student",
        "model_strategy": "int8",
        "rope_theta": 8e6,
        "rms_norm_eps": 1e-5,
        "template": "rekaflash3",
        "endtoken": "\n <sep>",
    }
    body = loadmodel_body(reka, plan(), FOLDER, "student")
    assert body["model_strategy"] == "bf16" and "rope_theta" not in body
    # Null stops the server; a missing key would make it tokenize with RWKV's vocabulary.
    unknown = loadmodel_body(config(), plan(), PTH, "student.pth")
    assert unknown["template"] is None and unknown["endtoken"] is None
