"""Each hint is followed on the input that causes it, and works; the list of what pickles may hold is torch's own."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hxaconv.errors import HxaconvError
from hxaconv.formats.pickles import Machine
from hxaconv.load.kinds import PEFT
from tests.field import builder
from tests.field.cases import CASES, Case

Cli = Callable[..., int]
EMBEDDING = "model.embed_tokens.weight"


def built(name: str, path: Path) -> tuple[Case, Path]:
    """A case and its input."""
    case = next(case for case in CASES if case.name == name)
    case.build(path / "in")
    return case, path / "in" / case.inside


@pytest.mark.parametrize("name", ["namespace", "numpy_scalar"])
def test_the_command_for_a_pickle_with_other_objects_works(
    name: str, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, source = built(name, tmp_path)
    teacher = builder.teacher(tmp_path / "teacher")
    assert cli("to-hf", source, "out", "--teacher", teacher, "--quiet") == 2
    said = capsys.readouterr().err
    command = shlex.split(re.search(r"python -c .*\n?$", said.replace("\n", " "))[0])  # type: ignore[index]
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert cli("to-hf", command[-1], "out", "--teacher", teacher, "--no-verify", "--quiet") == 0
    held = torch.load(source, weights_only=False)["model"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.model.layers.0.self_attn.student_attn.w2"
    assert torch.equal(found["model.layers.0.self_attn.w2"], held[name])


def without(name: str, file: Path) -> None:
    """One tensor taken out of a file."""
    save_file({key: value for key, value in load_file(file).items() if key != name}, file, {"format": "pt"})


def out_of(folder: Path) -> None:
    """Its files beside it, in its place."""
    folder.rename(folder.parent / "moved")
    for file in list((folder.parent / "moved").iterdir()):
        file.rename(folder.parent / file.name)


@pytest.mark.parametrize(
    ("name", "words", "cure"),
    [
        ("untied_no_head", ("--tie-word-embeddings",), None),
        ("both_different", ("--no-tie-word-embeddings",), None),
        ("index_of_another_sharding", (), lambda path: (path / "model.safetensors.index.json").unlink()),
        ("stale_index", (), lambda path: (path / "model.safetensors.index.json").unlink()),
        ("tokenizer_empty", (), lambda path: (path / "tokenizer.json").unlink()),
        ("student_and_teacher", ("--weights", "student"), None),
        ("model_and_state_dict", ("--weights", "state_dict"), None),
        ("tie_unsaid", ("--tie-word-embeddings",), None),
        ("two_values_of_one_tensor", (), lambda path: without(EMBEDDING, path / "model-00002-of-00002.safetensors")),
        ("byte_order_mark", (), lambda path: (path / "config.json").write_text(json.dumps(builder.config()))),
        ("folder_named_bin", (), lambda path: out_of(path / "pytorch_model.bin")),
        ("short_file_beside_shards", (), lambda path: (path / "model.safetensors").unlink()),
    ],
)
def test_the_hint_cures(
    name: str, words: tuple[str, ...], cure: Callable[[Path], object] | None, cli: Cli, tmp_path: Path
) -> None:
    case, source = built(name, tmp_path)
    places = {"in": source, "out": tmp_path / "out", "teacher": builder.teacher(tmp_path / "teacher")}
    command = [word.format(**places) for word in (*case.command, "--no-verify", "--quiet")]
    assert cli(*command) == 2
    if cure is not None:
        cure(source)
    assert cli(*command, *words) == 0


def test_weights_of_another_name_are_taken_where_the_models_own_are_moved_away(cli: Cli, tmp_path: Path) -> None:
    _, source = built("torchtune_beside_the_base", tmp_path)
    command = ("init-from-teacher", source, tmp_path / "out", "--gqa-layers", 1, "--no-verify", "-q", "--overwrite")
    name, norms = "model.norm.weight", []
    for file in (source / "model.safetensors", None):
        assert cli(*command) == 0
        norms.append(load_file(tmp_path / "out" / "model.safetensors")[name])
        if file is not None:
            file.rename(tmp_path / "moved")
    assert torch.equal(norms[1], norms[0] * 2)
    assert not torch.equal(norms[1], norms[0])


def test_bits_that_were_saved_as_integers_are_converted_once_they_are_viewed(cli: Cli, tmp_path: Path) -> None:
    _, source = built("bits_as_uint16", tmp_path)
    held = load_file(source / "model.safetensors")
    save_file({name: x.view(torch.bfloat16) for name, x in held.items()}, source / "model.safetensors")
    assert cli("init-from-teacher", source, tmp_path / "out", "--gqa-layers", 1, "--no-verify", "--quiet") == 0


def test_blocks_of_fp8_are_dequantized_as_the_hint_says(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    monkeypatch.chdir(tmp_path)
    held, made = builder.tensors(), {}
    for name, value in held.items():
        blocks = [-(-size // 16) for size in value.shape]
        scale = value.float().abs().max() / 448
        if "proj" in name:
            made |= {name: (value.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.repeat(*blocks)}
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    builder.folder(tmp_path / "in", builder.config(quantization_config=quantization), held | made)
    words = ("--gqa-layers", 1, "--no-verify", "--quiet")
    assert cli("init-from-teacher", "in", "out", *words) == 2
    said = " ".join(capsys.readouterr().err.split())
    code = re.search(r"AutoModelForCausalLM.*?save_original_format=False\)", said)[0]  # type: ignore[index]
    names = {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "FineGrainedFP8Config")}
    exec(code, names | {"THIS": "in", "OUT": "whole"})
    assert cli("init-from-teacher", "whole", "out", *words) == 0
    name = "model.layers.1.mlp.down_proj.weight"
    difference = load_file("out/model.safetensors")[name].float() - held[name].float()
    assert 0 < difference.abs().max() < held[name].float().abs().max() / 16


def test_a_config_that_still_names_a_quantization_can_be_corrected(cli: Cli, tmp_path: Path) -> None:
    source = builder.teacher(tmp_path / "in", quantization_config={"quant_method": "fp8"})
    command = ("init-from-teacher", source, tmp_path / "out", "--gqa-layers", 1, "--no-verify", "--quiet")
    assert cli(*command) == 2
    raw = json.loads((source / "config.json").read_text())
    del raw["quantization_config"]
    (source / "config.json").write_text(json.dumps(raw))
    assert cli(*command) == 0


ADAPTERS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("LORA", "LOHA", "LOKR", "VERA", "BOFT", "HRA", "FOURIERFT", "RANDLORA")},
    **{kind: {} for kind in ("DELORA", "GRALORA")},
    "ADALORA": {"total_step": 10},
    "IA3": {"feedforward_modules": []},
    "OFT": {"r": 0, "oft_block_size": 8},
    "ROAD": {"group_size": 8},
    **{kind: {"r": 4} for kind in ("MISS", "SHIRA")},
    "C3A": {"block_size": 8},
    "WAVEFT": {"n_frequency": 16},
    "VBLORA": {"num_vectors": 8, "vector_length": 8, "topk": 2},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
}
"""Kinds of PEFT, and what each needs for matrices this small."""


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_merged_as_the_hint_says(
    kind: str, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    source = builder.teacher(tmp_path / "model")
    made = {"target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"} | ADAPTERS[kind]
    configs = {entry.value: value for entry, value in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in configs:
        pytest.skip(f"this PEFT has no {kind}")
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(source), configs[kind](**made))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained("adapter")
    words = ("out", "--gqa-layers", 1, "--no-verify", "--quiet")
    assert cli("init-from-teacher", "adapter", *words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"of the kind {PEFT[kind][0]}" in said
    if kind == "LORA":
        assert "--adapter" in said
        assert cli("init-from-teacher", source, *words, "--adapter", "adapter") == 0
    else:
        code = re.search(r"peft\.AutoPeft\S+", said)[0].rstrip(".")  # type: ignore[index]
        exec(f"import peft\n{code}", {"THIS": "adapter", "OUT": "merged"})
        assert cli("init-from-teacher", "merged", *words) == 0
    name = "model.layers.1." + ("input_layernorm.weight" if kind == "LN_TUNING" else "self_attn.q_proj.weight")
    assert not torch.equal(load_file("out/model.safetensors")[name], builder.tensors()[name])


@pytest.mark.parametrize("said", [..., False])
def test_the_teacher_of_a_training_file_is_tied_as_the_hint_says(
    said: Any, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = builder.config(tie_word_embeddings=said)
    teacher = builder.folder(tmp_path / "teacher", raw, builder.tensors(head=False))
    torch.save(builder.mixers("RGR"), tmp_path / "x.pth")
    words = ("to-hf", tmp_path / "x.pth", tmp_path / "out", "--teacher", teacher, "--no-verify", "--quiet")
    assert cli(*words) == 2
    assert "--tie-word-embeddings" in capsys.readouterr().err
    assert cli(*words, "--tie-word-embeddings") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_an_adapter_beside_the_model_is_named_until_it_is_merged(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = builder.teacher(tmp_path / "in")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (source / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    pair = {f"{name}A.weight": builder.noise(4, 32), f"{name}B.weight": builder.noise(32, 4)}
    save_file(pair, source / "adapter_model.safetensors")
    words = ("init-from-teacher", source, tmp_path / "out", "--gqa-layers", 1, "--no-verify", "--quiet", "--overwrite")
    queries = []
    for more in ((), ("--adapter", source)):
        assert cli(*words, *more) == 0
        assert ("left out" in capsys.readouterr().err) == (more == ())
        queries.append(load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(queries[0], builder.tensors()["model.layers.1.self_attn.q_proj.weight"])
    assert not torch.equal(queries[1], queries[0])


def test_a_continued_run_is_completed_by_its_student(cli: Cli, tmp_path: Path) -> None:
    teacher = builder.teacher(tmp_path / "teacher")
    torch.save(builder.mixers("RGR"), tmp_path / "first.pth")
    assert cli("to-hf", tmp_path / "first.pth", tmp_path / "first", "--teacher", teacher, "--no-verify", "-q") == 0
    later = builder.mixers("--R", seed=40)
    torch.save(later, tmp_path / "later.pth")
    command = ("to-hf", tmp_path / "later.pth", tmp_path / "out", "--no-verify", "--quiet")
    assert cli(*command, "--teacher", tmp_path / "first") == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".2.self_attn." in name for name in changed)
    key = "model.layers.2.self_attn.w2"
    assert torch.equal(after[key], later["model.model.layers.2.self_attn.student_attn.w2"])


def test_layers_that_a_training_file_lacks_are_the_teachers_attention(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = builder.teacher(tmp_path / "teacher")
    torch.save(builder.mixers("R-R"), tmp_path / "x.pth")
    words = ("to-hf", tmp_path / "x.pth", tmp_path / "out", "--teacher", teacher)
    assert cli(*words, "--gqa-layers", 1) == 0
    printed = capsys.readouterr()
    assert "layer 1: not in" in " ".join((printed.out + printed.err).split())
    found, held = load_file(tmp_path / "out" / "model.safetensors"), builder.tensors()
    kept = [name for name in held if ".self_attn." not in name or ".1." in name]
    assert len(kept) == 22
    assert all(torch.equal(found[name], held[name]) for name in kept)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["transformer_layers"] == [1]


def test_tokenizers_of_every_name_travel_along(cli: Cli, tmp_path: Path) -> None:
    case, source = built("tekken", tmp_path)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    command = [word.format(**{"in": source, "out": tmp_path / "out"}) for word in (*case.command, "--no-verify")]
    assert cli(*command, "--quiet") == 0
    names = ("tekken.json", "spiece.model", "vocab.txt", "qwen.tiktoken", "tokenizer.model.v3", "SYSTEM_PROMPT.txt")
    for name in (*names, "additional_chat_templates/tools.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_code_that_the_tokenizer_needs_is_named_before_anything_is_written(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}})
    source = builder.folder(
        tmp_path / "in", builder.config(), builder.tensors(), tokenizer_config__json=settings, vocab__txt="x"
    )
    command = ("init-from-teacher", source, tmp_path / "out", "--gqa-layers", 1, "--no-verify")
    assert cli(*command, "--dry-run") == 0
    assert "tokenization_own.py, which is not there" in " ".join(capsys.readouterr().err.split())
    (source / "tokenization_own.py").write_text("class Own: pass")
    assert cli(*command, "--dry-run") == 0
    assert "--copy-code takes it along" in " ".join(capsys.readouterr().err.split())
    assert cli(*command, "--overwrite") == 0
    capsys.readouterr()
    cli("verify", tmp_path / "out", "--tokens", 4)
    assert "names tokenization_own.py, which is not there" in " ".join(capsys.readouterr().out.split())
    assert cli(*command, "--copy-code", "--overwrite") == 0
    assert "tokenization_own" not in capsys.readouterr().err
    assert (tmp_path / "out" / "tokenization_own.py").exists()


def test_everything_that_torch_lets_through_is_passed_over() -> None:
    unpickler = pytest.importorskip("torch._weights_only_unpickler")
    machine = Machine("x")
    refused = []
    for name in unpickler._get_allowed_globals():
        module, _, last = name.rpartition(".")
        try:
            machine.find_global(module, last)
        except HxaconvError:
            refused.append(name)
    assert refused == []
    with pytest.raises(HxaconvError):
        machine.find_global("os", "system")
