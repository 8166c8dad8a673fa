"""Probe tokens: drawn from a seed, read from files, or those of a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hxaconv.errors import HxaconvError
from hxaconv.formats.files import SourceFile
from hxaconv.forward import tokens as probe
from hxaconv.forward.tokens import probe_tokens


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


@pytest.mark.parametrize("content", ["[]", "[[], []]"])
def test_a_file_without_ids_is_called_empty(content: str, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(HxaconvError, match=r"ids\.json is empty: it holds no token ids"):
        probe_tokens(97, input_ids=tmp_path / "ids.json")
