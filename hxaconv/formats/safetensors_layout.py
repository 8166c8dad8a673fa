"""safetensors files: 8 bytes of header length, the header padded to 8 bytes, the tensors end to end.

Tensors stand in plan order, where the format's own writer would sort them. Only where that order would
put a tensor at an offset that is no multiple of its element size (torch cannot view it then) a file is
ordered by descending element size, plan order within.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.files import SourceFile
from hxaconv.formats.layout import FileLayout, Fill
from hxaconv.model.plan import Plan, Ranges, Recipe, total_bytes

INDEX_NAME = "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"
_HEADER_FRAME_BYTES = 64
"""The length, the metadata and the padding."""
_ENTRY_BYTES = 128
"""A header entry beside its name, with long numbers."""
_MAX_HEADER_BYTES = 100_000_000
"""The format's readers refuse longer headers."""


def shard_layouts(plan: Plan, max_shard_bytes: int) -> tuple[FileLayout, ...]:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` ... of at most `max_shard_bytes`."""
    from huggingface_hub import split_state_dict_into_shards_factory

    # What a tensor takes in the header: its name, dtype, shape and two offsets.
    header_share = max((len(name.encode()) for name in plan), default=0) + _ENTRY_BYTES
    split = split_state_dict_into_shards_factory(
        plan,
        get_storage_size=lambda recipe: recipe.nbytes + header_share,
        filename_pattern=_PATTERN,
        max_shard_size=max(1, max_shard_bytes - _HEADER_FRAME_BYTES),
    )
    shards = split.filename_to_tensors.items()
    return tuple(file_layout(file_name, {name: plan[name] for name in names}) for file_name, names in shards)


@dataclass(frozen=True, slots=True)
class Shard:
    """Tensors that belong into one file; `hard_link` is a source file that holds just these already."""

    names: tuple[str, ...]
    hard_link: SourceFile | None = None


def given_layouts(plan: Plan, shards: Sequence[Shard]) -> tuple[FileLayout, ...]:
    """The files of a sharding that is decided already, named as shard_layouts names them."""
    count, layouts = len(shards), []
    for number, shard in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
        name = _PATTERN.format(suffix=suffix)
        inside = {name: plan[name] for name in shard.names}
        layouts.append(_hard_linked(name, inside, shard.hard_link) if shard.hard_link else file_layout(name, inside))
    return tuple(layouts)


def _hard_linked(file_name: str, plan: Plan, hard_link: SourceFile) -> FileLayout:
    fills = []
    for name, recipe in plan.items():
        assert isinstance(recipe.make, Ranges)
        fills.append(Fill(name, recipe.make.extents[0].offset, recipe))
    return FileLayout(file_name, hard_link.size, (), tuple(fills), hard_link=hard_link)


def file_layout(file_name: str, plan: Plan) -> FileLayout:
    """One safetensors file that holds `plan`."""
    names = _aligned_order(plan)
    header, end = _header((name, plan[name]) for name in names)
    start, fills = len(header), []
    for name in names:
        fills.append(Fill(name, start, plan[name]))
        start += plan[name].nbytes
    assert start == len(header) + end
    return FileLayout(file_name, start, ((0, header),), tuple(fills))


def index_json(plan: Plan, layouts: Iterable[FileLayout]) -> bytes:
    """The index that names the file of every tensor, as transformers writes it."""
    where = {fill.name: layout.name for layout in layouts for fill in layout.fills}
    metadata = {"total_parameters": sum(recipe.numel for recipe in plan.values()), "total_size": total_bytes(plan)}
    index = {"metadata": metadata, "weight_map": {name: where[name] for name in plan}}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _aligned_order(plan: Plan) -> list[str]:
    end = 0
    for recipe in plan.values():
        if end % BY_NAME[recipe.dtype].itemsize:
            return sorted(plan, key=lambda name: -BY_NAME[plan[name].dtype].itemsize)
        end += recipe.nbytes
    return list(plan)


def _header(tensors: Iterable[tuple[str, Recipe]]) -> tuple[bytes, int]:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, recipe in tensors:
        offsets = [end, end + recipe.nbytes]
        entries[name] = {"dtype": recipe.dtype, "shape": list(recipe.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= _MAX_HEADER_BYTES, "tensor names fill more than a safetensors header may hold"
    return len(text).to_bytes(8, "little") + text, end
