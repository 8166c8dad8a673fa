"""Adapters as trainers save them: which tensor of the model each one changes, and how (see merging.py)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats import read_contents
from hxaconv.formats.files import SourceFile
from hxaconv.formats.json_files import read_json
from hxaconv.load.checkpoint import find_trained
from hxaconv.load.files import ADAPTER, WEIGHTS
from hxaconv.load.kinds import WITH_PEFT, kind_of_adapter, kind_of_tensors
from hxaconv.model.names import canonical_names, detect_key_format, unknown_names, unwrapped
from hxaconv.model.plan import Plan, Recipe
from hxaconv.surgery.merging import (
    Adapter,
    Delta,
    added,
    blockwise,
    column_normed,
    embedding_pair,
    low_rank,
    repeated,
    row_normed,
)

_PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PISSA_INIT = "init_pissa.pth"
"""What RWKV-PEFT calls the file of the pairs that it took off the weights before training."""


def read_adapter(spec: str, scale: float | None = None, *, kinds: Mapping[int, str] | None = None) -> Adapter:
    """The adapter in a folder or a file, its tensors under canonical names.

    `scale` multiplies the product B A: on top of that in adapter_config.json, or, for files of RWKV trainers, which
    have none, as the whole factor. `kinds` are the base's layer kinds.

    Raises:
        HxaconvError: when it is no adapter, of a kind that is not merged, incomplete, or its scale is not known.
    """
    found = _open(spec)
    if found.config is not None:
        return _peft(found, scale, kinds)
    return _rwkv(found, scale, kinds)


@dataclass(frozen=True, slots=True)
class _Opened:
    """An adapter's tensors by the names in its files."""

    label: str
    plan: Plan
    config: Mapping[str, Any] | None = None


def _open(spec: str) -> _Opened:
    path = Path(os.path.expanduser(spec))
    if not path.exists():
        raise HxaconvError(
            f"adapter {spec} does not exist", hint="Expected a folder or a file here; download it from the Hub first."
        )
    if path.is_file():
        return _open_file(spec, path)
    for name in _PEFT_WEIGHTS:
        if (path / name).is_file():
            return _open_file(spec, path / name)
    trained = find_trained(path, spec)
    if trained is not None:
        return _Opened(spec, trained.read(None)[1].tensors)
    files = [file for file in sorted(path.iterdir()) if file.name.endswith(WEIGHTS) and file.name != _PISSA_INIT]
    if len(files) != 1:
        names = [file.name for file in files]
        raise_all(f"adapter {spec} holds {len(files)} weight files:", names or ["none"], hint="Give one of them.")
    return _open_file(spec, files[0])


def _open_file(spec: str, file: Path) -> _Opened:
    plan = read_contents(SourceFile.local(file, label=str(file))).tensors
    config = file.parent / ADAPTER
    if file.name in _PEFT_WEIGHTS or (config.is_file() and any("base_model.model." in name for name in plan)):
        if not config.is_file():
            raise HxaconvError(f"{file} lies without its {ADAPTER}, which holds the scale", hint="Copy that too.")
        return _Opened(spec, plan, read_json(SourceFile.local(config)))
    initial = file.parent / _PISSA_INIT
    if initial.is_file() and any(name.endswith(".lora_A") for name in plan):
        plan = plan | read_contents(SourceFile.local(initial)).tensors
    return _Opened(spec, plan)


_PART = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_embedding_A|lora_embedding_B|lora_magnitude_vector|init_lora_A|init_lora_B"
    r"|lora_A|lora_B|lora_M|bone|disha)(?:\.(?P<adapter>(?!weight$|bias$)[\w-]+))?(?P<end>\.weight|\.bias)?$"
)
_SAVED = re.compile(r"\.(?:modules_to_save|original_module)(?:\.(?!weight$|bias$)[\w-]+)?(?=\.)|\.base_layer(?=\.)")


def _parts(found: _Opened) -> tuple[dict[str, dict[str, Recipe]], dict[str, Recipe]]:
    """(module -> part of an adapter -> tensor, name -> tensor of the model that was trained whole)."""
    modules: dict[str, dict[str, Recipe]] = {}
    whole: dict[str, Recipe] = {}
    adapters = set()
    for name, recipe in found.plan.items():
        plain = unwrapped(name)
        match = _PART.match(plain)
        if match is None:
            if ".original_module." not in plain:
                whole[_SAVED.sub("", plain)] = recipe
            continue
        adapters.add(match["adapter"])
        part = f"{match['part']}{'.bias' if match['end'] == '.bias' else ''}"
        modules.setdefault(match["module"].removesuffix(".base_layer"), {})[part] = recipe
    if len(adapters - {None}) > 1:
        names = sorted(str(name) for name in adapters if name)
        raise HxaconvError(f"{found.label} holds several adapters: {', '.join(names)}", hint="Save them one by one.")
    if not modules and not whole:
        raise HxaconvError(f"{found.label} holds no tensors")
    return modules, whole


def _canonical(
    found: _Opened,
    deltas: Mapping[str, tuple[Delta, ...]],
    whole: Mapping[str, Recipe],
    scale: float | None,
    kinds: Mapping[int, str] | None,
) -> Adapter:
    names = [*deltas, *(name for name in whole if name not in deltas)]
    key_format = detect_key_format(names)
    table, unknown = canonical_names(names, key_format, f"adapter {found.label}", kinds=kinds)
    if unknown:
        kind = kind_of_tensors({name: recipe.dtype for name, recipe in found.plan.items()}, unknown)
        if kind is not None:
            raise kind.error(f"adapter {found.label}")
        raise unknown_names(unknown, key_format, f"adapter {found.label}")
    changed = {new: deltas[old] for old, new in table.items() if new is not None and old in deltas}
    replaced = {new: whole[old] for old, new in table.items() if new is not None and old in whole}
    name = Path(found.label).name + ("" if scale is None else f" x {scale:g}")
    return Adapter(f"adapter {found.label}", name, changed, replaced)


_MERGED_KEYS = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("peft_type", "task_type", "peft_version", "revision", "base_model_name_or_path", "auto_mapping"),
        *("init_lora_weights", "lora_dropout", "inference_mode", "fan_in_fan_out", "ensure_weight_tying"),
        *("megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
    }
)
"""Of adapter_config.json: what is either taken into account or does not matter for merging."""
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base weights as well."""


def _peft(found: _Opened, scale: float | None, kinds: Mapping[int, str] | None) -> Adapter:
    config = found.config
    assert config is not None
    where = f"adapter {found.label}"
    if config.get("peft_type") != "LORA":
        kind = kind_of_adapter(config)
        what = f"{where} is {kind.what.partition(',')[0]}; of PEFT's, LoRA is merged here"
        raise HxaconvError(what, hint=kind.way_out)
    other = [f"{key}: {config[key]}" for key in config if key not in _MERGED_KEYS and config[key]]
    raise_all(f"{where} uses what is not merged here ({ADAPTER}):", other, hint=WITH_PEFT)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        raise HxaconvError(
            f"{where} was initialised by {start}, which changed the base weights too",
            hint="Save it with save_pretrained(..., path_initial_model_for_weight_conversion=...), as PEFT describes.",
        )
    modules, whole = _parts(found)
    problems: list[str] = []
    deltas: dict[str, tuple[Delta, ...]] = {}
    for module, parts in modules.items():
        factor = _peft_scale(module, parts, config, problems) * (1.0 if scale is None else scale)
        if parts.keys() == {"lora_embedding_A", "lora_embedding_B"}:
            pair = embedding_pair(parts["lora_embedding_A"], parts["lora_embedding_B"], factor)
            deltas[f"{module}.weight"] = (pair,)
        elif {"lora_A", "lora_B"} <= parts.keys() <= {"lora_A", "lora_B", "lora_B.bias", "lora_magnitude_vector"}:
            norm = [row_normed(parts[name]) for name in ("lora_magnitude_vector",) if name in parts]
            deltas[f"{module}.weight"] = (low_rank(parts["lora_A"], parts["lora_B"], factor), *norm)
            if "lora_B.bias" in parts:
                deltas[f"{module}.bias"] = (added(parts["lora_B.bias"], factor),)
        else:
            problems.append(f"{module} has {', '.join(sorted(parts))}")
    raise_all(f"{where} is not complete, or not merged here:", problems, hint=WITH_PEFT)
    return _canonical(found, deltas, whole, scale, kinds)


def _pattern(patterns: Any, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT looks it up."""
    for key, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


def _peft_scale(module: str, parts: Mapping[str, Recipe], config: Mapping[str, Any], problems: list[str]) -> float:
    rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    a = parts.get("lora_A", parts.get("lora_embedding_A"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or isinstance(alpha, bool):
        problems.append(f"{module}: r {rank!r} and lora_alpha {alpha!r} make no scale")
        return 0.0
    if a is not None and a.shape[:1] != (rank,):
        problems.append(f"{module}: A has {list(a.shape)}, {ADAPTER} has rank {rank}")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _rwkv(found: _Opened, scale: float | None, kinds: Mapping[int, str] | None) -> Adapter:
    where = f"adapter {found.label}"
    modules, whole = _parts(found)
    # RWKV-PEFT writes the first pairs of PiSSA under the names of its training module, with one `model.` more.
    for module in [module for module, parts in modules.items() if parts.keys() <= {"init_lora_A", "init_lora_B"}]:
        short = module.removeprefix("model.")
        if short != module and short in modules:
            modules[short] |= modules.pop(module)
    problems: list[str] = []
    deltas: dict[str, tuple[Delta, ...]] = {}
    needs_scale = False
    for module, parts in modules.items():
        made = _rwkv_module(parts, scale)
        if made is None:
            problems.append(f"{module} has {', '.join(sorted(parts))}")
        else:
            deltas[f"{module}.weight"] = made
            needs_scale |= "lora_A" in parts and "init_lora_A" not in parts
    raise_all(f"{where} is not complete, or not merged here:", problems, hint="An adapter has pairs lora_A and lora_B.")
    if needs_scale and scale is None:
        raise HxaconvError(
            f"{where} does not record what its product B A is multiplied by",
            hint="Give --adapter-scale: peft_scaling of RWKVInside's config, lora_alpha / lora_r of RWKV-PEFT.",
        )
    if scale is not None and not needs_scale:
        raise HxaconvError(f"--adapter-scale is for LoRA; {where} has no scale", hint="Leave it out.")
    if not deltas:
        raise_all(
            f"{where} holds whole tensors only, no adapter:",
            whole,
            hint="A whole checkpoint is given as the source; a tuned initial state has no place in these models.",
        )
    return _canonical(found, deltas, whole, scale, kinds)


def _rwkv_module(parts: Mapping[str, Recipe], scale: float | None) -> tuple[Delta, ...] | None:
    names = parts.keys()
    if {"lora_A", "lora_B"} <= names:
        factor = 1.0 if scale is None or "init_lora_A" in names else scale
        pair = low_rank(parts["lora_A"], parts["lora_B"], factor)
        if names == {"lora_A", "lora_B"}:
            return (pair,)
        if names == {"lora_A", "lora_B", "lora_M"}:
            return pair, column_normed(parts["lora_M"])
        if names == {"lora_A", "lora_B", "init_lora_A", "init_lora_B"}:
            return low_rank(parts["init_lora_A"], parts["init_lora_B"], -1.0), pair
    elif len(names) == 1 and (only := parts.get("bone", parts.get("disha"))) is not None and 2 <= len(only.shape) <= 3:
        return (blockwise(only) if len(only.shape) == 3 else repeated(only),)
    return None
