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
from typing import Any, NamedTuple

from hxaconv.errors import HxaconvError, raise_all, shortened
from hxaconv.formats import Contents
from hxaconv.formats.dtypes import BY_NAME, FLOATS, are_sizes, num_bytes
from hxaconv.formats.files import Extent, SourceFile, broken, check_names, show
from hxaconv.formats.pickles import TRAINER_OBJECTS, Record, Tensor, expect, shape_of
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
    if _states(folder):
        return folder
    latest = folder / LATEST
    if latest.is_file() and latest.stat().st_size <= 512:
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[\w.+=-]+", tag) and tag not in (".", "..") and (folder / tag).is_dir():
            return folder / tag if _states(folder / tag) else None
        steps = sorted(inner.name for inner in folder.iterdir() if inner.is_dir() and _states(inner))
        there = f"the folder holds {shortened(steps)}" if steps else "no step of DeepSpeed is in the folder"
        raise HxaconvError(f"{latest} names {show(tag)}, which is not there; {there}", hint="Give the step's folder.")
    return None


def _states(folder: Path) -> list[str]:
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if name.endswith((_MODEL, _OPTIMIZER)) and not name.startswith("._"))


def read_zero(folder: Path, label: str, weights: str | None = None) -> tuple[list[SourceFile], Contents]:
    """The weights in a step's folder, and its files.

    `weights`: `master`, the optimizer's float32 weights; `model`, those that the model computes with, which stages
    1 and 2 keep whole; None, the former where the optimizer's files are there.

    Raises:
        HxaconvError: for missing ranks, files of several steps, tensors of other sizes than announced, model-parallel
            checkpoints, and everything that makes a single file unreadable.
    """
    if weights not in (None, "master", "model"):
        raise HxaconvError(f"--weights {weights}: {label} has master and model weights", hint="Leave --weights out.")
    names = _states(folder)
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
    models, optimizers = (
        _opened(folder, [name for name in names if name.endswith(kind)], label) for kind in (_MODEL, _OPTIMIZER)
    )
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


def _opened(folder: Path, names: Iterable[str], label: str) -> dict[int, TorchZip]:
    """The files of one kind, by their ranks."""
    opened = {}
    for name in names:
        match = _RANK.match(name)
        assert match is not None
        file = SourceFile.local(folder / name, name=f"{folder.name}/{name}", label=f"{label.rstrip('/')}/{name}")
        archive = TorchZip(file, inert=TRAINER_OBJECTS)
        expect(archive.value, dict, file.label, "what it holds")
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
    return dict(expect(archive.value.get(key) or {}, dict, archive.label, key))


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


# --- master weights -----------------------------------------------------------------------------------


class _Rank(NamedTuple):
    """A rank's file of the optimizer's states, those of ZeRO in it, and its flat tensors, one per group."""

    archive: TorchZip
    state: dict[Any, Any]
    flats: list[Recipe]


def _masters(models: Mapping[int, TorchZip], optimizers: Mapping[int, TorchZip], label: str) -> tuple[Plan, int]:
    """The master weights, buffers and frozen parameters, and the stage of ZeRO."""
    stage, ranks = _ranks(optimizers, label)
    first = next(iter(models.values()))
    shapes = first.value.get("param_shapes")
    if not isinstance(shapes, list) or not shapes:
        raise HxaconvError(
            f"{first.label} lacks param_shapes, so that the flat partitions cannot be assigned", hint=_BY_MODEL
        )
    groups, module = [_shapes(first, group, "param_shapes") for group in shapes], _mapping(first, "module")
    names = expect(first.value.get("buffer_names"), list, first.label, "buffer_names")
    buffers = [name for name in names if isinstance(name, str) and isinstance(module.get(name), Tensor)]
    plan = {name: first.recipe(module[name], name) for name in buffers}
    if stage == 3:
        missing = [f"rank {rank}" for rank in optimizers if rank not in models]
        raise_all(f"{label}: *{_MODEL} of these ranks are missing:", missing, hint=_AGAIN)
        plan |= _frozen(list(models.values())) | _stage_3(groups, ranks)
    else:
        plan |= _frozen([first]) | _stages_1_and_2(groups, ranks)
    for alias, name in _mapping(first, "shared_params").items():
        if isinstance(name, str) and name in plan:
            plan[alias] = with_origin(plan[name], f"{plan[name].origin}, shared by {alias}")
    if stage < 3:  # stage 1 names frozen parameters nowhere else
        plan |= {name: recipe for name, recipe in _model_weights(first)[0].items() if name not in plan}
    return plan, stage


def _ranks(optimizers: Mapping[int, TorchZip], label: str) -> tuple[int, list[_Rank]]:
    """The stage of ZeRO, and what every rank has: all of them, of one step."""
    states = [(archive, _mapping(archive, "optimizer_state_dict")) for archive in optimizers.values()]
    none = [archive.file.name for archive, state in states if "zero_stage" not in state]
    raise_all(f"{label}: these are no files of a ZeRO optimizer:", none, hint="Take --weights model.")
    stage, *others = {_number(state["zero_stage"]) for _, state in states}
    if others or stage not in _MASTERS:
        raise HxaconvError(f"{label}: its optimizer's files are not all of ZeRO stage 1, 2 or 3")
    key, counts = _MASTERS[stage], states[0][1].get("partition_count")
    expected = max(_number(count) or 0 for count in (counts if isinstance(counts, list) and counts else [counts]))
    missing = [str(rank) for rank in range(min(expected, 65536)) if rank not in optimizers]
    if missing or len(optimizers) != expected:
        gone = f"; rank {shortened(missing)} is missing" if missing else ""
        raise HxaconvError(
            f"{label}: saved by {expected} ranks, but {len(optimizers)} *{_OPTIMIZER} are there{gone}",
            hint="Copy the files of all nodes into one folder, or delete those of an earlier run with more ranks.",
        )
    ranks = []
    for archive, state in states:
        flats = expect(state.get(key), list, archive.label, f"{key}, the master weights")
        ranks.append(_Rank(archive, state, [archive.recipe(flat, key) for flat in flats]))
    steps = [(_optimizer_step(archive, state), archive.file.name) for archive, state in states]
    _same_everywhere("steps", [(f"{step:g}", name) for step, name in steps if step is not None], label)
    dtypes = sorted({flat.dtype for rank in ranks for flat in rank.flats})
    if len(dtypes) != 1 or dtypes[0] not in FLOATS:
        raise broken(label, f"{key} is of {', '.join(dtypes) or 'no type'}, expected one float type")
    return stage, ranks


def _number(value: Any) -> int | None:
    """A whole number, or a member of DeepSpeed's enumeration of stages, written by its value or by its name."""
    if isinstance(value, Record) and value.arguments:
        value = value.arguments[-1]
    if isinstance(value, str):
        value = _STAGES.get(value)
    return value if type(value) is int else None


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
    shapes = {name: shape_of(shape) for name, shape in expect(value, dict, archive.label, what).items()}
    odd = [show(str(name)) for name, shape in shapes.items() if type(name) is not str or shape is None or 0 in shape]
    raise_all(f"{archive.label}: names or shapes in {what} that are none:", odd, hint=_AGAIN)
    return {name: shape for name, shape in shapes.items() if shape is not None}


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


def _stage_3(groups: Sequence[Shapes], ranks: Sequence[_Rank]) -> Plan:
    shapes = {name: shape for group in groups for name, shape in group.items()}
    shares = {name: -(-math.prod(shape) // len(ranks)) for name, shape in shapes.items()}
    needed = sum(shares.values())
    for archive, _, flats in ranks:
        numel = sum(flat.numel for flat in flats)
        if numel != needed:
            found = f"{_MASTERS[3]} holds {numel} elements"
            raise broken(archive.label, f"{found}, {len(ranks)} ranks need {needed} in each")
    plan, offset = Plan(), 0
    for name, shape in shapes.items():
        parts = [_cut(rank.flats, offset, (shares[name],), name) for rank in ranks]
        plan[name] = _cut(parts, 0, shape, f"{name} in {len(ranks)} {_OPTIMIZER}")
        offset += shares[name]
    return plan


def _stages_1_and_2(groups: Sequence[Shapes], ranks: Sequence[_Rank]) -> Plan:
    key, first, align = _MASTERS[2], ranks[0].archive.label, 2 * len(ranks)
    other = [f"{rank.archive.file.name}: {len(rank.flats)}" for rank in ranks if len(rank.flats) != len(groups)]
    raise_all(f"{first}: {key} has other groups than the {len(groups)} of the model's parameters:", other)
    # Elements of padding behind every parameter; newer versions of DeepSpeed write them down.
    none, what = [[0] * len(group) for group in groups], "param_alignment_paddings"
    paddings = expect(ranks[0].state.get(what) or none, list, first, what)
    counts = [len(inside) if isinstance(inside, list) and are_sizes(*inside) else None for inside in paddings]
    if counts != [len(group) for group in groups]:
        raise broken(first, f"{what} does not fit its parameters")
    plan: Plan = {}
    for number, shapes in enumerate(groups):
        offset, places = 0, {}
        for (name, shape), padding in zip(shapes.items(), paddings[number], strict=True):
            places[name] = (offset, math.prod(shape))
            offset += math.prod(shape) + padding
        parts = [rank.flats[number] for rank in ranks]
        numel = sum(part.numel for part in parts)
        if -(-offset // align) != -(-numel // align):
            raise HxaconvError(
                f"{first} and its {len(ranks) - 1} companions: group {number} of {key} holds"
                f" {numel} elements, its parameters have {offset} (padding: up to {align - 1})",
                hint="Files of another save or of another number of ranks are among them; copy the folder again.",
            )
        begin = 0
        for rank, part in enumerate(parts):
            _check_places(ranks[rank], rank, number, places, (begin, begin + part.numel))
            begin += part.numel
        for name, (start, _) in places.items():
            plan[name] = _cut(parts, start, shapes[name], f"{name} in {len(ranks)} {_OPTIMIZER}")
    return plan


def _check_places(
    rank: _Rank, index: int, group: int, places: Mapping[str, tuple[int, int]], partition: tuple[int, int]
) -> None:
    """Compare the places of parameters in a group with what the rank whose partition this is records of them."""
    mappings = rank.state.get("param_slice_mappings")
    recorded = mappings[group] if isinstance(mappings, list) and len(mappings) > group else None
    for name, address in recorded.items() if isinstance(recorded, dict) else ():
        fields = address.fields if isinstance(address, Record) else {}
        if name not in places or {"start", "numel"} - fields.keys():
            continue
        (start, numel), (begin, end) = places[name], partition
        low, high = max(start, begin), min(start + numel, end)
        if (fields["start"], fields["numel"]) != (low - begin, high - low):
            raise HxaconvError(
                f"{rank.archive.label}: {name} stands at {fields['start']} with {fields['numel']} elements by"
                f" this file, but at {low - begin} with {high - low} if it is that of rank {index}",
                hint="The file is of another rank or another save; copy the step's folder again.",
            )
