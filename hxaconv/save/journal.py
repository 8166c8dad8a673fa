"""The journal of a run: which tensors are on disk, one line each, appended once they are synced."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from hxaconv.save import diskio
from hxaconv.save.checksums import Finished

_NAME = "journal"


class Journal:
    """Appends to one file; every rank writes its own."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._path = folder / (f"{_NAME}-{rank}" if rank else _NAME)
        with diskio.explained(self._path, "opening"):
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def done(self, finished: Sequence[Finished]) -> None:
        """These tensors are synced.

        Raises:
            HxaconvError: when the lines cannot be written and synced in their turn.
        """
        # The break comes first: a line that a crash or a full disk cut short ends where the next one begins.
        lines = ({"tensor": t.name, "crc32": t.crc32, "sha256": t.sha256, "nonfinite": t.nonfinite} for t in finished)
        data = memoryview("".join("\n" + json.dumps(line) for line in lines).encode())
        with diskio.explained(self._path):
            while len(data):
                data = data[os.write(self._fd, data) :]
            diskio.sync_file(self._fd)

    def close(self) -> None:
        """No more lines."""
        os.close(self._fd)


def read_journals(folder: Path) -> dict[str, Finished]:
    """The tensors that the journals in a staging folder name; lines cut short by a crash say nothing."""
    tensors: dict[str, Finished] = {}
    for path in sorted(folder.glob(f"{_NAME}*")):
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                name = entry["tensor"]
                tensors[name] = Finished(name, entry["crc32"], entry["sha256"], entry["nonfinite"])
            except (ValueError, KeyError, TypeError):
                continue
    return tensors
