"""Which layers stay attention: what `--layers` may say, evenly spaced ones, and what is wrong with a choice."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.model.config import StudentConfig, TeacherConfig
from hxaconv.model.layer_maps import LayerMap, load, match, range_problems
from hxaconv.options import Layers

LAYER_0_REASON = (
    "layer 0 as GQA: the published trainer mixes a zero v_first into the first RWKV layer, the inference"
    " engine takes that layer's own v and k, so the two disagree about such a model"
)


def uniform(num_layers: int, count: int | None = None) -> tuple[int, ...]:
    """Evenly spaced and end-anchored: L-1-floor(L/K)*(K-1-j) for j < K; K is L//7, at least 1, unless given.

    Raises:
        HxaconvError: when `count` is not between 0 and the number of layers.
    """
    count = default_count(num_layers) if count is None else count
    if not 0 <= count <= num_layers:
        raise HxaconvError(f"{count} GQA layers asked for, the model has {num_layers} layers")
    return tuple(num_layers - 1 - num_layers // count * (count - 1 - j) for j in range(count))


def default_count(num_layers: int) -> int:
    """K where nobody says: a seventh of the layers (6 of 44), at least one."""
    return max(1, num_layers // 7)


_ITEM = re.compile(r"(-?[0-9]{1,6})(?:-(-?[0-9]{1,6}))?")


def parse_layers(
    text: str, num_layers: int, *, allow_layer_0: bool = False, option: str = "--layers"
) -> tuple[int, ...]:
    """`8,15-17,-1`, `none`, `all`, the name of a layer map or a file -> layer numbers, sorted.

    Negative numbers count from the end: -1 is the last layer.

    Raises:
        HxaconvError: listing everything that is wrong at once.
    """
    word = text.strip()
    if word in ("none", "all"):
        return tuple(range(num_layers)) if word == "all" else ()
    named = "," not in word or word.endswith(".toml") or os.path.isfile(word)
    if word and named and not re.fullmatch(r"[-\d,\s]+", word):
        return load_for(word, num_layers, allow_layer_0=allow_layer_0).gqa_layers
    layers, problems = _numbers(word, num_layers)
    if layers or not problems:
        problems += check(layers, num_layers, allow_layer_0=allow_layer_0)
    raise_all(f"{option} {text!r} of a model of {num_layers} layers:", problems, hint=_HINT)
    return tuple(sorted(layers))


def parse_numbers(text: str, num_layers: int, option: str) -> tuple[int, ...]:
    """`0,5-7,-1` -> layer numbers, sorted; unlike a choice of layers, any of them.

    Raises:
        HxaconvError: listing everything that is wrong at once.
    """
    layers, problems = _numbers(text, num_layers)
    problems += range_problems(layers, num_layers)
    hint = "Layers are numbered from 0, -1 is the last: 8,15-17,-1."
    raise_all(f"{option} {text!r} of a model of {num_layers} layers:", problems, hint=hint)
    return tuple(sorted(layers))


def _numbers(text: str, num_layers: int) -> tuple[list[int], list[str]]:
    """(layer numbers, what is not understood, a line each)."""
    layers: list[int] = []
    problems: list[str] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        found = _ITEM.fullmatch(item)
        if found is None:
            problems.append(f"{item!r} is not a layer number or a range such as 15-17")
            continue
        ends = [int(end or found[1]) for end in found.groups()]
        first, last = (end + num_layers if -num_layers <= end < 0 else end for end in ends)
        if first > last:
            problems.append(f"range {item} runs backwards: {first} to {last}")
        layers += range(first, min(last, first + num_layers) + 1)
    return layers, problems


_HINT = "Layers are numbered from 0, -1 is the last: 8,15-17,-1. Or `none`, `all`, a layer map's name or file."


def from_map(layer_map: LayerMap, num_layers: int, *, allow_layer_0: bool = False) -> tuple[int, ...]:
    """A map's layers, checked against a model of `num_layers` layers.

    Raises:
        HxaconvError: when the map is for another depth, or names layers this model cannot have.
    """
    problems = _misfits(layer_map.gqa_layers, layer_map.num_hidden_layers, num_layers, allow_layer_0)
    raise_all(f"layer map {layer_map.label or layer_map.name}:", problems)
    return layer_map.gqa_layers


def load_for(name: str, num_layers: int, *, allow_layer_0: bool = False) -> LayerMap:
    """A map by its name or file, whose layers fit a model of `num_layers` layers.

    Raises:
        HxaconvError: listing everything that is wrong with the file, and with its layers in this model.
    """
    return load(name, lambda layers, depth: _misfits(layers, depth, num_layers, allow_layer_0))


def _misfits(layers: Sequence[int], depth: int | None, num_layers: int, allow_layer_0: bool) -> list[str]:
    """What is wrong with the layers of a map for `depth` layers in a model of `num_layers`."""
    if depth not in (None, num_layers):
        return [f"it is for {depth} layers, the model has {num_layers}", *range_problems(layers, depth)]
    return check(layers, num_layers, allow_layer_0=allow_layer_0)


def check(layers: Sequence[int], num_layers: int, *, allow_layer_0: bool = False) -> list[str]:
    """Everything wrong with a choice, a line each. Every layer, or none, must be asked for by that word."""
    found = range_problems(layers, num_layers)
    if not layers:
        found.append("no layer is named; say `none` to make every layer RWKV")
    elif set(range(num_layers)) <= set(layers):
        found.append("every layer is named, so nothing becomes RWKV; say `all` if that is meant")
    elif 0 in layers and not allow_layer_0:
        found.append(f"{LAYER_0_REASON}; --allow-gqa-layer-0 goes on")
    return found


def layer_0_warning(config: StudentConfig) -> list[str]:
    """The sentence about layer 0 as GQA, where it is and RWKV layers follow."""
    return [LAYER_0_REASON] if 0 in config.gqa_layers and config.rwkv_layers else []


def choose(config: TeacherConfig, teacher: str, choice: Layers) -> tuple[tuple[int, ...], str]:
    """The GQA layers of a new student and why: those named, else the teacher's shipped map, else evenly spaced.

    Raises:
        HxaconvError: for two choices at once, and for layers that the model does not have.
    """
    count, allowed = config.num_hidden_layers, choice.allow_gqa_layer_0
    if choice.layer_map is not None and choice.gqa_layers is not None:
        raise HxaconvError("--layer-map and --gqa-layers both choose the layers", hint="Give one of them.")
    if choice.gqa_layers is not None:
        named = parse_layers(choice.gqa_layers, count, allow_layer_0=allowed, option="--gqa-layers")
        return named, "as asked for"
    if choice.layer_map is not None:
        found = load_for(choice.layer_map, count, allow_layer_0=allowed)
        return found.gqa_layers, f"layer map {found.name}"
    shipped = match(config, [teacher])
    if shipped is not None:
        return from_map(shipped, count, allow_layer_0=allowed), f"layer map {shipped.name}"
    return uniform(count), f"evenly spaced, {default_count(count)} of {count}"
