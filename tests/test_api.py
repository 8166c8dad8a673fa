"""The commands as Python functions: their own arguments, documented, and nothing else accepted."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

import hxaconv
from hxaconv.model.names import layer_kinds

QUIET = hxaconv.WriteOptions(verify=False)
FUNCTIONS = [name for name in hxaconv.__all__ if inspect.isfunction(getattr(hxaconv, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_documented(name: str) -> None:
    function = getattr(hxaconv, name)
    text = inspect.getdoc(function) or ""
    assert "Raises:" in text
    if name != "open_checkpoint" and "arguments are those of" not in text:
        lacking = [argument for argument in inspect.signature(function).parameters if argument not in text]
        assert not lacking


def test_layers_are_numbers_or_text(tiny_teacher: Path, tmp_path: Path) -> None:
    made = [
        hxaconv.init_from_teacher(
            str(tiny_teacher), str(tmp_path / f"{i}.pth"), gqa_layers=layers, format="pth", write=QUIET
        )
        for i, layers in enumerate(([2, 5], "2,5", (5, 2)))
    ]
    first, *rest = (outcome.written.digests for outcome in made if outcome.written)
    assert len(rest) == 2 and all(other == first for other in rest)
    hxaconv.pick_gqa_layers(
        str(tmp_path / "0.pth"), str(tmp_path / "p"), layers=[4], teacher=str(tiny_teacher), write=QUIET
    )
    kinds = layer_kinds(hxaconv.open_checkpoint(tmp_path / "p").plan)
    assert [layer for layer, kind in kinds.items() if kind == "gqa"] == [4]
    hxaconv.pick_gqa_layers(
        str(tmp_path / "0.pth"), str(tmp_path / "n"), layers=[], teacher=str(tiny_teacher), write=QUIET
    )
    assert set(layer_kinds(hxaconv.open_checkpoint(tmp_path / "n").plan).values()) == {"rwkv"}


def test_settings_are_given_by_name_everywhere(golden: Path, tmp_path: Path) -> None:
    source = str(golden / "reka_tiny" / "student.pth")
    theta = json.loads((golden / "reka_tiny" / "teacher" / "config.json").read_text())["rope_theta"]
    settings = {"rope_theta": theta, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    assert hxaconv.verify(source, **settings).passed
    hxaconv.to_hf(source, str(tmp_path / "hf"), write=QUIET, **settings)
    assert hxaconv.inspect(str(tmp_path / "hf"))["variant"] == "hxa079"
    few = hxaconv.VerifyOptions(tokens=8)
    same = hxaconv.VerifyOptions(tokens=hxaconv.TokenOptions(tokens=8))
    found = [hxaconv.verify(str(tmp_path / "hf"), options=options).settings for options in (few, same)]
    assert found[0] == found[1] and found[0]["tokens"] == 8


@pytest.mark.parametrize(
    ("function", "argument"), [("to_pth", "copy_code"), ("to_training", "pad_ffn"), ("to_hf", "all_tensors")]
)
def test_an_argument_of_another_command_is_refused(function: str, argument: str) -> None:
    with pytest.raises(TypeError, match=argument):
        getattr(hxaconv, function)("a", "b", **{argument: True})
