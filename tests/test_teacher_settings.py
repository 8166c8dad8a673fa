"""A teacher that `init-from-teacher` took with an option is taken by every later command, and limits are limits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import weights
from safetensors.torch import load_file, save_file

import hxaconv

Cli = Callable[..., int]
DROPPED = "Warning: the teacher's rope_scaling 'dynamic' is dropped"
QUIET = ("--no-verify", "--quiet")


def teacher_with(source: Path, folder: Path, **changes: Any) -> Path:
    """The teacher in a folder of its own, with these settings; None takes one away."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Other tensors in a folder's only weight file."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("own_config", [False, True])
def test_rope_theta_that_the_teacher_does_not_say(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_config: bool
) -> None:
    teacher = teacher_with(tiny_teacher, tmp_path / "t", rope_theta=None, rope_parameters=None)
    theta = ("--rope-theta", "10000")
    assert cli("init-from-teacher", teacher, tmp_path / "s", "--gqa-layers", "2,5", *theta, *QUIET) == 0
    assert cli("to-training", tmp_path / "s", tmp_path / "a" / "pytorch_model.bin", *QUIET) == 2  # no such folder
    (tmp_path / "a").mkdir()
    assert cli("to-training", tmp_path / "s", tmp_path / "a" / "pytorch_model.bin", *QUIET) == 0
    (tmp_path / "a" / "pytorch_model.json").unlink()
    if own_config:  # trainers copy the teacher's
        shutil.copy(teacher / "config.json", tmp_path / "a")
    capsys.readouterr()
    back = ("to-hf", tmp_path / "a", tmp_path / "h", "--teacher", teacher)
    assert cli(*back, *QUIET) == 2
    assert "--rope-theta" in capsys.readouterr().err
    assert cli(*back, *theta, *QUIET) == 0
    assert json.loads((tmp_path / "h" / "config.json").read_text())["rope_theta"] == 10000
    for arguments in (
        ("verify", teacher),
        ("verify", tmp_path / "h", "--against", teacher),
        ("pick-gqa-layers", tmp_path / "h", tmp_path / "p", "--layers", "1,5", "--teacher", teacher),
    ):
        assert cli(*arguments, *theta, "--quiet") == 0


def test_rope_theta_changes_a_teacher_s_logits(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    for name, options in (("plain", ()), ("same", ("--rope-theta", "10000")), ("other", ("--rope-theta", "500"))):
        assert cli("verify", tiny_teacher, "--quiet", "--logits-out", tmp_path / f"{name}.safetensors", *options) == 0
    plain, same, other = (load_file(tmp_path / f"{n}.safetensors")["logits"] for n in ("plain", "same", "other"))
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, other, atol=0.1)


def test_rope_scaling_that_was_dropped_is_dropped_again_with_a_warning(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = teacher_with(tiny_teacher, tmp_path / "t", rope_scaling={"type": "dynamic", "factor": 2.0})
    init = ("init-from-teacher", teacher, tmp_path / "s", "--gqa-layers", "2,5", *QUIET)
    assert cli(*init) == 2
    assert cli(*init, "--drop-rope-scaling") == 0
    assert cli("to-training", tmp_path / "s", tmp_path / "a.pth", *QUIET) == 0
    capsys.readouterr()
    for arguments in (
        ("to-hf", tmp_path / "a.pth", tmp_path / "h", "--teacher", teacher, *QUIET),
        ("pick-gqa-layers", tmp_path / "s", tmp_path / "p", "--layers", "1,5", "--teacher", teacher, *QUIET),
        ("pick-gqa-layers", teacher, "--count", "2", "--strategy", "influence", "--tokens", "32"),
    ):
        assert cli(*arguments) == 0
        assert DROPPED in capsys.readouterr().err
    for arguments in (("verify", teacher), ("verify", tmp_path / "s", "--against", teacher)):
        assert cli(*arguments, "--json") == 0
        assert [DROPPED.removeprefix("Warning: ") in note for note in json.loads(capsys.readouterr().out)["notes"]][-1]


def test_rope_scaling_that_can_be_followed_is_kept(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    teacher = teacher_with(tiny_teacher, tmp_path / "t", rope_scaling=scaling)
    init = ("init-from-teacher", teacher, tmp_path / "s", "--gqa-layers", "2,5", "--quiet")
    assert cli(*init) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "rope_scaling 'yarn' is kept" in said
    assert "the factor 1.296 of YaRN" in said
    assert cli("to-training", tmp_path / "s", tmp_path / "a.pth", *QUIET) == 0
    (tmp_path / "a.json").unlink()
    assert cli("to-hf", tmp_path / "a.pth", tmp_path / "h", "--teacher", teacher, "--quiet") == 0
    for folder in ("s", "h"):
        raw = json.loads((tmp_path / folder / "config.json").read_text())
        assert raw["rope_scaling"] == scaling
        assert raw["rope_parameters"] == scaling | {"rope_theta": raw["rope_theta"]}
    capsys.readouterr()
    assert cli("to-pth", tmp_path / "s", tmp_path / "b.pth", "--quiet") == 0
    assert "RWKV-Infer computes default frequencies" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "b.json").unlink()
    assert cli("verify", tmp_path / "b.pth", "--against", tmp_path / "s") == 0, "it cannot say that it is scaled"
    assert "tying, rope_scaling and the variant (hxa079)" in " ".join(capsys.readouterr().out.split())
    both = json.loads((tmp_path / "s" / "config.json").read_text())
    both["rope_scaling"]["factor"] = 8.0  # the modelling code goes by the other spelling
    (tmp_path / "h" / "config.json").write_text(json.dumps(both))
    assert cli("verify", tmp_path / "h") == 1
    assert "'factor': 8.0" in " ".join(capsys.readouterr().out.split())
    assert cli(*init, "--drop-rope-scaling", "--overwrite") == 0
    assert json.loads((tmp_path / "s" / "config.json").read_text())["rope_scaling"] is None
    assert cli("verify", tmp_path / "s", "--against", teacher) == 0, "a dropped scaling is no contradiction"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--max-kl", "100"), 0),
        (("--max-kl", "0.0001"), 1),
        (("--max-layer", "1e-9"), 1),
        (("--max-logit", "1000"), 0),
        (("--max-logit", "1e-3"), 1),
    ],
)
def test_a_limit_that_is_given_is_judged_whatever_is_expected(
    cli: Cli, golden: Path, options: tuple[str, ...], code: int
) -> None:
    case = golden / "qwen3_tiny"
    teacher = case / "teacher"
    compare = (
        "verify",
        case / "student_hf",
        "--against",
        teacher,
        "--teacher",
        teacher,
        "--variant",
        "hxa079",
        "--quiet",
    )
    assert cli(*compare, *options) == code


def test_limits_of_another_expectation_are_judged_too(cli: Cli, golden: Path) -> None:
    case = golden / "qwen3_tiny"
    same = (
        "verify",
        case / "student_hf",
        "--against",
        case / "student_hf",
        "--teacher",
        case / "teacher",
        "--variant",
        "hxa079",
        "--quiet",
    )
    assert cli(*same, "--max-kl", "1e-9") == 0
    assert cli(*same, "--expect", "close", "--max-logit", "0") == 0
    for limit in ("-1", "nan"):
        assert cli(*same, "--max-kl", limit) == 2


@pytest.mark.parametrize(
    "options",
    [
        ("--digests", "--teacher", "/nowhere"),
        ("--digests", "--max-kl", "0.1"),
        ("--digests", "--device", "cuda:9"),
        ("--input-ids", "x.npy", "--tokens", "7"),
        ("--input-ids", "x.npy", "--batch", "2"),
        ("--text", "x.txt", "--seed", "2"),
        ("--overwrite",),
    ],
)
def test_options_of_verify_that_would_be_ignored_are_refused(
    cli: Cli, golden: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    assert cli("verify", golden / "qwen3_tiny" / "student_hf", *options) == 2
    assert "these options have no use" in capsys.readouterr().err


def test_a_teacher_takes_no_options_of_students(
    cli: Cli, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("verify", tiny_teacher, "--teacher", tiny_teacher, "--layer-map", "reka-flash-3") == 2
    told = capsys.readouterr().err
    assert "--teacher, --layer-map: " in told and "is a teacher itself" in told


@pytest.mark.parametrize("option", ["--plot", "--logits-out"])
def test_verify_replaces_a_file_only_when_told_to(cli: Cli, tiny_teacher: Path, tmp_path: Path, option: str) -> None:
    if option == "--plot":
        pytest.importorskip("matplotlib")
    path = tmp_path / ("depth.svg" if option == "--plot" else "logits.safetensors")
    path.write_text("precious")
    command = ("verify", tiny_teacher, "--against", tiny_teacher, "--tokens", "8", "--quiet", option, path)
    assert cli(*command) == 2
    assert path.read_text() == "precious"
    assert cli(*command, "--overwrite") == 0
    assert path.read_bytes() != b"precious"


def test_a_student_without_layer_records_can_be_repicked(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "s", "--gqa-layers", "2,5", *QUIET) == 0
    records = ("layer_architecture", "head_size_record")
    rewritten(tmp_path / "s", lambda held: {n: t for n, t in held.items() if n.rsplit(".", 1)[-1] not in records})
    config = json.loads((tmp_path / "s" / "config.json").read_text()) | {"has_layer_records": False}
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    pick = ("pick-gqa-layers", tmp_path / "s", tmp_path / "p", "--teacher", tiny_teacher)
    assert cli(*pick, "--layers", "2,4", "--quiet") == 0
    assert not any(name.endswith(records) for name in load_file(tmp_path / "p" / "model.safetensors"))
    assert cli(*pick[:2], "--teacher", tiny_teacher, "--strategy", "mse", "--count", "2", "--tokens", "32") == 0


def test_an_attention_that_says_nothing_gives_numbers(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = teacher_with(tiny_teacher, tmp_path / "t")
    dead = "model.layers.2.self_attn.o_proj.weight"
    rewritten(teacher, lambda held: held | {dead: torch.zeros_like(held[dead])})
    for strategy in (("mse",), ("kl", "--kl-mode", "convert")):
        capsys.readouterr()
        advice = ("pick-gqa-layers", teacher, "--count", "2", "--tokens", "32", "--json", "--strategy")
        assert cli(*advice, *strategy) == 0

        def refuse(word: str) -> float:
            raise AssertionError(word)

        json.loads(capsys.readouterr().out, parse_constant=refuse)
    ids = ("--input-ids", tiny_teacher / "calibration_tokens.npy", "--tokens", "64", "--chunk", "64")
    fit = ("--init", "calibrated", "--refine-steps", "2", "--gqa-layers", "2,5")
    assert cli("init-from-teacher", teacher, tmp_path / "s", *ids, *fit, *QUIET) == 0
    layers = json.loads((tmp_path / "s" / "hxaconv.json").read_text())["calibration"]["layers"]
    assert all(isinstance(layer["error_before"], float) for layer in layers)


def test_what_a_pickle_holds_beside_tensors_is_shown(
    cli: Cli, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(golden / "reka_tiny" / "student.pth")
    state["model.embed_tokens.weight" if "emb.weight" not in state else "emb.weight"] = state["head.weight"]
    torch.save({"model": state, "step": 7, "optimizer": {}}, tmp_path / "s.pth")
    assert cli("inspect", tmp_path / "s.pth") == 0
    told = capsys.readouterr().out
    assert "nested under 'model'" in told
    assert "No tensors, and left behind: step, optimizer" in told
    assert "One tensor under 2 names" in told


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_files_are_closed_when_nobody_has_them_any_more(golden: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    source = str(golden / "reka_tiny" / "student_hf")
    hxaconv.inspect(source)
    before = count()
    for _ in range(5):
        hxaconv.inspect(source)
    assert count() <= before


def tied_teacher(golden: Path, folder: Path, head: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A tied teacher that stores a head all the same."""
    source = golden / "qwen3_tiny" / "teacher"
    held = weights(source)
    held["lm_head.weight"] = head(held["model.embed_tokens.weight"])
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_head_that_is_stored_and_said_to_be_tied(
    cli: Cli, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tied_teacher(golden, tmp_path / "t", lambda embedding: embedding + 1)
    init = ("init-from-teacher", teacher, tmp_path / "s", "--gqa-layers", "1,3", "--quiet")
    assert cli(*init) == 2
    assert "--no-tie-word-embeddings" in capsys.readouterr().err
    assert cli(*init, "--no-tie-word-embeddings") == 0
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    head = load_file(tmp_path / "s" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, weights(teacher)["lm_head.weight"])
    trained = golden / "qwen3_tiny" / "trained_attention.pth"
    back = ("to-hf", trained, tmp_path / "h", "--teacher", teacher, "--quiet")
    assert cli(*back) == 2
    assert cli(*back, "--no-tie-word-embeddings") == 0
    assert torch.equal(load_file(tmp_path / "h" / "model.safetensors")["lm_head.weight"], head)
    assert cli("verify", teacher, "--quiet") == 1
    assert cli("verify", teacher, "--quiet", "--no-tie-word-embeddings") == 0
    assert cli("verify", teacher, "--quiet", "--tie-word-embeddings") == 2


def test_an_untied_student_of_a_tied_teacher_that_stores_no_head(cli: Cli, golden: Path, tmp_path: Path) -> None:
    case = golden / "qwen3_tiny"
    held = load_file(case / "student_hf" / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + 1
    (tmp_path / "u").mkdir()
    save_file(held, tmp_path / "u" / "model.safetensors")
    words = ("to-hf", tmp_path / "u", tmp_path / "h", "--teacher", case / "teacher", "--no-tie-word-embeddings")
    assert cli(*words, "--variant", "hxa079", "--quiet") == 0
    assert torch.equal(load_file(tmp_path / "h" / "model.safetensors")["lm_head.weight"], held["lm_head.weight"])
    compare = ("verify", tmp_path / "h", "--against", case / "teacher", "--quiet", "--expect", "report")
    assert cli(*compare) == cli(*compare, "--no-tie-word-embeddings") == 0
    assert cli(*compare[:-2]) == 1  # its head is not the teacher's


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_trained_attention_is_held_against_the_teachers_embedding(
    cli: Cli, golden: Path, tmp_path: Path, same: bool
) -> None:
    case = golden / "qwen3_tiny"
    trained = torch.load(case / "trained_attention.pth")
    trained["model.lm_head.weight"] = weights(case / "teacher")["model.embed_tokens.weight"] + (0 if same else 1)
    torch.save(trained, tmp_path / "a.pth")
    assert cli("to-hf", tmp_path / "a.pth", tmp_path / "h", "--teacher", case / "teacher", "--quiet") == (
        0 if same else 2
    )


def test_inspect_reads_no_head(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tied_teacher(golden, tmp_path / "t", lambda embedding: embedding.clone())
    hxaconv.to_pth(
        str(golden / "qwen3_tiny" / "student.pth"),
        str(tmp_path / "s.pth"),
        teacher=str(teacher),
        variant="hxa079",
        write=hxaconv.Write(verify=False),
    )

    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("hxaconv.model.model.same_bytes", refuse)
    assert hxaconv.inspect(str(tmp_path / "s.pth"))["dimensions"]["tie_word_embeddings"] is True
    with pytest.raises(AssertionError, match="weights were read"):
        hxaconv.verify(str(tmp_path / "s.pth"))


def test_a_padded_student_goes_to_training_and_back(cli: Cli, golden: Path, tmp_path: Path) -> None:
    case = golden / "qwen3_tiny"
    pad = (
        "to-hf",
        case / "student.pth",
        tmp_path / "p",
        "--teacher",
        case / "teacher",
        "--variant",
        "hxa079",
        "--pad-ffn",
        "256",
    )
    assert cli(*pad, "--quiet") == 0
    assert cli("to-training", tmp_path / "p", tmp_path / "a.pth", "--quiet") == 0
    assert cli("to-hf", tmp_path / "a.pth", tmp_path / "h", "--teacher", case / "teacher", "--quiet") == 0
    back = load_file(tmp_path / "h" / "model.safetensors")
    first = load_file(case / "student_hf" / "model.safetensors")
    assert back.keys() == first.keys() and all(torch.equal(back[name], first[name]) for name in first)


def test_weights_that_were_trained_in_small_steps_can_be_cast(cli: Cli, golden: Path, tmp_path: Path) -> None:
    """Steps below half a bf16 step are all rounded away in one direction, which adds up in a layer."""
    case = golden / "qwen3_tiny"
    made = (
        "to-hf",
        case / "student.pth",
        tmp_path / "f",
        "--teacher",
        case / "teacher",
        "--variant",
        "hxa079",
        "--dtype",
        "float32",
    )
    assert cli(*made, "--quiet") == 0
    rewritten(tmp_path / "f", lambda held: {name: tensor + 1e-4 for name, tensor in held.items()})
    assert cli("to-pth", tmp_path / "f", tmp_path / "c.pth", "--dtype", "bfloat16", "--quiet") == 0
    # What would be too much for two checkpoints of which nothing is known.
    compare = ("verify", tmp_path / "f", "--against", tmp_path / "c.pth", "--expect", "close", "--quiet")
    assert cli(*compare) == 1
    assert cli(*compare, "--max-layer", "0.03") == 0
    assert cli(*compare, "--max-layer", "0.03", "--max-logit", "1e-9") == 1


def test_settings_that_one_of_two_cannot_say_are_the_others(
    cli: Cli, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = golden / "reka_tiny"
    made = (
        "to-hf",
        case / "student.pth",
        tmp_path / "h",
        "--teacher",
        case / "teacher",
        "--variant",
        "hxa079",
        "--quiet",
    )
    assert cli(*made) == 0
    for one, other in ((case / "student.pth", tmp_path / "h"), (tmp_path / "h", case / "student.pth")):
        capsys.readouterr()
        assert cli("verify", one, "--against", other, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert report["expect"] == "identical"
        words = "student.pth does not record rope_theta, rms_norm_eps, tying and the variant (hxa079): taken from"
        assert any(words in note for note in report["notes"])
    against = ("verify", case / "student.pth", "--against", case / "teacher", "--quiet")
    assert cli(*against) == 2, "a teacher tells rope_theta, not the variant"
    assert cli(*against, "--variant", "hxa079") == 0
    assert cli("verify", case / "student.pth", "--against", case / "student.pth", "--quiet") == 2


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "tie_word_embeddings"])
def test_a_config_that_lacks_a_key_fails_and_is_linted(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "s", *QUIET) == 0
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    (tmp_path / "s" / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in (key, "rope_parameters")})
    )
    capsys.readouterr()
    assert cli("verify", tmp_path / "s", "--json") == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [any(key in f["what"] for f in verdict["findings"]) for verdict in found][:2] == [True, True]


def test_a_tokenizer_that_cuts_and_pads_does_neither(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from hxaconv.formats.files import SourceFile
    from hxaconv.forward.tokens import probe_tokens

    words = {"a": 0, "b": 1, "<pad>": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(4)
    made.enable_padding(length=16, pad_id=2, pad_token="<pad>")
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.txt").write_text("a b " * 5)
    tokenizer = SourceFile.local(tmp_path / "tokenizer.json")
    assert probe_tokens(3, tokens=64, text=tmp_path / "x.txt", tokenizer=tokenizer).tolist() == [[0, 1] * 5]


@pytest.mark.parametrize(
    "command",
    [
        ("verify", "{teacher}"),
        ("pick-gqa-layers", "{teacher}", "--strategy", "influence", "--count", "2"),
        ("init-from-teacher", "{teacher}", "{out}", "--init", "calibrated", "--random-tokens"),
    ],
)
def test_a_seed_beyond_every_generator_is_refused(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    words = [word.format(teacher=tiny_teacher, out=tmp_path / "o") for word in command]
    for seed in ("99999999999999999999", "-1"):
        assert cli(*words, "--seed", seed) == 2
