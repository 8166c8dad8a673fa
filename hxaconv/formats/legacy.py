"""Files of torch.save before the zip form: five pickles, then the storages one after the other."""

from __future__ import annotations

import hashlib
import io

from hxaconv.errors import HxaconvError
from hxaconv.formats import Contents
from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.files import SourceFile, broken
from hxaconv.formats.pickles import MAX_PICKLE_BYTES, Machine, Storage, parse
from hxaconv.formats.state_dict import find_state_dict, recipes

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
PROTOCOL_1 = b"L%dL\n" % MAGIC
"""How such a file begins in pickle's protocol 1; later ones begin with 0x80."""
BIG_ENDIAN = "was written on a big-endian machine"
_WINDOW_BYTES = 1024 * 1024
"""Enough for the pickles of most files."""


def read_legacy(file: SourceFile, key: str | None = None) -> Contents:
    """The tensors of a file that torch.save wrote with `_use_new_zipfile_serialization=False`.

    Raises:
        HxaconvError: for big-endian files, globals outside the allow-list, and a damaged structure.
    """
    try:
        return _read(file, file.read(0, min(file.size, _WINDOW_BYTES)), key)
    except HxaconvError:
        if file.size <= _WINDOW_BYTES:
            raise
    return _read(file, file.read(0, min(file.size, MAX_PICKLE_BYTES)), key)


def _read(file: SourceFile, data: bytes, key: str | None) -> Contents:
    stream = io.BytesIO(data)

    def read_next() -> Machine:
        return parse(stream, file.label)

    if read_next().value != MAGIC:
        raise HxaconvError(f"{file.label} is a pickle, but not one that torch.save wrote", hint="Save a state dict.")
    if read_next().value != VERSION:
        raise broken(file.label, f"its format is not version {VERSION}")
    system = read_next().value
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise HxaconvError(f"{file.label} {BIG_ENDIAN}", hint="Load and save it again with torch here.")
    whole = read_next()
    tensors, facts = find_state_dict(whole.value, file.label, key)
    keys = read_next().value
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise broken(file.label, "its list of storages is not one")
    end = stream.tell()
    places = _places(file, keys, whole.storages, end)

    plan, aliases = recipes(tensors, lambda storage: places[storage.key], file)
    file.header_digest = hashlib.sha256(data[:end] + repr(sorted(places.items())).encode()).hexdigest()
    return Contents(container="legacy", tensors=plan, extra={**facts, "aliases": aliases})


def _places(
    file: SourceFile, keys: list[str], storages: dict[str, Storage], position: int
) -> dict[str, tuple[int, int]]:
    """Key -> (offset, bytes) of the storages, which follow each other behind their element counts."""
    if len(set(keys)) != len(keys) or set(keys) != storages.keys():
        raise broken(file.label, "its list of storages is not the one that its tensors need")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        expected = storages[key]
        count = int.from_bytes(file.read(position, 8), "little", signed=True)
        if count != expected.numel:
            raise broken(file.label, f"{count} elements announced at byte {position}, expected {expected.numel}")
        nbytes = count * BY_NAME[expected.dtype].itemsize
        places[key] = (position + 8, nbytes)
        position += 8 + nbytes
    if position > file.size:
        raise broken(file.label, f"the file ends at byte {file.size}, its storages at {position}")
    return places
