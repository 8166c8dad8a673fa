"""From the content of a pickle to recipes: finding the state dict, and where each tensor's bytes stand."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from hxaconv.errors import HxaconvError, NotConverted, raise_all
from hxaconv.formats.dtypes import BY_NAME, num_bytes
from hxaconv.formats.files import SourceFile, check_names, show
from hxaconv.formats.gathered import Strided, is_contiguous, overlaps_itself, span
from hxaconv.formats.pickles import OPAQUE_TENSORS, OTHER_DTYPE, Global, Record, Refused, Storage, Tensor
from hxaconv.model.plan import Plan, Recipe, stored

WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
"""Keys under which trainers put the state dict, beside optimizer state and counters."""
MAX_NESTING = 3
MAX_REPEATED_BYTES = 1024**3
"""Of a tensor that is larger than what its file holds of it, as torch.Tensor.expand makes them."""
_KINDS = {Tensor: "single tensor", Storage: "bare storage", Record: "class or an object of one"}
_KINDS[Global] = _KINDS[Record]
Place = Callable[[Storage], tuple[int, int]]
"""A storage's byte offset in the file, and its bytes."""


def find_state_dict(value: Any, where: str, key: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The mapping name -> tensor in what a pickle holds, wrapped or not, and how it was wrapped.

    `key` names one of several; without it, it is one of WRAPPERS.

    Raises:
        HxaconvError: when there is none.
        NotConverted: when there are several, and none of them is the one that trainers mean.
    """
    outer, taken = value, key
    path, ignored, value = _inside(value, where, key)
    if not isinstance(value, dict):
        kind = _KINDS.get(type(value), type(value).__name__)
        raise HxaconvError(
            f"{where} holds a {kind}, expected a dictionary name -> tensor",
            hint="Save a state dict: torch.save(model.state_dict(), ...).",
        )
    tensors = {key: item for key, item in value.items() if isinstance(item, Tensor)}
    opaque = [
        f"{show(str(key))} ({item.name.rpartition('.')[2].removeprefix('_rebuild_')})"
        for key, item in value.items()
        if isinstance(item, Record) and item.name in (*OPAQUE_TENSORS, OTHER_DTYPE)
    ]
    hint = "Take the bf16 original, or save them dense and dequantized."
    raise_all(f"{where}: tensors that are quantized, sparse or nested, not plain numbers:", opaque, hint=hint)
    odd = [f"a key of type {type(key).__name__}" for key in tensors if type(key) is not str]
    raise_all(f"{where}: tensors must be stored by name:", odd)
    several = _state_dicts(value)
    if not tensors and several:
        raise NotConverted(
            f"{where} holds state dicts under keys of its own: {', '.join(several)}",
            hint=f"--weights {several[0]} takes that one.",
        )
    if not tensors:
        keys = ", ".join(show(str(key)) for key in list(value)[:8])
        raise HxaconvError(
            f"{where} holds no tensors" + (f"; its keys are: {keys}" if keys else ""),
            hint=f"Expected a flat state dict, or one under {', '.join(WRAPPERS)}.",
        )
    check_names(tensors, where)
    ignored += [show(str(key)) for key in value if key not in tensors]
    several = _state_dicts(outer, len(tensors) // 2) if path and taken is None else []
    others = [other for other in several if other != path[0]]
    return tensors, {"nested_under": ".".join(path) or None, "ignored": ignored, "others": others}


def _inside(value: Any, where: str, key: str | None = None) -> tuple[list[str], list[str], Any]:
    """Keys that lead to the state dict, what lies beside it on the way, and what they lead to."""
    path: list[str] = []
    ignored: list[str] = []
    while isinstance(value, dict) and len(path) < MAX_NESTING:
        there = _state_dicts(value)
        found = [name for name in WRAPPERS if name in there]
        if key in there:
            found, key = [str(key)], None
        if len(found) > 1:
            raise NotConverted(
                f"{where} holds several state dicts: {', '.join(found)}", hint=f"--weights {found[0]} takes that one."
            )
        if not found:
            break
        ignored += [show(str(name)) for name in value if name != found[0]]
        path.append(found[0])
        value = value[found[0]]
    if key is not None:
        keys = ", ".join(_state_dicts(value)) if isinstance(value, dict) else ""
        raise HxaconvError(
            f"{where} holds no state dict under {show(key)}", hint=f"It has {keys}." if keys else "Leave --weights out."
        )
    return path, ignored, value


def _state_dicts(value: Any, least: int = 1) -> list[str]:
    """Keys of dictionaries that hold so many tensors, at least, themselves or under one of WRAPPERS."""
    found = []
    for key, inner in value.items() if isinstance(value, dict) else ():
        held = [inner, *(inner.get(wrapper) for wrapper in WRAPPERS)] if isinstance(inner, dict) else []
        counts = [sum(isinstance(item, Tensor) for item in one.values()) for one in held if isinstance(one, dict)]
        if type(key) is str and key.isprintable() and max(counts, default=0) >= max(least, 1):
            found.append(key)
    return found


def advised(refused: Refused, file: SourceFile, key: str | None = None) -> HxaconvError:
    """The error for a pickle with unknown objects, naming the command that gets the weights out where one does."""
    try:
        path, _, value = _inside(refused.value, file.label, key)
    except HxaconvError:
        return refused
    if not isinstance(value, dict) or not any(isinstance(item, Tensor) for item in value.values()):
        return refused
    inside = "".join(f"['{key}']" for key in path)
    own, out = shlex.quote(str(file.path or file.name)), shlex.quote(f"{PurePath(file.name).stem}-weights.pth")
    loaded = f"torch.load(sys.argv[1], map_location='cpu', weights_only=False){inside}"
    script = f"import sys, torch; torch.save({loaded}, sys.argv[2])"
    hint = (
        "torch.load(weights_only=True) refuses it as well. If you trust its origin, which then runs code of it, this"
        f' saves the weights alone:\n$ python -c "{script}" {own} {out}'
    )
    return NotConverted(refused.message, hint=hint)


def recipes(tensors: Mapping[str, Tensor], place: Place, file: SourceFile) -> tuple[Plan, list[list[str]]]:
    """Recipes for the tensors, and groups of names that are the same tensor (tied weights).

    Raises:
        HxaconvError: listing tensors that leave their storage, or are far larger than what they repeat.
    """
    problems: list[str] = []
    huge: list[str] = []
    named: dict[Tensor, list[str]] = {}
    plan: Plan = {}
    for name, tensor in tensors.items():
        dtype, shape, strides = tensor.storage.dtype, tensor.shape, tensor.strides
        (start, available), itemsize = place(tensor.storage), BY_NAME[tensor.storage.dtype].itemsize
        used = span(shape, strides) * itemsize
        begin, end = tensor.offset * itemsize, tensor.offset * itemsize + used
        if end > available:
            problems.append(f"{name} {list(shape)} needs bytes up to {end} of a storage of {available} bytes")
        elif overlaps_itself(shape, strides) and num_bytes(dtype, shape) > MAX_REPEATED_BYTES:
            huge.append(f"{name} {list(shape)} (strides {list(strides)})")
        elif is_contiguous(shape, strides):
            plan[name] = stored(dtype, shape, file, start + begin, f"{name} in {file.name}")
        else:
            make = Strided(file, start + begin, itemsize, shape, strides)
            plan[name] = Recipe(dtype, shape, make, f"{name} in {file.name}")
        if used:
            named.setdefault(tensor, []).append(name)
    raise_all(f"{file.label}: tensors do not fit their storages:", problems, hint="The file is damaged.")
    hint = "Save them as they are to be: {k: v.contiguous() for k, v in state_dict.items()}."
    raise_all(f"{file.label}: tensors repeat elements, to over {MAX_REPEATED_BYTES} bytes:", huge, hint=hint)
    return plan, [sorted(names) for names in named.values() if len(names) > 1]
