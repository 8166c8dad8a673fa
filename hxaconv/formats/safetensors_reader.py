"""safetensors: eight bytes of length, a JSON header, the data."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats.contents import Contents, broken, check_names, show
from hxaconv.formats.dtypes import BY_NAME, num_bytes
from hxaconv.formats.files import SourceFile
from hxaconv.formats.json_files import unique_keys
from hxaconv.model.plan import Plan, stored

MAX_HEADER_BYTES = 25_000_000
"""About 200,000 tensors; the format allows four times as much, which costs gigabytes once parsed."""
MAX_DIMS = 16
_DENSE_BYTES = 4 * 1024 * 1024
_KEYS = {"dtype", "shape", "data_offsets"}
_LIMIT = 2**63


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
    entries = _load_json(data[8:], file.label)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # some writers say null
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken(file.label, "__metadata__ of the header does not map text to text")
    check_names(list(entries), file.label)
    ranges = _checked_ranges(entries, file.label)
    _check_layout(ranges, file.size - len(data), file.label)
    plan: Plan = {}
    for name, (start, _) in sorted(ranges.items(), key=lambda item: item[1]):
        entry = entries[name]
        shape = tuple(entry["shape"])
        plan[name] = stored(entry["dtype"], shape, file, len(data) + start, f"{name} in {file.name}")
    file.header_digest = hashlib.sha256(data).hexdigest()
    return Contents(container="safetensors", tensors=plan)


def _load_json(raw: bytes, where: str) -> dict[str, Any]:
    # Parsed, each bracket costs some 60 bytes; the three of an entry stand in 50 bytes at least. Metadata
    # may quote JSON that is denser, but not by the megabyte.
    dense = len(raw) > _DENSE_BYTES and raw.count(b"[") + raw.count(b"{") > len(raw) // 12
    if raw[:1] != b"{" or dense:
        raise broken(where, "what should be the safetensors header is not one")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else show(str(error))
        raise broken(where, f"the safetensors header is not valid: {detail}") from None
    assert isinstance(header, dict)
    return header


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LIMIT


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_DIMS and all(map(_is_size, value))


def _checked_ranges(entries: dict[str, Any], where: str) -> dict[str, tuple[int, int]]:
    malformed, unknown, wrong = [], [], []
    ranges: dict[str, tuple[int, int]] = {}
    for name, entry in entries.items():
        fits = isinstance(entry, dict) and entry.keys() == _KEYS and isinstance(entry["dtype"], str)
        if not fits or not (_is_sizes(entry["shape"]) and _is_sizes(entry["data_offsets"])):
            malformed.append(f"{name}: expected dtype, shape and data_offsets of whole numbers")
            continue
        if entry["dtype"] not in BY_NAME:
            unknown.append(f"{name} has dtype {show(entry['dtype'])}")
            continue
        offsets, needed = entry["data_offsets"], num_bytes(entry["dtype"], tuple(entry["shape"]))
        if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
            shape = f"{entry['dtype']} {entry['shape']}"
            wrong.append(f"{name}: {shape} takes {needed} bytes, its data_offsets are {offsets}")
            continue
        ranges[name] = (offsets[0], offsets[1])
    raise_all(f"{where}: malformed entries in the safetensors header:", malformed)
    raise_all(f"{where}: dtypes that are not supported:", unknown, hint="Take the bf16 original of the model.")
    raise_all(f"{where}: sizes and offsets in the safetensors header contradict each other:", wrong)
    return ranges


def _check_layout(ranges: dict[str, tuple[int, int]], data_bytes: int, where: str) -> None:
    problems = []
    position, before = 0, "the header"
    for name, (start, end) in sorted(ranges.items(), key=lambda item: item[1]):
        if start > position:
            problems.append(f"{start - position} bytes between {before} and {name} belong to no tensor")
        elif start < position:
            problems.append(f"{before} and {name} overlap by {position - start} bytes")
        position, before = max(position, end), name
    raise_all(f"{where}: holes or overlaps in the data:", problems)
    if position != data_bytes:
        what = "truncated" if position > data_bytes else "longer than its header says"
        raise broken(where, f"the file is {what}: the tensors take {position} bytes, there are {data_bytes}")
