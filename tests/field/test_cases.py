"""Each situation gives its right outcome: the bits that transformers or torch read, or a refusal with its cure."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.field import builder
from tests.field.cases import CASES, READ, REFUSED, Case

Cli = Callable[..., int]


def run(case: Case, cli: Cli, path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, Path]:
    """(exit code, what was said, the input) of a case's command."""
    teacher = builder.teacher(path / "teacher")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.build(path / "in")
    source = path / "in" / case.inside
    places = {"in": source, "out": path / "out", "teacher": teacher}
    for name, layer in (("map", 1), ("wrong_map", 0)):
        places[name] = path / f"{name}.toml"
        places[name].write_text(f"gqa_layers = [{layer}]")
    capsys.readouterr()
    code = cli(*[word.format(**places) for word in case.command], "--no-verify", "--quiet")
    return code, " ".join(capsys.readouterr().err.split()), source


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_right_outcome(case: Case, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, source = run(case, cli, tmp_path, capsys)
    if case.outcome == REFUSED:
        assert code == 2, said
        assert [word for word in case.words if word not in said] == [], said
        assert "What to do" in said or "pass" in said or case.do.startswith("take"), said
        assert not (tmp_path / "out").exists()
        return
    assert code == 0, said
    assert [word for word in case.words if word not in said] == [], said
    if case.expected is None:
        return
    written = load_file(tmp_path / "out" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = case.expected(source)
    names = [name for name in expected if name in written]
    assert len(names) > 8 or len(names) == len(expected)
    different = [name for name in names if not torch.equal(written[name], expected[name].to(torch.bfloat16))]
    assert different == []


@pytest.mark.parametrize("case", [case for case in CASES if case.kind], ids=lambda case: case.name)
def test_inspect_says_what_it_is(case: Case, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case.build(tmp_path / "in")
    assert cli("inspect", tmp_path / "in" / case.inside) == 0
    assert case.kind in " ".join(capsys.readouterr().out.split())


def test_the_comparison_sees_a_difference() -> None:
    assert not torch.equal(builder.tensors()["model.norm.weight"], builder.noise(32, seed=1))
    assert {case.outcome for case in CASES} >= {READ, REFUSED}
