"""What makes two runs the same run: everything that decides the bytes, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hxaconv.containers.layout import FileLayout
from hxaconv.writing.target import Output

Record = Mapping[str, Any]


def components(output: Output, files: Sequence[FileLayout], digest: str) -> dict[str, Any]:
    """The parts of a plan that must be equal for a run to go on where another stopped, as JSON."""
    return {
        "container": output.container,
        "digest": digest,
        "files": {layout.name: layout.size for layout in files},
        "tensors": {
            name: f"{recipe.dtype} {list(recipe.shape)} {recipe.make.kind} of {recipe.origin}"
            for name, recipe in output.tensors.items()
        },
        "documents": {name: hashlib.sha256(data).hexdigest() for name, data in output.documents.items()},
        "copied files": {name: file.size for name, file in output.copied_files.items()},
        "sources": {
            # A download's time is not the source's.
            f"{number} {file.name}": f"{file.size} bytes, modified {None if file.fetch else file.mtime_ns},"
            f" header {file.header_digest or 'not digested'}"
            for number, file in enumerate(output.sources())
        },
        "provenance": json.loads(json.dumps(dict(output.provenance), default=str)),
    }


def fingerprint(record: Record) -> str:
    """64 hex digits."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def differences(recorded: Record, current: Record) -> list[str]:
    """In words, what two plans differ in; empty when they are the same."""
    lines: list[str] = []
    for section in current:
        before, now = recorded.get(section), current[section]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            keys = list(dict.fromkeys([*before, *now]))
            changed = [key for key in keys if before.get(key) != now.get(key)]
            lines += [f"{section}, {key}: was {before.get(key)}, is {now.get(key)}" for key in changed]
        elif before != now:
            lines.append(f"{section}: was {before}, is {now}")
    return lines
