"""What a checkpoint's record says of how it was made, read, and carried on into the records of what is made of it.

A record comes with a checkpoint, from anybody: figures and words of ours are taken over, names and texts are not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hxaconv.calibration.report import REFIT_OUTPUT, CalibrationReport, Distances, LayerReport
from hxaconv.errors import HxaconvError
from hxaconv.formats.json_files import MAX_LAYERS, read_json
from hxaconv.surgery.init import PRESETS, PROJECTIONS, InitSettings
from hxaconv.verification.digests import digest

if TYPE_CHECKING:
    from hxaconv.model.model import Checkpoint

MAX_STEPS = 32
"""Of a history; the latest are kept."""
SMALL_TENSOR_BYTES = 64 * 1024
"""Tensors up to here are held against their recorded digests: training changes many of them at its first step."""

INITIAL, FITTED = "initial", "fitted"


def record_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """hxaconv.json of a folder, or the key `hxaconv` of the sidecar of a `.pth`; empty where there is none.

    Raises:
        HxaconvError: when it is not JSON, or no object.
    """
    if checkpoint.record is not None and checkpoint.container == "safetensors":
        return read_json(checkpoint.record)
    return (checkpoint.sidecar or {}).get("hxaconv") or {}


def history_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The steps that made a checkpoint, the first one first: how layers were initialised, calibrated, exchanged.

    Empty where there is no record, where it is not as this package writes it, or is of other weights.
    """
    try:
        record = record_of(checkpoint)
        if not record or _of_other_weights(checkpoint, record):
            return []
        source = record.get("sources", {}).get("source", {})
        steps = [_step(step) for step in [*source.get("history", []), record]]
    except (HxaconvError, AttributeError, KeyError, TypeError, ValueError):
        return []
    return [step for step in steps if step][-MAX_STEPS:]


def init_record(layers: Iterable[int], method: str, preset: str, settings: InitSettings) -> dict[str, Any]:
    """The section `init` of a record: which layers were initialised, and how."""
    factors = dict(settings.factors)
    return {"method": method, "preset": preset, "factors": factors, "seed": settings.seed, "layers": list(layers)}


def layer_states(history: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """RWKV layer -> INITIAL or FITTED, as far as a history says; layers from elsewhere are left out."""
    states: dict[int, str] = {}
    for step in history:
        for layer in step.get("changed_layers", []):
            states.pop(layer, None)
        states |= dict.fromkeys(step.get("init", {}).get("layers", []), INITIAL)
        fitted = step.get("calibration", {}).get("layers", [])
        if not all(layer["kept_plain"] for layer in fitted):
            states |= {layer["layer"]: FITTED for layer in fitted if layer["kind"] == "rwkv"}
    return states


def calibration_of(history: Sequence[Mapping[str, Any]]) -> CalibrationReport | None:
    """The calibration that a history ends with; what happens to layers after one makes its figures untrue."""
    if not history or "calibration" not in history[-1]:
        return None
    last = dict(history[-1]["calibration"])
    distances = last.pop("kl_teacher_student")
    layers = [{key: _number_of(value) for key, value in layer.items()} for layer in last.pop("layers")]
    return CalibrationReport(
        **last,
        layers=tuple(LayerReport(**layer) for layer in layers),
        distances=Distances(**{key: _number_of(value) for key, value in distances.items()}) if distances else None,
    )


def _number_of(value: Any) -> Any:
    """A stored figure as a number: those that are not finite are stored as text."""
    if isinstance(value, list):
        return tuple(map(_number_of, value))
    return float(value) if value in _NOT_FINITE else value


def _of_other_weights(checkpoint: Checkpoint, record: Mapping[str, Any]) -> bool:
    """Whether a small tensor on this disk is not the one that was recorded: the weights were trained since."""
    if checkpoint.repo is not None:  # of one commit; and parts must not depend on what each has downloaded
        return False
    for name, recipe in checkpoint.plan.items():
        recorded = record["tensors"].get(checkpoint.stored_names[name], {}).get("digest")
        small = recipe.nbytes <= SMALL_TENSOR_BYTES
        if small and recorded is not None and digest(recipe, recorded.partition(":")[0]) != recorded:
            return True
    return False


_NOT_FINITE = ("nan", "inf", "-inf")


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _is_figure(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, str) and value in _NOT_FINITE)


def _is_layer(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_LAYERS


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**64


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


def _is_device(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"cpu|cuda(:\d{1,4})?", value) is not None


_FITTED_LAYER = {
    "layer": _is_layer,
    "kind": _one_of("rwkv", "gqa"),
    **dict.fromkeys(("error_before", "error_after", "clamped"), _is_figure),
    "decay": [_is_figure],
    "iclr": [_is_figure],
    **dict.fromkeys(("kept_plain", "output_refitted"), _is_flag),
}
_SECTIONS: dict[str, Any] = {
    "gqa_layers": [_is_layer],
    "changed_layers": [_is_layer],
    "init": {
        "method": _one_of("openmose", "calibrated"),
        "preset": _one_of(*PRESETS),
        "factors": dict.fromkeys(PROJECTIONS, _is_number),
        "seed": _is_whole,
        "layers": [_is_layer],
    },
    "calibration": {
        **dict.fromkeys(("tokens", "fitted_tokens"), _is_whole),
        "taken": _is_flag,
        "settings": {
            **dict.fromkeys(("chunk", "refine_steps"), _is_whole),
            "refit_output": _one_of(*REFIT_OUTPUT),
            "fold_rope": _is_flag,
            "device": _is_device,
        },
        "layers": [_FITTED_LAYER],
        "kl_teacher_student": {
            "tokens": _is_whole,
            **dict.fromkeys(("calibrated", "plain", "attention_zeroed"), _is_figure),
        },
    },
}
"""What is carried on of a step, and what its values must be; the texts of warnings stay behind."""


def _step(record: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of one record; empty where it made nothing anew."""
    found = {key: _kept(record[key], shape) for key, shape in _SECTIONS.items() if record.get(key) is not None}
    return found if found.keys() - {"gqa_layers"} else {}


def _kept(value: Any, shape: Any) -> Any:
    """As much of `value` as `shape` has; a figure that nobody took is null.

    Raises:
        KeyError, TypeError, ValueError: when it lacks something, or holds something else.
    """
    if isinstance(shape, dict):
        return {
            key: None if key == "kl_teacher_student" and value[key] is None else _kept(value[key], inner)
            for key, inner in shape.items()
        }
    if isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError
        return [_kept(item, shape[0]) for item in value]
    if not shape(value):
        raise ValueError
    return value
