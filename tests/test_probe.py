"""Probe tokens: drawn from a seed, read from files, or those of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GOLDEN, teacher
from safetensors.torch import save_file
from torch import Tensor

from hxaconv.errors import HxaconvError
from hxaconv.formats.files import SourceFile
from hxaconv.forward import tokens as probe
from hxaconv.forward.tokens import probe_tokens
from hxaconv.options import Probe


def test_probe_tokens_depend_on_the_seed() -> None:
    assert torch.equal(probe_tokens(97), probe_tokens(97))
    assert not torch.equal(probe_tokens(97), probe_tokens(97, seed=1))
    assert probe_tokens(97, tokens=5, batch=3).shape == (3, 5)


def write_ids(path: Path, values: Tensor) -> None:
    if path.suffix == ".npy":
        import numpy as np

        np.save(path, values.numpy())
    elif path.suffix == ".safetensors":
        save_file({"input_ids": values}, path)
    else:
        path.write_text(json.dumps(values.tolist()))


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".json"])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_ids_are_read_from_files(suffix: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path, values = tmp_path / f"ids{suffix}", torch.randint(97, shape)
    write_ids(path, values)
    assert torch.equal(probe_tokens(97, input_ids=path), values.view(-1, shape[-1]))
    with pytest.raises(HxaconvError, match="the vocabulary has"):
        probe_tokens(int(values.max()), input_ids=path)
    write_ids(path, torch.rand(4))
    with pytest.raises(HxaconvError, match="not token ids"):
        probe_tokens(97, input_ids=path)


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"1 2"), ("a.npy", b"no"), ("a.json", b"{"), ("b.json", b"[]"), ("c.json", b"{}")]
)
def test_files_that_hold_no_ids_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HxaconvError, match="token ids"):
        probe_tokens(97, input_ids=tmp_path / name)


def test_text_needs_a_tokenizer_and_enough_tokens(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")

    text = tmp_path / "sample.txt"
    text.write_text("a b a c b")
    with pytest.raises(HxaconvError, match=r"tokenizer\.json"):
        probe_tokens(97, text=text)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 1, "b": 2, "c": 3}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    file = SourceFile.local(tmp_path / "tokenizer.json")
    assert probe_tokens(97, text=text, tokenizer=file).tolist() == [[1, 2, 1, 3, 2]]
    assert probe_tokens(97, text=text, tokenizer=file, tokens=2, batch=2).tolist() == [[1, 2], [1, 3]]
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(HxaconvError, match=r"empty\.txt is empty") as caught:
        probe_tokens(97, text=tmp_path / "empty.txt", tokenizer=file)
    assert "--batch" not in str(caught.value)
    with pytest.raises(HxaconvError, match="5 tokens, 2 x 3"):
        probe_tokens(97, text=text, tokenizer=file, tokens=3, batch=2)


def test_of_a_long_text_only_the_beginning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "aé bc " * 40_000
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"aé": 1, "bc": 2}, unk_token="bc"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "long.txt").write_text(content)
    file = SourceFile.local(tmp_path / "tokenizer.json")
    read: list[int] = []
    beginning = probe._beginning
    monkeypatch.setattr(probe, "_beginning", lambda text, size: (read.append(size), beginning(text, size))[1])
    found = probe_tokens(97, text=tmp_path / "long.txt", tokenizer=file, tokens=500)
    assert max(read) < 20_000
    (tmp_path / "short.txt").write_text(content[:9000])
    assert found.tolist() == probe_tokens(97, text=tmp_path / "short.txt", tokenizer=file, tokens=500).tolist()
    # A character of several bytes may be cut, a broken one in what is used is told of.
    assert probe._beginning(tmp_path / "long.txt", 2) == ("a", False)
    (tmp_path / "broken.txt").write_bytes(content.encode()[:50] + b"\xff" + content.encode())
    with pytest.raises(HxaconvError, match="not UTF-8"):
        probe_tokens(97, text=tmp_path / "broken.txt", tokenizer=file, tokens=5)


def test_a_text_that_cannot_be_read_is_told_of_before_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"abc\xff")
    for name, said in (
        ("absent.txt", "absent.txt cannot be read: No such file or directory"),
        (".", "cannot be read: Is a directory"),
        ("bytes.txt", "bytes.txt is not UTF-8 text: invalid start byte at byte 3"),
    ):
        with pytest.raises(HxaconvError) as caught:
            probe_tokens(97, text=tmp_path / name)
        assert said in str(caught.value)
        assert "Errno" not in str(caught.value)


def test_a_text_given_as_token_ids_is_led_to_its_option(tmp_path: Path) -> None:
    with pytest.raises(HxaconvError) as caught:
        probe_tokens(97, input_ids=tmp_path / "sample.txt")
    assert "--text" in caught.value.hint
    with pytest.raises(HxaconvError) as caught:
        probe_tokens(97, input_ids=tmp_path / "absent.npy")
    assert "--text" not in caught.value.hint
    for name in ("torn.npy", "torn.json", "other.json"):
        (tmp_path / name).write_text('{"a": [1]' + ("}" if name == "other.json" else ""))
        with pytest.raises(HxaconvError) as caught:
            probe_tokens(97, input_ids=tmp_path / name)
        assert caught.value.hint == probe.EXPECTED


@pytest.mark.parametrize("dtype", ["float32", "float16", "bool", "complex64"])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", "memory"])
def test_what_is_no_token_id_is_called_by_its_own_name(dtype: str, suffix: str, tmp_path: Path) -> None:
    values, path = torch.ones(4, dtype=getattr(torch, dtype)), tmp_path / f"ids{suffix}"
    if suffix == "memory":
        given: Any = values.numpy()
    else:
        try:
            write_ids(path, values)
        except KeyError:
            pytest.skip("this release of safetensors stores no complex numbers")
        given = path
    with pytest.raises(HxaconvError, match=rf"holds {dtype} of shape \(4,\), not token ids"):
        probe_tokens(97, input_ids=given)
    assert probe_tokens(97, input_ids=values.real.to(torch.uint8)).tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"ids": [1], "mask": [1]}', "it holds ids, mask, and no input_ids"),
        ("{}", "it holds nothing, and no input_ids"),
        ("[[1, 2], [3]]", "rows of different lengths"),
        ('["a", "b"]', "holds text of shape"),
        ("[1.5]", "holds float64 of shape"),
        ("[true]", "holds bool of shape"),
        ("7", "of shape ()"),
        ('{"input_ids": null}', "other things than numbers"),
        ("[[[1]]]", "of shape (1, 1, 1)"),
        ("[" + "9" * 5000 + "]", "a number of thousands of digits"),
        ("[" * 100000, "nested too deeply"),
        ('{"input_ids": [1], "input_ids": [2]}', "occurs twice"),
        ("[-1]", "token ids -1..-1"),
        (f"[{10**30}]", "other things than numbers"),
    ],
)
def test_json_without_token_ids_says_what_it_holds(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text(content)
    with pytest.raises(HxaconvError) as caught:
        probe_tokens(97, input_ids=path)
    assert said in str(caught.value) and "sys." not in str(caught.value)


def test_more_tokens_than_memory_holds_are_refused_with_a_number_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "memory_limit", lambda: 10**6)
    model = teacher("reka_tiny")
    need = probe.forward_need([model], "float32")
    for length in (10**9, 10**25):
        with pytest.raises(HxaconvError, match="memory") as caught:
            probe.tokens_of(Probe(tokens=length), 97, model.opened, need)
        fits = int(caught.value.hint.split()[1])
        assert need(1, fits) <= 10**6 < need(1, fits + 1)
    assert probe.tokens_of(Probe(tokens=fits), 97, model.opened, need).shape == (1, fits)
    with pytest.raises(HxaconvError, match="2 sequences of"):
        probe.tokens_of(Probe(tokens=fits), 97, model.opened, need, batch=2)
    with pytest.raises(HxaconvError, match=f"{fits + 1:,} tokens need"):
        probe.tokens_of(Probe(input_ids=[[1] * (fits + 1)]), 97, model.opened, need)
    monkeypatch.setattr(probe, "memory_limit", lambda: None)
    assert probe.tokens_of(Probe(tokens=fits + 1), 97, model.opened, need).shape == (1, fits + 1)


@pytest.mark.parametrize("command", ["verify", "init-from-teacher", "pick-gqa-layers"])
def test_a_billion_tokens_are_refused_by_every_command(command: str, cli: Any, tmp_path: Path, capsys: Any) -> None:
    more = {
        "init-from-teacher": [tmp_path / "out", "--init", "calibrated", "--random-tokens"],
        "pick-gqa-layers": ["--strategy", "mse", "--count", "1"],
    }
    folder = GOLDEN / "reka_tiny" / "teacher"
    assert cli(command, folder, *more.get(command, ()), "--tokens", str(10**12)) == 2
    assert "of memory" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", "[[], []]"])
def test_a_file_without_ids_is_called_empty(content: str, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(HxaconvError, match=r"ids\.json is empty: it holds no token ids"):
        probe_tokens(97, input_ids=tmp_path / "ids.json")
