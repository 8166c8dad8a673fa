"""Build checkpoint files byte by byte, right or wrong in chosen places; without torch.

A record's or a storage's content is bytes, or a number of bytes that are left as a hole in the file.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

# --- pickles -----------------------------------------------------------------------------------


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode("utf-8")
    return b"X" + struct.pack("<L", len(raw)) + raw


def integer(value: int) -> bytes:
    """BININT or LONG1."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<l", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_of(*parts: bytes) -> bytes:
    """MARK ... TUPLE."""
    return b"(" + b"".join(parts) + b"t"


def global_(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def call(callee: bytes, *arguments: bytes) -> bytes:
    """REDUCE."""
    return callee + tuple_of(*arguments) + b"R"


def dict_of(items: Mapping[str, bytes] | Iterable[tuple[bytes, bytes]]) -> bytes:
    """A dictionary of values that are pickled already."""
    pairs = [(text(key), value) for key, value in items.items()] if isinstance(items, Mapping) else items
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def storage(key: str, numel: int, kind: str = "BFloat16Storage", view: bytes | None = None) -> bytes:
    """The persistent id of a storage; `view` (b"N" for none) in legacy files only."""
    parts = [text("storage"), global_("torch", kind), text(key), text("cpu"), integer(numel)]
    return tuple_of(*parts, *([] if view is None else [view])) + b"Q"


def tensor(held_in: bytes, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, offset: int = 0) -> bytes:
    """A call of `_rebuild_tensor_v2`."""
    if strides is None:
        strides = tuple(_product(shape[i + 1 :]) for i in range(len(shape)))
    hooks = global_("collections", "OrderedDict") + b")R"
    sizes, steps = tuple_of(*map(integer, shape)), tuple_of(*map(integer, strides))
    return call(global_("torch._utils", "_rebuild_tensor_v2"), held_in, integer(offset), sizes, steps, b"\x89", hooks)


def pickled(body: bytes) -> bytes:
    """A protocol-2 pickle."""
    return b"\x80\x02" + body + b"."


def _product(sizes: Iterable[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


# --- zip ---------------------------------------------------------------------------------------


def zip_file(path: Path, records: Iterable[tuple[str, bytes | int]], **falsified: Any) -> Path:
    """As `write_zip`, into a file."""
    with path.open("wb") as out:
        write_zip(out, records, **falsified)
    return path


def write_zip(
    out: BinaryIO,
    records: Iterable[tuple[str, bytes | int]],
    *,
    align: int = 64,
    local: Mapping[str, Mapping[str, Any]] | None = None,
    central: Mapping[str, Mapping[str, Any]] | None = None,
    end: Mapping[str, int] | None = None,
    always_zip64: bool = False,
) -> None:
    """A zip archive of stored records, holes left unwritten; `local`, `central` and `end` falsify fields.

    Fields: name, flags, method, size, packed, offset, extra; of the end record: count, size, offset.
    """
    entries = []
    for name, content in records:
        header = out.tell()
        size = content if isinstance(content, int) else len(content)
        crc = 0 if isinstance(content, int) else zlib.crc32(content)
        fields = {"name": name.encode(), "flags": 0, "method": 0, "size": size, "packed": size, "extra": b""}
        padding = -(header + 30 + len(fields["name"]) + 4) % align
        fields["extra"] = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        out.write(_local_header(fields | {"crc": crc} | dict((local or {}).get(name, {}))))
        if isinstance(content, int):
            out.seek(content, 1)
        else:
            out.write(content)
        fields |= {"crc": crc, "offset": header, "extra": b""} | dict((central or {}).get(name, {}))
        entries.append(_central_header(fields, always_zip64))
    directory = b"".join(entries)
    where = out.tell()
    out.write(directory)
    numbers = {"count": len(entries), "size": len(directory), "offset": where} | dict(end or {})
    wide = always_zip64 or where >= 0xFFFFFFFF
    if wide:
        end64 = out.tell()
        out.write(
            struct.pack(
                "<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, numbers["count"], numbers["count"],
                numbers["size"], numbers["offset"],
            )
        )  # fmt: skip
        out.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, numbers.get("end64", end64), 1))
    short = min(numbers["count"], 0xFFFF)
    place = 0xFFFFFFFF if wide else numbers["offset"]
    out.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, short, short, numbers["size"] & 0xFFFFFFFF, place, 0))


def _local_header(fields: Mapping[str, Any]) -> bytes:
    name, extra = fields["name"], fields["extra"]
    narrow = [min(fields[key], 0xFFFFFFFF) for key in ("packed", "size")]
    head = struct.pack(
        "<4s3H2HL2L2H", fields.get("signature", b"PK\x03\x04"), 20, fields["flags"], fields["method"], 0, 0,
        fields["crc"], *narrow, len(name), fields.get("extra_length", len(extra)),
    )  # fmt: skip
    return head + name + extra


def _central_header(fields: Mapping[str, Any], always_zip64: bool) -> bytes:
    name, extra = fields["name"], fields["extra"]
    wanted = [fields["size"], fields["packed"], fields["offset"]]
    wide = [value for value in wanted if always_zip64 or value >= 0xFFFFFFFF]
    if wide and not fields.get("without_zip64"):
        extra += struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide)
    size, packed, offset = (0xFFFFFFFF if always_zip64 else min(value, 0xFFFFFFFF) for value in wanted)
    head = struct.pack(
        "<4s6H3L5H2L", fields.get("signature", b"PK\x01\x02"), 45, 45, fields["flags"], fields["method"], 0, 0,
        fields["crc"], packed, size, len(name), len(extra), 0, 0, 0, 0, offset,
    )  # fmt: skip
    return head + name + extra


def torch_records(
    value: bytes, storages: Mapping[str, bytes | int], *, folder: str = "archive", byteorder: bytes = b"little"
) -> list[tuple[str, bytes | int]]:
    """The records of a torch.save file whose pickle says `value`."""
    return [
        (f"{folder}/data.pkl", pickled(value)),
        (f"{folder}/byteorder", byteorder),
        *((f"{folder}/data/{key}", content) for key, content in storages.items()),
        (f"{folder}/version", b"3\n"),
    ]


# --- files before the zip form, and safetensors --------------------------------------------------

LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"


def legacy_file(path: Path, value: bytes, storages: Mapping[str, tuple[int, bytes | int]], **falsified: Any) -> Path:
    """As `write_legacy`, into a file."""
    with path.open("wb") as out:
        write_legacy(out, value, storages, **falsified)
    return path


def write_legacy(
    out: BinaryIO,
    value: bytes,
    storages: Mapping[str, tuple[int, bytes | int]],
    *,
    magic: bytes = LEGACY_MAGIC,
    little_endian: bool = True,
    keys: Iterable[str] | None = None,
) -> None:
    """Five pickles, then an element count and the content of each storage."""
    system = dict_of({"little_endian": b"\x88" if little_endian else b"\x89"})
    key_list = b"](" + b"".join(text(key) for key in (storages if keys is None else keys)) + b"e"
    for body in (magic, integer(1001), system, value, key_list):
        out.write(pickled(body))
    for count, content in storages.values():
        out.write(struct.pack("<q", count))
        if isinstance(content, int):
            out.truncate(out.tell() + content)
            out.seek(content, 1)
        else:
            out.write(content)


def safetensors_file(path: Path, header: Any, data: bytes | int = b"", *, length: int | None = None) -> Path:
    """`header` is bytes or something for JSON; `length` falsifies the length prefix."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(raw) if length is None else length) + raw)
        if isinstance(data, int):
            out.truncate(out.tell() + data)
        else:
            out.write(data)
    return path
