"""The journal of a run: which tensors and files are on disk, one line each, appended once they are synced."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hxaconv.formats.layout import FileLayout
from hxaconv.save import diskio
from hxaconv.save.checksums import Finished

_NAME = "journal"


@dataclass(frozen=True, slots=True)
class Done:
    """What journals say: tensors by name, and the files that are complete."""

    tensors: Mapping[str, Finished]
    files: frozenset[str]


class Journal:
    """Appends to one file; every process writes its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise diskio.output_error(error, path, "opening") from error

    def tensors_done(self, layout: FileLayout, finished: Sequence[Finished]) -> None:
        """These tensors are synced."""
        self._append(
            {"tensor": t.name, "crc32": t.crc32, "sha256": t.sha256, "nonfinite": t.nonfinite} for t in finished
        )

    def file_done(self, layout: FileLayout) -> None:
        """The file is complete and synced."""
        self._append([{"file": layout.name}])

    def close(self) -> None:
        """No more lines."""
        os.close(self._fd)

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        # The break comes first: a line that a crash or a full disk cut short ends where the next one begins.
        data = memoryview("".join("\n" + json.dumps(line) for line in lines).encode())
        try:
            while len(data):
                data = data[os.write(self._fd, data) :]
            diskio.sync_file(self._fd)
        except OSError as error:
            raise diskio.output_error(error, self._path, "writing") from error


def journal_path(folder: Path) -> Path:
    """Where a run writes its journal."""
    return folder / _NAME


def read_journals(folder: Path) -> Done:
    """What the journal in a staging folder says; lines cut short by a crash say nothing."""
    tensors: dict[str, Finished] = {}
    files: set[str] = set()
    for path in sorted(folder.glob(f"{_NAME}*")):
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                if "file" in entry:
                    files.add(entry["file"])
                else:
                    name = entry["tensor"]
                    tensors[name] = Finished(name, entry["crc32"], entry["sha256"], entry["nonfinite"])
            except (ValueError, KeyError, TypeError):
                continue
    return Done(tensors, frozenset(files))
