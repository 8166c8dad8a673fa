"""What makes two runs the same run: everything that decides the bytes, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from hxaconv.save.command_line import option_name
from hxaconv.save.output import Output

Plan = Mapping[str, Any]


def plan_of(output: Output, digest: str) -> dict[str, Any]:
    """The parts of a plan that must be equal for a run to go on where another stopped, as JSON."""
    return {
        "folder": output.is_folder,
        "digest": digest,
        "files": {layout.name: layout.size for layout in output.files},
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


def fingerprint(plan: Plan) -> str:
    """64 hex digits."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """In words, what two plan records differ in: options and sources first; the rest where neither explains it."""
    if recorded["command"] != current["command"]:
        return [f"the command: {recorded['command']} then, {current['command']} now"]
    plans = recorded["plan"], current["plan"]
    then, now = (plan["provenance"].get("hxaconv") for plan in plans)
    if then != now:  # records of another version may look otherwise
        return [f"hxaconv: {then} then, {now} now"]
    options = (_flat({**record["options"], "digest": record["plan"]["digest"]}) for record in (recorded, current))
    return [*_changed_options(*options), *_changed_sources(*(plan["sources"] for plan in plans))] or _changed(*plans)


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, as JSON; those of a group (how to calibrate) by their own."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(options, default=str)).items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _changed_options(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name if name in ('source', 'teacher') else f'--{option_name(name)}'}:"
        f" {_shown(then.get(name))} then, {_shown(now.get(name))} now"
        for name in dict.fromkeys([*then, *now])
        if name != "out" and not _same(then.get(name), now.get(name))
    ]


def _same(then: Any, now: Any) -> bool:
    """Whether two values are equal, or two spellings of one path."""
    if isinstance(then, str) and isinstance(now, str):
        return os.path.abspath(then) == os.path.abspath(now)
    return bool(then == now)


def _shown(value: Any) -> str:
    return "not given" if value is None or value is False else "given" if value is True else str(value)


def _changed_sources(then: Plan, now: Plan) -> list[str]:
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


def _time(source: Mapping[str, Any]) -> str:
    """Local time to the millisecond."""
    if source["modified"] is None:
        return "?"
    return datetime.fromtimestamp(source["modified"] / 1e9).isoformat(" ", "milliseconds")


def _changed(recorded: Plan, current: Plan, section: str = "") -> list[str]:
    lines: list[str] = []
    for key in dict.fromkeys([*recorded, *current]):
        then, now, name = recorded.get(key), current.get(key), f"{section}{key}"
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            lines += _changed(then, now, f"{name}, ")
        elif then != now:
            lines.append(f"{name}: {then} then, {now} now")
    return lines
