"""`.pth` files: the zip archive of torch.save, a pickle that describes the tensors and one record per storage.

Records are stored uncompressed. What is written here has each padded so that its bytes start at a multiple of 64, and
every header when the checksums are known.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats import Contents, FileLayout, Fill, Segment
from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.files import Section, SourceFile, broken, show
from hxaconv.formats.gathered import contiguous_strides, is_contiguous
from hxaconv.formats.legacy import BIG_ENDIAN
from hxaconv.formats.pickles import MAX_PICKLE_BYTES, Storage, Tensor, parse
from hxaconv.formats.state_dict import find_state_dict, recipes
from hxaconv.model.plan import Plan, Recipe, stored

MAX_DIRECTORY_BYTES = 16 * 1024 * 1024
"""About 150,000 records."""
_LOCAL_SIZE = 30
_ENCRYPTED = 0x2041
ALIGNMENT = 64
_LIMIT_32 = 0xFFFFFFFF
_LIMIT_16 = 0xFFFF
_UTF8_NAME = 0x0800


class _Stream:
    """A file as zipfile reads one: never more at once than a directory may have."""

    def __init__(self, file: Section) -> None:
        self.file, self.position = file, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = (0, self.position, self.file.size)[whence] + offset
        if self.position < 0:
            raise OSError("a position before the file")
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.file.size - self.position)
        count = left if count < 0 else min(count, left)
        if count > MAX_DIRECTORY_BYTES:
            raise HxaconvError(
                f"{self.file.label}: a zip directory of {count} bytes, expected at most {MAX_DIRECTORY_BYTES}"
            )
        data = self.file.read(self.position, count)
        self.position += count
        return data


def read_directory(file: Section) -> dict[str, zipfile.ZipInfo]:
    """The records by their names, in the order of the file, from the central directory.

    Raises:
        HxaconvError: for a damaged directory, and for compressed, encrypted or overlapping records.
    """
    try:
        archive = zipfile.ZipFile(_Stream(file))
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, OverflowError, struct.error) as error:
        raise broken(
            file.label, f"the zip directory at the end of the file is missing or damaged ({show(str(error))})"
        ) from None
    found = sorted(archive.infolist(), key=lambda info: info.header_offset)
    locked = [show(info.filename) for info in found if info.flag_bits & _ENCRYPTED]
    raise_all(f"{file.label}: encrypted zip records:", locked, hint="Decrypt the file first.")
    raise_all(
        f"{file.label}: compressed zip records, where torch.save stores them plain:",
        [show(info.filename) for info in found if info.compress_type != zipfile.ZIP_STORED],
        hint="Unpack the archive if it merely contains the checkpoint; otherwise save it again with torch.save.",
    )
    odd = [
        f"{show(info.filename)}: {info.compress_size} bytes for {info.file_size} at {info.header_offset}"
        for info, following in zip(found, [*(info.header_offset for info in found[1:]), file.size], strict=False)
        if info.compress_size != info.file_size
        or not 0 <= info.header_offset <= following - _LOCAL_SIZE - info.file_size
    ]
    raise_all(f"{file.label}: zip records that overlap or leave the file:", odd, hint="The file is damaged.")
    by_name = {info.filename: info for info in found}
    if len(by_name) != len(found):
        raise broken(file.label, "the zip directory names a record twice")
    return by_name


class TorchZip:
    """A file of torch.save, or a section of a file that is one: what its pickle holds, and where its storages stand."""

    def __init__(self, file: SourceFile | Section, *, inert: tuple[str, ...] = ()) -> None:
        """Read directory and pickle; `inert` as in `parse`.

        Raises:
            HxaconvError: for anything that torch.save does not write, big-endian files, and damage.
        """
        self._section = file if isinstance(file, Section) else Section(file, 0, file.size, file.label)
        self.file, self.label = self._section.file, file.label
        self._records = read_directory(self._section)
        starts = [record.header_offset for record in self._records.values()]
        self._ends = dict(zip(starts, [*starts[1:], self._section.size], strict=False))
        if any(name.endswith("/constants.pkl") for name in self._records):
            raise HxaconvError(f"{self.label} is a TorchScript program", hint="Save its state_dict().")
        found = [name.removesuffix("/data.pkl") for name in self._records if name.endswith("/data.pkl")]
        if len(found) != 1:
            names = ", ".join(show(name) for name in list(self._records)[:4])
            raise HxaconvError(
                f"{self.label} is a zip archive, but not one that torch.save wrote:"
                f" it has {len(found)} data.pkl ({names}, ...)",
                hint="Unpack it if it merely contains the checkpoint.",
            )
        self._prefix = found[0]
        if f"{self._prefix}/byteorder" in self._records and self._read("byteorder", 32).strip() == b"big":
            raise HxaconvError(f"{self.label} {BIG_ENDIAN}", hint="Load and save it again with torch here.")
        self._pickled = self._read("data.pkl", MAX_PICKLE_BYTES)
        self.value = parse(io.BytesIO(self._pickled), self.label, inert=inert).value
        self._places: dict[str, int] = {}

    def _read(self, name: str, limit: int) -> bytes:
        record = self._records[f"{self._prefix}/{name}"]
        if record.file_size > limit:
            raise HxaconvError(f"{self.label}: record {name} has {record.file_size} bytes, expected at most {limit}")
        return self._section.read(self._data_offset(record), record.file_size)

    def _data_offset(self, record: zipfile.ZipInfo) -> int:
        """Where the data of a record stands: its local header has a name and extra field of its own lengths."""
        local = self._section.read(record.header_offset, _LOCAL_SIZE)
        signature, flags, method, name_length, extra_length = struct.unpack("<4s2x2H16x2H", local)
        if signature != b"PK\x03\x04" or method != 0 or flags & _ENCRYPTED:
            raise broken(
                self.label, f"record {show(record.filename)} has no plain local header at {record.header_offset}"
            )
        start = int(record.header_offset + _LOCAL_SIZE + name_length + extra_length)
        if start + record.file_size > self._ends[record.header_offset]:
            raise broken(self.label, f"record {show(record.filename)} reaches into what follows it")
        return start

    def place(self, storage: Storage) -> tuple[int, int]:
        """Where a storage begins, in the file that holds the section, and its bytes.

        Raises:
            HxaconvError: when its record is missing or of another size.
        """
        record = self._records.get(f"{self._prefix}/data/{storage.key}")
        itemsize = BY_NAME[storage.dtype].itemsize
        nbytes = storage.numel * itemsize
        if record is None or not 0 <= record.file_size - nbytes < itemsize:
            has = "is missing" if record is None else f"has {record.file_size} bytes"
            raise broken(self.label, f"record data/{show(storage.key)} {has}, its tensors need {nbytes}")
        if storage.key not in self._places:
            self._places[storage.key] = self._section.start + self._data_offset(record)
        return self._places[storage.key], nbytes

    def recipe(self, tensor: Any, name: str) -> Recipe:
        """A tensor of the file that is contiguous.

        Raises:
            HxaconvError: when it is none, or leaves its storage.
        """
        if not isinstance(tensor, Tensor) or not is_contiguous(tensor.shape, tensor.strides):
            raise broken(self.label, f"{show(name)} is no contiguous tensor")
        (start, available), dtype = self.place(tensor.storage), tensor.storage.dtype
        begin = tensor.offset * BY_NAME[dtype].itemsize
        made = stored(dtype, tensor.shape, self.file, start + begin, f"{name} in {self.file.name}")
        if begin + made.nbytes > available:
            raise broken(self.label, f"{show(name)} needs {begin + made.nbytes} bytes of a storage of {available}")
        return made

    def digest(self) -> str:
        """sha256 of what locates the tensors read so far, and of the records' checksums."""
        records = [(info.filename, info.header_offset, info.file_size, info.CRC) for info in self._records.values()]
        return hashlib.sha256(self._pickled + f"{records} {sorted(self._places.items())}".encode()).hexdigest()


def read_torchzip(file: SourceFile, key: str | None = None) -> Contents:
    """The tensors of a `.pth`, `.pt` or `.bin` that torch.save wrote.

    Raises:
        HxaconvError: for anything that torch.save does not write, big-endian files, and damage.
    """
    archive = TorchZip(file)
    tensors, facts = find_state_dict(archive.value, file.label, key)
    plan, aliases = recipes(tensors, archive.place, file)
    file.header_digest = archive.digest()
    return Contents(container="pth", tensors=plan, extra={**facts, "aliases": aliases})


# --- writing -----------------------------------------------------------------------------------------------


class _Record(NamedTuple):
    """One entry of the archive to be."""

    path: bytes
    offset: int
    """Of its header."""
    data_offset: int
    size: int
    crc: int | str
    """Its checksum, or the name of the tensor whose checksum it is."""


def file_layout(file_name: str, plan: Plan, *, ordered: bool = True) -> FileLayout:
    """A `.pth` file as torch.load reads it, of an OrderedDict or a plain dict.

    Raises:
        HxaconvError: when the plan has element types that torch keeps in no typed storage.
    """
    raise_all(
        f"{file_name}: a .pth file cannot hold these tensors:",
        [f"{name} ({recipe.dtype})" for name, recipe in plan.items() if not BY_NAME[recipe.dtype].storage_class],
        hint="Write safetensors instead, or cast with --dtype.",
    )
    # The folder inside: torch takes the file's stem, and `archive` if that is not ASCII.
    root, end = file_name.rpartition(".")[0] or file_name, 0
    root = root if file_name.isascii() else "archive"
    bodies: dict[str, bytes | tuple[str, Recipe]] = {"data.pkl": _pickled(plan, ordered), "byteorder": b"little"}
    bodies |= {f"data/{index}": item for index, item in enumerate(plan.items())}
    bodies["version"] = b"3\n"
    records, fills, known = [], [], []
    for name, body in bodies.items():
        path, size = f"{root}/{name}".encode(), body[1].nbytes if isinstance(body, tuple) else len(body)
        start = end + _LOCAL_SIZE + len(path) + len(_zip64(size, size)) + 4
        start += -start % ALIGNMENT
        if isinstance(body, tuple):
            fills.append(Fill(body[0], start, body[1]))
        else:
            known.append((start, body))
        records.append(_Record(path, end, start, size, body[0] if isinstance(body, tuple) else zlib.crc32(body)))
        end = start + size

    def seal(crcs: Mapping[str, int]) -> list[Segment]:
        sealed = [
            record._replace(crc=crcs[record.crc] if isinstance(record.crc, str) else record.crc) for record in records
        ]
        return [*((record.offset, _local_header(record)) for record in sealed), (end, _directory(sealed))]

    size = end + len(_directory([record._replace(crc=0) for record in records]))
    return FileLayout(file_name, size, lambda: known, tuple(fills), seal)


def _zip64(*values: int) -> bytes:
    """The extra field of the numbers that 32 bits do not hold."""
    wide = [value for value in values if value >= _LIMIT_32]
    return struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""


def _local_header(record: _Record) -> bytes:
    zip64, size = _zip64(record.size, record.size), min(record.size, _LIMIT_32)
    padding = record.data_offset - (record.offset + _LOCAL_SIZE + len(record.path) + len(zip64) + 4)
    extra = zip64 + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    fields = (0, _UTF8_NAME, 0, 0, 0, record.crc, size, size, len(record.path), len(extra))
    return struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *fields) + record.path + extra


def _directory(records: Sequence[_Record]) -> bytes:
    """The central directory and its ends."""
    start = records[-1].data_offset + records[-1].size
    entries = b"".join(map(_central_entry, records))
    count, size = len(records), len(entries)
    zip64_end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
    shown = min(count, _LIMIT_16)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, shown, shown, min(size, _LIMIT_32), min(start, _LIMIT_32), 0)
    return entries + zip64_end + locator + end


def _central_entry(record: _Record) -> bytes:
    extra = _zip64(record.size, record.size, record.offset)
    size, offset = min(record.size, _LIMIT_32), min(record.offset, _LIMIT_32)
    head = struct.pack("<4sHHHHHHIII", b"PK\1\2", 0, 0, _UTF8_NAME, 0, 0, 0, record.crc, size, size)
    tail = struct.pack("<HHHHHII", len(record.path), len(extra), 0, 0, 0, 0, offset)
    return head + tail + record.path + extra


def _pickled(plan: Plan, ordered: bool) -> bytes:
    """`data.pkl` of a dict, or OrderedDict, of contiguous tensors on the CPU, the n-th of them on storage `n`.

    There is no object to pickle: the opcodes are written one by one, those of torch.save without its memo.
    """
    made = [pickle.PROTO + b"\x02", _EMPTY_ORDERED_DICT if ordered else pickle.EMPTY_DICT, pickle.MARK]
    for index, (name, recipe) in enumerate(plan.items()):
        made += [_text(name), _tensor(index, recipe)]
    return b"".join([*made, pickle.SETITEMS, pickle.STOP])


_EMPTY_ORDERED_DICT = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE


def _tensor(index: int, recipe: Recipe) -> bytes:
    """`_rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, backward_hooks)`."""
    storage_class = f"torch\n{BY_NAME[recipe.dtype].storage_class}\n".encode()
    storage = [_text("storage"), pickle.GLOBAL + storage_class, _text(str(index)), _text("cpu"), _number(recipe.numel)]
    arguments = [
        _tuple(storage) + pickle.BINPERSID,
        _number(0),
        _tuple(map(_number, recipe.shape)),
        _tuple(map(_number, contiguous_strides(recipe.shape))),
        pickle.NEWFALSE,
        _EMPTY_ORDERED_DICT,
    ]
    return pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + _tuple(arguments) + pickle.REDUCE


def _tuple(items: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data
