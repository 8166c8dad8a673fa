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

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hxaconv.errors import HxaconvError, raise_all, shortened
from hxaconv.formats.contents import Contents, broken, check_names, show
from hxaconv.formats.dtypes import BY_NAME, FLOATS, num_bytes, num_elements
from hxaconv.formats.files import Extent, SourceFile
from hxaconv.formats.pickle_machine import MAX_DIMS, TRAINER_OBJECTS, Record, Tensor
from hxaconv.formats.state_dict import StateDict, recipes
from hxaconv.formats.torchzip_reader import TorchZip
from hxaconv.model.plan import Plan, Ranges, Recipe, with_origin

LATEST = "latest"
"""The file beside the folders of steps that names the newest of them."""
_MODEL, _OPTIMIZER = "model_states.pt", "optim_states.pt"
_RANK = re.compile(r"^(?:(?:bf16|fp16)_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(?:model|optim)_states\.pt$")
_MASTERS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
_USED = ("module", "param_shapes", "buffer_names", "frozen_param_shapes", "frozen_param_fragments", "shared_params")


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


@dataclass(slots=True)
class _States:
    """One file of the step: its pickle, and where its tensors stand."""

    file: SourceFile
    rank: int
    archive: TorchZip

    @property
    def value(self) -> dict[Any, Any]:
        return self.archive.value  # type: ignore[no-any-return]  # a dictionary: checked when it was opened

    def mapping(self, key: str) -> dict[Any, Any]:
        """A dictionary under a key; empty where the key is missing or None."""
        found = self.value.get(key)
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise broken(self.file.label, f"{key} is a {type(found).__name__}, expected a dictionary")
        return found

    def flat(self, tensor: Any, what: str) -> tuple[str, Extent]:
        """dtype and place of a contiguous tensor."""
        extent = self.archive.extent(tensor, what)
        return tensor.storage.dtype, extent


@dataclass(slots=True)
class _Partition:
    """One rank's share of one parameter group, or several of them after each other."""

    dtype: str
    extents: list[Extent] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return sum(extent.nbytes for extent in self.extents) // BY_NAME[self.dtype].itemsize

    def part(self, start: int, numel: int) -> tuple[Extent, ...]:
        itemsize = BY_NAME[self.dtype].itemsize
        return Ranges(tuple(self.extents)).part(start * itemsize, numel * itemsize).extents


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
            f"{label} holds {len(optimizers)} *{_OPTIMIZER} but no *{_MODEL}, which say what the tensors are called",
            hint="Copy the whole folder of the step.",
        )
    _same_everywhere(models, ("global_steps", "ds_version", "dp_world_size"), label)
    if weights == "master" and not optimizers:
        raise HxaconvError(
            f"{label} holds no *{_OPTIMIZER}, which the master weights are in", hint="Take --weights model."
        )
    steps = models[0].value.get("global_steps")
    facts: dict[str, Any] = {"step": steps if isinstance(steps, int) else None, "ranks": len(optimizers) or None}
    if optimizers and weights != "model":
        plan, stage = _masters(models, optimizers, label)
        facts |= {"zero_stage": stage, "weights": "master", "aliases": []}
        ignored = [*_ignored(models), "optimizer_state_dict (all but its master weights)"]
    else:
        plan, aliases = _model_weights(models[0])
        facts |= {"weights": "model", "aliases": aliases}
        ignored = [*_ignored(models), *([f"*{_OPTIMIZER}"] if optimizers else [])]
    check_names(list(plan), label)
    files = [states.file for states in (*models, *optimizers)]
    for states in (*models, *optimizers):
        states.file.header_digest = states.archive.digest()
    return files, Contents(container="zero", tensors=plan, extra={**facts, "nested_under": None, "ignored": ignored})


def _ignored(models: list[_States]) -> list[str]:
    return [show(str(key)) for key in models[0].value if key not in _USED]


def _refuse_other_layouts(names: Iterable[str], label: str) -> None:
    names = list(names)
    ranks = [match for name in names if (match := _RANK.match(name))]
    other = [show(name) for name in names if not _RANK.match(name)]
    hint = "Convert it with DeepSpeed's ds_to_universal.py or the trainer's own export, then convert the result."
    raise_all(f"{label}: files of a pipeline- or expert-parallel model, which are not put together:", other, hint=hint)
    parallel = sorted({int(match[2]) for match in ranks})
    if len(parallel) > 1:
        raise HxaconvError(
            f"{label}: the model was split over {len(parallel)} tensor-parallel ranks (mp_rank_00 to"
            f" mp_rank_{parallel[-1]:02d}), which are not put together",
            hint=hint,
        )


def _opened(folder: Path, names: Iterable[str], label: str) -> list[_States]:
    opened = []
    for name in names:
        match = _RANK.match(name)
        assert match is not None
        file = SourceFile.local(folder / name, name=f"{folder.name}/{name}", label=f"{label.rstrip('/')}/{name}")
        archive = TorchZip(file, inert=TRAINER_OBJECTS)
        if not isinstance(archive.value, dict):
            raise HxaconvError(f"{file.label} holds a {type(archive.value).__name__}, expected DeepSpeed's dictionary")
        opened.append(_States(file, int(match[1] or 0), archive))
    return sorted(opened, key=lambda states: states.rank)


def _same_everywhere(files: list[_States], keys: Iterable[str], label: str) -> None:
    """Refuse files of several saves in one folder."""
    problems = []
    for key in keys:
        found: dict[Any, list[str]] = {}
        for states in files:
            value = states.value.get(key)
            found.setdefault(value if isinstance(value, int | str) else None, []).append(states.file.name)
        if len(found) > 1:
            problems.append(f"{key}: " + ", ".join(f"{value} in {shortened(names)}" for value, names in found.items()))
    raise_all(f"{label}: its files were saved at different times:", problems, hint="Copy the step's folder again.")


def _model_weights(states: _States) -> tuple[Plan, list[list[str]]]:
    """What the model computes with, as the first rank saved it."""
    module = states.mapping("module")
    tensors = {name: tensor for name, tensor in module.items() if isinstance(tensor, Tensor)}
    check_names([name if isinstance(name, str) else "" for name in tensors], states.file.label)
    if not tensors:
        raise HxaconvError(f"{states.file.label} holds no model under `module`", hint="Copy the step's folder again.")
    if any(0 in tensor.shape for tensor in tensors.values()):
        raise HxaconvError(
            f"{states.file.label}: the model's own weights are empty: ZeRO-3 leaves them to the optimizer's files",
            hint="Take --weights master, and --dtype bfloat16 for weights of that size.",
        )
    return recipes(StateDict(tensors, {}), states.archive.place, states.file)


def _masters(models: list[_States], optimizers: list[_States], label: str) -> tuple[Plan, int]:
    inner = [_optimizer_state(states) for states in optimizers]
    stage = _one_stage(optimizers, inner, label)
    _check_ranks(optimizers, inner, label)
    _same_step(optimizers, inner, label)
    first = models[0]
    groups = _parameter_groups(first)
    plan = _buffers(first)
    if stage == 3:
        present = {states.rank for states in models}
        missing = [f"rank {rank}" for rank in range(len(optimizers)) if rank not in present]
        raise_all(f"{label}: *{_MODEL} of these ranks are missing:", missing, hint="Copy the step's folder again.")
        plan |= _frozen_parts(models)
        plan |= _stage_3(groups, optimizers, inner)
    else:
        plan |= _frozen_whole(first)
        plan |= _stages_1_and_2(groups, optimizers, inner)
    for alias, name in first.mapping("shared_params").items():
        if isinstance(name, str) and name in plan:
            plan[alias] = with_origin(plan[name], f"{plan[name].origin}, shared by {alias}")
    if stage < 3:  # stage 1 names frozen parameters nowhere else
        whole, _ = _model_weights(first)
        plan |= {name: recipe for name, recipe in whole.items() if name not in plan}
    return plan, stage


def _optimizer_state(states: _States) -> dict[Any, Any]:
    inner = states.mapping("optimizer_state_dict")
    if "zero_stage" not in inner:
        raise HxaconvError(
            f"{states.file.label} is no file of a ZeRO optimizer", hint="Take --weights model for the model's weights."
        )
    return inner


def _number(value: Any) -> int | None:
    """A whole number, or an enumeration's member that stands for one."""
    if isinstance(value, Record) and len(value.arguments) == 1:
        value = value.arguments[0]
    return value if type(value) is int else None


def _one_stage(optimizers: list[_States], inner: list[dict[Any, Any]], label: str) -> int:
    stages = {_number(state["zero_stage"]) for state in inner}
    stage = stages.pop()
    if stages or stage not in _MASTERS:
        raise HxaconvError(f"{label}: its optimizer's files are not all of ZeRO stage 1, 2 or 3")
    lacking = [
        states.file.name for states, state in zip(optimizers, inner, strict=True) if _MASTERS[stage] not in state
    ]
    raise_all(f"{label}: optimizer's files without {_MASTERS[stage]}, the master weights:", lacking)
    return stage


def _check_ranks(optimizers: list[_States], inner: list[dict[Any, Any]], label: str) -> None:
    counts = inner[0].get("partition_count")
    counts = [_number(count) for count in (counts if isinstance(counts, list) else [counts])]
    if None in counts or not counts:
        raise broken(optimizers[0].file.label, "partition_count is no number of ranks")
    expected = max(count for count in counts if count is not None)
    there = {states.rank for states in optimizers}
    missing = sorted(set(range(min(expected, 65536))) - there)
    if missing or len(there) != expected:
        gone = f"; rank {shortened(map(str, missing))} is missing" if missing else ""
        raise HxaconvError(
            f"{label}: saved by {expected} ranks, but {len(there)} *{_OPTIMIZER} are there{gone}",
            hint="Copy the files of all nodes into one folder, or delete those of an earlier run with more ranks.",
        )


def _same_step(optimizers: list[_States], inner: list[dict[Any, Any]], label: str) -> None:
    """Refuse optimizer's files that have taken different numbers of steps."""
    found: dict[Any, list[str]] = {}
    for states, state in zip(optimizers, inner, strict=True):
        step = _optimizer_step(states, state)
        if step is not None:
            found.setdefault(step, []).append(states.file.name)
    if len(found) > 1:
        problems = [f"{step:g} steps in {shortened(names)}" for step, names in found.items()]
        raise_all(f"{label}: its files were saved at different steps:", problems, hint="Copy the step's folder again.")


def _optimizer_step(states: _States, state: Mapping[Any, Any]) -> float | None:
    """The step of the first parameter that has one: a number, or a tensor with one element."""
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    inside = base.get("state") if isinstance(base, dict) else None
    for entry in inside.values() if isinstance(inside, dict) else ():
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, int | float):
            return float(step)
        if isinstance(step, Tensor) and num_elements(step.shape) == 1 and step.storage.dtype == "F32":
            _, extent = states.flat(step, "a step")
            return float(struct.unpack("<f", states.file.read(extent.offset, extent.nbytes))[0])
    return None


def _shape(value: Any, name: str, where: str) -> tuple[int, ...]:
    if not (
        isinstance(value, tuple) and len(value) <= MAX_DIMS and all(type(n) is int and 0 < n < 2**62 for n in value)
    ):
        raise broken(where, f"{show(name)} has no shape")
    return value


def _shapes(states: _States, value: Any, what: str) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise broken(states.file.label, f"{what} does not map names to shapes")
    return {name: _shape(shape, name, states.file.label) for name, shape in value.items()}


def _parameter_groups(states: _States) -> list[dict[str, tuple[int, ...]]]:
    groups = states.value.get("param_shapes")
    if isinstance(groups, dict):  # of DeepSpeed before 0.4: one group
        groups = [groups]
    if not isinstance(groups, list) or not groups:
        raise HxaconvError(
            f"{states.file.label} lacks param_shapes, so that the flat partitions cannot be told apart",
            hint="Take --weights model, if the model's own weights are enough.",
        )
    return [_shapes(states, group, "param_shapes") for group in groups]


def _buffers(states: _States) -> Plan:
    """The registered buffers, as the model holds them."""
    module, names = states.mapping("module"), states.value.get("buffer_names")
    if not isinstance(names, list):
        raise broken(states.file.label, "buffer_names is no list")
    plan: Plan = {}
    for name in names:
        if isinstance(name, str) and isinstance(module.get(name), Tensor):
            dtype, extent = states.flat(module[name], f"the buffer {show(name)}")
            plan[name] = Recipe(dtype, module[name].shape, Ranges((extent,)), f"{name} in {states.file.name}")
    return plan


def _frozen_whole(states: _States) -> Plan:
    """Parameters without gradient: stages 1 and 2 keep them whole."""
    fragments = states.mapping("frozen_param_fragments")
    plan: Plan = {}
    for name, shape in _shapes(states, states.mapping("frozen_param_shapes"), "frozen_param_shapes").items():
        dtype, extent = states.flat(fragments.get(name), f"the frozen parameter {show(name)}")
        if extent.nbytes != num_bytes(dtype, shape):
            raise broken(states.file.label, f"the frozen parameter {show(name)} is not of shape {list(shape)}")
        plan[name] = Recipe(dtype, shape, Ranges((extent,)), f"{name} in {states.file.name}")
    return plan


def _frozen_parts(models: list[_States]) -> Plan:
    """Parameters without gradient: stage 3 leaves every rank its part of them."""
    shapes = _shapes(models[0], models[0].mapping("frozen_param_shapes"), "frozen_param_shapes")
    plan: Plan = {}
    for name, shape in shapes.items():
        found = [
            states.flat(states.mapping("frozen_param_fragments").get(name), f"the frozen parameter {show(name)}")
            for states in models
        ]
        dtype = found[0][0]
        flat = Ranges(tuple(extent for _, extent in found))
        needed = num_bytes(dtype, shape)
        if {other for other, _ in found} != {dtype} or sum(extent.nbytes for _, extent in found) < needed:
            raise broken(models[0].file.label, f"the parts of {show(name)} do not make one tensor of {list(shape)}")
        origin = f"{name} in {len(models)} {_MODEL}"
        plan[name] = Recipe(dtype, shape, flat.part(0, needed), origin)
    return plan


def _partition(states: _States, tensors: Iterable[Any], what: str) -> _Partition:
    found = [states.flat(tensor, what) for tensor in tensors]
    dtypes = {dtype for dtype, _ in found}
    if len(dtypes) != 1 or not dtypes <= FLOATS:
        raise broken(
            states.file.label, f"{what} is of {', '.join(sorted(dtypes)) or 'no type'}, expected one float type"
        )
    return _Partition(dtypes.pop(), [extent for _, extent in found])


def _groups(states: _States, state: Mapping[Any, Any], key: str, count: int | None = None) -> list[Any]:
    groups = state[key]
    if not isinstance(groups, list) or (count is not None and len(groups) != count):
        has = len(groups) if isinstance(groups, list) else "no"
        raise broken(states.file.label, f"{key} has {has} groups, the model's parameters make {count}")
    return groups


def _stage_3(groups: list[dict[str, tuple[int, ...]]], optimizers: list[_States], inner: list[dict[Any, Any]]) -> Plan:
    ranks = len(optimizers)
    flats = [
        _partition(states, _groups(states, state, _MASTERS[3]), _MASTERS[3])
        for states, state in zip(optimizers, inner, strict=True)
    ]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    shares = {name: -(-num_elements(shape) // ranks) for name, shape in shapes.items()}
    for states, flat in zip(optimizers, flats, strict=True):
        if flat.numel != sum(shares.values()) or flat.dtype != flats[0].dtype:
            raise broken(
                states.file.label,
                f"{_MASTERS[3]} holds {flat.numel} elements ({flat.dtype}),"
                f" {ranks} ranks need {sum(shares.values())} ({flats[0].dtype}) in each",
            )
    plan, offset = Plan(), 0
    for name, shape in shapes.items():
        parts = tuple(extent for flat in flats for extent in flat.part(offset, shares[name]))
        dtype = flats[0].dtype
        origin = f"{name} in {ranks} {_OPTIMIZER}"
        plan[name] = Recipe(dtype, shape, Ranges(parts).part(0, num_bytes(dtype, shape)), origin)
        offset += shares[name]
    return plan


def _stages_1_and_2(
    groups: list[dict[str, tuple[int, ...]]], optimizers: list[_States], inner: list[dict[Any, Any]]
) -> Plan:
    ranks, key = len(optimizers), _MASTERS[2]
    align = 2 * ranks
    held = [_groups(states, state, key, len(groups)) for states, state in zip(optimizers, inner, strict=True)]
    paddings = _paddings(inner[0], groups, optimizers[0].file.label)
    plan: Plan = {}
    for number, shapes in enumerate(groups):
        parts = [
            _partition(states, [tensors[number]], f"group {number} of {key}")
            for states, tensors in zip(optimizers, held, strict=True)
        ]
        whole = _Partition(parts[0].dtype, [extent for part in parts for extent in part.extents])
        offset, places = 0, {}
        for (name, shape), padding in zip(shapes.items(), paddings[number], strict=True):
            places[name] = (offset, num_elements(shape))
            offset += num_elements(shape) + padding
        if -(-offset // align) != -(-whole.numel // align) or {part.dtype for part in parts} != {whole.dtype}:
            raise HxaconvError(
                f"{optimizers[0].file.label} and its {ranks - 1} companions: group {number} of {key} holds"
                f" {whole.numel} elements, its parameters have {offset} (padding: up to {align - 1})",
                hint="Files of another save or of another number of ranks are among them; copy the folder again.",
            )
        _check_places(number, places, parts, optimizers, inner)
        for name, (start, numel) in places.items():
            origin = f"{name} in {ranks} {_OPTIMIZER}"
            plan[name] = Recipe(whole.dtype, shapes[name], Ranges(whole.part(start, numel)), origin)
    return plan


def _paddings(state: Mapping[Any, Any], groups: list[dict[str, tuple[int, ...]]], where: str) -> list[list[int]]:
    """Elements of padding behind every parameter; newer versions of DeepSpeed write them down."""
    found = state.get("param_alignment_paddings")
    if found is None:
        return [[0] * len(group) for group in groups]
    fits = isinstance(found, list) and [len(group) for group in groups] == [
        len(inside) if isinstance(inside, list) else -1 for inside in found
    ]
    if not fits or not all(type(n) is int and 0 <= n < 2**31 for inside in found for n in inside):
        raise broken(where, "param_alignment_paddings does not fit its parameters")
    return found  # type: ignore[no-any-return]


def _check_places(
    group: int,
    places: Mapping[str, tuple[int, int]],
    parts: list[_Partition],
    optimizers: list[_States],
    inner: list[dict[Any, Any]],
) -> None:
    """Hold the places against what each rank says of the parameters in its partition, where it does."""
    begin = 0
    for part, states, state in zip(parts, optimizers, inner, strict=True):
        mappings = state.get("param_slice_mappings")
        end = begin + part.numel
        if isinstance(mappings, list) and len(mappings) > group and isinstance(mappings[group], dict):
            for name, address in mappings[group].items():
                fields = address.fields if isinstance(address, Record) else {}
                if name not in places or {"start", "numel"} - fields.keys():
                    continue
                start, numel = places[name]
                low, high = max(start, begin), min(start + numel, end)
                if (fields["start"], fields["numel"]) != (low - begin, high - low):
                    raise HxaconvError(
                        f"{states.file.label}: {name} stands at {fields['start']} with {fields['numel']} elements by"
                        f" this file, but at {low - begin} with {high - low} if it is that of rank {states.rank}",
                        hint="The file is of another rank or another save; copy the step's folder again.",
                    )
        begin = end
