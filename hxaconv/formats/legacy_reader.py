"""Files of torch.save before the zip form: five pickles, then the storages one after the other."""

from __future__ import annotations

import hashlib

from hxaconv.errors import HxaconvError
from hxaconv.formats.contents import Contents, broken
from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.files import SourceFile
from hxaconv.formats.pickle_machine import MAX_PICKLE_BYTES, Pickled, Storage, Truncated
from hxaconv.formats.state_dict import find_state_dict, recipes
from hxaconv.formats.unpickler import parse

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
_FIRST_WINDOW = 1024 * 1024


class _Pickles:
    """The pickles at the start of a file, read as far as they reach."""

    def __init__(self, file: SourceFile) -> None:
        self.file, self.position = file, 0
        self.data = file.read(0, min(file.size, _FIRST_WINDOW))

    def next(self) -> Pickled:
        while True:
            try:
                found = parse(self.data, self.file.label, self.position)
                self.position = found.end
                return found
            except Truncated:
                if len(self.data) == self.file.size:
                    raise
                if len(self.data) >= MAX_PICKLE_BYTES:
                    raise HxaconvError(
                        f"{self.file.label}: its pickle is longer than {MAX_PICKLE_BYTES} bytes"
                    ) from None
                # Eightfold, so that all attempts together cost little more than the last.
                more = min(8 * len(self.data), MAX_PICKLE_BYTES, self.file.size)
                self.data = self.file.read(0, more)


def read_legacy(file: SourceFile) -> Contents:
    """The tensors of a file that torch.save wrote with `_use_new_zipfile_serialization=False`.

    Raises:
        HxaconvError: for big-endian files, globals outside the allow-list, and a damaged structure.
    """
    pickles = _Pickles(file)
    if pickles.next().value != MAGIC:
        raise HxaconvError(f"{file.label} is a pickle, but not one that torch.save wrote", hint="Save a state dict.")
    if pickles.next().value != PROTOCOL:
        raise broken(file.label, f"its format is not version {PROTOCOL}")
    system = pickles.next().value
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise HxaconvError(
            f"{file.label} was written on a big-endian machine", hint="Load and save it again with torch here."
        )
    pickled = pickles.next()
    state = find_state_dict(pickled.value, file.label)
    keys = pickles.next().value
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise broken(file.label, "its list of storages is not one")
    places = _places(file, keys, pickled.storages, pickles.position)

    def place(storage: Storage) -> tuple[int, int]:
        start, nbytes = places[storage.key]
        if storage.view is None:
            return start, nbytes
        itemsize = BY_NAME[storage.dtype].itemsize
        skipped = storage.view[1] * itemsize
        return start + skipped, min(storage.view[2] * itemsize, nbytes - skipped)

    plan, aliases = recipes(state, place, file)
    digest = hashlib.sha256(pickles.data[: pickles.position])
    digest.update(repr(sorted(places.items())).encode())
    file.header_digest = digest.hexdigest()
    return Contents(container="legacy", tensors=plan, extra={**state.facts, "aliases": aliases})


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
