"""What the README says: its commands run, its output is what the commands print."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., int]

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
OUTPUTS = re.findall(r"<!-- output: hxaconv (.*?) -->\n```text\n(.*?)```", README, re.DOTALL)
SCREEN = re.findall(r"^\$ hxaconv (\w+-.*RekaAI.*?|verify .*?) *#", README, re.MULTILINE)
TABLE = re.findall(r"^\|[^|]+\|[^|]+\| (`hxaconv .*`) \|$", README, re.MULTILINE)


@pytest.fixture
def workplace(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README's commands name: a teacher with a tokenizer, and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "teacher" / "tokenizer.json"))
    (tmp_path / "sample.txt").write_text(README[:2000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(text: str) -> list[str]:
    """Lines that say something, without the spaces that tables end on."""
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_the_output_shown_is_the_real_one(cli: Cli, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("init-from-teacher", "teacher", "changed", "--gqa-layers", "2,5", "--scale", "value=0.4", "-q") == 0
    assert len(OUTPUTS) == 2
    for command, text in OUTPUTS:
        capsys.readouterr()
        words = command.format(teacher="teacher", out=".").replace("./", "").split()
        assert cli(*words) in (0, 1)
        printed = shown(capsys.readouterr().out)
        start = printed.index(shown(text)[0])
        assert printed[start : start + len(shown(text))] == shown(text), command


SUBSTITUTES = {
    "TEACHER": "teacher",
    "RekaAI/reka-flash-3": "teacher",
    "reka-flash-3": "map.toml",
    "trained.pth": "attention.pth",
    "8,15,22": "2,5",
    "6": "2",
    "ONE": "hf",
    "OTHER": "model.pth",
}


def test_the_commands_of_the_table_run(cli: Cli, workplace: Path) -> None:
    commands = [found for row in TABLE for found in re.findall(r"`hxaconv ([^`]*)`", row)]
    assert len(commands) >= 10 and len(SCREEN) == 3
    # What the table's first rows start from.
    assert cli("pick-gqa-layers", "teacher", "--count", "2", "--save", "map.toml", "-q") == 0
    assert cli("init-from-teacher", "teacher", "attention.pth", "--format", "training", "-q") == 0
    quick = ["--tokens", "64", "--refine-steps", "2"]
    for command in commands:
        words = [SUBSTITUTES.get(word, word) for word in shlex.split(command)]
        words += quick if {"calibrated", "calibrate"} & set(words) else []
        words += ["--overwrite"] if words[0].startswith(("init", "to-")) else []
        assert cli(*words, "--quiet") == 0, command
    for command in SCREEN:
        words = [SUBSTITUTES.get(word, word) for word in shlex.split(command)]
        words += ["--overwrite"] if words[0] != "verify" else []
        assert cli(*words, "--quiet") == 0, command


def test_the_python_code_runs(workplace: Path) -> None:
    block = re.search(r"## From Python\n\n```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    scope: dict[str, object] = {}
    exec(block[1], scope)
    assert (workplace / "student.pth").exists()


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target


def test_the_annotated_tree_is_true() -> None:
    root = Path(__file__).parents[1]
    text = (root / "docs" / "design.md").read_text(encoding="utf-8")
    tree = re.search(r"```text\nlayer_maps/(.*?)```", text, re.DOTALL)
    assert tree is not None
    for name in re.findall(r"\b([a-z_0-9]+\.py)\b", tree[1]):
        assert list((root / "hxaconv").rglob(name)), name
    for name in re.findall(r"^  ([a-z]+)/", tree[1], re.MULTILINE):
        assert (root / "hxaconv" / name).is_dir(), name
    rows = re.findall(r"^\| [^|]+ \| `([\w/.]+\.py)` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 9
    for file, description in rows:
        source = (root / "hxaconv" / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(@?\w+)`", description):
            start = "@" if name[0] == "@" else "(def |class |@)?"  # a decorator is one only where it decorates
            assert re.search(rf"^\s*{start}{name.removeprefix('@')}\b", source, re.MULTILINE), (file, name)
        for other in re.findall(r"`([\w/]+\.py)`", description):
            assert (root / "hxaconv" / other).is_file(), other
