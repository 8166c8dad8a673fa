"""The zip form of torch.save: a pickle that describes the tensors, one stored record per storage.

Layout (APPNOTE 6.3): local header + data per record, the central directory, its end record; zip64
records where numbers exceed 32 bits.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats.contents import Contents, broken, show
from hxaconv.formats.dtypes import BY_NAME, num_bytes
from hxaconv.formats.files import Extent, Section, SourceFile
from hxaconv.formats.pickle_machine import MAX_PICKLE_BYTES, Storage, Tensor
from hxaconv.formats.state_dict import find_state_dict, recipes
from hxaconv.formats.strided import is_contiguous
from hxaconv.formats.unpickler import parse

MAX_DIRECTORY_BYTES = 32 * 1024 * 1024
"""About 300,000 records."""
_END, _END_SIZE = b"PK\x05\x06", 22
_END64_LOCATOR, _END64_LOCATOR_SIZE = b"PK\x06\x07", 20
_END64, _END64_SIZE = b"PK\x06\x06", 56
_CENTRAL = struct.Struct("<4s4x2H4x3L3H4x4xL")
"""Signature, flags, method, CRC-32, compressed and full size, lengths of name, extra and comment, header offset."""
_CENTRAL_SIZE, _LOCAL_SIZE = 46, 30
_ENCRYPTED, _IN_32_BITS, _IN_16_BITS = 0x2041, 0xFFFFFFFF, 0xFFFF
_ZIP64_EXTRA = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the central directory."""

    name: str
    header_offset: int
    size: int
    crc32: int
    method: int
    flags: int
    limit: int = 0
    """Where the next record, or the directory, begins."""


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip file's directory."""

    records: dict[str, Record]
    digest: str
    """sha256 of the central directory."""


def read_directory(file: SourceFile | Section) -> Archive:
    """The central directory, checked against the file's size; local headers are not read.

    Raises:
        HxaconvError: for a damaged directory, and for compressed or encrypted records.
    """
    count, size, offset, end = _find_directory(file)
    if offset + size > end or count * _CENTRAL_SIZE > size:
        raise broken(file.label, f"the zip directory ({count} records, {size} bytes at {offset}) does not fit")
    if size > MAX_DIRECTORY_BYTES:
        raise HxaconvError(f"{file.label}: a zip directory of {size} bytes, expected at most {MAX_DIRECTORY_BYTES}")
    data = file.read(offset, size)
    records = _with_limits(_parse_directory(data, count, file.label), offset)
    _check_records(records, file.label)
    by_name = {record.name: record for record in records}
    if len(by_name) != len(records):
        raise broken(file.label, "the zip directory names a record twice")
    return Archive(by_name, hashlib.sha256(data).hexdigest())


def _find_directory(file: SourceFile | Section) -> tuple[int, int, int, int]:
    """Number of records, bytes and offset of the directory, and where it must end."""
    tail = file.read(max(0, file.size - _END_SIZE), min(file.size, _END_SIZE))
    if not (tail.startswith(_END) and tail.endswith(b"\0\0")):  # it has a comment, which torch.save does not write
        tail = file.read(max(0, file.size - _END_SIZE - _IN_16_BITS), min(file.size, _END_SIZE + _IN_16_BITS))
    at = tail.rfind(_END)
    while at >= 0 and len(tail) != at + _END_SIZE + int.from_bytes(tail[at + 20 : at + 22], "little"):
        at = tail.rfind(_END, 0, at)
    if at < 0:
        raise broken(file.label, "the zip directory at the end of the file is missing")
    count, size, offset = struct.unpack_from("<HLL", tail, at + 10)
    end = file.size - len(tail) + at
    locator_at = end - _END64_LOCATOR_SIZE
    if locator_at >= 0 and file.read(locator_at, 4) == _END64_LOCATOR:
        (end64,) = struct.unpack("<8xQ4x", file.read(locator_at, _END64_LOCATOR_SIZE))
        if end64 + _END64_SIZE > locator_at or file.read(end64, 4) != _END64:
            raise broken(file.label, "the zip64 end record is not where its locator points")
        count, size, offset = struct.unpack("<32x3Q", file.read(end64, _END64_SIZE))
        return count, size, offset, end64
    if count == _IN_16_BITS or _IN_32_BITS in (size, offset):
        raise broken(file.label, "the zip64 end record is missing")
    return count, size, offset, end


def _parse_directory(data: bytes, count: int, where: str) -> list[Record]:
    records = []
    position = 0
    for index in range(count):
        start, position = position, position + _CENTRAL_SIZE
        if position > len(data):
            raise broken(where, f"the zip directory ends at record {index} of {count}")
        signature, flags, method, crc, packed, size, *lengths, offset = _CENTRAL.unpack_from(data, start)
        name_end = position + lengths[0]
        extra = data[name_end : name_end + lengths[1]]
        raw_name, position = data[position:name_end], name_end + lengths[1] + lengths[2]
        if signature != b"PK\x01\x02" or position > len(data):
            raise broken(where, f"record {index} of the zip directory is malformed")
        name = raw_name.decode("utf-8", errors="backslashreplace")
        if _IN_32_BITS in (packed, size, offset):
            size, packed, offset = _widen(extra, size, packed, offset, f"{where}: record {show(name)}")
        if method == 0 and packed != size:
            raise broken(where, f"record {show(name)} takes {packed} bytes for {size}")
        records.append(Record(name, offset, size, crc, method, flags))
    return records


def _widen(extra: bytes, size: int, packed: int, offset: int, where: str) -> tuple[int, int, int]:
    """Those of the numbers that did not fit 32 bits, from the zip64 extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        field = extra[position + 4 : position + 4 + length]
        if kind == _ZIP64_EXTRA:
            wide = iter(struct.unpack_from(f"<{len(field) // 8}Q", field))
            given = [next(wide, None) if value == _IN_32_BITS else value for value in (size, packed, offset)]
            values = [value for value in given if value is not None]
            if len(values) == 3:
                return values[0], values[1], values[2]
        position += 4 + length
    raise broken(where, "its zip64 sizes are missing")


def _with_limits(records: list[Record], end: int) -> list[Record]:
    starts = sorted({record.header_offset for record in records} | {end})
    following = dict(zip(starts, [*starts[1:], end], strict=True))
    return [replace(record, limit=following[record.header_offset]) for record in records]


def _check_records(records: list[Record], where: str) -> None:
    locked = [show(record.name) for record in records if record.flags & _ENCRYPTED]
    raise_all(f"{where}: encrypted zip records:", locked, hint="Decrypt the file first.")
    packed = [show(record.name) for record in records if record.method != 0]
    raise_all(
        f"{where}: compressed zip records, where torch.save stores them plain:",
        packed,
        hint="Unpack the archive if it merely contains the checkpoint; otherwise save it again with torch.save.",
    )
    overlapping = [
        f"{show(record.name)}: {record.size} bytes at {record.header_offset}, the next record is at {record.limit}"
        for record in records
        if record.header_offset + _LOCAL_SIZE + record.size > record.limit
    ]
    twice = Counter(record.header_offset for record in records)
    overlapping += [show(record.name) for record in records if twice[record.header_offset] > 1]
    raise_all(f"{where}: zip records that overlap or leave the file:", overlapping, hint="The file is damaged.")


def data_offset(file: SourceFile | Section, record: Record) -> int:
    """Where the data of a record stands: its local header has a name and extra field of its own lengths.

    Raises:
        HxaconvError: when there is no local header.
    """
    local = file.read(record.header_offset, _LOCAL_SIZE)
    signature, flags, method, name_length, extra_length = struct.unpack("<4s2x2H16x2H", local)
    if signature != b"PK\x03\x04" or method != 0 or flags & _ENCRYPTED:
        raise broken(file.label, f"record {show(record.name)} has no plain local header at {record.header_offset}")
    start = int(record.header_offset + _LOCAL_SIZE + name_length + extra_length)
    if start + record.size > record.limit:
        raise broken(file.label, f"record {show(record.name)} reaches into what follows it")
    return start


class TorchZip:
    """A file of torch.save, or a section of a file that is one: what its pickle says, and where its storages stand."""

    def __init__(self, file: SourceFile | Section, *, inert: Sequence[str] = ()) -> None:
        """Read directory and pickle; `inert` as in `parse`.

        Raises:
            HxaconvError: for anything that torch.save does not write, big-endian files, and damage.
        """
        self._file, self._archive = file, read_directory(file)
        self._prefix = _prefix(self._archive, file.label)
        if _small(file, self._archive, f"{self._prefix}/byteorder") == "big":
            raise HxaconvError(
                f"{file.label} was written on a big-endian machine", hint="Load and save it again with torch here."
            )
        record = self._archive.records[f"{self._prefix}/data.pkl"]
        if record.size > MAX_PICKLE_BYTES:
            raise HxaconvError(f"{file.label}: a pickle of {record.size} bytes, expected at most {MAX_PICKLE_BYTES}")
        self._pickled = file.read(data_offset(file, record), record.size)
        self.value = parse(self._pickled, file.label, inert=inert).value
        self._places: dict[str, int] = {}

    def place(self, storage: Storage) -> tuple[int, int]:
        """Where a storage begins, in the file that holds the section, and its bytes.

        Raises:
            HxaconvError: when its record is missing or of another size.
        """
        found = self._archive.records.get(f"{self._prefix}/data/{storage.key}")
        nbytes = storage.numel * BY_NAME[storage.dtype].itemsize
        if found is None or not 0 <= found.size - nbytes < BY_NAME[storage.dtype].itemsize:
            has = "is missing" if found is None else f"has {found.size} bytes"
            raise broken(self._file.label, f"record data/{show(storage.key)} {has}, its tensors need {nbytes}")
        if storage.key not in self._places:
            start = self._file.start if isinstance(self._file, Section) else 0
            self._places[storage.key] = start + data_offset(self._file, found)
        return self._places[storage.key], nbytes

    def extent(self, tensor: Any, what: str) -> Extent:
        """Where the bytes of a contiguous tensor stand.

        Raises:
            HxaconvError: when it is none, or leaves its storage.
        """
        if not isinstance(tensor, Tensor) or not is_contiguous(tensor.shape, tensor.strides):
            raise broken(self._file.label, f"{what} is no contiguous tensor")
        start, available = self.place(tensor.storage)
        dtype = tensor.storage.dtype
        begin, nbytes = tensor.offset * BY_NAME[dtype].itemsize, num_bytes(dtype, tensor.shape)
        if begin + nbytes > available:
            raise broken(self._file.label, f"{what} needs {begin + nbytes} bytes of a storage of {available}")
        return Extent(self._file.file if isinstance(self._file, Section) else self._file, start + begin, nbytes)

    def digest(self) -> str:
        """sha256 of what says where the tensors are that were asked for so far."""
        digest = hashlib.sha256(f"{self._archive.digest} {sorted(self._places.items())}".encode())
        digest.update(self._pickled)
        return digest.hexdigest()


def read_torchzip(file: SourceFile) -> Contents:
    """The tensors of a `.pth`, `.pt` or `.bin` that torch.save wrote.

    Raises:
        HxaconvError: for anything that torch.save does not write, big-endian files, and damage.
    """
    archive = TorchZip(file)
    state = find_state_dict(archive.value, file.label)
    plan, aliases = recipes(state, archive.place, file)
    file.header_digest = archive.digest()
    return Contents(container="pth", tensors=plan, extra={**state.facts, "aliases": aliases})


def _prefix(archive: Archive, where: str) -> str:
    """The folder inside the archive that holds data.pkl."""
    found = [name.removesuffix("/data.pkl") for name in archive.records if name.endswith("/data.pkl")]
    if any(name.endswith("/constants.pkl") for name in archive.records):
        raise HxaconvError(f"{where} is a TorchScript program, not a state dict", hint="Save its state_dict().")
    if len(found) != 1:
        names = ", ".join(show(name) for name in list(archive.records)[:4])
        raise HxaconvError(
            f"{where} is a zip archive, but not one that torch.save wrote: it has {len(found)} data.pkl ({names}, ...)",
            hint="Unpack it if it merely contains the checkpoint.",
        )
    return found[0]


def _small(file: SourceFile | Section, archive: Archive, name: str) -> str | None:
    record = archive.records.get(name)
    if record is None:
        return None
    if record.size > 32:
        raise broken(file.label, f"record {show(name)} has {record.size} bytes")
    return file.read(data_offset(file, record), record.size).decode("ascii", errors="replace").strip()
