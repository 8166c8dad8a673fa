"""safetensors files: 8 bytes of header length, the header in JSON padded to 8 bytes, the tensors end to end.

What is written stands in plan order, where the format's own writer would sort. Only where that order would put a
tensor at an offset that is no multiple of its element size (torch cannot view it then) a file is ordered by descending
element size, plan order within.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats import Contents, FileLayout, Fill
from hxaconv.formats.dtypes import BY_NAME, is_shape, num_bytes
from hxaconv.formats.files import SourceFile, broken, check_names, show
from hxaconv.formats.json_files import parse_json
from hxaconv.model.plan import Plan, Ranges, stored, total_bytes

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 25_000_000
"""About 200,000 tensors; the format allows four times as much, which costs gigabytes once parsed."""
_DENSE_BYTES = 4 * 1024 * 1024
_KEYS = {"dtype", "shape", "data_offsets"}
_PATTERN = "model{suffix}.safetensors"
_HEADER_FRAME_BYTES = 64
"""The length, the metadata and the padding."""
_ENTRY_BYTES = 128
"""A header entry beside its name, with long numbers."""


def header_length(prefix: bytes, size: int, where: str) -> int:
    """Bytes of the JSON header, from the first eight bytes of a file of `size` bytes.

    Raises:
        HxaconvError: when no header of that length can be in the file.
    """
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length < 2 or length > size - 8:
        raise broken(where, f"a safetensors header of {length} bytes does not fit a file of {size} bytes")
    if length > MAX_HEADER_BYTES:
        raise HxaconvError(f"{where}: a safetensors header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
    return length


def read_safetensors(file: SourceFile) -> Contents:
    """The tensors of a local safetensors file.

    Raises:
        HxaconvError: when the header contradicts itself or the size of the file.
    """
    prefix = file.read(0, min(8, file.size))
    return parse_header(file, prefix + file.read(8, header_length(prefix, file.size, file.label)))


def parse_header(file: SourceFile, data: bytes) -> Contents:
    """The tensors of `file`, whose length prefix and header are `data`; the file itself is not read.

    Raises:
        HxaconvError: listing every entry of one kind of fault at once.
    """
    raw, where = data[8:], file.label
    # Parsed, each bracket costs some 60 bytes; the three of an entry stand in 50 bytes at least. Metadata
    # may quote JSON that is denser, but not by the megabyte.
    dense = len(raw) > _DENSE_BYTES and raw.count(b"[") + raw.count(b"{") > len(raw) // 12
    if raw[:1] != b"{" or dense:
        raise broken(where, "what should be the safetensors header is not one")
    try:
        entries: dict[str, Any] = parse_json(raw)
    except ValueError as error:
        raise broken(where, f"the safetensors header is not valid: {error}") from None
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # some writers put null
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken(where, "__metadata__ of the header does not map text to text")
    check_names(entries, where)
    _check_entries(entries, where)
    in_order = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    _check_places([(name, *entry["data_offsets"]) for name, entry in in_order], file.size - len(data), where)
    plan: Plan = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    for name, entry in in_order:
        shape = tuple(entry["shape"])
        shape = shapes.setdefault(shape, shape)  # experts by the thousand have three shapes
        dtype, start = BY_NAME[entry["dtype"]].name, len(data) + entry["data_offsets"][0]
        plan[name] = stored(dtype, shape, file, start, f"{name} in {file.name}")
    file.header_digest = hashlib.sha256(data).hexdigest()
    return Contents(container="safetensors", tensors=plan)


def _check_entries(entries: dict[str, Any], where: str) -> None:
    malformed, unknown, wrong = [], [], []
    for name, entry in entries.items():
        fits = isinstance(entry, dict) and entry.keys() == _KEYS and isinstance(entry["dtype"], str)
        if not fits or not all(isinstance(entry[key], list) and is_shape(entry[key]) for key in _KEYS - {"dtype"}):
            malformed.append(f"{name}: expected dtype, shape and data_offsets of whole numbers")
        elif entry["dtype"] not in BY_NAME:
            unknown.append(f"{name} has dtype {show(entry['dtype'])}")
        else:
            offsets, needed = entry["data_offsets"], num_bytes(entry["dtype"], tuple(entry["shape"]))
            if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
                shape = f"{entry['dtype']} {entry['shape']}"
                wrong.append(f"{name}: {shape} takes {needed} bytes, its data_offsets are {offsets}")
    raise_all(f"{where}: malformed entries in the safetensors header:", malformed)
    raise_all(f"{where}: dtypes that are not supported:", unknown, hint="Take the bf16 original of the model.")
    raise_all(f"{where}: sizes and offsets in the safetensors header contradict each other:", wrong)


def _check_places(ranges: Iterable[tuple[str, int, int]], data_bytes: int, where: str) -> None:
    """Whether tensors (name, first and last byte), in order, follow each other without holes up to the end."""
    problems = []
    position, before = 0, "the header"
    for name, start, end in ranges:
        if start > position:
            problems.append(f"{start - position} bytes between {before} and {name} belong to no tensor")
        elif start < position:
            problems.append(f"{before} and {name} overlap by {position - start} bytes")
        position, before = max(position, end), name
    raise_all(f"{where}: holes or overlaps in the data:", problems)
    if position != data_bytes:
        what = "truncated" if position > data_bytes else "longer than its header implies"
        raise broken(where, f"the file is {what}: the tensors take {position} bytes, there are {data_bytes}")


def shard_layouts(plan: Plan, max_shard_bytes: int) -> tuple[FileLayout, ...]:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` ... of at most `max_shard_bytes`."""
    from huggingface_hub import split_state_dict_into_shards_factory

    # What a tensor takes in the header: its name, dtype, shape and two offsets.
    header_share = max((len(name.encode()) for name in plan), default=0) + _ENTRY_BYTES
    split = split_state_dict_into_shards_factory(
        plan,
        get_storage_size=lambda recipe: recipe.nbytes + header_share,
        filename_pattern=_PATTERN,
        max_shard_size=max(1, max_shard_bytes - _HEADER_FRAME_BYTES),
    )
    shards = split.filename_to_tensors.items()
    return tuple(file_layout(file_name, {name: plan[name] for name in names}) for file_name, names in shards)


@dataclass(frozen=True, slots=True)
class Shard:
    """Tensors that belong into one file; `hard_link` is a source file that holds just these already."""

    names: tuple[str, ...]
    hard_link: SourceFile | None = None


def given_layouts(plan: Plan, shards: Sequence[Shard]) -> tuple[FileLayout, ...]:
    """The files of a sharding that is decided already, named as shard_layouts names them."""
    count, layouts = len(shards), []
    for number, shard in enumerate(shards, start=1):
        name = _PATTERN.format(suffix=f"-{number:05d}-of-{count:05d}" if count > 1 else "")
        inside = {name: plan[name] for name in shard.names}
        layouts.append(_hard_linked(name, inside, shard.hard_link) if shard.hard_link else file_layout(name, inside))
    return tuple(layouts)


def _hard_linked(file_name: str, plan: Plan, hard_link: SourceFile) -> FileLayout:
    fills = []
    for name, recipe in plan.items():
        assert isinstance(recipe.make, Ranges)
        fills.append(Fill(name, recipe.make.extents[0].offset, recipe))
    return FileLayout(file_name, hard_link.size, list, tuple(fills), hard_link=hard_link)


def file_layout(file_name: str, plan: Plan) -> FileLayout:
    """One safetensors file that holds `plan`."""
    names, fills = _aligned_order(plan), []
    end = len(_header(plan, names))
    for name in names:
        fills.append(Fill(name, end, plan[name]))
        end += plan[name].nbytes
    return FileLayout(file_name, end, lambda: [(0, _header(plan, names))], tuple(fills))


def _header(plan: Plan, names: Iterable[str]) -> bytes:
    """The length, and the header in JSON."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        offsets = [end, end + plan[name].nbytes]
        entries[name] = {"dtype": plan[name].dtype, "shape": list(plan[name].shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _aligned_order(plan: Plan) -> list[str]:
    end = 0
    for recipe in plan.values():
        if end % BY_NAME[recipe.dtype].itemsize:
            return sorted(plan, key=lambda name: -BY_NAME[plan[name].dtype].itemsize)
        end += recipe.nbytes
    return list(plan)


def index(plan: Plan, layouts: Iterable[FileLayout]) -> dict[str, Any]:
    """The index that names the file of every tensor, as transformers writes it."""
    where = {fill.name: layout.name for layout in layouts for fill in layout.fills}
    metadata = {"total_parameters": sum(recipe.numel for recipe in plan.values()), "total_size": total_bytes(plan)}
    return {"metadata": metadata, "weight_map": {name: where[name] for name in plan}}
