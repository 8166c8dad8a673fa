"""Which files of a folder hold the weights: one file, an index with its shards, or several that stand alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats import Contents, read_contents
from hxaconv.formats.contents import show
from hxaconv.formats.files import SourceFile
from hxaconv.formats.json_files import read_json

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
_TRAINER_STATE = re.compile(
    r"^(training_args|optimizer|scheduler|scaler|rng_state|random_states|lr_scheduler|sampler)([._-].*)?\.(bin|pt|pth)$"
    r"|^(optimizer|scheduler)_\d+\.(bin|pt|pth)$"
)
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.\w+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The files of a checkpoint, wherever they are, and how to open one."""

    label: str
    sizes: Mapping[str, int]
    """File name (relative, `/`) -> bytes."""
    open: Callable[[str], SourceFile]
    read: Callable[[SourceFile], Contents] = read_contents


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which of the files hold the weights."""

    names: tuple[str, ...]
    weight_map: Mapping[str, str] | None = None
    """Of the index: tensor name -> file name."""
    index_name: str | None = None
    stray: tuple[str, ...] = ()


def holds_weights(names: Iterable[str]) -> bool:
    """Whether files of these names are weights as they are published, one file or several."""
    return any(_is_weights(name) for name in names)


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHTS) and not _TRAINER_STATE.match(name)


def select_weights(listing: Listing) -> Selection:
    """Choose the files that hold the weights; safetensors win over pickles, an index over its absence.

    Raises:
        HxaconvError: when there are none, or the index is not usable.
    """
    weights = [name for name in listing.sizes if _is_weights(name)]
    if not weights and not any(name.endswith(".index.json") for name in listing.sizes):
        raise HxaconvError(
            f"{listing.label} holds no weights ({len(listing.sizes)} other files)",
            hint="Expected *.safetensors, *.bin, *.pth or *.pt in the folder itself.",
        )
    for suffixes, stem in (((".safetensors",), "model"), ((".bin", ".pth", ".pt"), "pytorch_model")):
        of_kind = [name for name in weights if name.endswith(suffixes)]
        single, index = f"{stem}{suffixes[0]}", f"{stem}{suffixes[0]}.index.json"
        if index in listing.sizes and (single not in of_kind or _only_names(listing, index, single)):
            return _from_index(listing, index, weights)
        if of_kind:
            chosen = [single] if single in of_kind else of_kind
            odd = [show(name) for name in chosen if not name.isprintable()]
            raise_all(f"{listing.label}: files whose names cannot be printed:", odd, hint="Rename them.")
            _refuse_missing_parts(chosen, listing.label)
            return Selection(names=tuple(chosen), stray=tuple(n for n in weights if n not in chosen))
    raise HxaconvError(f"{listing.label} has an index of an unknown name, and no weights that stand alone")


def _only_names(listing: Listing, index: str, single: str) -> bool:
    weight_map = read_json(listing.open(index)).get("weight_map")
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


def _from_index(listing: Listing, index: str, weights: list[str]) -> Selection:
    raw = read_json(listing.open(index))
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise HxaconvError(f"{listing.label}: weight_map of {index} does not map tensor names to file names")
    if not weight_map:
        raise HxaconvError(f"{listing.label}: weight_map of {index} is empty")
    names = sorted(set(weight_map.values()))
    outside = [show(name) for name in names if not _is_plain(name)]
    raise_all(f"{listing.label}: {index} names files outside the folder:", outside)
    missing = [f"{show(name)} is missing" for name in names if name not in listing.sizes]
    raise_all(
        f"{listing.label}: {index} names {len(names)} files, not all of them are there:",
        missing,
        hint="Download the missing files; an interrupted download leaves such folders.",
    )
    return Selection(
        names=tuple(names),
        weight_map=weight_map,
        index_name=index,
        stray=tuple(name for name in weights if name not in weight_map.values()),
    )


def _is_plain(name: str) -> bool:
    return bool(name) and name.isprintable() and not re.search(r"[/\\:]|^\.\.?$", name)


def check_index(selection: Selection, opened: list[tuple[SourceFile, Contents]], label: str) -> None:
    """Hold the index against the files that it names.

    Raises:
        HxaconvError: listing tensors that a file lacks, or that it has beyond the index.
    """
    assert selection.weight_map is not None
    held = {file.name: contents.tensors for file, contents in opened}
    lacking = [
        f"{show(name)}: not in {show(file)}" for name, file in selection.weight_map.items() if name not in held[file]
    ]
    raise_all(f"{label}: {selection.index_name} names tensors that its files lack:", lacking)
    unlisted = [
        f"{show(name)} in {file}"
        for file, tensors in held.items()
        for name in tensors
        if selection.weight_map.get(name) != file
    ]
    raise_all(f"{label}: tensors that {selection.index_name} does not name:", unlisted)
