"""Folders that several ranks of torch.distributed saved: each file holds blocks of tensors, put together here.

Two kinds are read. torch.distributed.checkpoint (FSDP, FSDP2) leaves `.metadata` and `*.distcp`. `.metadata` is a
pickle of `torch.distributed.checkpoint.metadata.Metadata`, which has of every tensor its size and the chunks it was cut
into, and of every chunk the file, offset and length of a small torch.save archive that holds it. verl leaves
`model_world_size_8_rank_0.pt` and companions: state dicts of DTensors, each with the rank's own block, the whole shape
and how the tensor is divided. Both are interpreted by this package's own reader: nothing is imported or called.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hxaconv.errors import HxaconvError, NotConverted, raise_all
from hxaconv.formats import Contents
from hxaconv.formats.dtypes import BY_TORCH_NAME
from hxaconv.formats.files import Extent, Section, SourceFile, broken, check_names, show
from hxaconv.formats.gathered import Chunk, joined
from hxaconv.formats.pickles import (
    MAX_PICKLE_BYTES,
    TRAINER_OBJECTS,
    Global,
    Record,
    Storage,
    Tensor,
    expect,
    parse,
    shape_of,
)
from hxaconv.formats.state_dict import find_state_dict
from hxaconv.formats.torchzip import TorchZip
from hxaconv.model.plan import Plan, Ranges, Recipe

METADATA, SUFFIX = ".metadata", ".distcp"
_RANK = re.compile(r"^model_world_size_(\d+)_rank_(\d+)\.pt$")
_MAX_STEPS = 20_000_000
"""A chunk takes 74 opcodes: 270,000 chunks, such as 1,000 tensors with two moments each on 90 ranks."""
_DTENSOR = "torch._utils._rebuild_wrapper_subclass"


def holds_dcp(folder: Path) -> bool:
    """Whether a folder is a checkpoint of torch.distributed.checkpoint, whole or not."""
    return (folder / METADATA).is_file() or any(folder.glob(f"[!.]*{SUFFIX}"))


def holds_dtensors(folder: Path) -> bool:
    """Whether a folder holds state dicts of DTensors, one file per rank."""
    return any(_RANK.match(path.name) for path in folder.iterdir())


def read_dcp(folder: Path, label: str, weights: str | None = None) -> tuple[list[SourceFile], Contents]:
    """The model's tensors in a folder, and its files; optimizer states and counters are left behind.

    `weights` is the key of one of several state dicts.

    Raises:
        HxaconvError: for files that are missing, short or of another save, chunks that do not make their tensor,
            classes outside the allow-list, and forms that are not put together (quantized, transformed by extensions).
    """
    metadata, file = _metadata(folder, label)
    described = _field(metadata, "state_dict_metadata", dict, file)
    tensors, facts = _tensors(described, metadata.fields.get("planner_data"), file, weights)
    places = _places(metadata, file)
    needed = {_field(info, "relative_path", str, file) for name in tensors.values() for info in places[name].values()}
    files = _files(folder, needed, label)
    plan: Plan = {}
    for name, stored in tensors.items():
        shape, dtype, chunks = _chunks(name, described[stored], places[stored], files, file)
        used = {chunk.place.file.name for chunk in chunks if chunk.place.file is not None}
        origin = f"{name} in {min(used) if len(used) == 1 else f'{len(used)} {SUFFIX} files'}"
        plan[name] = joined(name, dtype, shape, chunks, origin, file.label)
    digest = hashlib.sha256(file.read(0, file.size)).hexdigest()
    for each in (file, *files.values()):
        each.header_digest = digest
    facts["ignored"] += sorted(path.name for path in folder.glob(f"[!.]*{SUFFIX}") if path.name not in needed)
    return [file, *files.values()], Contents(container="dcp", tensors=plan, extra={**facts, "aliases": []})


def _metadata(folder: Path, label: str) -> tuple[Record, SourceFile]:
    if not (folder / METADATA).is_file():
        raise HxaconvError(
            f"{label} holds *{SUFFIX} but no {METADATA}, which describes what is in them",
            hint="It is written last: the save did not end, or the file was not copied (its name begins with a dot).",
        )
    file = _opened(folder, METADATA, label)
    if file.size > MAX_PICKLE_BYTES:
        raise HxaconvError(f"{file.label}: a pickle of {file.size} bytes, expected at most {MAX_PICKLE_BYTES}")
    stream = io.BytesIO(file.read(0, file.size))
    value = parse(stream, file.label, inert=TRAINER_OBJECTS, max_steps=_MAX_STEPS).value
    if not isinstance(value, Record) or not value.name.endswith(".Metadata"):
        raise NotConverted(
            f"{label} is a sharded checkpoint of FSDP whose {METADATA} is none of torch.distributed.checkpoint",
            hint=f"Copy the whole folder again, {METADATA} too. Of one that the accelerate it was saved with still"
            " reads, `accelerate merge-weights FOLDER OUT` makes one file.",
        )
    return value, file


def _opened(folder: Path, name: str, label: str) -> SourceFile:
    return SourceFile.local(folder / name, name=name, label=f"{label.rstrip('/')}/{name}")


def _field(record: Any, name: str, kind: type, file: SourceFile) -> Any:
    return expect(record.fields.get(name) if isinstance(record, Record) else None, kind, file.label, name)


def _sizes(value: Any, file: SourceFile) -> tuple[int, ...]:
    return tuple(expect(shape_of(value), tuple, file.label, "a size or offset"))


def _tensors(
    described: Mapping[Any, Any], paths: Any, file: SourceFile, key: str | None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Name in the model -> name in the checkpoint, and what was left behind.

    The nested state that was saved is rebuilt by the paths of its leaves, with a tensor without elements in place of
    each, whose storage's key is the name in the checkpoint.
    """
    tree: dict[Any, Any] = {}
    for name, entry in described.items():
        if not isinstance(name, str) or not isinstance(entry, Record):
            raise broken(file.label, "its table of tensors is none")
        path = paths.get(name) if isinstance(paths, dict) else None
        if not (isinstance(path, tuple) and path and all(isinstance(part, str | int) for part in path)):
            path = (name,)
        inner: Any = tree
        for part in path[:-1]:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else {}
        if isinstance(inner, dict):
            is_tensor = entry.name.endswith(".TensorStorageMetadata")
            inner[path[-1]] = Tensor(Storage("U8", name, 0), 0, (), ()) if is_tensor else None
    if isinstance(tree.get("app"), dict):  # the Stateful of PyTorch's own tutorial
        tree = tree["app"]
    tensors, facts = find_state_dict(tree, file.label, key)
    return {name: tensor.storage.key for name, tensor in tensors.items()}, facts


def _places(metadata: Record, file: SourceFile) -> dict[str, dict[tuple[int, ...], Record]]:
    """Name -> chunk's offsets -> what describes the place of its archive."""
    described = _field(metadata, "state_dict_metadata", dict, file)
    found: dict[str, dict[tuple[int, ...], Record]] = {name: {} for name in described}
    for index, info in _field(metadata, "storage_data", dict, file).items():
        name, offsets = _field(index, "fqn", str, file), index.fields.get("offset")
        if offsets is None:  # not a tensor
            continue
        if not isinstance(info, Record) or info.fields.get("transform_descriptors"):
            raise HxaconvError(
                f"{file.label}: {show(name)} was transformed by an extension when it was saved, which is not undone",
                hint="Load it with torch.distributed.checkpoint and save it without extensions.",
            )
        found.setdefault(name, {})[_sizes(offsets, file)] = info
    return found


def _files(folder: Path, names: Iterable[str], label: str) -> dict[str, SourceFile]:
    """The files of the chunks; those that are missing are refused all at once."""
    names = sorted(names)
    odd = [show(name) for name in names if Path(name).name != name or name in (".", "..")]
    raise_all(f"{label}: {METADATA} names files outside the folder:", odd)
    raise_all(
        f"{label}: {METADATA} names {len(names)} files, not all of them are there:",
        [name for name in names if not (folder / name).is_file()],
        hint="Every node writes files of its own: copy those of all of them into one folder.",
    )
    return {name: _opened(folder, name, label) for name in names}


def _chunks(
    name: str,
    entry: Record,
    places: Mapping[tuple[int, ...], Record],
    files: Mapping[str, SourceFile],
    metadata: SourceFile,
) -> tuple[tuple[int, ...], str, list[Chunk]]:
    """(shape, dtype, chunks) of one tensor; the elements of a chunk stand in the archive at its place."""
    shape, chunks = _sizes(entry.fields.get("size"), metadata), []
    properties = _field(entry, "properties", Record, metadata)
    state = properties.state
    named = state[0] if isinstance(state, tuple) and state else properties.fields.get("dtype")
    known = BY_TORCH_NAME.get(named.name.removeprefix("torch.")) if isinstance(named, Global) else None
    if known is None:
        raise HxaconvError(f"{metadata.label}: {show(name)} has an element type that is not known")
    for chunk in _field(entry, "chunks", list, metadata):
        offsets, sizes = (_sizes(_field(chunk, key, tuple, metadata), metadata) for key in ("offsets", "sizes"))
        if 0 in sizes:
            continue
        if offsets not in places:
            raise broken(metadata.label, f"the chunk of {show(name)} at {list(offsets)} stands nowhere")
        place = places[offsets]
        file = files[_field(place, "relative_path", str, metadata)]
        start, length = (_field(place, key, int, metadata) for key in ("offset", "length"))
        if start < 0 or length < 0 or start + length > file.size:
            raise HxaconvError(
                f"{file.label} has {file.size} bytes, {show(name)} is to stand at {start} with {length}",
                hint="The file is truncated, or of another save; copy the folder again.",
            )
        archive = TorchZip(Section(file, start, length, f"{file.label}, {show(name)}"), inert=TRAINER_OBJECTS)
        found = archive.recipe(archive.value, "what it holds")
        if (found.shape, found.dtype) != (sizes, known.name):
            raise HxaconvError(
                f"{archive.label}: a tensor {list(found.shape)} ({found.dtype}),"
                f" {METADATA} expects {list(sizes)} ({known.name})",
                hint="The file is of another save; copy the folder again.",
            )
        chunks.append(Chunk(offsets, sizes, _extent(found)))
    return shape, known.name, chunks


def _extent(recipe: Recipe) -> Extent:
    assert isinstance(recipe.make, Ranges)
    return recipe.make.extents[0]


# --- DTensors ------------------------------------------------------------------------------------------

_Block = tuple[Recipe, tuple[int, ...], int | None]
"""A rank's part of a tensor, the whole shape, and the axis it is divided along (None: every rank has all of it)."""


def read_dtensors(folder: Path, label: str, weights: str | None = None) -> tuple[list[SourceFile], Contents]:
    """The tensors in a folder, put together from the blocks of all ranks, and its files; there is one set of `weights`.

    Raises:
        HxaconvError: for missing ranks, files of several runs, blocks that do not make their tensor, and tensors that
            are divided along more than one axis of the mesh.
    """
    if weights is not None:
        raise HxaconvError(f"--weights {weights}: {label} has one set of weights", hint="Leave --weights out.")
    opened = [TorchZip(file, inert=TRAINER_OBJECTS) for file in _ranks(folder, label)]
    blocks: dict[str, list[_Block]] = {}
    for archive in opened:
        if not isinstance(archive.value, dict) or not all(isinstance(name, str) for name in archive.value):
            raise broken(archive.label, "it is no dictionary of tensors")
        for name, value in archive.value.items():
            if isinstance(value, Tensor):
                blocks.setdefault(name, []).append((archive.recipe(value, name), value.shape, None))
            elif isinstance(value, Record):
                blocks.setdefault(name, []).append(_block(name, value, archive))
    check_names(blocks, label)
    plan: Plan = {name: _whole(name, parts, len(opened), label) for name, parts in blocks.items()}
    for archive in opened:
        archive.file.header_digest = archive.digest()
    left = [f"{kind}*" for kind in ("optim_world_size", "extra_state_world_size") if any(folder.glob(f"{kind}*"))]
    facts: dict[str, Any] = {"nested_under": None, "ignored": left, "aliases": [], "ranks": len(opened)}
    return [archive.file for archive in opened], Contents(container="dtensor", tensors=plan, extra=facts)


def _ranks(folder: Path, label: str) -> list[SourceFile]:
    found = {path.name: match for path in folder.iterdir() if (match := _RANK.match(path.name))}
    worlds = sorted({int(match[1]) for match in found.values()})
    if len(worlds) != 1:
        raise HxaconvError(f"{label} holds files of runs with {worlds} ranks", hint="Keep those of one run.")
    names = {int(match[2]): name for name, match in found.items()}
    missing = [f"rank {rank}" for rank in range(min(worlds[0], 65536)) if rank not in names]
    hint = "Copy the files of all nodes into one folder."
    raise_all(f"{label}: saved by {worlds[0]} ranks, but {len(names)} files are there:", missing, hint=hint)
    return [_opened(folder, names[rank], label) for rank in range(worlds[0])]


def _block(name: str, value: Record, archive: TorchZip) -> _Block:
    state = value.arguments[3] if value.name == _DTENSOR and len(value.arguments) == 4 else None
    both = state if isinstance(state, tuple) else (state,)  # attributes in a dictionary, and in slots
    state = {key: item for part in both if isinstance(part, dict) for key, item in part.items()}
    spec = state.get("_spec")
    if not isinstance(spec, Record):
        raise broken(archive.label, f"{show(name)} is of a kind of tensor that is not put together")
    meta, placements = spec.fields.get("tensor_meta"), spec.fields.get("placements")
    shape = shape_of(meta.arguments[0]) if isinstance(meta, Record) and meta.arguments else None
    if shape is None:
        raise broken(archive.label, f"{show(name)} has no shape")
    divided = [p for p in placements if isinstance(p, Record)] if isinstance(placements, tuple) else []
    kinds = [placement.name.rsplit(".", 1)[-1] for placement in divided]
    local = archive.recipe(state.get("_local_tensor"), name)
    if kinds == ["Replicate"]:
        return local, shape, None
    axis = divided[0].fields.get("dim") if kinds == ["Shard"] else None
    if type(axis) is not int or not 0 <= axis < len(shape) or len(local.shape) != len(shape):
        raise HxaconvError(
            f"{archive.label}: {show(name)} is divided as {', '.join(kinds) or 'unknown'};"
            " one Shard or Replicate is read",
            hint="Merge it with the trainer's script (verl: `python -m verl.model_merger merge`), and convert that.",
        )
    return local, shape, axis


def _whole(name: str, blocks: list[_Block], ranks: int, label: str) -> Recipe:
    (first, shape, axis) = blocks[0]
    alike = {(local.dtype, shape, axis) for local, shape, axis in blocks}
    if len(blocks) != ranks or len(alike) != 1:
        raise HxaconvError(
            f"{label}: {show(name)} is in {len(blocks)} of {ranks} files, with {len(alike)} descriptions",
            hint="Files of several saves are among them; copy the folder again.",
        )
    chunks, start = [], 0
    for local, _, _ in blocks[:1] if axis is None else blocks:
        chunks.append(Chunk(tuple(start if i == axis else 0 for i in range(len(shape))), local.shape, _extent(local)))
        start += 0 if axis is None else local.shape[axis]
    return joined(name, first.dtype, shape, chunks, f"{name} in {ranks} files of ranks", label)
