"""Laid-out files are what the formats' own libraries read."""

from __future__ import annotations

import collections
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Literal
from safetensors import safe_open

from hxaconv.errors import HxaconvError
from hxaconv.formats import FileLayout, safetensors, torchzip
from hxaconv.formats.dtypes import BY_NAME, BY_TORCH_NAME
from hxaconv.model.plan import Buffers, Plan, Recipe

TORCH_DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


def plan_of(state: dict[str, torch.Tensor]) -> Plan:
    """The tensors as literals."""
    plan = {}
    for name, tensor in state.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        dtype = BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")].name
        plan[name] = Recipe(dtype, tuple(tensor.shape), Literal(data), name)
    return plan


def render(layout: FileLayout) -> bytes:
    """The whole file, in memory."""
    content, crcs = bytearray(layout.size), {}
    for offset, data in layout.segments():
        content[offset : offset + len(data)] = data
    for fill in layout.fills:
        data = b"".join(bytes(piece) for piece in fill.recipe.chunks(Buffers()))
        content[fill.offset : fill.offset + len(data)] = data
        crcs[fill.name] = zlib.crc32(data)
    for offset, data in layout.seal(crcs) if layout.seal else []:
        content[offset : offset + len(data)] = data
    assert len(content) == layout.size
    return bytes(content)


def pth(name: str, state: dict[str, torch.Tensor]) -> bytes:
    ordered = isinstance(state, collections.OrderedDict)
    return render(torchzip.file_layout(name, plan_of(state), ordered=ordered))


tensors = st.builds(
    lambda shape, dtype, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.lists(st.integers(0, 4), max_size=5),
    st.sampled_from(TORCH_DTYPES),
    st.integers(0, 99),
)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def opened(folder: Path, name: str, data: bytes) -> dict[str, torch.Tensor]:
    """What torch reads from these bytes; the checksums inside are compared by a zip reader that is not torch's."""
    (folder / name).write_bytes(data)
    with zipfile.ZipFile(folder / name) as archive:
        assert archive.testzip() is None
    return torch.load(folder / name, weights_only=True)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same bits under the same names, in order."""
    return list(one) == list(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.contiguous().view(-1).equal(b.contiguous().view(-1))
        for a, b in zip(one.values(), other.values(), strict=True)
    )


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(names, tensors, max_size=6), st.booleans())
def test_torch_reads_any_pth(tmp_path_factory, state, ordered):
    folder = tmp_path_factory.mktemp("saved")
    state = collections.OrderedDict(state) if ordered else state
    found = opened(folder, "x.pth", pth("x.pth", state))
    assert type(found) is type(state)
    assert same(found, state)


@pytest.mark.parametrize("name", ["a.b.pth", "noextension", "with space.pt", "été.pth"])
def test_pth_root_folder_follows_the_file_name(tmp_path, name):
    state = {"a": torch.arange(70000.0).reshape(70000, 1)}
    assert same(opened(tmp_path, name, pth(name, state)), state)
    with zipfile.ZipFile(tmp_path / name) as ours:
        found = ours.namelist()
    torch.save(state, tmp_path / name)
    with zipfile.ZipFile(tmp_path / name) as theirs:
        assert [name for name in theirs.namelist() if "/." not in name] == found


def test_pth_is_readable_in_every_way(tmp_path):
    state = collections.OrderedDict(a=torch.randn(3, 5), b=torch.ones(7, dtype=torch.bfloat16), c=torch.tensor(3))
    path = tmp_path / "x.pth"
    path.write_bytes(pth("x.pth", state))
    for options in ({}, {"mmap": True}):
        loaded = torch.load(path, weights_only=True, **options)
        assert list(loaded) == list(state)
        assert all(torch.equal(loaded[name], state[name]) for name in state)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        starts = [fill.offset for fill in torchzip.file_layout("x.pth", plan_of(state)).fills]
    assert all(start % 64 == 0 for start in starts)


def test_a_wrong_checksum_would_be_noticed(tmp_path):
    data = bytearray(pth("x.pth", {"a": torch.arange(10.0)}))
    data[torchzip.file_layout("x.pth", plan_of({"a": torch.arange(10.0)}), ordered=False).fills[0].offset] ^= 1
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "x/data/0"


def test_pth_beyond_4_gib_has_zip64_fields(tmp_path):
    shapes = {"a": ("U8", 1 << 20), "b": ("U8", (1 << 32) + 100), "c": ("F32", 3), "d": ("BF16", 5)}
    plan = {name: Recipe(dtype, (size,), Literal(b""), name) for name, (dtype, size) in shapes.items()}
    layout = torchzip.file_layout("big.pth", plan)
    assert all(fill.offset % 64 == 0 for fill in layout.fills)
    path = tmp_path / "big.pth"
    with open(path, "wb") as file:
        file.truncate(layout.size)  # sparse: the tensors are zeros
        zeros = {"a": zlib.crc32(bytes(1 << 20)), "b": 0, "c": zlib.crc32(bytes(12)), "d": zlib.crc32(bytes(10))}
        for offset, data in (*layout.segments(), *layout.seal(zeros)):
            file.seek(offset)
            file.write(data)
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: (info.file_size, info.header_offset) for info in archive.infolist()}
        assert sizes["big/data/1"][0] == (1 << 32) + 100
        assert sizes["big/data/3"][1] > 1 << 32
        assert archive.read("big/data/3") == bytes(10)
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {n: (s,) for n, (_, s) in shapes.items()}


def test_more_records_than_a_small_zip_counts(tmp_path):
    plan = {f"t{i}": Recipe("U8", (1,), Literal(b"\7"), "") for i in range(66000)}
    path = tmp_path / "many.pth"
    path.write_bytes(render(torchzip.file_layout("many.pth", plan)))
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 66003
        assert archive.read("many/data/65999") == b"\7"


def test_pth_refuses_types_without_a_storage_class():
    plan = {"x": Recipe("F8_E4M3", (2,), Literal(b"ab"), ""), "y": Recipe("U8", (1,), Literal(b"a"), "")}
    with pytest.raises(HxaconvError, match=r"x \(F8_E4M3\)") as caught:
        torchzip.file_layout("x.pth", plan)
    assert "y" not in caught.value.message.split(":", 1)[1]


def test_safetensors_are_read_by_their_own_library_in_our_order(tmp_path):
    state = {"z": torch.randn(2, 3), "a": torch.randn(5).bfloat16(), "m": torch.tensor(1.5, dtype=torch.bfloat16)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(render(safetensors.file_layout("model.safetensors", plan_of(state))))
    with safe_open(path, "pt") as file:
        assert file.offset_keys() == ["z", "a", "m"]
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), state[name]) for name in state)
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert header_bytes % 8 == 0


def test_safetensors_order_changes_only_where_a_tensor_would_be_misaligned():
    def order(*dtypes_and_sizes):
        plan = {
            f"{i}": Recipe(dtype, (n,), Literal(bytes(n * BY_NAME[dtype].itemsize)), "")
            for i, (dtype, n) in enumerate(dtypes_and_sizes)
        }
        return [fill.name for fill in safetensors.file_layout("m", plan).fills]

    assert order(("BF16", 4), ("I64", 1), ("BF16", 1)) == ["0", "1", "2"]
    assert order(("BF16", 1), ("I64", 1), ("U8", 3), ("F32", 1), ("BF16", 1)) == ["1", "3", "0", "4", "2"]


def test_shards_are_named_and_indexed_as_the_hub_does():
    plan = {f"layer.{i}": Recipe("F32", (10,), Literal(bytes(40)), "") for i in range(5)}
    layouts = safetensors.shard_layouts(plan, 450)
    assert all(layout.size <= 450 for layout in layouts)
    assert [layout.name for layout in layouts] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [fill.name for layout in layouts for fill in layout.fills] == list(plan)
    index = safetensors.index(plan, layouts)
    assert index["metadata"] == {"total_parameters": 50, "total_size": 200}
    assert list(index["weight_map"]) == list(plan)
    assert index["weight_map"]["layer.4"] == "model-00003-of-00003.safetensors"
    assert [layout.name for layout in safetensors.shard_layouts(plan, 10**6)] == ["model.safetensors"]
