"""`.pth` files: the zip archive that `torch.save` writes of a flat dict of tensors.

Records are stored uncompressed, each padded so that its bytes start at a multiple of 64. As torch has it,
sizes and CRC-32 follow the data in a descriptor and stand again in the central directory at the end.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from hxaconv.errors import raise_all
from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.layout import FileLayout, Fill, Segment
from hxaconv.formats.torch_pickle import state_dict_pickle
from hxaconv.model.plan import Plan, Recipe

ALIGNMENT = 64
_ID_RECORD = ".data/serialization_id"
_ID_BYTES = 40
_LIMIT_32 = 0xFFFFFFFF
_LIMIT_16 = 0xFFFF
_UTF8_NAME = 0x0800
_DESCRIPTOR_FOLLOWS = 0x0008


@dataclass(frozen=True, slots=True)
class _Record:
    """One entry: `body` is its bytes, the tensor that will be its bytes, or None for the id."""

    name: str
    path: bytes
    header_offset: int
    data_offset: int
    size: int
    body: bytes | Fill | None

    @property
    def large(self) -> bool:
        """Whether its header needs 64-bit fields."""
        return self.size >= _LIMIT_32 or self.header_offset >= _LIMIT_32

    @property
    def flags(self) -> int:
        return _UTF8_NAME | (_DESCRIPTOR_FOLLOWS if self.size else 0)

    @property
    def end(self) -> int:
        return self.data_offset + self.size + (0 if self.size == 0 else 24 if self.large else 16)

    def descriptor(self, crc: int) -> bytes:
        """Checksum and sizes; an empty record has none."""
        if self.size == 0:
            return b""
        return struct.pack("<4sIQQ" if self.large else "<4sIII", b"PK\7\x08", crc, self.size, self.size)


def archive_root(file_name: str) -> str:
    """The folder inside the archive: torch takes the file's stem, and `archive` if that is not ASCII."""
    stem = file_name.rpartition(".")[0] or file_name
    return stem if file_name.isascii() else "archive"


def file_layout(file_name: str, plan: Plan, *, ordered: bool = True) -> FileLayout:
    """The `.pth` file that `torch.save` would write of `plan` (an OrderedDict, or a plain dict).

    Raises:
        HxaconvError: when the plan has element types that torch keeps in no typed storage.
    """
    _check_storable(file_name, plan)
    records = _records(archive_root(file_name), plan, ordered)
    segments = [_local_header(record) for record in records]
    segments += [(record.data_offset, record.body) for record in records if isinstance(record.body, bytes)]
    directory = _central_directory(records, dict.fromkeys((record.name for record in records), 0))

    def seal(crcs: Mapping[str, int]) -> list[Segment]:
        return _seal(records, crcs)

    fills = tuple(record.body for record in records if isinstance(record.body, Fill))
    return FileLayout(file_name, records[-1].end + len(directory), tuple(segments), fills, seal)


def _check_storable(file_name: str, plan: Plan) -> None:
    raise_all(
        f"{file_name}: a .pth file cannot hold these tensors:",
        [f"{name} ({recipe.dtype})" for name, recipe in plan.items() if not BY_NAME[recipe.dtype].storage_class],
        hint="Write safetensors instead, or cast with --dtype.",
    )


def _records(root: str, plan: Plan, ordered: bool) -> list[_Record]:
    bodies: list[tuple[str, bytes | tuple[str, Recipe] | None]] = [
        ("data.pkl", state_dict_pickle(plan, ordered=ordered)),
        (".format_version", b"1"),
        (".storage_alignment", str(ALIGNMENT).encode()),
        ("byteorder", b"little"),
        *((f"data/{index}", item) for index, item in enumerate(plan.items())),
        ("version", b"3\n"),
        (_ID_RECORD, None),
    ]
    records: list[_Record] = []
    for name, body in bodies:
        offset = records[-1].end if records else 0
        records.append(_place(name, f"{root}/{name}".encode(), offset, body))
    return records


def _place(name: str, path: bytes, offset: int, body: bytes | tuple[str, Recipe] | None) -> _Record:
    size = _ID_BYTES if body is None else len(body) if isinstance(body, bytes) else body[1].nbytes
    start = offset + 30 + len(path) + len(_local_zip64(size, offset)) + 4
    data_offset = start + -start % ALIGNMENT
    if isinstance(body, tuple):
        return _Record(name, path, offset, data_offset, size, Fill(body[0], data_offset, body[1]))
    return _Record(name, path, offset, data_offset, size, body)


def _local_zip64(size: int, offset: int) -> bytes:
    # The stored size is not known to torch's zip writer when it writes this field, so it says 0.
    return _zip64_field([size, 0] if size >= _LIMIT_32 else [], offset)


def _zip64_field(sizes: list[int], offset: int) -> bytes:
    values = sizes + ([offset] if offset >= _LIMIT_32 else [])
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _local_header(record: _Record) -> Segment:
    zip64 = _local_zip64(record.size, record.header_offset)
    padding = record.data_offset - (record.header_offset + 30 + len(record.path) + len(zip64) + 4)
    extra = zip64 + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    header = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 0, record.flags, 0, 0, 0, 0, 0, 0, len(record.path), len(extra))
    return record.header_offset, header + record.path + extra


def _seal(records: list[_Record], tensor_crcs: Mapping[str, int]) -> list[Segment]:
    """The serialization id, every data descriptor, and the central directory."""
    crcs: dict[str, int] = {}
    for record in records[:-1]:
        body = record.body
        assert body is not None
        crcs[record.name] = zlib.crc32(body) if isinstance(body, bytes) else tensor_crcs[body.name]
    identity = _serialization_id(crcs)
    crcs[_ID_RECORD] = zlib.crc32(identity)
    segments = [(records[-1].data_offset, identity)]
    for record in records:
        segments.append((record.data_offset + record.size, record.descriptor(crcs[record.name])))
    return [*segments, (records[-1].end, _central_directory(records, crcs))]


def _serialization_id(crcs: Mapping[str, int]) -> bytes:
    """40 digits that depend on the names of the records and their bytes alone; torch stores a hash of its own."""
    known = "\n".join(f"{crc:08x} {name}" for name, crc in crcs.items())
    digits = int.from_bytes(hashlib.sha256(known.encode("utf-8", "surrogatepass")).digest()) % 10**_ID_BYTES
    return f"{digits:0{_ID_BYTES}d}".encode()


def _central_directory(records: list[_Record], crcs: Mapping[str, int]) -> bytes:
    start = records[-1].end
    entries = b"".join(_central_entry(record, crcs[record.name]) for record in records)
    count, size = len(records), len(entries)
    zip64_end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
    shown = min(count, _LIMIT_16)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, shown, shown, min(size, _LIMIT_32), min(start, _LIMIT_32), 0)
    return entries + zip64_end + locator + end


def _central_entry(record: _Record, crc: int) -> bytes:
    extra = _zip64_field([record.size] * 2 if record.size >= _LIMIT_32 else [], record.header_offset)
    size, offset = min(record.size, _LIMIT_32), min(record.header_offset, _LIMIT_32)
    head = struct.pack("<4sHHHHHHIII", b"PK\1\2", 0, 0, record.flags, 0, 0, 0, crc, size, size)
    tail = struct.pack("<HHHHHII", len(record.path), len(extra), 0, 0, 0, 0, offset)
    return head + tail + record.path + extra
