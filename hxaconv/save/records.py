"""Records: what hxaconv.json says of how a checkpoint was made, carried on into what is made of it; and what plan.json
says of a run, by which an interrupted one is known again: everything that decides the bytes, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError
from hxaconv.formats.json_files import read_json
from hxaconv.options import option_words

if TYPE_CHECKING:
    from hxaconv.model.model import Checkpoint
    from hxaconv.options import Init
    from hxaconv.save.output import Output
    from hxaconv.surgery.init import InitSettings

Json = Mapping[str, Any]

MAX_STEPS = 32
"""Of a history; the latest are kept."""
STEP = ("hxaconv", "command_line", "gqa_layers", "changed_layers", "init", "calibration")
"""The sections of a record that a history keeps, as they are."""


def record_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """hxaconv.json of a folder, or the key `hxaconv` of the sidecar of a `.pth`; empty where there is none.

    Raises:
        HxaconvError: when it is not JSON, or no object.
    """
    if checkpoint.record is not None and checkpoint.container == "safetensors":
        return read_json(checkpoint.record)
    return (checkpoint.sidecar or {}).get("hxaconv") or {}


def history_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The steps that made a checkpoint, the first one first, as their records say; empty where there is none.

    A record comes with a checkpoint, from anybody: what is read of it later has to be looked at first.
    """
    try:
        record = record_of(checkpoint)
        earlier = record["sources"]["source"].get("history", []) if "source" in record.get("sources", {}) else []
        steps = [step for step in earlier if isinstance(step, dict)]
    except (HxaconvError, AttributeError, KeyError, TypeError):
        return []
    own = {key: record[key] for key in STEP if key in record}
    return [*steps, own][-MAX_STEPS:] if own else steps


def init_record(layers: Iterable[int], values: Init, settings: InitSettings) -> dict[str, Any]:
    """The section `init` of a record: which layers were initialised, and how."""
    how = {"method": values.init, "preset": values.preset, "factors": dict(settings.factors), "seed": settings.seed}
    return how | {"layers": list(layers)}


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


def fingerprint(plan: Json) -> str:
    """64 hex digits."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def differences(recorded: Json, current: Json) -> list[str]:
    """In words, what two plan records differ in: options and sources first; the rest where neither explains it."""
    views: tuple[Callable[[Json], dict[str, Any]], ...] = (
        lambda record: {"the command": record["command"]},
        lambda record: {"hxaconv": record["plan"]["provenance"].get("hxaconv")},  # others may lay it out otherwise
        lambda record: _options(record) | _sources(record["plan"]["sources"]),
        lambda record: _flat(record["plan"]),
    )
    for view in views:
        then, now = view(recorded), view(current)
        changed = [key for key in dict.fromkeys([*then, *now]) if not _same(then.get(key), now.get(key))]
        if changed:
            return [f"{key}: {_shown(then.get(key))} then, {_shown(now.get(key))} now" for key in changed]
    return []


def _options(record: Json) -> dict[str, Any]:
    """Options as one types them."""
    options = {**record["options"], "digest": record["plan"]["digest"]}
    return {
        name if name in ("source", "teacher") else option_words([name]): value
        for name, value in json.loads(json.dumps(options, default=str)).items()
        if name != "out"
    }


def _sources(sources: Json) -> dict[str, str]:
    return {
        key.partition(" ")[2]: f"{source['bytes']:,} bytes, modified {_time(source['modified'])},"
        f" header {str(source['header'])[:8]}"
        for key, source in sources.items()
    }


def _time(modified: int | None) -> str:
    """Local time to the millisecond."""
    return "?" if modified is None else datetime.fromtimestamp(modified / 1e9).isoformat(" ", "milliseconds")


def _flat(plan: Json, section: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in plan.items():
        flat |= _flat(value, f"{section}{key}, ") if isinstance(value, Mapping) else {f"{section}{key}": value}
    return flat


def _same(then: Any, now: Any) -> bool:
    """Whether two values are equal, or two spellings of one path."""
    if isinstance(then, str) and isinstance(now, str):
        return os.path.abspath(then) == os.path.abspath(now)
    return bool(then == now)


def _shown(value: Any) -> str:
    return "not given" if value is None or value is False else "given" if value is True else str(value)
