"""The command line: the main job end to end, exit codes, messages, and what is imported when."""

from __future__ import annotations

import filecmp
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import conversion, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hxaconv.commands import COMMANDS, SUMMARIES

Cli = Callable[..., int]


def header_of(file: Path) -> list[str]:
    """The names in a safetensors file, in the order they are stored in."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return [name for name in header if name != "__metadata__"]


def test_the_main_job(cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "student"
    assert cli("init-from-teacher", tiny_teacher, out, "--gqa-layers", "2,5") == 0
    shown = capsys.readouterr().out
    assert "RRGRRG" in shown
    assert "scaled projections" in shown
    config = json.loads((out / "config.json").read_text())
    assert config["transformer_layers"] == [2, 5]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    story = json.loads((out / "hxaconv.json").read_text())
    assert story["verification"]["passed"]
    assert story["tensors"]["model.layers.0.self_attn.value.weight"]["origin"].endswith("v_proj.weight x 0.3")
    assert str(tmp_path) not in (out / "hxaconv.json").read_text()
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert "- linear-attention" in card
    assert {p.name for p in out.iterdir()} >= {"modeling_hxa079.py", "configuration_hxa079.py"}


def test_shards_are_in_layer_order_with_an_index(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    assert cli("init-from-teacher", tiny_teacher, out, "--max-shard-size", "2MB", "--quiet", "--no-verify") == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    order = [name for shard in shards for name in header_of(shard)]
    assert order == list(index["weight_map"])
    layers = [int(name.split(".")[2]) for name in order if ".layers." in name]
    assert layers == sorted(layers)
    assert max(shard.stat().st_size for shard in shards) < 2_000_000
    assert safe_open(shards[0], "pt").metadata() == {"format": "pt"}


def test_a_dry_run_writes_nothing(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "out", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["written"] is False
    assert plan["plan"]["model.layers.0.self_attn.key.weight"]["how"] == "scale"
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_and_replaced_only_on_request(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "student"
    assert cli("init-from-teacher", tiny_teacher, out, "--quiet", "--no-verify") == 0
    assert cli("init-from-teacher", tiny_teacher, out, "--quiet", "--no-verify", "--seed", "1") == 2
    assert "--overwrite" in capsys.readouterr().err
    before = weights(out)["model.layers.0.self_attn.w2"]
    assert cli("init-from-teacher", tiny_teacher, out, "--quiet", "--no-verify", "--seed", "1", "--overwrite") == 0
    assert not torch.equal(weights(out)["model.layers.0.self_attn.w2"], before)


def test_same_command_same_bytes_on_any_number_of_threads(tiny_teacher: Path, tmp_path: Path) -> None:
    outputs = []
    for threads, workers in ((1, 1), (2, 3)):
        out = tmp_path / f"{threads}-{workers}" / "student"
        out.parent.mkdir()
        command = [sys.executable, "-m", "hxaconv", "init-from-teacher", str(tiny_teacher), str(out)]
        options = ["--workers", str(workers), "--quiet", "--max-shard-size", "3MB"]
        subprocess.run([*command, *options], check=True, env=environment(OMP_NUM_THREADS=str(threads)))
        outputs.append(out)
    names = sorted(path.name for path in outputs[0].iterdir())
    for other in outputs[1:]:
        assert sorted(path.name for path in other.iterdir()) == names
        assert filecmp.cmpfiles(outputs[0], other, names, shallow=False) == (names, [], [])


def environment(**more: str) -> dict[str, str]:
    import os

    return {**os.environ, **more}


@pytest.mark.parametrize("case", ["reka_tiny", "reka_tiny_init", "qwen3_tiny"])
def test_conversions_go_round_without_losing_a_bit(cli: Cli, golden: Path, tmp_path: Path, case: str) -> None:
    facts = json.loads((golden / case / "case.json").read_text())
    settings = ["--rope-theta", facts["rope_theta"], "--rms-norm-eps", facts["rms_norm_eps"], "--quiet"]
    settings.append("--tie-word-embeddings" if case == "qwen3_tiny" else "--no-tie-word-embeddings")
    settings += ["--variant", "hxa079"]
    assert cli("to-hf", golden / case / "student.pth", tmp_path / "hf", *settings) == 0
    assert cli("to-pth", tmp_path / "hf", tmp_path / "back.pth", "--quiet") == 0
    assert cli("to-hf", tmp_path / "back.pth", tmp_path / "hf2", "--quiet") == 0
    expected = load_file(golden / case / "student_hf" / "model.safetensors")
    made = weights(tmp_path / "hf")
    assert set(made) == set(expected)
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    original = torch.load(golden / case / "student.pth", weights_only=True)
    for mmap in (False, True):
        back = torch.load(tmp_path / "back.pth", weights_only=True, mmap=mmap)
        assert list(back) == list(original)
        assert all(torch.equal(back[name], original[name]) for name in original)
    assert zipfile.ZipFile(tmp_path / "back.pth").testzip() is None
    assert filecmp.cmp(tmp_path / "hf" / "model.safetensors", tmp_path / "hf2" / "model.safetensors", shallow=False)


def test_config_json_has_the_keys_of_every_reader(cli: Cli, golden: Path, tmp_path: Path) -> None:
    case = golden / "qwen3_tiny"
    assert cli(*conversion("to-hf", case, tmp_path / "hf")) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    rwkv_infer = "rwkv_architecture num_hidden_layers num_key_value_heads head_dim num_attention_heads rms_norm_eps"
    llama_cpp = "transformer_layers rwkv_layers attention_bias attention_out_bias lora_rank_decay lora_rank_iclr"
    more = "rope_theta tie_word_embeddings lora_rank_value_residual_mix lora_rank_key_residual_mix lora_rank_gate"
    assert not set(f"{rwkv_infer} {llama_cpp} {more}".split()) - set(config)
    assert (config["enable_qk_norm"], config["nope_in_transformer"], config["nope_in_rwkv"]) == (True, True, False)
    assert (config["transformer_layers"], config["rwkv_layers"]) == ([1, 3], [0, 2])


def test_a_card_names_a_teacher_only_where_there_is_one(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "s", "--no-verify", "--quiet") == 0
    assert cli("to-pth", tmp_path / "s", tmp_path / "s.pth", "--no-verify", "--quiet") == 0
    assert cli("to-hf", tmp_path / "s.pth", tmp_path / "again", "--no-verify", "--quiet") == 0
    assert "\n# hxa079 student of teacher\n" in (tmp_path / "s" / "README.md").read_text()
    card = (tmp_path / "again" / "README.md").read_text()
    assert "\n# hxa079 student\n" in card and "(hxa079) made from s.pth. The weights are" in card


def test_a_tied_head_is_written_out_in_a_pth_and_tied_again(cli: Cli, golden: Path, tmp_path: Path) -> None:
    case = golden / "qwen3_tiny"
    trained = case / "trained_attention.pth"
    assert cli("to-hf", trained, tmp_path / "hf", "--teacher", case / "teacher", "--quiet") == 0
    assert cli("to-pth", trained, tmp_path / "s.pth", "--teacher", case / "teacher", "--quiet") == 0
    assert "lm_head.weight" not in weights(tmp_path / "hf")
    pth = torch.load(tmp_path / "s.pth", weights_only=True)
    expected = torch.load(case / "student.pth", weights_only=True)
    assert set(pth) == set(expected)
    assert all(torch.equal(pth[name], expected[name]) for name in expected)
    assert cli("to-hf", tmp_path / "s.pth", tmp_path / "hf2", "--quiet") == 0
    assert "lm_head.weight" not in weights(tmp_path / "hf2")


def test_back_to_training(cli: Cli, golden: Path, tmp_path: Path) -> None:
    case = golden / "reka_tiny"
    assert cli(*conversion("to-hf", case, tmp_path / "hf")) == 0
    assert cli("to-training", tmp_path / "hf", tmp_path / "t.pth", "--quiet") == 0
    made = torch.load(tmp_path / "t.pth", weights_only=True)
    expected = torch.load(case / "trained_attention.pth", weights_only=True)
    assert set(made) == set(expected)
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert cli("to-training", tmp_path / "hf", tmp_path / "all.pth", "--all", "--quiet") == 0
    assert "model.model.norm.weight" in torch.load(tmp_path / "all.pth", weights_only=True)


def test_padding_and_casting_are_verified(cli: Cli, golden: Path, tmp_path: Path) -> None:
    case = golden / "reka_tiny"
    source = [
        case / "student.pth",
        tmp_path / "padded",
        "--teacher",
        case / "teacher",
        "--variant",
        "hxa079",
        "--quiet",
    ]
    assert cli("to-hf", *source, "--pad-ffn", "256") == 0
    assert json.loads((tmp_path / "padded" / "config.json").read_text())["intermediate_size"] == 256
    assert cli("to-hf", tmp_path / "padded", tmp_path / "wide", "--dtype", "float32", "--quiet") == 0
    assert {value.dtype for value in weights(tmp_path / "wide").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "hxaconv.json").read_text())["verification"]["passed"]


def test_what_no_source_says_is_asked_for(
    cli: Cli, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("to-hf", golden / "reka_tiny" / "student.pth", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--rope-theta" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_picking_other_layers(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    first, second, direct = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    assert cli("init-from-teacher", tiny_teacher, first, "--gqa-layers", "1,5", "--quiet") == 0
    assert cli("pick-gqa-layers", first, second, "--layers", "2-3", "--teacher", tiny_teacher, "--quiet") == 0
    assert cli("init-from-teacher", tiny_teacher, direct, "--gqa-layers", "2,3", "--quiet") == 0
    ours, theirs = weights(second), weights(direct)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    pth = tmp_path / "d.pth"
    assert cli("to-pth", first, tmp_path / "a.pth", "--quiet") == 0
    assert cli("pick-gqa-layers", tmp_path / "a.pth", pth, "--layers", "2,3", "--teacher", tiny_teacher, "-q") == 0
    assert len(torch.load(pth, weights_only=True)) == len(theirs)


def test_picking_says_everything_that_is_wrong(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tmp_path / "a"
    assert cli("init-from-teacher", tiny_teacher, student, "--gqa-layers", "1,5", "--quiet", "--no-verify") == 0
    capsys.readouterr()
    assert cli("pick-gqa-layers", student, tmp_path / "b", "--layers", "0,3,3,9", "--teacher", tiny_teacher) == 2
    error = capsys.readouterr().err
    assert "out of range" in error
    assert "more than once" in error
    assert "layer 0" in error


def test_verify_finds_what_was_changed(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    assert cli("init-from-teacher", tiny_teacher, first, "--quiet") == 0
    assert cli("init-from-teacher", tiny_teacher, second, "--quiet", "--scale", "value=0.4") == 0
    assert cli("verify", first) == 0
    assert cli("verify", first, "--digests") == 0
    assert cli("verify", first, "--against", first, "--quiet") == 0
    capsys.readouterr()
    assert cli("verify", first, "--against", second, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["first_difference"] == 0
    assert cli("verify", first, "--against", second, "--expect", "report", "--quiet") == 0
    data = bytearray((first / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (first / "model.safetensors").write_bytes(data)
    assert cli("verify", first, "--digests", "--quiet") == 1
    assert "lm_head.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "no-such-folder/x"),
        ("inspect", "./nothing.pth"),
        ("init-from-teacher", "{teacher}", "{tmp}/o", "--format", "gguf"),
        ("init-from-teacher", "{teacher}", "{tmp}/o", "--preset", "mine"),
        ("init-from-teacher", "{teacher}", "{tmp}/o", "--layer-map", "reka-flash-3"),
        ("init-from-teacher", "{teacher}", "{tmp}/o", "--gqa-layers", "1", "--layer-map", "reka-flash-3"),
        ("init-from-teacher", "{teacher}", "{tmp}/o.safetensors"),
        ("init-from-teacher", "{teacher}", "{tmp}/o", "--format", "pth"),
        ("init-from-teacher", "{teacher}", "{tmp}/o", "--dtype", "int8"),
        ("init-from-teacher", "{teacher}", "{tmp}/o", "--max-shard-size", "big"),
        ("init-from-teacher", "{teacher}", "{tmp}/o", "--digest", "md5"),
        ("init-from-teacher", "{teacher}", "{teacher}"),
        ("init-from-teacher", "{teacher}", "{teacher}/inside"),
        ("to-pth", "{teacher}", "{tmp}/o.pth"),
        ("pick-gqa-layers", "{teacher}", "--strategy", "magic"),
        ("pick-gqa-layers", "{teacher}", "--count", "99"),
        ("pick-gqa-layers", "{teacher}", "--layers", "2"),
        ("verify", "{teacher}", "--input-ids", "nothing.npy"),
        ("verify", "{teacher}", "--digests"),
        ("verify", "{teacher}", "--dtype", "int8"),
        ("verify", "{teacher}", "--expect", "sure"),
        ("verify", "{teacher}", "--max-kl", "0.1"),
        ("verify", "{teacher}", "--against", "no/such/teacher", "--plot", "depth.bmp"),
        ("verify", "{teacher}", "--revision", "main"),
        ("inspect", "{teacher}", "--revision", "main"),
        ("inspect", "org/name@one", "--revision", "two"),
        ("verify", "{teacher}", "--device", "warp"),
        ("maps", "rekka-flash"),
        ("no-such-command",),
        ("inspect", ""),
        ("init-from-teacher", "{teacher}", ""),
        ("init-from-teacher", "{teacher}", "{tmp}/o\0"),
        ("init-from-teacher", "{teacher}", "{tmp}/" + "o" * 300),
        ("init-from-teacher", "{teacher}", "{tmp}/o", "--push-to", ""),
        ("verify", "{teacher}", "--against", "a/" * 3000),
        ("verify", "{teacher}", "--logits-out", "\0.safetensors"),
        ("pick-gqa-layers", "{teacher}", "--count", "2", "--save", "m" * 300),
        ("demo", "a/" * 3000),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(
    cli: Cli, arguments: tuple[str, ...], tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(teacher=tiny_teacher, tmp=tmp_path) for word in arguments]
    assert cli(*words) == 2
    seen = capsys.readouterr()
    assert "Traceback" not in seen.err
    assert seen.err.strip() or seen.out.strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli: Cli, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "Usage" in shown
    assert COMMANDS[command].__doc__.startswith(SUMMARIES[command])


def imported(arguments: list[str], names: list[str]) -> list[str]:
    """Which of `names` are loaded after the command has run, in a process of its own."""
    script = (
        "import sys, json\n"
        f"sys.argv = ['hxaconv', *{arguments!r}]\n"
        "from hxaconv.cli.app import run\n"
        "code = run()\n"
        f"print(json.dumps([code, [n for n in {names!r} if n in sys.modules]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, loaded = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return list(loaded)


HEAVY = ["torch", "numpy", "transformers", "huggingface_hub", "safetensors", "matplotlib"]


def test_help_imports_nothing_heavy() -> None:
    own = ["hxaconv.load", "hxaconv.model.names", "hxaconv.save.staging", "hxaconv.commands.init"]
    assert imported(["--help"], [*HEAVY, *own]) == []
    assert imported(["init-from-teacher", "--help"], own)[-1] == own[-1], "the negative control"
    assert imported(["init-from-teacher", "--help"], HEAVY) == []


def test_inspect_and_pure_conversions_never_import_torch(cli: Cli, golden: Path, tmp_path: Path) -> None:
    case = golden / "reka_tiny"
    assert imported(["inspect", str(case / "student.pth")], ["torch"]) == []
    to_hf = [
        "to-hf",
        str(case / "student.pth"),
        str(tmp_path / "hf"),
        "--teacher",
        str(case / "teacher"),
        "--variant",
        "hxa079",
    ]
    assert imported([*to_hf, "--no-verify", "--quiet"], ["torch"]) == []
    to_pth = ["to-pth", str(tmp_path / "hf"), str(tmp_path / "s.pth")]
    assert imported([*to_pth, "--no-verify", "--quiet"], ["torch"]) == []
    # The verification that follows by default computes, so it does.
    assert imported([*to_pth, "--overwrite", "--quiet"], ["torch"]) == ["torch"]
    assert imported(["verify", str(tmp_path / "hf"), "--digests"], ["torch"]) == []


def test_debug_shows_the_traceback(golden: Path) -> None:
    command = [sys.executable, "-m", "hxaconv", "to-hf", str(golden / "reka_tiny" / "student.pth"), "x", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
    assert done.returncode == 2


def test_shards_without_a_change_are_linked_not_written(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    options = ["--gqa-layers", "1,5", "--max-shard-size", "2MB", "--quiet", "--no-verify"]
    assert cli("init-from-teacher", tiny_teacher, first, *options) == 0
    assert cli("pick-gqa-layers", first, second, "--layers", "1,4", "--teacher", tiny_teacher, "--quiet") == 0
    shards = sorted(path.name for path in second.glob("*.safetensors"))
    assert shards == sorted(path.name for path in first.glob("*.safetensors"))
    linked = [name for name in shards if (first / name).samefile(second / name)]
    # Layers 4 and 5 change and stand in the last shards; the others are the same files.
    assert 0 < len(linked) < len(shards)
    assert linked == shards[: len(linked)]
    index = json.loads((second / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert cli("verify", second, "--digests", "--quiet") == 0
    assert cli("pick-gqa-layers", first, tmp_path / "c", "--layers", "1,5", "--max-shard-size", "1MB", "-q") == 0
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > len(shards)


def test_a_shard_is_copied_where_links_are_not_possible(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    first, second = tmp_path / "a", tmp_path / "b"
    assert cli("init-from-teacher", tiny_teacher, first, "--gqa-layers", "1,5", "--quiet", "--no-verify") == 0
    monkeypatch.setattr("os.link", refuse)
    assert cli("pick-gqa-layers", first, second, "--layers", "1,5", "--quiet") == 0
    assert not (first / "model.safetensors").samefile(second / "model.safetensors")
    assert filecmp.cmp(first / "model.safetensors", second / "model.safetensors", shallow=False)


def test_quantized_weights_are_refused(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(tiny_teacher / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    (tmp_path / "t").mkdir()
    save_file(tensors, tmp_path / "t" / "model.safetensors")
    (tmp_path / "t" / "config.json").write_bytes((tiny_teacher / "config.json").read_bytes())
    assert cli("init-from-teacher", tmp_path / "t", tmp_path / "o") == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--rope-theta", "nan"), ("--rms-norm-eps", "-1"), ("--rope-theta", "0")]
)
def test_numbers_that_cannot_be(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "o", option, value) == 2
    assert option[2:].replace("-", "_") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_says_what_is_kept(
    cli: Cli,
    tiny_teacher: Path,
    tmp_path: Path,
    number: int,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hxaconv.save.interruption import Interrupted

    def stop(*_: object, **__: object) -> None:
        raise Interrupted(number)

    with monkeypatch.context() as patch:
        patch.setattr("hxaconv.save.writer.publish", stop)
        assert cli("init-from-teacher", tiny_teacher, tmp_path / "o", "--no-verify", "--quiet") == code
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "o", "--no-verify", "--quiet", "--resume") == 0


def test_inspect_sees_a_config_that_contradicts_the_tensors(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads((tiny_teacher / "config.json").read_text()) | {"num_hidden_layers": 7}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((tiny_teacher / "model.safetensors").read_bytes())
    assert cli("inspect", tmp_path) == 0
    assert "model.layers.6.input_layernorm.weight is missing" in capsys.readouterr().out


def test_a_shard_counts_its_header(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    words = ["--max-shard-size", "220KB", "--quiet", "--no-verify"]
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "o", *words) == 0
    assert max(path.stat().st_size for path in (tmp_path / "o").glob("*.safetensors")) <= 220_000


@pytest.mark.parametrize("source", ["student.pth", "student_hf"])
@pytest.mark.parametrize("out", ["o.pth", "o"])
def test_other_layers_of_a_tied_student(cli: Cli, golden: Path, tmp_path: Path, source: str, out: str) -> None:
    case = golden / "qwen3_tiny"
    words = ["--layers", "1-2", "--teacher", case / "teacher", "--variant", "hxa079", "--quiet"]
    assert cli("pick-gqa-layers", case / source, tmp_path / out, *words) == 0


def test_advice_never_replaces_a_file_unasked(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "map.toml").write_text("mine")
    assert cli("pick-gqa-layers", tiny_teacher, "--count", "2", "--save", tmp_path / "map.toml") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "map.toml").read_text() == "mine"
    assert cli("pick-gqa-layers", tiny_teacher, "--count", "2", "--exclude", "9") == 2
    assert "out of range" in capsys.readouterr().err
    assert cli("pick-gqa-layers", tiny_teacher, tmp_path / "o", "--count", "2") == 2
    assert "init-from-teacher" in capsys.readouterr().err


def test_the_recorded_command_can_be_typed_again(cli: Cli, golden: Path, tmp_path: Path) -> None:
    case = golden / "reka_tiny"
    words = ["to-hf", case / "student.pth", tmp_path / "a", "--pad-ffn", "256", "--no-tie-word-embeddings"]
    words += ["--rope-theta", "8e6", "--rms-norm-eps", "1e-5", "--variant", "hxa079"]
    assert cli(*words, "--quiet") == 0
    line = json.loads((tmp_path / "a" / "hxaconv.json").read_text())["command_line"]
    again = tmp_path / "again" / "a"
    again.parent.mkdir()
    recorded = shlex.split(line.replace("OUT", str(again)).replace("student.pth", str(case / "student.pth")))
    assert "--no-tie-word-embeddings" in recorded
    differing = json.loads((tmp_path / "a" / "hxaconv.json").read_text())["options"]
    settings = {"pad_ffn": 256, "tie_word_embeddings": False, "rope_theta": 8e6, "rms_norm_eps": 1e-5}
    assert differing == {"source": "student.pth", "out": "OUT", "variant": "hxa079", **settings}
    assert cli(*recorded[1:], "--quiet") == 0
    names = ["model.safetensors", "config.json", "hxaconv.json", "README.md"]
    assert filecmp.cmpfiles(tmp_path / "a", again, names, shallow=False) == (names, [], [])
    assert cli("to-training", tmp_path / "a", tmp_path / "t.pth", "--all", "--quiet") == 0
    sidecar = json.loads((tmp_path / "t.json").read_text())
    assert sidecar["hxaconv"]["command_line"] == "hxaconv to-training a OUT --all"


def test_a_value_beyond_float16_is_not_called_damage(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(tiny_teacher / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    (tmp_path / "t").mkdir()
    save_file(tensors, tmp_path / "t" / "model.safetensors")
    (tmp_path / "t" / "config.json").write_bytes((tiny_teacher / "config.json").read_bytes())
    assert cli("init-from-teacher", tmp_path / "t", tmp_path / "o", "--dtype", "float16") == 2
    assert "65504" in capsys.readouterr().err


def test_names_that_are_no_text_are_refused_in_words(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "t\udcff"
    odd.symlink_to(tiny_teacher)
    for words, name in (((tiny_teacher, tmp_path / "o\udcff"), rb"b'o\xff'"), ((odd, tmp_path / "o"), rb"b't\xff'")):
        assert cli("init-from-teacher", *words, "--no-verify", "--quiet") == 2
        assert f"{name.decode()} in the command is not UTF-8" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [odd]


def test_memory_that_runs_out_is_an_error_in_words(
    cli: Cli, tiny_teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("hxaconv.commands.inspect.open_checkpoint", exhaust)
    assert cli("inspect", tiny_teacher) == 2
    assert capsys.readouterr().err.startswith("Error: memory has run out\nWhat to do: ")


def test_what_the_system_refuses_is_an_error_without_a_traceback(
    cli: Cli, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "some/place")

    monkeypatch.setattr("hxaconv.model.layer_maps.shipped", refuse)
    assert cli("maps") == 2
    assert capsys.readouterr().err.startswith("Error: [Errno 13] Permission denied: 'some/place'\n")


def test_verify_replaces_nothing(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    student = tmp_path / "s"
    assert cli("init-from-teacher", tiny_teacher, student, "--quiet", "--no-verify") == 0
    before = (student / "model.safetensors").read_bytes()
    for path in (student / "model.safetensors", student / "new.safetensors", tmp_path / "l.npy"):
        assert cli("verify", student, "--logits-out", path, "--quiet") == 2
    assert (student / "model.safetensors").read_bytes() == before
    assert cli("verify", student, "--logits-out", tmp_path / "l.safetensors", "--quiet") == 0
    assert "hidden.5" in load_file(tmp_path / "l.safetensors")


def test_nan_is_refused_without_a_trace_and_let_through_on_request(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(tiny_teacher / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    (tmp_path / "t").mkdir()
    save_file(tensors, tmp_path / "t" / "model.safetensors")
    (tmp_path / "t" / "config.json").write_bytes((tiny_teacher / "config.json").read_bytes())
    words = ["init-from-teacher", tmp_path / "t", tmp_path / "o", "--quiet"]
    assert cli(*words) == 2
    assert "model.layers.1.mlp.up_proj.weight: 1 of" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert cli(*words, "--allow-nonfinite") == 0
    story = json.loads((tmp_path / "o" / "hxaconv.json").read_text())
    assert story["nonfinite"] == {"model.layers.1.mlp.up_proj.weight": 1}
    assert "allowed by --allow-nonfinite" in json.dumps(story["verification"])


def test_a_calibration_tells_of_every_layer(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--init", "calibrated", "--tokens", "128", "--refine-steps", "2", "--gqa-layers", "none"]
    tokens = tiny_teacher / "calibration_tokens.npy"
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "a", *words, "--input-ids", tokens, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["calibration"]["layers"]) == 6
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "b", *words) == 2
    assert "--text" in capsys.readouterr().err
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "plain", "--gqa-layers", "none", "--quiet") == 0
    more = ["--teacher", tiny_teacher, "--tokens", "128", "--refine-steps", "2", "--input-ids", tokens]
    assert cli("calibrate", tmp_path / "plain", tmp_path / "c", *more) == 0
    assert "decay by head" in capsys.readouterr().out
    one, other = weights(tmp_path / "a"), weights(tmp_path / "c")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "plain"]


def test_nothing_is_computed_for_a_target_that_cannot_be(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: object, **__: object) -> None:
        raise AssertionError("calibration began")

    monkeypatch.setattr("hxaconv.calibration.streaming.calibrate", computed)
    (tmp_path / "o").mkdir()
    words = ["--init", "calibrated", "--random-tokens", "--quiet"]
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "o", *words) == 2
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "no" / "o", *words) == 2
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "p", *words, "--digest", "md5") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert cli("calibrate", tiny_teacher, tmp_path / "o.pth", "--teacher", tiny_teacher, "--format", "x") == 2


@pytest.mark.parametrize(
    ("key", "text"), [("model_type", "llama\ud800"), ("model_type", "[/red]\x1b[31m"), ("torch_dtype", "[/b]\x1b[31m")]
)
def test_a_strangers_config_does_nothing_to_the_terminal(
    tiny_teacher: Path, tmp_path: Path, key: str, text: str
) -> None:
    shutil.copytree(tiny_teacher, tmp_path / "t")
    config = json.loads((tmp_path / "t" / "config.json").read_text()) | {key: text}
    (tmp_path / "t" / "config.json").write_text(json.dumps(config))
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    for options in ((), ("--json",)):
        command = [sys.executable, "-m", "hxaconv", "inspect", str(tmp_path / "t"), *options]
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert b"\x1b" not in done.stdout + done.stderr
        shown = "llama" if "llama" in text else "[31m"
        assert shown.encode() in done.stdout
    assert json.loads(done.stdout)
