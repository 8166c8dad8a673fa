"""What somebody meets who has never used the program: help, suggestions, refusals before the work, narrow screens."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import hxaconv
from hxaconv.cli.app import run
from hxaconv.cli.tables import WIDTH, shown
from hxaconv.commands import COMMANDS
from hxaconv.progress import Result

Cli = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("words", [["-h"], ["verify", "-h"]])
def test_help_has_a_short_name(cli: Cli, words: list[str], capsys: Capture) -> None:
    assert cli(*words) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("convert", "hxaconv to-hf or hxaconv to-pth"),
        ("init", "hxaconv init-from-teacher"),
        ("to", "hxaconv to-hf or hxaconv to-pth"),
        ("verfy", "hxaconv verify"),
    ],
)
def test_commands_that_there_are_not_bring_those_that_were_meant(
    cli: Cli, word: str, meant: str, capsys: Capture
) -> None:
    assert cli(word, "x") == 2
    assert f"Did you mean {meant}" in capsys.readouterr().err
    for word in ("nothing-like-it", "help", ""):
        assert cli(word) == 2
        assert "Commands: init-from-teacher, " in (said := capsys.readouterr().err) and "hxaconv --help" in said


def completed(*words: str) -> str:
    script = "from hxaconv.__main__ import main; import sys; sys.argv = ['hxaconv']; main()"
    environment = {"_HXACONV_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words)}
    environment |= {"COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=True)
    return done.stdout


def test_the_shell_completes_commands_and_options() -> None:
    assert {name for name in COMMANDS if name.startswith("to-")} == set(completed("hxaconv", "to-").split())
    assert "--max-shard-size" in completed("hxaconv", "to-hf", "--max").split()
    assert completed("hxaconv", "verify", "x", "--expect", "c").split() == ["calibrated", "close"]


def test_words_without_a_place_are_explained(cli: Cli, capsys: Capture) -> None:
    assert cli("verify", "one", "other") == 2
    assert "`hxaconv verify ONE --against other`" in capsys.readouterr().err
    assert cli("init-from-teacher", "one", "other", "--gqa-layers", "2", "5") == 2
    assert "separated by commas" in (said := capsys.readouterr().err) and "no use for 5" in said


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_is_in_words_of_the_command_line_and_fits_a_terminal(name: str) -> None:
    script = f"from hxaconv.__main__ import main; import sys; sys.argv = ['hxaconv', {name!r}, '--help']; main()"
    narrow = os.environ | {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=narrow, check=True)
    described = done.stdout.partition("╭")[0]
    assert not re.search(r"`|\w_\w", described.partition("Example")[0])
    assert "…" not in done.stdout


def test_a_switch_can_be_turned_either_way() -> None:
    assert option_of("--no-tie-word-embeddings") is False and option_of("--tie-word-embeddings") is True
    assert option_of() is None


def option_of(*words: str) -> object:
    """What `to-hf` is given as `tie_word_embeddings` by these words."""
    seen: list[object] = []

    def keep(function: object, name: str, values: dict[str, object], progress: object) -> Result:
        seen.append(values["tie_word_embeddings"])
        raise hxaconv.HxaconvError("that is all")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hxaconv.cli.app.invoke", keep)
        patch.setattr(sys, "argv", ["hxaconv", "to-hf", "one", "other", *words])
        assert run() == 2
    return seen[0]


def test_a_fault_of_ours_is_no_failed_check(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def faulty(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("hxaconv.cli.app.invoke", faulty)
    monkeypatch.setattr(sys, "argv", ["hxaconv", "maps"])
    assert run() == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and "KeyError: 'lost'" in said and "this is a fault of hxaconv" in said


def test_tests_see_a_fault_of_ours(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hxaconv.cli.app.invoke", lambda *_: {}["lost"])
    with pytest.raises(KeyError):
        cli("maps")


def test_what_is_opened_is_short_to_print(tiny_teacher: Path) -> None:
    assert len(repr(hxaconv.open_checkpoint(tiny_teacher))) < 100 + len(str(tiny_teacher))


@pytest.mark.parametrize("strategy", ["uniform", "last", "influence"])
def test_one_command_ranks_by_any_strategy(cli: Cli, tiny_teacher: Path, strategy: str, capsys: Capture) -> None:
    ids = ("--input-ids", tiny_teacher / "calibration_tokens.npy", "--tokens", 32)
    assert cli("pick-gqa-layers", tiny_teacher, "--count", 2, "--strategy", strategy, *ids) == 0
    assert ("looks at no tokens" in capsys.readouterr().err) == (strategy != "influence")


def test_the_small_teacher_cuts_text(cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "sample.txt").write_text("def main(words):\n    return 'é'\n", encoding="utf-8")
    assert cli("verify", tiny_teacher, "--text", tmp_path / "sample.txt", "--tokens", 8, "--json") == 0
    by_text = json.loads(capsys.readouterr().out)["settings"]
    report = hxaconv.verify(tiny_teacher, input_ids=list(b"def main"))
    assert by_text["tokens"] == report.settings["tokens"] == 8


def test_a_dry_run_refuses_what_the_run_would(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "there").mkdir()
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "there", "--dry-run") == 2
    assert "exists" in capsys.readouterr().err
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "no" / "folder", "--dry-run") == 2
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "new", "--dry-run", "--push-to", "no id") == 2
    assert "--push-to no id" in capsys.readouterr().err
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "new", "--dry-run") == 0
    monkeypatch.setattr("hxaconv.formats.diskio.free_bytes", lambda folder: 1_000_000)
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "new", "--dry-run") == 2
    assert "free" in capsys.readouterr().err


def test_the_plan_is_shown_before_the_work(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hxaconv.save.run.download", stop)
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "out", "--gqa-layers", "2,5") == 130
    assert "RRGRRG" in capsys.readouterr().out
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "out", "--gqa-layers", "2,5", "--json") == 130
    assert capsys.readouterr().out == ""


def words(result: Result, width: int) -> Counter[str]:
    """The words of a result on a screen of `width` columns; a word that is broken is two others."""
    from rich.console import Console

    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for part in shown(result, width):
        console.print(part, **({"markup": False} if isinstance(part, str) else {}))
    return Counter(re.sub(r"─+", "", console.export_text()).split())


def test_no_word_is_broken_at_eighty_columns(tiny_teacher: Path, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    fit = {"input_ids": str(tiny_teacher / "calibration_tokens.npy"), "tokens": 64, "refine_steps": 0}
    results = [
        hxaconv.inspect(tiny_teacher, stats=True),
        hxaconv.init_from_teacher(tiny_teacher, "a", init="calibrated", **fit),
        hxaconv.verify("a", against=tiny_teacher),
        hxaconv.pick_gqa_layers(tiny_teacher, strategy="influence", input_ids=fit["input_ids"], tokens=64),
        hxaconv.maps(),
        hxaconv.maps(names=True),
    ]
    for result in results:
        if isinstance(result, hxaconv.commands.inspect.Inspection):
            result.facts["path"] = "teacher"  # type: ignore[index]
        broken = words(result, WIDTH) - words(result, 300)
        assert not broken, f"{type(result).__name__}: {broken}"
    assert words(results[2], 30) - words(results[2], 300), "a screen that is too narrow breaks words"


@pytest.mark.slow
def test_the_demo_shows_every_step(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("demo") == 0
    said = capsys.readouterr().out
    for words in ("influence", "--init calibrated", "# The same model?", "What to try next:", "Everything is in"):
        assert words in said
    folder = tmp_path / "hxaconv-demo"
    assert {path.name for path in folder.iterdir()} >= {"teacher", "student", "student-calibrated", "student.pth"}
    plots = {"ranking.png", "calibration.png", "depth.png"}
    done = plots <= {path.name for path in folder.iterdir()}
    assert done or "Left out: plots" in said
    assert ("it continues" in said) or "Left out: text" in said
