"""Folders of torch.distributed.checkpoint (FSDP, FSDP2, DTensor): `.metadata` and `*.distcp`.

`.metadata` is a pickle of `torch.distributed.checkpoint.metadata.Metadata`: for every tensor its size and the chunks
it was cut into, for every chunk the file, offset and length of a small torch.save archive that holds it. It is
interpreted by this package's own reader: its classes become records, nothing is imported or called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats.contents import Contents, broken, show
from hxaconv.formats.dtypes import BY_NAME, BY_TORCH_NAME, num_elements
from hxaconv.formats.files import Extent, Section, SourceFile
from hxaconv.formats.pickle_machine import MAX_DIMS, MAX_PICKLE_BYTES, TRAINER_OBJECTS, Inert, Record, Storage, Tensor
from hxaconv.formats.state_dict import find_state_dict
from hxaconv.formats.torchzip_reader import TorchZip
from hxaconv.formats.unpickler import parse
from hxaconv.model.plan import Buffers, Bytes, Ranges, Recipe

if TYPE_CHECKING:
    from hxaconv.formats.strided import Elements

METADATA = ".metadata"
SUFFIX = ".distcp"
_OBJECTS = (
    *TRAINER_OBJECTS,
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in ("ChunkStorageMetadata", "TensorProperties")),
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    *("torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout"),
)
_MAX_STEPS = 20_000_000
"""A chunk takes 74 opcodes: 270,000 chunks, such as 1,000 tensors with two moments each on 90 ranks."""


def holds_dcp(folder: Path) -> bool:
    """Whether a folder is a checkpoint of torch.distributed.checkpoint, whole or not."""
    return (folder / METADATA).is_file() or any(folder.glob(f"[!.]*{SUFFIX}"))


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor, and where its elements stand."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Extent

    def end(self, axis: int) -> int:
        return self.offsets[axis] + self.sizes[axis]

    def spans(self, shape: tuple[int, ...], axis: int) -> bool:
        """Whether it holds all of every axis from `axis` on."""
        return self.offsets[axis:] == (0,) * (len(shape) - axis) and self.sizes[axis:] == shape[axis:]


@dataclass(frozen=True, slots=True)
class Tiles:
    """A tensor cut along other axes than its first (tensor parallelism): its rows are gathered from several chunks."""

    shape: tuple[int, ...]
    itemsize: int
    chunks: tuple[Chunk, ...]
    rows: tuple[int, int]
    """The rows, [first, last), that are wanted."""
    kind: str = "copy"

    def pieces(self, buffers: Buffers) -> Iterator[memoryview]:
        """The tensor's bytes, as many whole rows at a time as the buffers buffer holds, at least one."""
        import numpy as np

        limit = len(buffers.read) // 16 * 16
        height = max(1, limit // (num_elements(self.shape[1:]) * self.itemsize))
        for low, high, covering in _bands(0, self.chunks):
            last = min(high, self.rows[1])
            for first in range(max(low, self.rows[0]), last, height):
                block = np.empty((min(height, last - first), *self.shape[1:]), dtype=f"V{self.itemsize}")
                for chunk in covering:
                    inside = tuple(slice(chunk.offsets[i], chunk.end(i)) for i in range(1, len(self.shape)))
                    block[(slice(None), *inside)] = self._rows(chunk, first, len(block))
                data = block.reshape(-1).view("u1").data.cast("B")
                for start in range(0, len(data), limit):
                    yield data[start : start + limit]

    def _rows(self, chunk: Chunk, first: int, count: int) -> Elements:
        """Rows of a chunk, by their number in the tensor."""
        import numpy as np

        row = num_elements(chunk.sizes[1:]) * self.itemsize
        assert chunk.place.file is not None
        data = chunk.place.file.read(chunk.place.offset + (first - chunk.offsets[0]) * row, count * row)
        return np.frombuffer(data, dtype=f"V{self.itemsize}").reshape(count, *chunk.sizes[1:])

    def sources(self) -> Iterable[SourceFile]:
        """The files of the chunks."""
        return [chunk.place.file for chunk in self.chunks if chunk.place.file is not None]

    def part(self, start: int, nbytes: int) -> Tiles:
        """The rows that these bytes are."""
        row = num_elements(self.shape[1:]) * self.itemsize
        first = self.rows[0] + start // row
        return replace(self, rows=(first, first + nbytes // row))


def _bands(axis: int, chunks: Iterable[Chunk]) -> Iterator[tuple[int, int, list[Chunk]]]:
    """The axis cut at every border of a chunk, with the chunks that lie across each stretch."""
    chunks = list(chunks)
    cuts = sorted({cut for chunk in chunks for cut in (chunk.offsets[axis], chunk.end(axis))})
    for low, high in pairwise(cuts):
        yield low, high, [chunk for chunk in chunks if chunk.offsets[axis] <= low and high <= chunk.end(axis)]


def read_dcp(folder: Path, *, label: str) -> tuple[list[SourceFile], Contents]:
    """The model's tensors in a folder, and its files; optimizer states and counters are left behind.

    Raises:
        HxaconvError: for files that are missing, short or of another save, chunks that do not make their tensor,
            classes outside the allow-list, and forms that are not put together (quantized, transformed by extensions).
    """
    metadata, file = _metadata(folder, label)
    tensors, facts = _tensors(metadata, file)
    places = _places(metadata, file)
    opened = _Files(folder, label)
    needed = {place.path for name in tensors.values() for place in places.get(name, {}).values()}
    opened.require(needed)
    described = _field(metadata, "state_dict_metadata", dict, file)
    plan = {
        name: _recipe(name, described[stored], places.get(stored, {}), opened, file) for name, stored in tensors.items()
    }
    file.header_digest = hashlib.sha256(file.read(0, file.size)).hexdigest()
    for other in opened.files.values():
        other.header_digest = file.header_digest
    stray = sorted(path.name for path in folder.glob(f"[!.]*{SUFFIX}") if path.name not in needed)
    facts["ignored"] += stray
    return [file, *opened.files.values()], Contents(container="dcp", tensors=plan, extra={**facts, "aliases": []})


def _metadata(folder: Path, label: str) -> tuple[Record, SourceFile]:
    if not (folder / METADATA).is_file():
        raise HxaconvError(
            f"{label} holds *{SUFFIX} but no {METADATA}, which says what is in them",
            hint="It is written last: the save did not end, or the file was not copied (its name begins with a dot).",
        )
    file = SourceFile.local(folder / METADATA, name=METADATA, label=f"{label.rstrip('/')}/{METADATA}")
    if file.size > MAX_PICKLE_BYTES:
        raise HxaconvError(f"{file.label}: a pickle of {file.size} bytes, expected at most {MAX_PICKLE_BYTES}")
    value = parse(file.read(0, file.size), file.label, inert=_OBJECTS, max_steps=_MAX_STEPS).value
    if not isinstance(value, Record) or not value.name.endswith(".Metadata"):
        raise HxaconvError(
            f"{file.label} is not the metadata of torch.distributed.checkpoint that FSDP shards come with",
            hint="If they were saved by accelerate, `accelerate merge-weights FOLDER OUT` makes one file of them.",
        )
    return value, file


def _field(record: Any, name: str, kind: type, file: SourceFile) -> Any:
    value = record.fields.get(name) if isinstance(record, Record) else None
    if not isinstance(value, kind):
        raise broken(file.label, f"a record lacks {name}")
    return value


def _numbers(value: Any, file: SourceFile) -> tuple[int, ...]:
    if not (
        isinstance(value, tuple) and len(value) <= MAX_DIMS and all(type(n) is int and 0 <= n < 2**62 for n in value)
    ):
        raise broken(file.label, "a size or offset is none")
    return value


def _tensors(metadata: Record, file: SourceFile) -> tuple[dict[str, str], dict[str, Any]]:
    """Name in the model -> name in the checkpoint, and what was left behind."""
    described = _field(metadata, "state_dict_metadata", dict, file)
    paths = metadata.fields.get("planner_data")
    tree: dict[Any, Any] = {}
    for name, entry in described.items():
        if not isinstance(name, str) or not isinstance(entry, Record):
            raise broken(file.label, "its table of tensors is none")
        path = paths.get(name) if isinstance(paths, dict) else None
        if not (isinstance(path, tuple) and path and all(isinstance(part, str | int) for part in path)):
            path = (name,)
        inner: Any = tree
        for part in path[:-1]:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else {}
        if isinstance(inner, dict):
            inner[path[-1]] = _placeholder(name, entry, file)
    if isinstance(tree.get("app"), dict):  # the Stateful of PyTorch's own tutorial
        tree = tree["app"]
    state = find_state_dict(tree, file.label)
    return {name: tensor.storage.key for name, tensor in state.tensors.items()}, dict(state.facts)


def _placeholder(name: str, entry: Record, file: SourceFile) -> Tensor | None:
    """What find_state_dict takes for a tensor; its storage's key is the name in the checkpoint."""
    if not entry.name.endswith(".TensorStorageMetadata"):
        return None
    shape = _numbers(entry.fields.get("size"), file)
    return Tensor(Storage("U8", name, 0), 0, shape, (0,) * len(shape))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the archive of one chunk stands."""

    path: str
    offset: int
    length: int


def _places(metadata: Record, file: SourceFile) -> dict[str, dict[tuple[int, ...], _Place]]:
    """Name -> chunk's offsets -> where it stands."""
    found: dict[str, dict[tuple[int, ...], _Place]] = {}
    for index, info in _field(metadata, "storage_data", dict, file).items():
        name, offsets = _field(index, "fqn", str, file), index.fields.get("offset")
        if offsets is None:  # not a tensor
            continue
        if not isinstance(info, Record) or info.fields.get("transform_descriptors"):
            raise HxaconvError(
                f"{file.label}: {show(name)} was transformed by an extension when it was saved, which is not undone",
                hint="Load it with torch.distributed.checkpoint and save it without extensions.",
            )
        fields = (("relative_path", str), ("offset", int), ("length", int))
        place = _Place(*(_field(info, key, kind, file) for key, kind in fields))
        found.setdefault(name, {})[_numbers(offsets, file)] = place
    return found


class _Files:
    """The files of the chunks, each opened once."""

    def __init__(self, folder: Path, label: str) -> None:
        self.folder, self.label = folder, label
        self.files: dict[str, SourceFile] = {}

    def require(self, names: Iterable[str]) -> None:
        """Refuse files that are missing, all at once, and open the rest."""
        names = sorted(names)
        odd = [show(name) for name in names if Path(name).name != name or name in (".", "..")]
        raise_all(f"{self.label}: {METADATA} names files outside the folder:", odd)
        missing = [name for name in names if not (self.folder / name).is_file()]
        raise_all(
            f"{self.label}: {METADATA} names {len(names)} files, not all of them are there:",
            missing,
            hint="Every node writes files of its own: copy those of all of them into one folder.",
        )
        for name in names:
            path = self.folder / name
            self.files[name] = SourceFile.local(path, name=name, label=f"{self.label.rstrip('/')}/{name}")

    def section(self, place: _Place, what: str) -> Section:
        """The archive of one chunk."""
        file = self.files[place.path]
        if place.offset < 0 or place.length < 0 or place.offset + place.length > file.size:
            raise HxaconvError(
                f"{file.label} has {file.size} bytes, {what} is to stand at {place.offset} with {place.length}",
                hint="The file is truncated, or of another save; copy the folder again.",
            )
        return Section(file, place.offset, place.length, f"{file.label}, {what}")


def _recipe(
    name: str, entry: Record, places: Mapping[tuple[int, ...], _Place], opened: _Files, file: SourceFile
) -> Recipe:
    shape = _numbers(entry.fields.get("size"), file)
    properties = _field(entry, "properties", Record, file)
    dtype = _dtype(properties, name, file)
    chunks = []
    for chunk in _field(entry, "chunks", list, file):
        offsets = _numbers(_field(chunk, "offsets", tuple, file), file)
        sizes = _numbers(_field(chunk, "sizes", tuple, file), file)
        if not len(offsets) == len(sizes) == len(shape):
            raise broken(file.label, f"{show(name)} {list(shape)} is cut into chunks of other dimensions")
        if 0 in sizes:
            continue
        if offsets not in places:
            raise broken(file.label, f"the chunk of {show(name)} at {list(offsets)} stands nowhere")
        chunks.append(Chunk(offsets, sizes, _stored(name, dtype, sizes, opened, places[offsets])))
    if not make_whole(shape, chunks):
        raise broken(file.label, f"the {len(chunks)} chunks of {show(name)} do not make a tensor of {list(shape)}")
    used = {chunk.place.file.name: None for chunk in chunks if chunk.place.file is not None}
    origin = f"{name} in {next(iter(used)) if len(used) == 1 else f'{len(used)} {SUFFIX} files'}"
    return Recipe(dtype, shape, bytes_of(shape, BY_NAME[dtype].itemsize, chunks), origin)


def bytes_of(shape: tuple[int, ...], itemsize: int, chunks: list[Chunk]) -> Bytes:
    """A tensor's bytes from the chunks that make it whole: ranges of files where they are rows of it."""
    if all(chunk.spans(shape, 1) for chunk in chunks) or len(chunks) == 1:
        return Ranges(tuple(chunk.place for chunk in sorted(chunks, key=lambda chunk: chunk.offsets)))
    return Tiles(shape, itemsize, tuple(chunks), (0, shape[0]))


def make_whole(shape: tuple[int, ...], chunks: list[Chunk]) -> bool:
    """Whether the chunks make the tensor: every element in exactly one."""
    if not shape or 0 in shape:
        return len(chunks) == (0 not in shape)
    if sum(num_elements(chunk.sizes) for chunk in chunks) != num_elements(shape):
        return False
    return all(chunk.end(axis) <= size for chunk in chunks for axis, size in enumerate(shape)) and _disjoint(0, chunks)


def _disjoint(axis: int, chunks: list[Chunk]) -> bool:
    if len(chunks) < 2:
        return True
    if axis == len(chunks[0].sizes):
        return False
    return all(_disjoint(axis + 1, covering) for _, _, covering in _bands(axis, chunks))


def _dtype(properties: Record, name: str, file: SourceFile) -> str:
    state = properties.state
    named = state[0] if isinstance(state, tuple) and state else properties.fields.get("dtype")
    text = named.name.removeprefix("torch.") if isinstance(named, Inert) else ""
    if text not in BY_TORCH_NAME:
        raise HxaconvError(f"{file.label}: {show(name)} has an element type that is not known ({text or named!r})")
    return BY_TORCH_NAME[text].name


def _stored(name: str, dtype: str, sizes: tuple[int, ...], opened: _Files, place: _Place) -> Extent:
    """Where the elements of one chunk stand."""
    section = opened.section(place, show(name))
    archive = TorchZip(section, inert=TRAINER_OBJECTS)
    tensor = archive.value
    extent = archive.extent(tensor, "what it holds")
    if (tensor.shape, tensor.storage.dtype) != (sizes, dtype):
        raise HxaconvError(
            f"{section.label}: a tensor {list(tensor.shape)} ({tensor.storage.dtype}),"
            f" {METADATA} expects {list(sizes)} ({dtype})",
            hint="The file is of another save; copy the folder again.",
        )
    return extent
