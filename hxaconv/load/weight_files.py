"""The files of a folder, here or on the Hub, and which of them hold the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats import Contents, read_contents
from hxaconv.formats.contents import show
from hxaconv.formats.files import SourceFile
from hxaconv.formats.json_files import read_json
from hxaconv.load.kinds import kind_of_files

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_OTHER = re.compile(
    r"^(training_args|optimizer|scheduler|scaler|rng_state|random_states|lr_scheduler|sampler)([._-].*)?\.(bin|pt|pth)$"
    r"|^(optimizer|scheduler)_\d+\.(bin|pt|pth)$"
    r"|^adapter_model\.\w+$"
)
_SECOND = re.compile(r"^consolidated[.\d]*\.(pth|safetensors)$")
"""A second copy of the weights, in another layout."""
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.\w+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """The files of a checkpoint, wherever they are, and how to open one."""

    label: str
    sizes: Mapping[str, int]
    """File name (relative, `/`) -> bytes."""
    open: Callable[[str], SourceFile]
    read: Callable[[SourceFile], Contents] = read_contents
    root: Path | None = None
    repo: str | None = None
    revision: str | None = None
    handle: object = None
    """What downloads the files, for a Hub id."""

    @property
    def weights(self) -> list[str]:
        """Files that may be weights, as they are published."""
        found = [name for name in self.sizes if name.endswith(WEIGHTS) and not _OTHER.match(name) and "/" not in name]
        first = [name for name in found if not _SECOND.match(name)]
        return first or ([] if "params.json" in self.sizes else found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which files hold the weights, and what the index says of them."""

    names: tuple[str, ...]
    weight_map: Mapping[str, str] = field(default_factory=dict)
    """Tensor name -> file name; empty without an index."""
    index_name: str | None = None
    stray: tuple[str, ...] = ()


class NoWeights(HxaconvError):
    """A folder without weights whose other files say what it is."""


def select_weights(folder: Folder) -> Selection:
    """Choose the files that hold the weights; safetensors win over pickles, an index over its absence.

    Raises:
        HxaconvError: when there are none, or the index is not usable.
    """
    weights = folder.weights
    if not weights and not any(name.endswith(".index.json") for name in folder.sizes):
        raise _nothing(folder)
    for suffixes, stem in (((".safetensors",), "model"), ((".bin", ".pth", ".pt", ".ckpt"), "pytorch_model")):
        of_kind = [name for name in weights if name.endswith(suffixes)]
        single, index = f"{stem}{suffixes[0]}", f"{stem}{suffixes[0]}.index.json"
        if index in folder.sizes and (single not in of_kind or _only_names(folder, index, single)):
            return _from_index(folder, index, weights)
        if of_kind:
            chosen = [single] if single in of_kind else of_kind
            odd = [show(name) for name in chosen if not name.isprintable()]
            raise_all(f"{folder.label}: files whose names cannot be printed:", odd, hint="Rename them.")
            _refuse_missing_parts(chosen, folder.label)
            return Selection(names=tuple(chosen), stray=_strays(folder, chosen))
    raise HxaconvError(f"{folder.label} has an index of an unknown name, and no weights that stand alone")


def _nothing(folder: Folder) -> HxaconvError:
    """The error for a folder without weights: what it is, or where there are some."""
    kind = kind_of_files(folder.sizes)
    if kind is not None:
        return NoWeights(f"{folder.label} is {kind.what}", hint=kind.way_out)
    inside = []
    if folder.root is not None and folder.root.is_dir():
        for path in sorted(folder.root.iterdir())[:1000]:
            if path.is_dir() and any(name.name.endswith(WEIGHTS) for name in path.iterdir()):
                inside.append(path.name)
    hint = "Expected *.safetensors, *.bin, *.pth, *.pt or *.ckpt in the folder itself."
    if inside:
        hint = f"These folders in it hold some: {', '.join(inside[:8])}. Give one of them."
    count = len(folder.sizes)
    return HxaconvError(f"{folder.label} holds no weights ({count} other file{'s' if count != 1 else ''})", hint=hint)


def _only_names(folder: Folder, index: str, single: str) -> bool:
    weight_map = read_json(folder.open(index)).get("weight_map")
    return isinstance(weight_map, dict) and set(map(str, weight_map.values())) == {single}


def _refuse_missing_parts(names: Iterable[str], label: str) -> None:
    numbers: dict[tuple[str, int], set[int]] = {}
    for name in names:
        part = SHARD.search(name)
        if part:
            numbers.setdefault((name[: part.start()], int(part[2])), set()).add(int(part[1]))
    missing = [
        f"{stem}: {len(found)} of {total} parts are there"
        for (stem, total), found in numbers.items()
        if len(found) != total
    ]
    raise_all(f"{label}: shards are missing, and there is no index:", missing, hint="Download the folder again.")


def _from_index(folder: Folder, index: str, weights: list[str]) -> Selection:
    raw = read_json(folder.open(index))
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise HxaconvError(f"{folder.label}: weight_map of {index} does not map tensor names to file names")
    if not weight_map:
        raise HxaconvError(f"{folder.label}: weight_map of {index} is empty")
    names = sorted(set(weight_map.values()))
    outside = [show(name) for name in names if not _is_plain(name)]
    raise_all(f"{folder.label}: {index} names files outside the folder:", outside)
    missing = [f"{show(name)} is missing" for name in names if name not in folder.sizes]
    others = [name for name in weights if name not in names and name.endswith(names[0].rpartition(".")[2])]
    hint = "Download the missing files; an interrupted download leaves such folders."
    if others:
        hint = f"{hint} If {', '.join(others[:3])} are the model, the index is stale: delete {index}."
    raise_all(
        f"{folder.label}: {index} names {len(names)} files, not all of them are there:",
        missing,
        hint=hint,
    )
    return Selection(
        names=tuple(names),
        weight_map=weight_map,
        index_name=index,
        stray=_strays(folder, names),
    )


def _strays(folder: Folder, chosen: Collection[str]) -> tuple[str, ...]:
    """Weight files that are not opened."""
    return tuple(
        name for name in folder.sizes if name.endswith(WEIGHTS) and not _OTHER.match(name) and name not in chosen
    )


def _is_plain(name: str) -> bool:
    return bool(name) and name.isprintable() and not re.search(r"[/\\:]|^\.\.?$", name)


def facts_of(selection: Selection, opened: list[tuple[SourceFile, Contents]]) -> dict[str, Any]:
    """What is worth knowing of the choice: files left out, and what the index says that its files do not bear out.

    None of it decides anything here: whether a tensor is missing or too much, the architecture says.
    """
    held = {name for _, contents in opened for name in contents.tensors}
    return {
        "stray_files": selection.stray,
        "index": selection.index_name,
        "index_lacks": sorted(held - selection.weight_map.keys()) if selection.weight_map else [],
        "only_in_index": {name: file for name, file in selection.weight_map.items() if name not in held},
    }
