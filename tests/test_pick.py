"""`pick-gqa-layers`: what is said before scoring, what interruptions keep, what is written and what is linked."""

from __future__ import annotations

import json
import os
import re
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import weights

from hxaconv.calls import parameters_of
from hxaconv.commands import COMMANDS
from hxaconv.model import layer_maps
from hxaconv.save.interruption import Interrupted
from hxaconv.selection.sweep import Progressed, Sweep

Cli = Callable[..., int]
COMMAND = "pick-gqa-layers"


@pytest.fixture
def make(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> Callable[..., Path]:
    def student(name: str, layers: str, *options: object) -> Path:
        words = ("init-from-teacher", tiny_teacher, tmp_path / name, "--gqa-layers", layers, *options)
        assert cli(*words, "--quiet", "--no-verify") == 0
        return tmp_path / name

    return student


@pytest.fixture
def tokens(tiny_teacher: Path) -> list[object]:
    return ["--input-ids", tiny_teacher / "calibration_tokens.npy", "--tokens", 48]


class Layers:
    """Which layers a sweep computes; a signal comes while it is at `stop`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[int] = []
        self.stop: tuple[int, int] | None = None
        real = Sweep._layer

        def layer(sweep: Sweep, walk: object, streams: object, at: Progressed, step: object) -> None:
            self.seen.append(at.layer)
            if self.stop is not None and self.stop[0] == self.seen[-1]:
                os.kill(os.getpid(), self.stop[1])
            real(sweep, walk, streams, at, step)  # type: ignore[arg-type]

        monkeypatch.setattr(Sweep, "_layer", layer)


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Layers:
    return Layers(monkeypatch)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_advice_says_what_is_kept_and_goes_on(
    cli: Cli,
    tiny_teacher: Path,
    tmp_path: Path,
    tokens: list[object],
    layers: Layers,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    words = [COMMAND, tiny_teacher, "--count", 2, "--strategy", "mse", *tokens]
    assert cli(*words, "--save", tmp_path / "whole.toml", "--quiet") == 0
    layers.stop, layers.seen = (3, number), []
    assert cli(*words, "--save", tmp_path / "map.toml", "--quiet") == 128 + number
    kept = tmp_path / "map.toml.scores.safetensors"
    error = " ".join(capsys.readouterr().err.split())
    assert "run the same command again to continue" in error
    assert str(kept) in error.replace(" ", "")  # long paths are folded
    assert {path.name for path in tmp_path.iterdir()} == {"whole.toml", kept.name}
    layers.stop, layers.seen = None, []
    assert cli(*words, "--save", tmp_path / "map.toml", "--quiet") == 0
    assert layers.seen == [4, 5]  # what was under way when the signal came was finished
    assert tomllib.loads((tmp_path / "map.toml").read_text()) == tomllib.loads((tmp_path / "whole.toml").read_text())
    assert not kept.exists()


def test_advice_without_a_file_says_that_nothing_is_kept(
    cli: Cli, tiny_teacher: Path, tokens: list[object], layers: Layers, capsys: pytest.CaptureFixture[str]
) -> None:
    layers.stop = (1, signal.SIGINT)
    assert cli(COMMAND, tiny_teacher, "--count", 2, "--strategy", "influence", *tokens) == 130
    error = capsys.readouterr().err
    assert "Scores are kept nowhere: with --save" in error
    assert "Nothing is kept" in error


def test_scores_outlive_a_failure_to_write(
    cli: Cli,
    make: Callable[..., Path],
    tiny_teacher: Path,
    tmp_path: Path,
    tokens: list[object],
    layers: Layers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, out, saved = make("a", "1,5"), tmp_path / "b", tmp_path / "map.toml"
    words = [COMMAND, student, out, "--count", 2, "--strategy", "influence", "--teacher", tiny_teacher, *tokens]
    words += ["--save", saved, "--quiet"]

    def stop(*_: object, **__: object) -> None:
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("hxaconv.save.writer.publish", stop)
        assert cli(*words) == 143
    assert not saved.exists()
    assert (tmp_path / "map.toml.scores.safetensors").is_file()
    layers.seen = []
    assert cli(*words, "--resume") == 0
    assert layers.seen == []
    assert saved.is_file()
    assert out.is_dir()
    assert not list(tmp_path.glob("*.npz"))


def test_a_dry_run_keeps_its_scores_for_the_run(
    cli: Cli,
    make: Callable[..., Path],
    tiny_teacher: Path,
    tmp_path: Path,
    tokens: list[object],
    layers: Layers,
    capsys: pytest.CaptureFixture[str],
) -> None:
    student, out = make("a", "1,5"), tmp_path / "b"
    words = [COMMAND, student, out, "--count", 2, "--strategy", "influence", "--teacher", tiny_teacher, *tokens]
    assert cli(*words, "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    layers.seen = []
    assert cli(*words, "--json") == 0
    assert layers.seen == []
    done = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.glob("*.npz"))
    assert done["gqa_layers"] == planned["gqa_layers"] == done["advice"]["gqa_layers"]
    assert done["advice"] == planned["advice"]
    assert len(done["advice"]["scores"]["influence"]) == 6
    assert done["advice"]["warnings"] == []


def test_warnings_of_the_advice_are_in_the_json_of_both(
    cli: Cli,
    make: Callable[..., Path],
    tiny_teacher: Path,
    tmp_path: Path,
    tokens: list[object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [COMMAND, make("a", "1,5"), tmp_path / "b", "--count", 1, "--strategy", "mse", "--teacher", tiny_teacher]
    assert cli(*words, *tokens, "--json") == 0
    assert "initial values" in json.loads(capsys.readouterr().out)["advice"]["warnings"][0]


REFUSED = [
    (("--count", 6, "--allow-gqa-layer-0", "--strategy", "mse"), "between 1 and 5"),
    (("--strategy", "mse", "--format", "pth"), "one file"),
    (("--strategy", "mse", "--max-shard-size", "huge"), "not a size"),
    (("--strategy", "mse", "--min-gap", 0, "--max-gap", -3, "--max-consecutive", 0), "--max-consecutive 0"),
    (("--strategy", "mse", "--count", 3, "--min-gap", 3), "no choice of 3 of 6"),
    (("--strategy", "mse", "--kl-mode", "convert"), "only --strategy kl"),
    (("--strategy", "log"), "--log FILE.csv"),
    (("--strategy", "last", "--log", "x"), "--log: only --strategy log reads one"),
    (("--layers", "1", "--count", 1, "--max-gap", 3), "--count, --max-gap: --layers is a choice made"),
    (("--strategy", "mse", "--save", "no/such/folder/map.toml"), "is not a folder"),
    (("--strategy", "mse", "--plot", "scores.gif"), ".png, .svg, .pdf"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_done_is_said_before_scoring(
    cli: Cli,
    make: Callable[..., Path],
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.setattr(Sweep, "run", None)
    student = make("a", "1,5")
    assert cli(COMMAND, student, tmp_path / "b", "--teacher", tiny_teacher, *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_teacher_as_source_takes_no_options_of_students(
    cli: Cli, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [COMMAND, tiny_teacher, "--count", 2, "--strategy", "mse", "--teacher", tiny_teacher]
    assert cli(*words, "--from", "x", "--layer-map", "reka-flash-3", "--tie-word-embeddings") == 2
    error = capsys.readouterr().err
    for option in ("--teacher", "--from", "--layer-map", "--tie-word-embeddings"):
        assert option in error.partition(": ")[2] and "is a teacher itself" in error


def test_a_teacher_s_rope_theta_can_be_overridden(
    cli: Cli, tiny_teacher: Path, tokens: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [COMMAND, tiny_teacher, "--count", 2, "--strategy", "influence", *tokens, "--json"]
    found = []
    for options in ([], ["--rope-theta", 10000.0], ["--rope-theta", 3.0]):
        assert cli(*words, *options) == 0
        found.append(json.loads(capsys.readouterr().out)["scores"])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_advice_takes_trained_layers_from_another_checkpoint(
    cli: Cli,
    make: Callable[..., Path],
    tiny_teacher: Path,
    tmp_path: Path,
    tokens: list[object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A student with GQA layers is scored with these as RWKV: plain ones, or those of an all-RWKV sibling."""
    student = make("a", "1,5")
    words = [COMMAND, student, "--count", 1, "--strategy", "mse", "--teacher", tiny_teacher, *tokens, "--json"]

    def mse(*options: object) -> list[float]:
        assert cli(*words, *options) == 0
        scores: list[float] = json.loads(capsys.readouterr().out)["scores"]["mse"]
        return scores

    plain, same, other = mse(), mse("--from", make("b", "none")), mse("--from", make("c", "none", "--scale", "value=1"))
    assert plain == same
    assert [i for i in range(6) if plain[i] != other[i]] == [1, 5]


def test_a_donor_of_another_dtype_is_cast(
    cli: Cli, make: Callable[..., Path], tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, source_student = make("a", "1,5"), make("b", "none", "--dtype", "float32", "--scale", "key=0.7")
    assert cli(COMMAND, student, tmp_path / "c", "--layers", "5", "--from", source_student, "--quiet") == 0
    ours, theirs = weights(tmp_path / "c"), weights(source_student)
    assert {x.dtype for x in ours.values()} == {torch.bfloat16}
    name = "model.layers.1.self_attn.key.weight"
    assert torch.equal(ours[name], theirs[name].bfloat16())
    assert not torch.equal(ours[name].float(), theirs[name])
    story = json.loads((tmp_path / "c" / "hxaconv.json").read_text())
    assert story["tensors"][name]["origin"] == f"trained {name} in model.safetensors, cast from F32"
    capsys.readouterr()
    assert (
        cli(COMMAND, student, tmp_path / "e", "--layers", "3", "--from", source_student, "--teacher", tiny_teacher) == 0
    )
    told = " ".join(capsys.readouterr().err.split())
    assert f"layers 1, 5: trained, from {source_student}, cast from F32 to BF16" in told
    assert "layer 3: GQA, the teacher's attention" in told
    words = [COMMAND, student, tmp_path / "d", "--layers", "1,3,5", "--from", source_student, "--teacher", tiny_teacher]
    assert cli(*words, "--quiet") == 0
    assert "it is not used" in " ".join(capsys.readouterr().err.split())


def test_a_donor_of_another_shape_is_refused(
    cli: Cli, make: Callable[..., Path], golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = golden / "reka_tiny"
    assert cli(COMMAND, make("a", "1,5"), tmp_path / "b", "--layers", "5", "--from", case / "student_hf") == 2
    assert "hidden_size is" in " ".join(capsys.readouterr().err.split())


def test_only_the_shard_that_outgrows_the_limit_is_split(
    cli: Cli, make: Callable[..., Path], tiny_teacher: Path, tmp_path: Path
) -> None:
    """Layer 0's mixer becomes larger; the shards are full to the last tensor."""
    first, second = make("a", "0,5", "--allow-gqa-layer-0", "--max-shard-size", "2MB"), tmp_path / "b"
    before = sorted(first.glob("*.safetensors"))
    limit = max(path.stat().st_size for path in before)
    words = [COMMAND, first, second, "--layers", "5", "--teacher", tiny_teacher, "--max-shard-size", str(limit)]
    assert cli(*words, "--quiet") == 0
    after = sorted(second.glob("*.safetensors"))
    assert len(after) == len(before) + 1
    assert max(path.stat().st_size for path in after) <= limit
    for old, new in zip(before[1:], after[2:], strict=True):
        assert old.samefile(new)
    index = json.loads((second / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {path.name for path in after}
    direct = weights(make("c", "5"))
    ours = weights(second)
    assert ours.keys() == direct.keys()
    assert all(torch.equal(ours[name], direct[name]) for name in direct)


@pytest.mark.parametrize("case", ["reka_tiny", "qwen3_tiny"])
@pytest.mark.parametrize("suffix", ["", ".pth"])
def test_layers_a_and_then_b_are_layers_b(cli: Cli, golden: Path, tmp_path: Path, case: str, suffix: str) -> None:
    """The same bits as an initialisation with B, and the layer contract of verify, in both containers."""
    teacher, options = golden / case / "teacher", ["--preset", "openmose-stage2", "--seed", 3, "--quiet"]
    form = ["--format", "pth"] if suffix else ["--format", "hf"]
    first, second, direct = (tmp_path / f"{name}{suffix}" for name in "abc")
    for out, layers in ((first, "1,3"), (direct, "2-3")):
        assert cli("init-from-teacher", teacher, out, "--gqa-layers", layers, *form, *options) == 0
    assert cli(COMMAND, first, second, "--layers", "2-3", "--teacher", teacher, *options) == 0

    def held(path: Path) -> dict[str, torch.Tensor]:
        return torch.load(path, weights_only=True) if suffix else weights(path)

    ours, theirs, before = held(second), held(direct), held(first)
    assert ours.keys() == theirs.keys() != before.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Negative control: the seed matters for the layer that became RWKV.
    words = [COMMAND, first, tmp_path / f"d{suffix}", "--layers", "2-3", "--teacher", teacher, "--quiet"]
    assert cli(*words, "--preset", "openmose-stage2", "--seed", 4) == 0
    other = held(tmp_path / f"d{suffix}")
    assert any(not torch.equal(other[name], theirs[name]) for name in theirs)


def test_layers_from_a_file_with_a_comma_in_its_path(
    cli: Cli, make: Callable[..., Path], tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = make("a", "1,5")
    file = tmp_path / "mine, and yours"
    file.write_text("gqa_layers = [2, 3]")
    assert cli(COMMAND, student, tmp_path / "b", "--layers", file, "--teacher", tiny_teacher, "--quiet") == 0
    assert json.loads((tmp_path / "b" / "config.json").read_text())["transformer_layers"] == [2, 3]
    assert cli(COMMAND, student, tmp_path / "c", "--layers", "x,y.toml", "--teacher", tiny_teacher) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_saved_map_has_a_title_and_is_shown_whole(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "map.toml"
    assert cli(COMMAND, tiny_teacher, "--count", 2, "--strategy", "last", "--save", path, "--quiet") == 0
    assert layer_maps.load(path).title == "teacher, 2 of 6 layers by last"
    assert cli("maps", path) == 0
    assert "RRRRGG" in capsys.readouterr().out
    path.write_text("gqa_layers = [1, 3]")
    assert cli("maps", path) == 0
    shown = capsys.readouterr().out
    assert "RG" not in shown  # how far the strip goes is not known
    assert "1, 3" in shown


def test_every_source_is_opened_once(
    cli: Cli, make: Callable[..., Path], tiny_teacher: Path, tokens: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hxaconv.load import models
    from hxaconv.selection import subject

    opened: list[str] = []
    real = models.open_checkpoint

    def count(spec: object, **options: object) -> object:
        opened.append(Path(str(spec)).name)
        return real(spec, **options)  # type: ignore[arg-type]

    student, other = make("a", "1,5"), make("b", "none")
    for module in (subject, models):
        monkeypatch.setattr(module, "open_checkpoint", count)
    words = [COMMAND, student, "--count", 1, "--strategy", "mse", "--teacher", tiny_teacher, "--from", other, *tokens]
    assert cli(*words, "--quiet") == 0
    assert sorted(opened) == ["a", "b", "teacher"]


def test_messages_name_commands_and_options_that_exist() -> None:
    root = Path(layer_maps.__file__).parents[1]
    text = "\n".join(path.read_text() for path in root.rglob("*.py") if not {"hf", "verification"} & {*path.parts})
    assert set(re.findall(r"`hxaconv ([a-z][a-z-]+)", text)) <= set(COMMANDS)
    options = [parameter.words[0] for function in COMMANDS.values() for parameter in parameters_of(function)]
    known = {word.strip() for words in options for word in words.split("/")}
    known |= {"--json", "--quiet", "--debug", "--version", "--help"}
    known |= {"--nproc-per-node", "--hf-path", "--mlx-path", "--options"}  # of other programs, or of none
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?!-)", text)):
        assert option in known, option


@pytest.mark.parametrize("applied", [False, True])
def test_nothing_is_lost_when_nobody_reads_the_output(
    cli: Cli,
    make: Callable[..., Path],
    tiny_teacher: Path,
    tmp_path: Path,
    tokens: list[object],
    monkeypatch: pytest.MonkeyPatch,
    applied: bool,
) -> None:
    pytest.importorskip("matplotlib")
    student, saved, plot = make("a", "1,5"), tmp_path / "map.toml", tmp_path / "scores.svg"

    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("hxaconv.cli.console.Talk.write", closed)
    words = [COMMAND, student, *([tmp_path / "b"] if applied else []), "--strategy", "influence", *tokens]
    assert cli(*words, "--teacher", tiny_teacher, "--count", 2, "--save", saved, "--plot", plot) == 0
    assert saved.is_file()
    assert plot.is_file()
    assert (tmp_path / "b" / "hxaconv.json").is_file() == applied


def test_a_dry_run_says_where_it_keeps_scores(
    cli: Cli,
    make: Callable[..., Path],
    tiny_teacher: Path,
    tmp_path: Path,
    tokens: list[object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [COMMAND, make("a", "1,5"), tmp_path / "b", "--teacher", tiny_teacher, "--count", 2, "--dry-run"]
    assert cli(*words, "--strategy", "influence", *tokens) == 0
    kept = tmp_path / "b.scores.safetensors"
    assert kept.is_file()
    assert f"The scores are kept in {kept}" in capsys.readouterr().err
    assert cli(*words, "--strategy", "last") == 0
    assert "Dry run: nothing was written.\n" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 50])
def test_the_advice_fits_the_terminal(
    cli: Cli,
    tiny_teacher: Path,
    tokens: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    width: int,
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    assert cli(COMMAND, tiny_teacher, "--count", 2, "--strategy", "mse", *tokens) == 0
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    assert sum(bool(re.match(r" [0-5] +[GR] ", line)) for line in lines) == 6
    assert ("Too wide for" in " ".join(lines)) == (width == 50)


def test_why_says_why_never_layer_0(
    cli: Cli, tiny_teacher: Path, tokens: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [COMMAND, tiny_teacher, "--count", 2, "--strategy", "influence", *tokens, "--json"]
    for options, said in (([], True), (["--allow-gqa-layer-0"], False)):
        assert cli(*words, *options) == 0
        why = json.loads(capsys.readouterr().out)["why"]
        assert (layer_maps.LAYER_0_REASON in why) == said


def test_without_a_strategy_text_is_ranked_by_retrieval(
    cli: Cli, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [COMMAND, tiny_teacher, "--count", 2]
    ids = ["--input-ids", tiny_teacher / "calibration_tokens.npy"]
    for options, strategy, reason in ((ids, "retrieval", "there is text"), ([], "uniform", "neither --strategy nor")):
        assert cli(*words, *options, "--json") == 0
        seen = capsys.readouterr()
        assert json.loads(seen.out)["strategy"] == strategy and reason in seen.err.splitlines()[0]
        assert cli(*words, *options, "--strategy", strategy) == 0
        seen = capsys.readouterr()
        assert f"layers stay attention by {strategy}: " in seen.out.splitlines()[0] and "as there is" not in seen.err


def test_retrieval_says_how_many_tokens_to_pass(
    cli: Cli, tiny_teacher: Path, tokens: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(COMMAND, tiny_teacher, "--count", 2, "--strategy", "retrieval", *tokens) == 2
    assert "What to do: Pass --tokens 128 or more" in " ".join(capsys.readouterr().err.split())


def test_a_saved_map_names_all_that_it_depends_on(
    cli: Cli,
    make: Callable[..., Path],
    tiny_teacher: Path,
    tmp_path: Path,
    tokens: list[object],
) -> None:
    path = tmp_path / "map.toml"

    def comments(source: Path, *options: object) -> list[str]:
        assert cli(COMMAND, source, "--count", 2, "--save", path, "--overwrite", "--quiet", *options) == 0
        assert layer_maps.load(path).gqa_layers
        text = path.read_text()
        assert str(tmp_path) not in text
        assert str(tiny_teacher) not in text
        return [line[2:] for line in text.splitlines() if line.startswith("# ")]

    of_student = ["--strategy", "kl", "--teacher", tiny_teacher, "--from", make("b", "none"), "--seed", 3, *tokens]
    found = comments(make("a", "1,5"), *of_student, "--scale", "key=0.7")
    assert {"SOURCE: a", "teacher: teacher", "--kl-mode restore"} <= set(found)
    assert "RWKV layers that exist nowhere yet: --preset openmose-stage1 --scale key=0.7 --seed 3" in found
    assert "layers that SOURCE has as GQA: b, where RWKV there" in found
    assert any(line.startswith("kl total: ") for line in found)
    assert any(re.fullmatch(r"uniform would take 2, 5: [012] of 2 in common", line) for line in found)
    found = comments(tiny_teacher, "--strategy", "influence", *tokens)
    assert "SOURCE: teacher" in found
    assert not any("preset" in line for line in found)
    log = tmp_path / "stage1.csv"
    names = [f"layer_{i}_{kind}" for kind in ("rawMSE", "scale") for i in range(6)]
    rows = [",".join(map(str, [step, *range(1, 13)])) for step in range(3)]
    log.write_text("\n".join([",".join(["step", *names]), *rows]))
    found = comments(tiny_teacher, "--strategy", "log", "--log", log)
    assert "training log: stage1.csv" in found
    assert "layer, log, residue, slow convergence, slow alignment, scale mismatch, instability" in found


def test_layers_and_other_options_are_judged_at_once(
    cli: Cli, make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [COMMAND, make("a", "1,5"), tmp_path / "b", "--layers", "5,99", "--scale", "nope=1"]
    assert cli(*words) == 2
    error = capsys.readouterr().err
    for part in ("out of range (the last is 5): 99", "'nope=1' is not one of"):
        assert part in error
    assert cli(*words, "--max-shard-size", "huge", "--workers", "0", "--seed", "-1") == 2
    error = capsys.readouterr().err
    for part in ("--max-shard-size: 'huge' is not a size", "--workers: 0 is not possible", "--seed: -1"):
        assert part in error


def test_shards_that_are_only_linked_need_no_space(
    cli: Cli,
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = ("--max-shard-size", "1MB", "--no-verify", "--quiet")
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "s", "--gqa-layers", "2,5", *shards) == 0
    pick = ("pick-gqa-layers", tmp_path / "s", tmp_path / "p", "--layers", "2", "--teacher", tiny_teacher, *shards[:3])
    monkeypatch.setattr("hxaconv.formats.diskio.free_bytes", lambda folder: 4_000_000)
    capsys.readouterr()
    assert cli(*pick) == 0
    assert "hard links to the source's" in capsys.readouterr().err
    whole = sum(path.stat().st_size for path in (tmp_path / "p").glob("*.safetensors"))
    assert whole > 4_000_000


def test_a_training_file_holds_attention_alone_whatever_made_it(
    cli: Cli, tiny_teacher: Path, make: Callable[..., Path], tmp_path: Path
) -> None:
    student = make("s", "2,5")
    training = ("--teacher", tiny_teacher, "--format", "training", "--quiet")
    assert cli("pick-gqa-layers", student, tmp_path / "p.pth", "--layers", "1,5", *training) == 0
    ids = ("--input-ids", tiny_teacher / "calibration_tokens.npy", "--tokens", "64", "--refine-steps", "0")
    assert cli("calibrate", student, tmp_path / "c.pth", *ids, *training) == 0
    for name in ("p.pth", "c.pth"):
        held = torch.load(tmp_path / name)
        assert held and all(".student_attn." in key for key in held)
