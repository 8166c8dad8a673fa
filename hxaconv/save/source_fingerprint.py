"""What makes two runs the same run: everything that decides the bytes, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from hxaconv.formats.layout import FileLayout
from hxaconv.save.command_line import option_name
from hxaconv.save.target import Output

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
            f"{number} {file.name}": {
                "bytes": file.size,
                "modified": None if file.fetch else file.mtime_ns,  # a download's time is not the source's
                "header": file.header_digest,
            }
            for number, file in enumerate(output.sources())
        },
        "provenance": json.loads(json.dumps(dict(output.provenance), default=str)),
    }


def fingerprint(record: Record) -> str:
    """64 hex digits."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def differences(recorded: Record, current: Record) -> list[str]:
    """In words, what two plan records differ in: options and sources first; the tensors where neither explains it."""
    if recorded["command"] != current["command"]:
        return [f"the command: {recorded['command']} then, {current['command']} now"]
    plans = recorded["plan"], current["plan"]
    then, now = (plan["provenance"].get("hxaconv") for plan in plans)
    if then != now:  # records of another version may look otherwise
        return [f"hxaconv: {then} then, {now} now"]
    settings = ({**record["options"], "digest": record["plan"]["digest"]} for record in (recorded, current))
    told = [*_changed_options(*settings), *_changed_sources(*(plan["sources"] for plan in plans))]
    return told or _changed(*plans)


def _changed_options(recorded: Record, current: Record) -> list[str]:
    then, now = (_flat(json.loads(json.dumps(options, default=str))) for options in (recorded, current))
    return [
        f"{_option(name)}: {_shown(then.get(name))} then, {_shown(now.get(name))} now"
        for name in dict.fromkeys([*then, *now])
        if name != "out" and not _same(then.get(name), now.get(name))
    ]


def _flat(options: Record) -> dict[str, Any]:
    """Options by name, those of a group (how to calibrate) by their own."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _same(then: Any, now: Any) -> bool:
    """Whether two values are equal, or two spellings of one path."""
    if isinstance(then, str) and isinstance(now, str):
        return os.path.abspath(then) == os.path.abspath(now)
    return bool(then == now)


def _option(name: str) -> str:
    return name if name in ("source", "teacher") else f"--{option_name(name)}"


def _shown(value: Any) -> str:
    return "not given" if value is None or value is False else "given" if value is True else str(value)


def _changed_sources(then: Record, now: Record) -> list[str]:
    lines = []
    for key in dict.fromkeys([*then, *now]):
        name, was, is_ = key.partition(" ")[2], then.get(key), now.get(key)
        if was is None or is_ is None:
            lines.append(f"{name}: {'not read then' if was is None else 'no longer read'}")
        elif was != is_:
            changes = [
                f"{was['bytes']:,} bytes then, {is_['bytes']:,} now" if was["bytes"] != is_["bytes"] else "",
                f"modified {_time(was)} then, {_time(is_)} now" if was["modified"] != is_["modified"] else "",
                "with another header" if was["header"] != is_["header"] else "",
            ]
            lines.append(f"{name}: {'; '.join(change for change in changes if change)}")
    return lines


def _time(source: Record) -> str:
    """Local time to the millisecond."""
    if source["modified"] is None:
        return "?"
    return datetime.fromtimestamp(source["modified"] / 1e9).isoformat(" ", "milliseconds")


def _changed(recorded: Record, current: Record) -> list[str]:
    lines: list[str] = []
    for section, now in current.items():
        before = recorded.get(section)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
            lines += [f"{section}, {key}: {before.get(key)} then, {now.get(key)} now" for key in keys]
        elif before != now:
            lines.append(f"{section}: {before} then, {now} now")
    return lines
