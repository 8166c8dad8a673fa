"""Signals that the command line sends itself at a given call: one line, and the exit code that belongs to it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from writing import leftovers, partials

PROGRAM = """
import atexit, importlib, os, sys
from hxaconv.__main__ import main

def strike_at(place, number):
    module, _, names = place.partition(":")
    if place == "atexit":
        atexit.register(os.kill, os.getpid(), number)
        return
    owner = importlib.import_module(module)
    *owners, name = names.split(".")
    for part in owners:
        owner = getattr(owner, part)
    real = getattr(owner, name)

    def struck(*arguments, **options):
        os.kill(os.getpid(), number)
        return real(*arguments, **options)

    setattr(owner, name, struck)

class StrikeAtImport:
    def find_spec(self, name, path=None, target=None):
        if name in AT_IMPORT:
            os.kill(os.getpid(), AT_IMPORT.pop(name))

AT_IMPORT = {{}}
sys.meta_path.insert(0, StrikeAtImport())
for place, number in {strikes!r}:
    if place.startswith("import "):
        AT_IMPORT[place.removeprefix("import ")] = number
    else:
        strike_at(place, number)
sys.argv = ["hxaconv", *{words!r}]
sys.exit(main())
"""
INT, TERM = int(signal.SIGINT), int(signal.SIGTERM)
PLANNING = "hxaconv.commands.init:load_teacher"
WRITTEN = "hxaconv.save.checks:put"
KEPT = "hxaconv.save.staging:Staging.what_is_kept"
SAYING = "hxaconv.cli.console:Talk.say"
PUBLISHING = "hxaconv.save.staging:_rename_into_place"
TELLING = "hxaconv.cli.console:Talk.show"


@pytest.fixture
def convert(tiny_teacher: Path, tmp_path: Path):
    """Convert to `out`, sending signals where told; returns (exit code, lines on stderr)."""

    def call(*strikes: tuple[str, int]) -> tuple[int, list[str]]:
        words = ["init-from-teacher", str(tiny_teacher), str(tmp_path / "out"), "--no-verify", "--quiet"]
        program = PROGRAM.format(strikes=strikes, words=words)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        return done.returncode, done.stderr.splitlines()

    return call


@pytest.mark.parametrize("place", ["import typer", "import hxaconv.commands.init", PLANNING])
@pytest.mark.parametrize("number", [INT, TERM])
def test_before_the_first_byte(convert, tmp_path, place, number):
    assert convert((place, number)) == (128 + number, ["Interrupted; nothing was published."])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([KEPT], marks=pytest.mark.slow),
        pytest.param([SAYING], marks=pytest.mark.slow),
        ["atexit"],
        [KEPT, SAYING, "atexit"],
    ],
)
@pytest.mark.parametrize("second", [INT, TERM])
def test_further_signals_leave_the_line_and_the_exit_code_of_the_first(convert, tmp_path, more, second):
    code, lines = convert((WRITTEN, TERM), *((place, second) for place in more))
    assert code == 143
    (partial,) = partials(tmp_path)
    assert len(lines) == 1
    assert lines[0].startswith("Interrupted. ")
    assert lines[0].endswith(f" finished tensors are kept in {partial}; the same command with --resume continues.")


def test_while_publishing_the_output_is_finished_and_reported(convert, tmp_path):
    assert convert((PUBLISHING, INT), (PUBLISHING, TERM)) == (0, [])
    assert leftovers(tmp_path / "out") == []
    assert (tmp_path / "out" / "hxaconv.json").exists()


def test_once_published_the_output_is_said_to_be_complete(convert, tmp_path):
    assert convert((TELLING, TERM)) == (143, [f"Interrupted. {tmp_path / 'out'} is complete."])
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("number", [INT, TERM])
def test_after_the_last_word_the_exit_code_stands(convert, tmp_path, number):
    assert convert(("atexit", number)) == (0, [])
    assert (tmp_path / "out").is_dir()
