"""A checkpoint as a plan: canonical name -> where the bytes of that tensor stand. Headers only, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats import Contents, read_contents
from hxaconv.formats.contents import show
from hxaconv.formats.files import SourceFile, kind_of
from hxaconv.formats.json_files import PROVENANCE_NAME, read_config, read_sidecar
from hxaconv.load.weight_files import SHARD, WEIGHTS, Listing, check_index, select_weights
from hxaconv.model.names import detect_dialect, to_canonical
from hxaconv.model.plan import Plan

COMPANIONS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja", "chat_template.json"),
)
"""The only files that are copied along from a source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint. Nothing but headers and small JSON files has been read."""

    label: str
    """As the user named it."""
    container: str
    """`safetensors`, `pth` (zip) or `legacy`."""
    dialect: str
    plan: Plan
    """Canonical name -> recipe, in storage order."""
    stored_names: Mapping[str, str]
    """Canonical name -> name in the file."""
    dropped: tuple[str, ...] = ()
    """Known buffers that are left behind."""
    config: Mapping[str, Any] | None = None
    """config.json beside the weights, as it is."""
    sidecar: Mapping[str, Any] | None = None
    """NAME.json beside NAME.pth, where it is one of ours."""
    record: SourceFile | None = None
    """hxaconv.json beside the weights, unread."""
    files: tuple[SourceFile, ...]
    companions: Mapping[str, SourceFile] = field(default_factory=dict)
    code_files: Mapping[str, SourceFile] = field(default_factory=dict)
    root: Path | None = None
    repo: str | None = None
    revision: str | None = None
    """The commit that was opened, for a Hub id."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Facts about the container: what the reader found, `stray_files` (weight files that were not opened),
    `index` (the name of the index)."""
    handle: object = None
    """What downloads the files, for a Hub id."""


def open_folder(path: Path, *, label: str, repo: str | None = None, revision: str | None = None) -> Checkpoint:
    """Open a local folder.

    Raises:
        HxaconvError: listing what is missing, contradictory or outside the folder.
    """
    root = path.resolve()
    try:
        entries = sorted(root.iterdir())
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except OSError as error:
        raise HxaconvError(f"{label}: {error.strerror}") from None
    odd = [f"{entry.name} is {kind_of(entry)}" for entry in entries if entry.name not in sizes and _matters(entry)]
    raise_all(f"{label}: these should be files:", odd, hint="Put the files themselves there; download again.")

    def open_local(name: str) -> SourceFile:
        target = _inside(root, name, label)
        return SourceFile.local(target, name=name, label=f"{label.rstrip('/')}/{name}")

    listing = Listing(label=label, sizes=sizes, open=open_local)
    return assemble(listing, root=root, repo=repo, revision=revision)


def _matters(entry: Path) -> bool:
    """Whether an entry that is no file stands where a checkpoint has one; folders may have any other name."""
    if entry.name in (*COMPANIONS, "config.json") or entry.name.endswith(".index.json"):
        return True
    return entry.name.endswith(WEIGHTS) and (not entry.is_dir() or entry.name.startswith(("model", "pytorch_model")))


def _inside(root: Path, name: str, label: str) -> Path:
    """The path of a file of the folder, unless a link leads out of it (but for the Hub's cache)."""
    target = (root / name).resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise HxaconvError(
            f"{label}: {show(name)} is a link to {target}, outside the folder",
            hint="Copy the file into the folder if it belongs there.",
        )
    return root / name


def open_file(path: Path, *, label: str) -> Checkpoint:
    """Open one weight file, with the config or sidecar beside it.

    Raises:
        HxaconvError: when it is damaged, of an unknown kind, or one shard of several.
    """
    shard = SHARD.search(path.name)
    if shard and int(shard[2]) > 1:
        raise HxaconvError(f"{label} is one of {int(shard[2])} shards", hint=f"Give the folder instead: {path.parent}")
    file = SourceFile.local(path, label=label)
    folder, where = path.parent.resolve(), str(path.parent)
    contents = read_contents(file)

    def beside(name: str) -> SourceFile | None:
        if not (folder / name).is_file():
            return None
        return SourceFile.local(_inside(folder, name, where), label=str(path.parent / name))

    config = beside("config.json") if path.suffix in (".safetensors", ".bin") else None
    sidecar = beside(path.with_suffix(".json").name) if contents.container != "safetensors" else None
    companions = {name: beside(name) for name in COMPANIONS} if config is not None else {}
    return _checkpoint(
        label,
        [(file, contents)],
        config=read_config(config) if config is not None else None,
        sidecar=read_sidecar(sidecar) if sidecar is not None else None,
        companions={name: found for name, found in companions.items() if found is not None},
        root=path.resolve(),
    )


def assemble(
    listing: Listing,
    *,
    root: Path | None = None,
    repo: str | None = None,
    revision: str | None = None,
    handle: object = None,
) -> Checkpoint:
    """Open what a listing offers: choose the weight files, read their headers, hold them against the index.

    Raises:
        HxaconvError: listing every problem of one kind at once.
    """
    config = read_config(listing.open("config.json")) if "config.json" in listing.sizes else None
    selection = select_weights(listing)
    opened = [(file, listing.read(file)) for file in map(listing.open, selection.names)]
    if selection.weight_map is not None:
        check_index(selection, opened, listing.label)
    sidecar = None
    if len(opened) == 1 and opened[0][1].container != "safetensors":
        beside = str(PurePosixPath(selection.names[0]).with_suffix(".json"))
        sidecar = read_sidecar(listing.open(beside)) if beside in listing.sizes else None
    return _checkpoint(
        listing.label,
        opened,
        config=config,
        sidecar=sidecar,
        record=listing.open(PROVENANCE_NAME) if PROVENANCE_NAME in listing.sizes else None,
        companions={name: listing.open(name) for name in COMPANIONS if name in listing.sizes},
        code_files={name: listing.open(name) for name in listing.sizes if re.fullmatch(r"[\w-]+\.py", name)},
        root=root,
        repo=repo,
        revision=revision,
        handle=handle,
        facts={"stray_files": selection.stray, "index": selection.index_name},
    )


def _checkpoint(
    label: str, opened: list[tuple[SourceFile, Contents]], *, facts: Mapping[str, Any] | None = None, **rest: Any
) -> Checkpoint:
    merged: Plan = {}
    twice = []
    for file, contents in opened:
        twice += [f"{name} ({merged[name].origin}; {file.name})" for name in contents.tensors if name in merged]
        merged |= contents.tensors
    raise_all(f"{label}: tensors that several files hold:", twice, hint="Give the one file to convert by its path.")
    dialect = detect_dialect(merged)
    canonical = to_canonical(merged, dialect, label)
    plan = {new: merged[old] for old, new in canonical.items() if new is not None}
    _check_dimensions(plan, label)
    first = opened[0][1]
    extra = {"stray_files": (), **first.extra, **(facts or {})}
    for key in ("ignored", "aliases"):
        extra[key] = [entry for _, contents in opened for entry in contents.extra.get(key, ())]
    return Checkpoint(
        label=label,
        container=first.container,
        dialect=dialect,
        plan=plan,
        stored_names={new: old for old, new in canonical.items() if new is not None},
        dropped=tuple(old for old, new in canonical.items() if new is None),
        files=tuple(file for file, _ in opened),
        extra=extra,
        **rest,
    )


def _check_dimensions(plan: Plan, label: str) -> None:
    """Refuse shapes that a tensor of that name never has, so that nobody else has to expect them."""
    odd = [f"{name} has shape {list(recipe.shape)}" for name, recipe in plan.items() if not _fits(name, recipe.shape)]
    raise_all(f"{label}: tensors with the wrong number of dimensions, or without elements:", odd)


def _fits(name: str, shape: tuple[int, ...]) -> bool:
    last = name.rsplit(".", 1)[-1]
    if 0 in shape:
        return False
    if last == "bias" or name.endswith("norm.weight"):
        return len(shape) == 1
    if last == "weight" or last[-1] in "12":  # projections, embeddings, and the low-rank pairs
        return len(shape) == 2
    return len(shape) > 0 or last in ("layer_architecture", "head_size_record")
