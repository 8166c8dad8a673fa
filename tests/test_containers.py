"""Readers against torch and safetensors themselves: the same names, shapes, dtypes and bytes."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import forge
from safetensors.torch import load_file, save_file

from hxaconv.errors import HxaconvError
from hxaconv.formats import Contents, read_contents
from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.files import SourceFile
from hxaconv.formats.gathered import Strided, is_contiguous, overlaps_itself, span
from hxaconv.formats.pickles import parse
from hxaconv.model.plan import Buffers

GOLDEN = Path(__file__).parent / "golden"
FORMS = {"zip": True, "legacy": False}


def contents(path: Path) -> Contents:
    return read_contents(SourceFile.local(path))


def raw(tensor: torch.Tensor) -> bytes:
    """Row-major bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(found: Contents, expected: dict[str, Any]) -> None:
    buffers = Buffers()
    assert list(found.tensors) == list(expected)
    for name, recipe in found.tensors.items():
        tensor = expected[name]
        assert recipe.shape == tuple(tensor.shape), name
        assert BY_NAME[recipe.dtype].torch_name == str(tensor.dtype).removeprefix("torch."), name
        assert b"".join(bytes(piece) for piece in recipe.chunks(buffers)) == raw(tensor), name


@pytest.mark.parametrize("path", sorted(GOLDEN.rglob("*.pth")), ids=lambda p: "/".join(p.parts[-2:]))
def test_golden_pth(path: Path) -> None:
    found = contents(path)
    assert found.container == "pth"
    assert_same(found, torch.load(path))


@pytest.mark.parametrize("path", sorted(GOLDEN.rglob("*.safetensors")), ids=lambda p: "/".join(p.parts[-3:]))
def test_golden_safetensors(path: Path) -> None:
    found, expected = contents(path), load_file(path)
    assert_same(found, {name: expected[name] for name in found.tensors})
    assert found.tensors.keys() == expected.keys()


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    source = GOLDEN / "reka_tiny" / "student.pth"
    data = bytearray(source.read_bytes())
    offset = contents(source).tensors["emb.weight"].make.extents[0].offset  # type: ignore[attr-defined]
    data[offset] ^= 1
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(AssertionError):
        assert_same(contents(tmp_path / "x.pth"), torch.load(source))


def everything() -> dict[str, torch.Tensor]:
    """Tensors in all the forms in which state dicts hold them."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(12, 10, generator=generator)
    made: dict[str, torch.Tensor] = {
        "plain": base,
        "tied": base,
        "transposed": torch.randn(7, 5, generator=generator).t(),
        "columns": torch.randn(9, 11, generator=generator)[2:5, 1:7],
        "permuted": torch.randn(3, 4, 5, generator=generator).permute(2, 0, 1),
        "every_other": torch.arange(20)[3::4],
        "parameter": torch.nn.Parameter(torch.randn(3, generator=generator)),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "one_row": torch.randn(1, 6, generator=generator).expand(1, 6),
    }
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"):
        made[f"dtype_{name}"] = torch.arange(6).to(getattr(torch, name)).reshape(2, 3)
    return made


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_torch_save_in_every_protocol(form: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(everything(), path, _use_new_zipfile_serialization=FORMS[form], pickle_protocol=protocol)
    found = contents(path)
    assert_same(found, everything())
    assert found.extra["aliases"] == [["plain", "tied"]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict"])
def test_training_checkpoint_around_the_state_dict(form: str, key: str, tmp_path: Path) -> None:
    state = {"w": torch.randn(3, 2), "v": torch.randn(2)}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.randn(3, 2)}}, "param_groups": [{"betas": (0.9, 0.95)}]}
    path = tmp_path / "x.pth"
    whole = {"epoch": 3, "rng": torch.get_rng_state(), key: OrderedDict(state), "optimizer": optimizer}
    torch.save(whole, path, _use_new_zipfile_serialization=FORMS[form])
    found = contents(path)
    assert_same(found, state)
    assert found.extra["nested_under"] == key
    assert found.extra["ignored"] == ["epoch", "rng", "optimizer"]


def test_two_wrappers_deep(tmp_path: Path) -> None:
    torch.save({"module": {"model": {"w": torch.ones(2)}}}, tmp_path / "x.pth")
    found = contents(tmp_path / "x.pth")
    assert found.extra["nested_under"] == "module.model"
    assert list(found.tensors) == ["w"]


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_of_a_module_with_metadata(form: str, tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=FORMS[form])
    assert_same(contents(tmp_path / "x.bin"), state)


def test_parts_of_one_storage(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    torch.save(dict(zip("abc", whole.split(2), strict=True)), tmp_path / "x.pth")
    assert_same(contents(tmp_path / "x.pth"), dict(zip("abc", whole.split(2), strict=True)))


@pytest.mark.parametrize("low_byte", [0x50, 0x80])
def test_safetensors_whatever_its_length_begins_with(low_byte: int, tmp_path: Path) -> None:
    """0x80 is also how pickles begin."""
    metadata = {"pad": ""}
    tensors = {"w": torch.ones(2, dtype=torch.bfloat16)}
    for padding in range(256):
        metadata["pad"] = "x" * padding
        save_file(tensors, tmp_path / "x.safetensors", metadata)
        if (tmp_path / "x.safetensors").read_bytes()[0] == low_byte:
            break
    else:
        pytest.fail("no header of such a length")
    found = contents(tmp_path / "x.safetensors")
    assert_same(found, tensors)


def test_metadata_may_quote_json(tmp_path: Path) -> None:
    metadata = {"settings": "[[[{" * 2_000}
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors", metadata)
    assert_same(contents(tmp_path / "x.safetensors"), {"w": torch.ones(2)})


def test_zip_written_by_another_program(tmp_path: Path) -> None:
    """No alignment, data descriptors, directory in another order: what Python's zipfile makes of it."""
    torch.save({"w": torch.arange(6.0), "v": torch.ones(3)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as old, (tmp_path / "y.pth").open("wb") as out:
        out.seekable = lambda: False  # type: ignore[method-assign]
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
            for name in reversed(old.namelist()):
                new.writestr(name.replace("x/", "another/", 1), old.read(name))
    found = contents(tmp_path / "y.pth")
    assert_same(found, {"w": torch.arange(6.0), "v": torch.ones(3)})


def test_local_name_and_extra_of_other_lengths(tmp_path: Path) -> None:
    data = struct.pack("<4f", *range(4))
    value = forge.dict_of({"w": forge.tensor(forge.storage("0", 4, "FloatStorage"), (4,))})
    path = forge.zip_file(
        tmp_path / "x.pth",
        forge.torch_records(value, {"0": data}),
        local={"archive/data/0": {"name": b"archive/data/00", "extra": b"abcd" * 7}},
    )
    assert_same(contents(path), {"w": torch.arange(4.0)})


def test_zip64_and_a_file_beyond_every_32_bit_number(tmp_path: Path) -> None:
    """Two storages, one of 5 GB that is a hole, one whose local header stands behind it."""
    numel = 2_500_000_000
    value = forge.dict_of(
        {
            "big": forge.tensor(forge.storage("0", numel), (50_000, 50_000)),
            "small": forge.tensor(forge.storage("1", 4, "FloatStorage"), (4,)),
        }
    )
    storages = {"0": 2 * numel, "1": struct.pack("<4f", *range(4))}
    path = forge.zip_file(tmp_path / "x.pth", forge.torch_records(value, storages))
    found = contents(path)
    assert found.tensors["big"].nbytes == 2 * numel
    assert b"".join(map(bytes, found.tensors["small"].chunks(Buffers()))) == storages["1"]
    with zipfile.ZipFile(path) as judge:
        assert judge.read("archive/data/1") == storages["1"]


def test_42_gigabytes_are_opened_from_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, numel = 300, 70_000_000
    value = forge.dict_of({f"t{i}": forge.tensor(forge.storage(str(i), numel), (numel,)) for i in range(count)})
    path = forge.zip_file(tmp_path / "x.pth", forge.torch_records(value, {str(i): 2 * numel for i in range(count)}))
    read: list[int] = []
    honest = SourceFile.read
    monkeypatch.setattr(SourceFile, "read", lambda self, at, n: read.append(n) or honest(self, at, n))
    found = contents(path)
    assert sum(recipe.nbytes for recipe in found.tensors.values()) == 42_000_000_000
    assert sum(read) < 300_000


def test_headers_are_digested(tmp_path: Path) -> None:
    """A new header or layout changes the digest, new weights alone do not."""
    digests = []
    for shape, value in (((2, 3), 0.0), ((2, 3), 1.0), ((3, 2), 0.0)):
        for form in FORMS.values():
            torch.save({"w": torch.full(shape, value)}, tmp_path / "x.pth", _use_new_zipfile_serialization=form)
            file = SourceFile.local(tmp_path / "x.pth")
            pickles = read_contents(file)
            digests.append((pickles.container, shape, file.header_digest))
        save_file({"w": torch.full(shape, value)}, tmp_path / "x.safetensors")
        file = SourceFile.local(tmp_path / "x.safetensors")
        read_contents(file)
        digests.append(("safetensors", shape, file.header_digest))
    by_form = {(kind, shape): digest for kind, shape, digest in digests}
    assert by_form["safetensors", (2, 3)] != by_form["safetensors", (3, 2)]
    assert by_form["pth", (2, 3)] != by_form["pth", (3, 2)]
    assert len({d for kind, shape, d in digests if kind == "safetensors" and shape == (2, 3)}) == 1
    assert all(len(digest) == 64 for _, _, digest in digests)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[:, 3:17],
        lambda t: t[5::7, ::3],
        lambda t: t.reshape(30, 2, 20)[:, 1].t(),
        lambda t: t.reshape(3, 10, 4, 10).permute(3, 1, 0, 2),
    ],
)
@pytest.mark.parametrize("block_bytes", [16, 100, 10**6])
def test_strided_in_blocks_of_any_size(view: Any, block_bytes: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("hxaconv.formats.gathered.BLOCK_BYTES", block_bytes)
    whole = torch.randn(30, 40)
    (tmp_path / "x").write_bytes(b"before" + raw(whole))
    part = view(whole)
    file = SourceFile.local(tmp_path / "x")
    gathered = Strided(file, 6 + part.storage_offset() * 4, 4, tuple(part.shape), part.stride())
    pieces = [bytes(piece) for piece in gathered.chunks(Buffers(64))]
    assert b"".join(pieces) == raw(part)
    assert max(map(len, pieces)) <= 64


def test_geometry_of_strides() -> None:
    for shape, strides in [((3, 4), (4, 1)), ((1, 4), (99, 1)), ((3, 1), (1, 7)), ((0, 5), (1, 1)), ((), ())]:
        assert is_contiguous(shape, strides)
        assert not overlaps_itself(shape, strides)
    assert not is_contiguous((3, 4), (1, 3))
    assert not overlaps_itself((3, 4), (1, 3))
    assert overlaps_itself((3, 4), (0, 1))
    assert overlaps_itself((3, 4), (3, 1))
    assert span((3, 4), (10, 2)) == 27


def test_whatever_pickle_writes_of_plain_data_is_read_the_same() -> None:
    value = {
        "numbers": [0, 1, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**63, -(2**80), True, False, None, 0.5],
        "text": ["", "a", "ä" * 300, "x" * 70_000],
        "bytes": [b"", b"a", b"b" * 300],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        3: {"deep": {"deeper": [[[]]]}},
        None: OrderedDict([("a", 1), ("b", 2)]),
    }
    for protocol in (2, 3, 4, 5):
        # Protocol 2 pickles bytes through a codec, which no state dict needs.
        wanted = {key: item for key, item in value.items() if key != "bytes"} if protocol == 2 else value
        data = pickle.dumps(wanted, protocol)
        stream = io.BytesIO(b"xx" + data + b"yy")
        stream.seek(2)
        assert parse(stream, "test").value == wanted
        assert stream.read() == b"yy"


def test_every_truncation_of_a_pickle_is_refused() -> None:
    data = pickle.dumps({"a": [1, 2.5, ("x", None)], "b": OrderedDict(c=2**40)}, 2)
    for length in range(len(data)):
        with pytest.raises(HxaconvError):
            parse(io.BytesIO(data[:length]), "test")


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys; from hxaconv.load.checkpoint import open_checkpoint\n"
        "for path in sys.argv[1:]: assert open_checkpoint(path).plan\n"
        "print(sorted({'torch', 'numpy', 'huggingface_hub', 'rich'} & set(sys.modules)))"
    )
    paths = [GOLDEN / "reka_tiny" / "teacher", GOLDEN / "reka_tiny" / "student.pth"]
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "[]"
