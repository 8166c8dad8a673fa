"""Open a folder, a file or a Hub id as a plan: canonical name -> where the bytes stand. Headers only, no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats import Contents, read_contents
from hxaconv.formats.contents import show
from hxaconv.formats.files import SourceFile, kind_of
from hxaconv.formats.json_files import PROVENANCE_NAME, read_config, read_sidecar
from hxaconv.load.trained import Trained, find_trained
from hxaconv.load.weight_files import SHARD, WEIGHTS, Listing, check_index, holds_weights, select_weights
from hxaconv.model.model import Checkpoint
from hxaconv.model.names import detect_dialect, to_canonical
from hxaconv.model.plan import Plan

if TYPE_CHECKING:
    from hxaconv.progress import Progress

COMPANIONS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja", "chat_template.json"),
)
"""The only files that are copied along from a source."""

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def open_checkpoint(
    spec: str | Path, *, revision: str | None = None, weights: str | None = None, progress: Progress | None = None
) -> Checkpoint:
    """Open a folder, a file or a Hub id (`org/name[@revision]`); a path that exists wins.

    `weights`, of a trainer's folder: `master`, the optimizer's float32 weights, or `model`, those it computes with.

    Raises:
        HxaconvError: when there is nothing there, or it is damaged, ambiguous or of an unknown kind.
    """
    text = str(spec)
    path = Path(text).expanduser()
    if revision is not None and path.exists():
        raise HxaconvError(f"--revision {revision} is for Hub ids; {text} is here", hint="Leave it out.")
    if path.is_dir():
        return open_folder(path, label=text, weights=weights)
    if weights is not None:
        raise HxaconvError(f"--weights {weights} is for folders that a trainer saved; {text} is none")
    if path.exists():
        return open_file(path, label=text)
    if isinstance(spec, Path) or _looks_like_path(text):
        raise HxaconvError(
            f"{text} does not exist",
            hint="Expected a folder, a .safetensors/.pth/.pt/.bin file, or a Hub id such as RekaAI/reka-flash-3.",
        )
    name, _, pinned = text.partition("@")
    if revision and pinned and revision != pinned:
        raise HxaconvError(f"{text} and --revision {revision} name two revisions", hint="Leave one of them out.")
    return _open_hub(name, revision or pinned or None, label=text, progress=progress)


def _looks_like_path(text: str) -> bool:
    return (
        _HUB_ID.match(text) is None
        or text.startswith((".", "/", "~"))
        or text.partition("@")[0].endswith((*WEIGHTS, ".json"))
    )


def _open_hub(repo: str, revision: str | None, *, label: str, progress: Progress | None) -> Checkpoint:
    """Open a model of the Hub, or what the cache has of it without network."""
    from hxaconv.formats import hub

    repository = hub.open_repository(repo, revision)
    if isinstance(repository, Path):
        return open_folder(repository, label=label, repo=repo, revision=repository.name)

    def read(file: SourceFile) -> Contents:
        if file.path is None and not file.name.endswith(".safetensors"):
            hub.download([file], repository, progress)  # a pickle stands at no fixed place: it must be here
        return repository.read(file)

    sizes = {name: file.size for name, file in sorted(repository.files.items())}
    listing = Listing(label=label, sizes=sizes, open=repository.open, read=read)
    checkpoint = assemble(listing, repo=repo, revision=repository.commit, handle=repository)
    hub.remember(repo, revision or "main", repository.commit)
    return checkpoint


def download_weights(
    checkpoint: Checkpoint, progress: Progress | None = None, *, needed: Collection[SourceFile] | None = None
) -> None:
    """Download weights of a Hub checkpoint that are not in the cache: all, or those in `needed`.

    There is nothing to do for a local one.

    Raises:
        HxaconvError: as for reading them; what has arrived is kept and completed by the next attempt.
    """
    from hxaconv.formats import hub

    if isinstance(checkpoint.handle, hub.Repository):
        missing = [file for file in checkpoint.files if file.path is None and (needed is None or file in needed)]
        hub.download(missing, checkpoint.handle, progress)


def open_folder(
    path: Path, *, label: str, repo: str | None = None, revision: str | None = None, weights: str | None = None
) -> Checkpoint:
    """Open a local folder: weight files as they are published, or, without any or by `weights`, a trainer's.

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
    trained = find_trained(root, label)
    if trained is not None and (weights is not None or trained.folder == root or not holds_weights(sizes)):
        return _from_trainer(trained, listing, root, weights)
    if weights is not None:
        raise HxaconvError(
            f"--weights {weights}: {label} was not saved by DeepSpeed's ZeRO, and has one set of weights",
            hint="Leave --weights out.",
        )
    return assemble(listing, root=root, repo=repo, revision=revision)


def _from_trainer(trained: Trained, listing: Listing, root: Path, weights: str | None) -> Checkpoint:
    """Open what several ranks saved, with the small files beside it or in the folder above."""
    files, contents = trained.read(weights)
    beside = dict(listing.sizes)
    opener = listing.open
    if "config.json" not in beside and trained.folder == root and (root.parent / "config.json").is_file():
        above = root.parent
        beside = {path.name: path.stat().st_size for path in above.iterdir() if path.is_file()}

        def opener(name: str) -> SourceFile:
            return SourceFile.local(_inside(above, name, str(above)), name=name)

    return _checkpoint(
        listing.label,
        [(files[0], contents)],
        files=files,
        config=read_config(opener("config.json")) if "config.json" in beside else None,
        companions={name: opener(name) for name in COMPANIONS if name in beside},
        root=root,
    )


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
    label: str,
    opened: list[tuple[SourceFile, Contents]],
    *,
    files: Collection[SourceFile] = (),
    facts: Mapping[str, Any] | None = None,
    **rest: Any,
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
        files=tuple(files or (file for file, _ in opened)),
        extra=extra,
        **rest,
    )


def _check_dimensions(plan: Plan, label: str) -> None:
    """Refuse shapes that a tensor of that name never has, so that nobody else has to expect them."""
    odd = [f"{name} has shape {list(recipe.shape)}" for name, recipe in plan.items() if not _fits(name, recipe.shape)]
    empty = sum(0 in recipe.shape for recipe in plan.values())
    hint = ""
    if empty:
        hint = (
            f"{empty} are empty: ZeRO-3 saves them so where the trainer does not gather them first."
            " Give the folder with its global_step*, or set stage3_gather_16bit_weights_on_model_save and save again."
        )
    raise_all(f"{label}: tensors with the wrong number of dimensions, or without elements:", odd, hint=hint)


def _fits(name: str, shape: tuple[int, ...]) -> bool:
    last = name.rsplit(".", 1)[-1]
    if 0 in shape:
        return False
    if last == "bias" or name.endswith("norm.weight"):
        return len(shape) == 1
    if last == "weight" or last[-1] in "12":  # projections, embeddings, and the low-rank pairs
        return len(shape) == 2
    return len(shape) > 0 or last in ("layer_architecture", "head_size_record")
