"""State dicts of DTensors, one file per rank, as verl saves them: `model_world_size_8_rank_0.pt` and its companions.

Every file maps each name to a DTensor: the rank's own block, the whole shape, and how the tensor is divided.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats.contents import Contents, broken, check_names, show
from hxaconv.formats.dcp import Chunk, bytes_of, make_whole
from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.files import Extent, SourceFile
from hxaconv.formats.pickle_machine import TRAINER_OBJECTS, Record, Tensor
from hxaconv.formats.torchzip_reader import TorchZip
from hxaconv.model.plan import Plan, Recipe

_FILE = re.compile(r"^model_world_size_(\d+)_rank_(\d+)\.pt$")
_DTENSOR = "torch._utils._rebuild_wrapper_subclass"
_PLACEMENTS = ("Shard", "Replicate", "Partial", "_Partial", "_StridedShard")
_OBJECTS = (
    *TRAINER_OBJECTS,
    *("torch.distributed.tensor.DTensor", "torch.distributed._tensor.api.DTensor"),
    *("torch.distributed.tensor._api.DTensor", "torch.distributed.device_mesh.DeviceMesh"),
    *("torch.distributed._mesh_layout._MeshLayout", "torch.distributed._mesh_layout._FlatLayout"),
    *(
        f"torch.distributed.{module}.{name}"
        for module in ("tensor._dtensor_spec", "_tensor._dtensor_spec", "_tensor.placement_types")
        for name in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")
    ),
    *(f"torch.distributed.{module}.placement_types.{name}" for module in ("tensor", "_tensor") for name in _PLACEMENTS),
)


def holds_dtensors(folder: Path) -> bool:
    """Whether a folder holds such files."""
    return any(_FILE.match(path.name) for path in folder.iterdir())


@dataclass(frozen=True, slots=True)
class _Block:
    """One rank's part of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    axis: int | None
    """Along which the tensor is divided; None where every rank has all of it."""
    place: Extent


def read_dtensors(folder: Path, *, label: str) -> tuple[list[SourceFile], Contents]:
    """The tensors in a folder, put together from the blocks of all ranks, and its files.

    Raises:
        HxaconvError: for missing ranks, files of several runs, blocks that do not make their tensor, and tensors that
            are divided along more than one axis of the mesh.
    """
    opened = [(file, TorchZip(file, inert=_OBJECTS)) for file in _ranks(folder, label)]
    blocks: dict[str, list[_Block]] = {}
    for file, archive in opened:
        if not isinstance(archive.value, dict) or not all(isinstance(name, str) for name in archive.value):
            raise broken(file.label, "it is no dictionary of tensors")
        for name, value in archive.value.items():
            if isinstance(value, Tensor | Record):
                blocks.setdefault(name, []).append(_block(name, value, file, archive))
    check_names(list(blocks), label)
    plan: Plan = {name: _whole(name, parts, len(opened), label) for name, parts in blocks.items()}
    for file, archive in opened:
        file.header_digest = archive.digest()
    left = [f"{kind}*" for kind in ("optim_world_size", "extra_state_world_size") if any(folder.glob(f"{kind}*"))]
    facts: dict[str, Any] = {"nested_under": None, "ignored": left, "aliases": [], "ranks": len(opened)}
    return [file for file, _ in opened], Contents(container="dtensor", tensors=plan, extra=facts)


def _ranks(folder: Path, label: str) -> list[SourceFile]:
    found = {path.name: match for path in sorted(folder.iterdir()) if (match := _FILE.match(path.name))}
    worlds = sorted({int(match[1]) for match in found.values()})
    if len(worlds) != 1:
        raise HxaconvError(f"{label} holds files of runs with {worlds} ranks", hint="Keep those of one run.")
    names = {int(match[2]): name for name, match in found.items()}
    missing = [f"rank {rank}" for rank in range(min(worlds[0], 65536)) if rank not in names]
    hint = "Copy the files of all nodes into one folder."
    raise_all(f"{label}: saved by {worlds[0]} ranks, but {len(names)} files are there:", missing, hint=hint)
    return [
        SourceFile.local(folder / names[rank], name=names[rank], label=f"{label.rstrip('/')}/{names[rank]}")
        for rank in range(worlds[0])
    ]


def _block(name: str, value: Tensor | Record, file: SourceFile, archive: TorchZip) -> _Block:
    local: Any = value
    shape, axis = None, None
    if isinstance(value, Record):
        local, shape, axis = _described(name, value, file)
    place = archive.extent(local, show(name))
    return _Block(local.storage.dtype, shape or local.shape, local.shape, axis, place)


def _described(name: str, value: Record, file: SourceFile) -> tuple[Any, tuple[int, ...], int | None]:
    """(the rank's own tensor, the whole shape, the axis it is divided along) of a DTensor."""
    state = value.arguments[3] if value.name == _DTENSOR and len(value.arguments) == 4 else None
    both = state if isinstance(state, tuple) else (state,)  # attributes in a dictionary, and in slots
    state = {key: item for part in both if isinstance(part, dict) for key, item in part.items()}
    spec = state.get("_spec")
    if not isinstance(spec, Record):
        raise broken(file.label, f"{show(name)} is of a kind of tensor that is not put together")
    meta, placements = spec.fields.get("tensor_meta"), spec.fields.get("placements")
    shape = meta.arguments[0] if isinstance(meta, Record) and meta.arguments else None
    if not (isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 2**62 for n in shape)):
        raise broken(file.label, f"{show(name)} has no shape")
    divided = [p for p in placements if isinstance(p, Record)] if isinstance(placements, tuple) else []
    kinds = [placement.name.rsplit(".", 1)[-1] for placement in divided]
    if kinds == ["Replicate"]:
        return state.get("_local_tensor"), shape, None
    axis = divided[0].fields.get("dim") if kinds == ["Shard"] else None
    if type(axis) is not int or not 0 <= axis < len(shape):
        raise HxaconvError(
            f"{file.label}: {show(name)} is divided as {', '.join(kinds) or 'unknown'}; one Shard or Replicate is read",
            hint="Merge it with the trainer's own script (verl: python -m verl.model_merger merge), and convert that.",
        )
    return state.get("_local_tensor"), shape, axis


def _whole(name: str, blocks: Sequence[_Block], ranks: int, label: str) -> Recipe:
    first = blocks[0]
    alike = {(block.dtype, block.shape, block.axis) for block in blocks}
    if len(blocks) != ranks or len(alike) != 1:
        raise HxaconvError(
            f"{label}: {show(name)} is in {len(blocks)} of {ranks} files, with {len(alike)} descriptions",
            hint="Files of several saves are among them; copy the folder again.",
        )
    if first.axis is None:
        blocks = blocks[:1]
    chunks, start = [], 0
    for block in blocks:
        axis = block.axis or 0
        offsets = tuple(start if i == axis else 0 for i in range(len(block.shape)))
        if 0 not in block.sizes:
            chunks.append(Chunk(offsets, block.sizes, block.place))
            start += block.sizes[axis] if block.sizes else 0
    fits = all(len(chunk.sizes) == len(first.shape) for chunk in chunks)
    if not fits or not make_whole(first.shape, chunks):
        raise broken(label, f"the {len(chunks)} blocks of {show(name)} do not make a tensor of {list(first.shape)}")
    origin = f"{name} in {ranks} files of ranks"
    return Recipe(first.dtype, first.shape, bytes_of(first.shape, BY_NAME[first.dtype].itemsize, chunks), origin)
