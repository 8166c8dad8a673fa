"""Which layers stay attention: layer maps in TOML, shipped ones and a user's own, and what `--layers` may say."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError, meant, raise_all
from hxaconv.formats.json_files import why_unread
from hxaconv.model.variants import VARIANTS

if TYPE_CHECKING:
    from hxaconv.model.config import ModelConfig, StudentConfig, TeacherConfig
    from hxaconv.options import Layers

Kind = tuple[Callable[[Any], bool], str]
_TEXT: Kind = (lambda value: isinstance(value, str), "a string")
_SWITCH: Kind = (lambda value: isinstance(value, bool), "true or false")
_SIZE: Kind = (lambda value: type(value) is int and value > 0, "a whole number above 0")
_NUMBER: Kind = (lambda value: type(value) in (int, float) and value > 0, "a number above 0")
_LAYERS: Kind = (
    lambda value: isinstance(value, list) and all(type(x) is int for x in value),
    "a list of layer numbers",
)
_IDS: Kind = (lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value), "a list of Hub ids")
_MODEL: Kind = (lambda value: isinstance(value, dict), "a table of config.json settings")
_VARIANT: Kind = (lambda value: value in ("", *VARIANTS), f"one of {', '.join(VARIANTS)}")
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
_MODEL_KEYS = {"model_type": _TEXT, **dict.fromkeys((*_SIZES, "head_dim", "vocab_size"), _SIZE)}
_MODEL_KEYS |= {"rope_theta": _NUMBER, "rms_norm_eps": _NUMBER, "tie_word_embeddings": _SWITCH}
_KEYS = {"title": _TEXT, "model_ids": _IDS, "default": _SWITCH, "gqa_layers": _LAYERS, "source": _TEXT}
_KEYS |= {"variant": _VARIANT, "model": _MODEL} | {f"model.{key}": kind for key, kind in _MODEL_KEYS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMap:
    """A choice of GQA layers for one model; `model` holds what is known of its config.json, nothing guessed."""

    name: str
    gqa_layers: tuple[int, ...]
    title: str = ""
    model_ids: tuple[str, ...] = ()
    source: str = ""
    variant: str = ""
    """That of the published student with these layers, where the map names it."""
    default: bool = True
    """Whether `match` may take it although it was not named."""
    model: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    """The file it was read from."""

    @property
    def num_hidden_layers(self) -> int | None:
        """L, where the map has it."""
        return self.model.get("num_hidden_layers")


def folder() -> Path:
    """Where the shipped maps are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(found for place in (package, package.parent) if (found := place / "layer_maps").is_dir())


def shipped() -> dict[str, LayerMap]:
    """Every shipped map by name, sorted."""
    return {path.stem: read(path) for path in sorted(folder().glob("*.toml"))}


_WHERE = "Name the file, or one of the shipped maps: hxaconv maps"
_MINIMAL = "A minimal map is one line: gqa_layers = [4, 9, 14]"
_FOR_OTHERS = "it is for "
MAX_BYTES = 1024 * 1024


def load(name: str | Path, num_layers: int | None = None, *, allow_layer_0: bool = False) -> LayerMap:
    """A map by its name or by the path of a TOML file; a shipped name wins.

    With `num_layers`, those of the model that it is for, its layers must be such that the model can have them.

    Raises:
        HxaconvError: naming the nearest shipped map where there is no such map or file, or everything
            that is wrong with the file.
    """
    text = str(name)
    names = [path.stem for path in sorted(folder().glob("*.toml"))]
    if text in names:
        return read(folder() / f"{text}.toml", num_layers, allow_layer_0)
    if os.path.isfile(text):  # unlike Path's, no error for a name that is too long
        return read(Path(text), num_layers, allow_layer_0)
    if os.path.isdir(text):
        raise HxaconvError(f"layer map {text}: that is a folder, expected a TOML file", hint=_WHERE)
    if text.endswith(".toml") or "/" in text or "\\" in text:
        raise HxaconvError(f"layer map {text}: there is no such file", hint=_WHERE)
    near = meant(text.lower().replace("_", "-"), names)
    raise HxaconvError(
        f"layer map {text!r} is neither the name of a shipped map nor a file{near}",
        hint=f"Shipped maps: {', '.join(names)}",
    )


def read(path: Path, num_layers: int | None = None, allow_layer_0: bool = False) -> LayerMap:
    """Parse one file; the others as `load` has them.

    Raises:
        HxaconvError: listing everything in it that is not understood.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise HxaconvError(f"layer map {path} has {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HxaconvError(f"layer map {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise HxaconvError(f"layer map {path} is not valid TOML: {why_unread(error)}", hint=_MINIMAL) from None
    problems = _problems(raw, num_layers, allow_layer_0)
    hint = "Correct the file." if "gqa_layers" in raw else _MINIMAL
    if any(line.startswith(_FOR_OTHERS) for line in problems):
        hint = f"{_WHERE}. Without a map, name the layers by their numbers: 8,15-17,-1."
    raise_all(f"layer map {path}:", problems, hint=hint)
    lists = {"gqa_layers": tuple(sorted(raw["gqa_layers"])), "model_ids": tuple(raw.get("model_ids", ()))}
    return LayerMap(name=path.stem, label=str(path), **(raw | lists))


def _problems(raw: Mapping[str, Any], num_layers: int | None, allow_layer_0: bool) -> list[str]:
    values: dict[str, Any] = {"gqa_layers": None} | dict(raw)
    model = raw.get("model", {}) if isinstance(raw.get("model", {}), dict) else {}
    values |= {f"model.{key}": value for key, value in model.items()}
    found = [f"unknown key {key!r}{meant(key, _KEYS)}" for key in values if key not in _KEYS]
    wrong = [key for key, value in values.items() if key in _KEYS and not _KEYS[key][0](value)]
    found += [f"{key} is {values[key]!r}, expected {_KEYS[key][1]}" for key in wrong]
    if "gqa_layers" in wrong:
        return found
    layers, depth = raw["gqa_layers"], None if "model.num_hidden_layers" in wrong else model.get("num_hidden_layers")
    if num_layers is None or depth not in (None, num_layers):
        others = [] if num_layers is None else [f"{_FOR_OTHERS}{depth} layers, the model has {num_layers}"]
        return found + others + range_problems(layers, depth)
    return found + check(layers, num_layers, allow_layer_0=allow_layer_0)


def match(config: ModelConfig, names: Iterable[str] = ()) -> LayerMap | None:
    """The shipped map of this teacher, or None where none fits or more than one does.

    A map fits when everything it records of the model (sizes, vocabulary, rope_theta, eps, family) is so.
    Teachers of one shape (Devstral Small, Magistral Small) are distinguished by `names`: Hub id or folder name.
    """
    fitting = [candidate for candidate in shipped().values() if candidate.default and fits(candidate, config)]
    if len(fitting) > 1:
        wanted = {_comparable(name) for name in names}
        fitting = [found for found in fitting if not wanted.isdisjoint(map(_comparable, found.model_ids))]
    return fitting[0] if len(fitting) == 1 else None


def fits(layer_map: LayerMap, config: ModelConfig) -> bool:
    """Whether all that the map records of its model holds for `config` (settings a config lacks do not count)."""
    return bool(layer_map.model) and not differences(layer_map, config)


def differences(layer_map: LayerMap, config: ModelConfig) -> list[str]:
    """Where the map and `config` differ, a line each."""
    return [
        f"{key} is {value} in the map, {getattr(config, key)} in the model"
        for key, value in layer_map.model.items()
        if hasattr(config, key) and getattr(config, key) != value
    ]


def _comparable(name: str) -> str:
    # A folder is named like the model, whoever published it; a revision does not identify the model.
    return name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].partition("@")[0].lower()


def range_problems(layers: Sequence[int], num_layers: int | None) -> list[str]:
    """Layers that do not exist and layers named twice, a line each."""
    found = []
    outside = sorted({x for x in layers if x < 0 or (num_layers is not None and x >= num_layers)})
    if outside:
        last = "" if num_layers is None else f" (the last is {num_layers - 1})"
        found.append(f"out of range{last}: {', '.join(map(str, outside))}")
    twice = sorted({x for x in layers if list(layers).count(x) > 1})
    if twice:
        found.append(f"named more than once: {', '.join(map(str, twice))}")
    return found


def of_config(name: str, config: ModelConfig, gqa_layers: Iterable[int], **more: Any) -> LayerMap:
    """A map for `config`; `more` are further fields of LayerMap."""
    model = {key: getattr(config, key) for key in _MODEL_KEYS if hasattr(config, key)}
    return LayerMap(name=name, gqa_layers=tuple(sorted(gqa_layers)), model=model, **more)


def dump(layer_map: LayerMap, comments: Iterable[str] = ()) -> str:
    """The map as TOML, `comments` (reason, figures, date) on top; `read` gives it back."""
    lines = [f"# {line}".rstrip() for comment in comments for line in comment.splitlines() or [""]]
    lines += [""] if lines else []
    keys = ("gqa_layers", "title", "model_ids", "source", "variant")
    top = {key: getattr(layer_map, key) for key in keys if getattr(layer_map, key) or key == "gqa_layers"}
    top |= {} if layer_map.default else {"default": False}
    lines += [f"{key} = {_toml(value)}" for key, value in top.items()]
    if layer_map.model:
        lines += ["", "[model]", *(f"{key} = {_toml(value)}" for key, value in layer_map.model.items())]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)  # of such values, TOML as well


# --- Which layers stay attention: what `--layers` may be, evenly spaced ones, and what is wrong with a choice --------

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
        raise HxaconvError(f"{count} GQA layers requested, the model has {num_layers} layers")
    return tuple(num_layers - 1 - num_layers // count * (count - 1 - j) for j in range(count))


def default_count(num_layers: int) -> int:
    """K where none is given: a seventh of the layers (6 of 44), at least one."""
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
        return load(word, num_layers, allow_layer_0=allow_layer_0).gqa_layers
    return parse_numbers(
        text, num_layers, option, lambda layers: check(layers, num_layers, allow_layer_0=allow_layer_0)
    )


def parse_numbers(
    text: str, num_layers: int, option: str, check: Callable[[list[int]], list[str]] | None = None
) -> tuple[int, ...]:
    """`0,5-7,-1` -> layer numbers, sorted. Any of them, or, with a `check`, a choice of which it finds nothing wrong.

    Raises:
        HxaconvError: listing everything that is wrong at once.
    """
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
    if check is None:
        problems += range_problems(layers, num_layers)
    elif layers or not problems:
        problems += check(layers)
    hint = "Layers are numbered from 0, -1 is the last: 8,15-17,-1."
    if check is not None:
        hint += " Or `none`, `all`, a layer map's name or file."
    if all(line.startswith(LAYER_0_REASON) for line in problems):
        hint = ""  # that line says what to do
    raise_all(f"{option} {text!r} of a model of {num_layers} layers:", problems, hint=hint)
    return tuple(sorted(layers))


def check(layers: Sequence[int], num_layers: int, *, allow_layer_0: bool = False) -> list[str]:
    """Everything wrong with a choice, a line each. Every layer, or none, must be requested by that word."""
    found = range_problems(layers, num_layers)
    if not layers:
        found.append("no layer is named; write `none` to make every layer RWKV")
    elif set(range(num_layers)) <= set(layers):
        found.append("every layer is named, so nothing becomes RWKV; write `all` if that is meant")
    elif 0 in layers and not allow_layer_0:
        found.append(f"{LAYER_0_REASON}; --allow-gqa-layer-0 accepts it")
    return found


def layer_0_warning(config: StudentConfig) -> list[str]:
    """The sentence about layer 0 as GQA, where it is and RWKV layers follow."""
    return [LAYER_0_REASON] if 0 in config.gqa_layers and config.rwkv_layers else []


def choose(config: TeacherConfig, teacher: str, choice: Layers, variant: str) -> tuple[tuple[int, ...], str]:
    """The GQA layers of a new student and why: those named, else the teacher's shipped map, else evenly spaced.

    Raises:
        HxaconvError: for two choices at once, and for layers that the model does not have.
    """
    count, allowed = config.num_hidden_layers, choice.allow_gqa_layer_0
    if choice.layer_map is not None and choice.gqa_layers is not None:
        raise HxaconvError("--layer-map and --gqa-layers both choose the layers", hint="Give one of them.")
    if choice.gqa_layers is not None:
        named = parse_layers(choice.gqa_layers, count, allow_layer_0=allowed, option="--gqa-layers")
        return named, "as requested"
    if choice.layer_map is not None:
        found = load(choice.layer_map, count, allow_layer_0=allowed)
        return found.gqa_layers, _reason(found, variant)
    found_map = match(config, [teacher])
    if found_map is not None:
        return found_map.gqa_layers, _reason(found_map, variant)
    return uniform(count), f"evenly spaced, {default_count(count)} of {count}"


def _reason(chosen: LayerMap, variant: str) -> str:
    other = chosen.variant not in ("", variant)
    more = f", of a student that is {chosen.variant}; this one is {variant} (--variant)" if other else ""
    return f"layer map {chosen.name}{more}"
