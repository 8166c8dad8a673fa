"""DeepSpeed's checkpoints: the float32 master weights of ZeRO 1, 2 and 3, as byte ranges of its flat partitions.

A step's folder holds `*_model_states.pt`, which name parameters, shapes and buffers, and one `*_optim_states.pt`
per rank with that rank's share of the master weights as flat tensors. How they fit together is what
`deepspeed/utils/zero_to_fp32.py` does with them:

* stages 1 and 2: the ranks' partitions of a parameter group, one after the other, are the group's parameters, one
  after the other, then padding to a multiple of 2 * ranks;
* stage 3: of every parameter each rank holds ceil(elements / ranks) elements, the last of them padded.

Nothing but pickles and zip directories is read here; nothing in them is executed.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hxaconv.errors import HxaconvError, raise_all, shortened
from hxaconv.formats import Contents
from hxaconv.formats.dtypes import BY_NAME, FLOATS, num_bytes
from hxaconv.formats.files import Extent, SourceFile, broken, check_names, show
from hxaconv.formats.pickles import TRAINER_OBJECTS, Record, Tensor, shape_of
from hxaconv.formats.state_dict import recipes
from hxaconv.formats.torchzip import TorchZip
from hxaconv.model.plan import Plan, Ranges, Recipe, with_origin

LATEST = "latest"
"""The file beside the folders of steps that names the newest of them."""
_MODEL, _OPTIMIZER = "model_states.pt", "optim_states.pt"
_RANK = re.compile(r"^(?:(?:bf16|fp16)_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(?:model|optim)_states\.pt$")
_STAGES = {"optimizer_states": 1, "gradients": 2, "weights": 3}
"""DeepSpeed's names of the stages."""
_MASTERS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
_USED = ("module", "param_shapes", "buffer_names", "frozen_param_shapes", "frozen_param_fragments", "shared_params")
_AGAIN = "Copy the step's folder again."
_BY_MODEL = "Take --weights model, if the model's own weights are enough."
Shapes = Mapping[str, tuple[int, ...]]


def step_folder(folder: Path) -> Path | None:
    """The folder of one step of DeepSpeed: `folder`, or the one inside that its file `latest` names; None without.

    Raises:
        HxaconvError: when `latest` names a folder that is not there.
    """
    if _holds_step(folder):
        return folder
    latest = folder / LATEST
    if latest.is_file() and latest.stat().st_size <= 512:
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[\w.+=-]+", tag) and tag not in (".", "..") and (folder / tag).is_dir():
            return folder / tag if _holds_step(folder / tag) else None
        steps = sorted(inner.name for inner in folder.iterdir() if inner.is_dir() and _holds_step(inner))
        there = f"the folder holds {shortened(steps)}" if steps else "no step of DeepSpeed is in the folder"
        raise HxaconvError(f"{latest} names {show(tag)}, which is not there; {there}", hint="Give the step's folder.")
    return None


def _holds_step(folder: Path) -> bool:
    return any(map(_is_state, folder.iterdir()))


def _is_state(path: Path) -> bool:
    return path.name.endswith((_MODEL, _OPTIMIZER)) and not path.name.startswith("._")  # of macOS, beside each file


def read_zero(folder: Path, *, label: str, weights: str | None = None) -> tuple[list[SourceFile], Contents]:
    """The weights in a step's folder, and its files.

    `weights`: `master`, the optimizer's float32 weights; `model`, those that the model computes with, which stages
    1 and 2 keep whole; None, the former where the optimizer's files are there.

    Raises:
        HxaconvError: for missing ranks, files of several steps, tensors of other sizes than announced, model-parallel
            checkpoints, and everything that makes a single file unreadable.
    """
    names = sorted(path.name for path in folder.iterdir() if _is_state(path))
    _refuse_other_layouts(names, label)
    models = _opened(folder, [name for name in names if name.endswith(_MODEL)], label)
    optimizers = _opened(folder, [name for name in names if name.endswith(_OPTIMIZER)], label)
    if not models:
        raise HxaconvError(
            f"{label} holds {len(optimizers)} *{_OPTIMIZER} but no *{_MODEL}, which name the tensors",
            hint="Copy the whole folder of the step.",
        )
    for key in ("global_steps", "ds_version", "dp_world_size"):
        found = [(model.value.get(key), model.file.name) for model in models.values()]
        _same_everywhere(key, [(value if isinstance(value, int | str) else None, name) for value, name in found], label)
    if weights == "master" and not optimizers:
        raise HxaconvError(
            f"{label} holds no *{_OPTIMIZER}, which the master weights are in", hint="Take --weights model."
        )
    first = next(iter(models.values()))
    steps = first.value.get("global_steps")
    ignored = [show(str(key)) for key in first.value if key not in _USED]
    facts: dict[str, Any] = {"step": steps if isinstance(steps, int) else None, "ranks": len(optimizers) or None}
    if optimizers and weights != "model":
        plan, stage = _masters(models, optimizers, label)
        facts |= {"zero_stage": stage, "weights": "master", "aliases": []}
        ignored.append("optimizer_state_dict (all but its master weights)")
    else:
        plan, aliases = _model_weights(first)
        facts |= {"weights": "model", "aliases": aliases}
        ignored += [f"*{_OPTIMIZER}"] if optimizers else []
    check_names(plan, label)
    opened = [*models.values(), *optimizers.values()]
    for archive in opened:
        archive.file.header_digest = archive.digest()
    facts |= {"nested_under": None, "ignored": ignored}
    return [archive.file for archive in opened], Contents(container="zero", tensors=plan, extra=facts)


def _refuse_other_layouts(names: Iterable[str], label: str) -> None:
    matches = {name: _RANK.match(name) for name in names}
    hint = "Convert it with DeepSpeed's ds_to_universal.py or the trainer's own export, then convert the result."
    other = [show(name) for name, match in matches.items() if match is None]
    raise_all(f"{label}: files of a pipeline- or expert-parallel model, which are not put together:", other, hint=hint)
    parallel = {match[2] for match in matches.values() if match}
    if len(parallel) > 1:
        raise HxaconvError(
            f"{label}: the model was split over {len(parallel)} tensor-parallel ranks (mp_rank_{min(parallel)} to"
            f" mp_rank_{max(parallel)}), which are not put together",
            hint=hint,
        )


def _opened(folder: Path, names: Iterable[str], label: str) -> dict[int, TorchZip]:
    """The files of one kind, by their ranks."""
    opened = {}
    for name in names:
        match = _RANK.match(name)
        assert match is not None
        file = SourceFile.local(folder / name, name=f"{folder.name}/{name}", label=f"{label.rstrip('/')}/{name}")
        archive = TorchZip(file, inert=TRAINER_OBJECTS)
        if not isinstance(archive.value, dict):
            raise HxaconvError(f"{file.label} holds a {type(archive.value).__name__}, expected DeepSpeed's dictionary")
        opened[int(match[1] or 0)] = archive
    return dict(sorted(opened.items()))


def _same_everywhere(what: str, values: Iterable[tuple[Any, str]], label: str) -> None:
    """Refuse files of several saves in one folder, by (value, file name)."""
    found: dict[Any, list[str]] = {}
    for value, name in values:
        found.setdefault(value, []).append(name)
    if len(found) > 1:
        problems = [f"{value} {what} in {shortened(names)}" for value, names in found.items()]
        raise_all(f"{label}: its files were saved at different times:", problems, hint=_AGAIN)


def _mapping(archive: TorchZip, key: str) -> dict[Any, Any]:
    """A dictionary under a key; empty where the key is missing or None."""
    found = archive.value.get(key)
    if not isinstance(found, dict | None):
        raise broken(archive.label, f"{key} is a {type(found).__name__}, expected a dictionary")
    return found or {}


def _model_weights(model: TorchZip) -> tuple[Plan, list[list[str]]]:
    """What the model computes with, as the first rank saved it."""
    tensors = {name: tensor for name, tensor in _mapping(model, "module").items() if isinstance(tensor, Tensor)}
    check_names([name if isinstance(name, str) else "" for name in tensors], model.label)
    if not tensors:
        raise HxaconvError(f"{model.label} holds no model under `module`", hint=_AGAIN)
    if any(0 in tensor.shape for tensor in tensors.values()):
        raise HxaconvError(
            f"{model.label}: the model's own weights are empty: ZeRO-3 leaves them to the optimizer's files",
            hint="Take --weights master, and --dtype bfloat16 for weights of that size.",
        )
    return recipes(tensors, model.place, model.file)


def _masters(models: Mapping[int, TorchZip], optimizers: Mapping[int, TorchZip], label: str) -> tuple[Plan, int]:
    states = {rank: _mapping(archive, "optimizer_state_dict") for rank, archive in optimizers.items()}
    stage = _stage(optimizers, states, label)
    _check_ranks(optimizers, states, label)
    steps = [(_optimizer_step(archive, states[rank]), archive.file.name) for rank, archive in optimizers.items()]
    _same_everywhere("steps", [(f"{step:g}", name) for step, name in steps if step is not None], label)
    first = next(iter(models.values()))
    groups = _parameter_groups(first)
    plan = _buffers(first)
    if stage == 3:
        missing = [f"rank {rank}" for rank in optimizers if rank not in models]
        raise_all(f"{label}: *{_MODEL} of these ranks are missing:", missing, hint=_AGAIN)
        plan |= _frozen(list(models.values())) | _stage_3(groups, optimizers, states)
    else:
        plan |= _frozen([first]) | _stages_1_and_2(groups, optimizers, states)
    for alias, name in _mapping(first, "shared_params").items():
        if isinstance(name, str) and name in plan:
            plan[alias] = with_origin(plan[name], f"{plan[name].origin}, shared by {alias}")
    if stage < 3:  # stage 1 names frozen parameters nowhere else
        plan |= {name: recipe for name, recipe in _model_weights(first)[0].items() if name not in plan}
    return plan, stage


def _number(value: Any) -> int | None:
    """A whole number, or a member of DeepSpeed's enumeration of stages, written by its value or by its name."""
    if isinstance(value, Record) and value.arguments:
        value = value.arguments[-1]
    if isinstance(value, str):
        value = _STAGES.get(value)
    return value if type(value) is int else None


def _stage(optimizers: Mapping[int, TorchZip], states: Mapping[int, Mapping[Any, Any]], label: str) -> int:
    none = [optimizers[rank].file.name for rank, state in states.items() if "zero_stage" not in state]
    raise_all(f"{label}: these are no files of a ZeRO optimizer:", none, hint="Take --weights model.")
    stages = {_number(state["zero_stage"]) for state in states.values()}
    stage = stages.pop()
    if stages or stage not in _MASTERS:
        raise HxaconvError(f"{label}: its optimizer's files are not all of ZeRO stage 1, 2 or 3")
    lacking = [optimizers[rank].file.name for rank, state in states.items() if _MASTERS[stage] not in state]
    raise_all(f"{label}: optimizer's files without {_MASTERS[stage]}, the master weights:", lacking)
    return stage


def _check_ranks(optimizers: Mapping[int, TorchZip], states: Mapping[int, Mapping[Any, Any]], label: str) -> None:
    first, archive = next(iter(states.values())), next(iter(optimizers.values()))
    counts = first.get("partition_count")
    numbers = [_number(count) for count in (counts if isinstance(counts, list) else [counts])]
    if None in numbers or not numbers:
        raise broken(archive.label, "partition_count is no number of ranks")
    expected = max(number for number in numbers if number is not None)
    missing = [str(rank) for rank in range(min(expected, 65536)) if rank not in optimizers]
    if missing or len(optimizers) != expected:
        gone = f"; rank {shortened(missing)} is missing" if missing else ""
        raise HxaconvError(
            f"{label}: saved by {expected} ranks, but {len(optimizers)} *{_OPTIMIZER} are there{gone}",
            hint="Copy the files of all nodes into one folder, or delete those of an earlier run with more ranks.",
        )


def _optimizer_step(archive: TorchZip, state: Mapping[Any, Any]) -> float | None:
    """The step of the first parameter that has one: a number, or a tensor with one element."""
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    inside = base.get("state") if isinstance(base, dict) else None
    for entry in inside.values() if isinstance(inside, dict) else ():
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, int | float):
            return float(step)
        if isinstance(step, Tensor) and math.prod(step.shape) == 1 and step.storage.dtype == "F32":
            (extent,) = _extents([archive.recipe(step, "a step")])
            return float(struct.unpack("<f", archive.file.read(extent.offset, extent.nbytes))[0])
    return None


def _extents(flats: Iterable[Recipe]) -> list[Extent]:
    return [extent for flat in flats if isinstance(flat.make, Ranges) for extent in flat.make.extents]


def _cut(flats: Sequence[Recipe], start: int, shape: tuple[int, ...], origin: str) -> Recipe:
    """The elements from `start` on of flat tensors that follow each other, as one of this shape."""
    dtype = flats[0].dtype
    whole = Ranges(tuple(_extents(flats)))
    return Recipe(dtype, shape, whole.part(start * BY_NAME[dtype].itemsize, num_bytes(dtype, shape)), origin)


def _shapes(archive: TorchZip, value: Any, what: str) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise broken(archive.label, f"{what} does not map names to shapes")
    shapes = {name: shape_of(shape) for name, shape in value.items()}
    odd = [f"{show(name)} has no shape" for name, shape in shapes.items() if shape is None or 0 in shape]
    raise_all(f"{archive.label}: {what}:", odd, hint=_AGAIN)
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _parameter_groups(model: TorchZip) -> list[Shapes]:
    groups = model.value.get("param_shapes")
    if not isinstance(groups, list) or not groups:
        raise HxaconvError(
            f"{model.label} lacks param_shapes, so that the flat partitions cannot be assigned", hint=_BY_MODEL
        )
    return [_shapes(model, group, "param_shapes") for group in groups]


def _buffers(model: TorchZip) -> Plan:
    """The registered buffers, as the model holds them."""
    module, names = _mapping(model, "module"), model.value.get("buffer_names")
    if not isinstance(names, list):
        raise broken(model.label, "buffer_names is no list")
    held = [name for name in names if isinstance(name, str) and isinstance(module.get(name), Tensor)]
    return {name: model.recipe(module[name], name) for name in held}


def _frozen(models: Sequence[TorchZip]) -> Plan:
    """Parameters without gradient: stages 1 and 2 keep them whole, stage 3 leaves every rank its part of them."""
    plan: Plan = {}
    shapes = _shapes(models[0], _mapping(models[0], "frozen_param_shapes"), "frozen_param_shapes")
    for name, shape in shapes.items():
        parts = [model.recipe(_mapping(model, "frozen_param_fragments").get(name), name) for model in models]
        held, needed = sum(part.numel for part in parts), math.prod(shape)
        whole = held == needed or (held > needed and len(parts) > 1)  # the parts may be padded
        if not whole or len({part.dtype for part in parts}) > 1:
            raise broken(models[0].label, f"the parts of {show(name)} do not make one tensor of {list(shape)}")
        origin = parts[0].origin if len(parts) == 1 else f"{name} in {len(parts)} {_MODEL}"
        plan[name] = _cut(parts, 0, shape, origin)
    return plan


def _flat(archive: TorchZip, tensors: Iterable[Any], what: str) -> list[Recipe]:
    """A rank's flat tensors, all of one float type."""
    found = [archive.recipe(tensor, what) for tensor in tensors]
    dtypes = sorted({flat.dtype for flat in found})
    if len(dtypes) != 1 or dtypes[0] not in FLOATS:
        raise broken(archive.label, f"{what} is of {', '.join(dtypes) or 'no type'}, expected one float type")
    return found


def _flat_groups(archive: TorchZip, state: Mapping[Any, Any], key: str) -> list[Any]:
    if not isinstance(state[key], list):
        raise broken(archive.label, f"{key} is no list of groups")
    return list(state[key])


def _stage_3(
    groups: Sequence[Shapes], optimizers: Mapping[int, TorchZip], states: Mapping[int, Mapping[Any, Any]]
) -> Plan:
    ranks, key = len(optimizers), _MASTERS[3]
    flats = [_flat(archive, _flat_groups(archive, states[rank], key), key) for rank, archive in optimizers.items()]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    shares = {name: -(-math.prod(shape) // ranks) for name, shape in shapes.items()}
    dtype, needed = flats[0][0].dtype, sum(shares.values())
    for archive, flat in zip(optimizers.values(), flats, strict=True):
        numel = sum(part.numel for part in flat)
        if numel != needed or flat[0].dtype != dtype:
            raise broken(
                archive.label,
                f"{key} holds {numel} elements ({flat[0].dtype}), {ranks} ranks need {needed} ({dtype}) in each",
            )
    plan, offset = Plan(), 0
    for name, shape in shapes.items():
        parts = [_cut(flat, offset, (shares[name],), name) for flat in flats]
        plan[name] = _cut(parts, 0, shape, f"{name} in {ranks} {_OPTIMIZER}")
        offset += shares[name]
    return plan


def _stages_1_and_2(
    groups: Sequence[Shapes], optimizers: Mapping[int, TorchZip], states: Mapping[int, Mapping[Any, Any]]
) -> Plan:
    ranks, key = len(optimizers), _MASTERS[2]
    align = 2 * ranks
    held = {rank: _flat_groups(archive, states[rank], key) for rank, archive in optimizers.items()}
    other = [f"{optimizers[rank].file.name}: {len(flats)}" for rank, flats in held.items() if len(flats) != len(groups)]
    first = next(iter(optimizers.values()))
    raise_all(f"{first.label}: {key} has other groups than the {len(groups)} of the model's parameters:", other)
    paddings = _paddings(next(iter(states.values())), groups, first.label)
    plan: Plan = {}
    for number, shapes in enumerate(groups):
        what = f"group {number} of {key}"
        parts = {rank: _flat(archive, [held[rank][number]], what)[0] for rank, archive in optimizers.items()}
        offset, places = 0, {}
        for (name, shape), padding in zip(shapes.items(), paddings[number], strict=True):
            places[name] = (offset, math.prod(shape))
            offset += math.prod(shape) + padding
        numel = sum(part.numel for part in parts.values())
        if -(-offset // align) != -(-numel // align) or len({part.dtype for part in parts.values()}) > 1:
            raise HxaconvError(
                f"{first.label} and its {ranks - 1} companions: {what} holds"
                f" {numel} elements, its parameters have {offset} (padding: up to {align - 1})",
                hint="Files of another save or of another number of ranks are among them; copy the folder again.",
            )
        begin = 0
        for rank, part in parts.items():
            _check_places(optimizers[rank], rank, _mappings(states[rank], number), places, (begin, begin + part.numel))
            begin += part.numel
        for name, (start, _) in places.items():
            plan[name] = _cut(list(parts.values()), start, shapes[name], f"{name} in {ranks} {_OPTIMIZER}")
    return plan


def _paddings(state: Mapping[Any, Any], groups: Sequence[Shapes], where: str) -> list[list[int]]:
    """Elements of padding behind every parameter; newer versions of DeepSpeed write them down."""
    found = state.get("param_alignment_paddings")
    if found is None:
        return [[0] * len(group) for group in groups]
    fits = isinstance(found, list) and len(found) == len(groups) and all(isinstance(inside, list) for inside in found)
    if not fits or not all(
        len(inside) == len(group) and all(type(n) is int and 0 <= n < 2**31 for n in inside)
        for inside, group in zip(found, groups, strict=True)
    ):
        raise broken(where, "param_alignment_paddings does not fit its parameters")
    return list(found)


def _mappings(state: Mapping[Any, Any], group: int) -> dict[Any, Any]:
    """What a rank records of the parameters in its partition of a group, where it does."""
    mappings = state.get("param_slice_mappings")
    found = mappings[group] if isinstance(mappings, list) and len(mappings) > group else None
    return found if isinstance(found, dict) else {}


def _check_places(
    archive: TorchZip,
    rank: int,
    mappings: Mapping[Any, Any],
    places: Mapping[str, tuple[int, int]],
    partition: tuple[int, int],
) -> None:
    """Compare the places of parameters in a group with the record of the rank whose partition this is."""
    for name, address in mappings.items():
        fields = address.fields if isinstance(address, Record) else {}
        if name not in places or {"start", "numel"} - fields.keys():
            continue
        (start, numel), (begin, end) = places[name], partition
        low, high = max(start, begin), min(start + numel, end)
        if (fields["start"], fields["numel"]) != (low - begin, high - low):
            raise HxaconvError(
                f"{archive.label}: {name} stands at {fields['start']} with {fields['numel']} elements by"
                f" this file, but at {low - begin} with {high - low} if it is that of rank {rank}",
                hint="The file is of another rank or another save; copy the step's folder again.",
            )
