"""From what a pickle says to recipes: finding the state dict, and where each tensor's bytes stand."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats.contents import check_names, show
from hxaconv.formats.dtypes import BY_NAME, num_bytes
from hxaconv.formats.files import SourceFile
from hxaconv.formats.pickle_machine import (
    OPAQUE_TENSORS,
    Callee,
    Inert,
    Record,
    Refused,
    Storage,
    StorageClass,
    Tensor,
    UntypedStorage,
)
from hxaconv.formats.strided import Strided, is_contiguous, overlaps_itself, span
from hxaconv.model.plan import Plan, Recipe, stored

WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
"""Keys under which trainers put the state dict, beside optimizer state and counters."""
MAX_NESTING = 3
MAX_REPEATED_BYTES = 1024**3
"""Of a tensor that is larger than what its file holds of it, as torch.Tensor.expand makes them."""
_OTHER_DTYPE = "torch._utils._rebuild_tensor_v3"


@dataclass(frozen=True, slots=True)
class StateDict:
    """Tensors by name, and how they were wrapped."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    """`nested_under` (`a.b` or None), `ignored` (names of what is no tensor)."""


def find_state_dict(value: Any, where: str) -> StateDict:
    """The mapping name -> tensor in what a pickle holds, wrapped or not.

    Raises:
        HxaconvError: when there is none, or more than one.
    """
    path, ignored = _path_inside(value, where)
    for key in path:
        value = value[key]
    if not isinstance(value, dict):
        raise HxaconvError(
            f"{where} holds a {_kind(value)}, expected a dictionary name -> tensor",
            hint="Save a state dict: torch.save(model.state_dict(), ...).",
        )
    tensors = {key: item for key, item in value.items() if isinstance(item, Tensor)}
    opaque = [
        f"{show(str(key))} ({item.name.rpartition('.')[2].removeprefix('_rebuild_')})"
        for key, item in value.items()
        if isinstance(item, Record) and item.name in (*OPAQUE_TENSORS, _OTHER_DTYPE)
    ]
    hint = "Take the bf16 original, or save them dense and dequantized."
    raise_all(f"{where}: tensors that are quantized, sparse or nested, not plain numbers:", opaque, hint=hint)
    odd = [f"a key of type {type(key).__name__}" for key in tensors if type(key) is not str]
    raise_all(f"{where}: tensors must be stored by name:", odd)
    if not tensors:
        keys = ", ".join(show(str(key)) for key in list(value)[:8])
        raise HxaconvError(
            f"{where} holds no tensors" + (f"; its keys are: {keys}" if keys else ""),
            hint=f"Expected a flat state dict, or one under {', '.join(WRAPPERS)}.",
        )
    check_names(list(tensors), where)
    ignored += [show(str(key)) for key in value if key not in tensors]
    facts = {
        "nested_under": ".".join(path) or None,
        "ignored": ignored,
    }
    return StateDict(tensors, facts)


def _path_inside(value: Any, where: str) -> tuple[list[str], list[str]]:
    """Keys that lead to the state dict, and what lies beside it on the way."""
    path: list[str] = []
    ignored: list[str] = []
    while isinstance(value, dict) and len(path) < MAX_NESTING:
        inside = [key for key in WRAPPERS if isinstance(value.get(key), dict) and _holds_tensors(value[key])]
        if len(inside) > 1:
            raise HxaconvError(
                f"{where} holds several state dicts: {', '.join(inside)}", hint="Save the one to convert by itself."
            )
        if not inside:
            break
        ignored += [show(str(key)) for key in value if key != inside[0]]
        value = value[inside[0]]
        path.append(inside[0])
    return path, ignored


def advised(refused: Refused, file: SourceFile) -> HxaconvError:
    """The error for a pickle with unknown objects, naming the command that gets the weights out where one does."""
    try:
        path, _ = _path_inside(refused.value, file.label)
    except HxaconvError:
        return refused
    value = refused.value
    for key in path:
        value = value[key]
    if not isinstance(value, dict) or not any(isinstance(item, Tensor) for item in value.values()):
        return refused
    inside = "".join(f"['{key}']" for key in path)
    own, out = shlex.quote(str(file.path or file.name)), shlex.quote(f"{PurePath(file.name).stem}-weights.pth")
    loaded = f"torch.load(sys.argv[1], map_location='cpu', weights_only=False){inside}"
    script = f"import sys, torch; torch.save({loaded}, sys.argv[2])"
    refused.hint = (
        "torch.load(weights_only=True) refuses it as well. If you trust its origin, which then runs code of it, this"
        f' saves the weights alone: python -c "{script}" {own} {out}'
    )
    return refused


def _holds_tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(item, Tensor) for item in value.values()) or any(
        isinstance(value.get(key), dict) for key in WRAPPERS
    )


def _kind(value: Any) -> str:
    named = {Tensor: "single tensor", Storage: "bare storage", Record: "class or an object of one"}
    named |= dict.fromkeys((Inert, Callee, StorageClass, UntypedStorage), named[Record])
    return named.get(type(value), type(value).__name__)


def recipes(
    state: StateDict, place: Callable[[Storage], tuple[int, int]], file: SourceFile
) -> tuple[Plan, list[list[str]]]:
    """Recipes for the tensors, and groups of names that are the same tensor (tied weights).

    `place` gives a storage's byte offset in the file and its length in bytes.

    Raises:
        HxaconvError: listing tensors that leave their storage, or are far larger than what they repeat.
    """
    problems: list[str] = []
    huge: list[str] = []
    spans: dict[str, list[tuple[int, int, str]]] = {}
    plan: Plan = {}
    for name, tensor in state.tensors.items():
        start, available = place(tensor.storage)
        itemsize = BY_NAME[tensor.storage.dtype].itemsize
        begin = tensor.offset * itemsize
        end = begin + span(tensor.shape, tensor.strides) * itemsize
        if end > available or begin > available:
            problems.append(f"{name} {list(tensor.shape)} needs bytes up to {end} of a storage of {available} bytes")
            continue
        repeats = overlaps_itself(tensor.shape, tensor.strides)
        if repeats and num_bytes(tensor.storage.dtype, tensor.shape) > MAX_REPEATED_BYTES:
            huge.append(f"{name} {list(tensor.shape)} (strides {list(tensor.strides)})")
            continue
        plan[name] = _recipe(name, tensor, file, start + begin)
        if end > begin:
            spans.setdefault(tensor.storage.key, []).append((start + begin, start + end, name))
    raise_all(f"{file.label}: tensors do not fit their storages:", problems, hint="The file is damaged.")
    hint = "Save them as they are to be: {k: v.contiguous() for k, v in state_dict.items()}."
    raise_all(f"{file.label}: tensors repeat elements, to over {MAX_REPEATED_BYTES} bytes:", huge, hint=hint)
    return plan, _aliases(spans, state.tensors)


def _recipe(name: str, tensor: Tensor, file: SourceFile, offset: int) -> Recipe:
    origin = f"{name} in {file.name}"
    if is_contiguous(tensor.shape, tensor.strides):
        return stored(tensor.storage.dtype, tensor.shape, file, offset, origin)
    itemsize = BY_NAME[tensor.storage.dtype].itemsize
    make = Strided(file, offset, itemsize, tensor.shape, tensor.strides)
    return Recipe(tensor.storage.dtype, tensor.shape, make, origin)


def _aliases(spans: Mapping[str, list[tuple[int, int, str]]], tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Groups of names that are one tensor; views that share a part of their bytes are tensors of their own."""
    groups: list[list[str]] = []
    for used in spans.values():
        used.sort()
        for _, _, name in used:
            if groups and _same(tensors[groups[-1][0]], tensors[name]):
                groups[-1].append(name)
            else:
                groups.append([name])
    return [group for group in groups if len(group) > 1]


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.storage, a.offset, a.shape, a.strides) == (b.storage, b.offset, b.shape, b.strides)
