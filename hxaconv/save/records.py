"""What a checkpoint's record says of how it was made, read, and carried on into the records of what is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError
from hxaconv.formats.json_files import read_json

if TYPE_CHECKING:
    from hxaconv.model.model import Checkpoint
    from hxaconv.options import Init
    from hxaconv.surgery.init import InitSettings

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
