"""From what a pickle says to recipes: finding the state dict, and where each tensor's bytes stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats.contents import check_names, show
from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.files import SourceFile
from hxaconv.formats.pickle_machine import Storage, Tensor
from hxaconv.formats.strided import Strided, is_contiguous, overlaps_itself, span
from hxaconv.model.plan import Plan, Recipe, stored

WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
"""Keys under which trainers put the state dict, beside optimizer state and counters."""
MAX_NESTING = 3


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
    if not isinstance(value, dict):
        raise HxaconvError(
            f"{where} holds a {_kind(value)}, expected a dictionary name -> tensor",
            hint="Save a state dict: torch.save(model.state_dict(), ...).",
        )
    tensors = {key: item for key, item in value.items() if isinstance(item, Tensor)}
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


def _holds_tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(item, Tensor) for item in value.values()) or any(
        isinstance(value.get(key), dict) for key in WRAPPERS
    )


def _kind(value: Any) -> str:
    return {Tensor: "single tensor", Storage: "bare storage", list: "list"}.get(type(value), type(value).__name__)


def recipes(
    state: StateDict, place: Callable[[Storage], tuple[int, int]], file: SourceFile
) -> tuple[Plan, list[list[str]]]:
    """Recipes for the tensors, and groups of names that are the same tensor (tied weights).

    `place` gives a storage's byte offset in the file and its length in bytes.

    Raises:
        HxaconvError: listing tensors that leave their storage, repeat elements, or overlap others.
    """
    problems: list[str] = []
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
        if overlaps_itself(tensor.shape, tensor.strides):
            problems.append(f"{name} {list(tensor.shape)} repeats elements (strides {list(tensor.strides)})")
            continue
        plan[name] = _recipe(name, tensor, file, start + begin)
        if end > begin:
            spans.setdefault(tensor.storage.key, []).append((start + begin, start + end, name))
    raise_all(f"{file.label}: tensors do not fit their storages:", problems, hint="The file is damaged.")
    return plan, _aliases(spans, state.tensors, file.label)


def _recipe(name: str, tensor: Tensor, file: SourceFile, offset: int) -> Recipe:
    origin = f"{name} in {file.name}"
    if is_contiguous(tensor.shape, tensor.strides):
        return stored(tensor.storage.dtype, tensor.shape, file, offset, origin)
    itemsize = BY_NAME[tensor.storage.dtype].itemsize
    make = Strided(file, offset, itemsize, tensor.shape, tensor.strides)
    return Recipe(tensor.storage.dtype, tensor.shape, make, origin)


def _aliases(
    spans: Mapping[str, list[tuple[int, int, str]]], tensors: Mapping[str, Tensor], where: str
) -> list[list[str]]:
    groups: list[list[str]] = []
    problems: list[str] = []
    for used in spans.values():
        used.sort()
        last_end, last, group = -1, "", [""]
        for start, end, name in used:
            if start >= last_end:
                last_end, last, group = end, name, [name]
                groups.append(group)
            elif _same(tensors[last], tensors[name]):
                group.append(name)
            else:
                problems.append(f"{last} and {name}")
                last_end = max(last_end, end)
    raise_all(
        f"{where}: different tensors share memory, as views of one tensor saved without .clone():",
        problems,
        hint="Save the state dict with every tensor cloned: {k: v.clone() for k, v in state_dict.items()}.",
    )
    return [group for group in groups if len(group) > 1]


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.offset, a.shape, a.strides, a.storage.dtype) == (b.offset, b.shape, b.strides, b.storage.dtype)
