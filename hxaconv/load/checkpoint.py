"""Open a folder, a file or a Hub id as a plan: canonical name -> where the bytes stand. Headers only, no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from hxaconv.errors import MAX_LISTED, HxaconvError, bullet_list, raise_all
from hxaconv.formats import Contents, read_contents
from hxaconv.formats.contents import show
from hxaconv.formats.files import TEMPLATES, SourceFile, kind_of
from hxaconv.formats.json_files import PROVENANCE_NAME, read_config, read_sidecar
from hxaconv.load.companions import is_companion
from hxaconv.load.kinds import Kind, kind_of_config, kind_of_shell, kind_of_tensors
from hxaconv.load.trained import Trained, find_trained
from hxaconv.load.weight_files import SHARD, WEIGHTS, Folder, NoWeights, Selection, facts_of, select_weights
from hxaconv.model import shells
from hxaconv.model.config import teacher_config
from hxaconv.model.model import Checkpoint
from hxaconv.model.names import HEAD, canonical_names, detect_key_format, layer_kinds, unknown_names
from hxaconv.model.plan import Plan, Recipe, same_bytes

if TYPE_CHECKING:
    from hxaconv.progress import Progress

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
_CACHED_MODEL = re.compile(r"^models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)$")
_BLOB = re.compile(r"^[0-9a-f]{40}([0-9a-f]{24})?$")


def open_checkpoint(
    spec: str | Path,
    *,
    revision: str | None = None,
    weights: str | None = None,
    judged: bool = True,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open a folder, a file or a Hub id (`org/name[@revision]`); a path that exists wins.

    Args:
        spec: What the user named.
        revision: Branch, tag or commit of a Hub id.
        weights: Of a trainer's folder: `master`, the optimizer's float32 weights, or `model`, those it computes with.
        judged: Refuse what is neither teacher nor student; otherwise `Checkpoint.problem` says so.
        progress: Shows a download.

    Raises:
        HxaconvError: when there is nothing there, or it is damaged, ambiguous or of an unknown kind.
    """
    checkpoint = _open(spec, revision, weights, progress)
    if judged and checkpoint.problem is not None:
        raise checkpoint.problem
    return checkpoint


def _open(spec: str | Path, revision: str | None, weights: str | None, progress: Progress | None) -> Checkpoint:
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
    page = re.match(r"https?://[\w.-]+/(?P<id>[\w.-]+/[\w.-]+)(/tree/(?P<revision>[\w.-]+))?/?$", text)
    if page:  # the address of a model's page, pasted
        text = page["id"] + (f"@{page['revision']}" if page["revision"] else "")
    elif isinstance(spec, Path) or _looks_like_path(text):
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

    repository = hub.open_repository(repo, revision, progress)
    if isinstance(repository, Path):
        return open_folder(repository, label=label, repo=repo, revision=repository.name)

    def read(file: SourceFile) -> Contents:
        if file.path is None and not file.name.endswith(".safetensors"):
            hub.download([file], repository, progress)  # a pickle stands at no fixed place: it must be here
        return repository.read(file)

    folder = Folder(
        label=label,
        sizes={name: file.size for name, file in sorted(repository.files.items())},
        open=repository.open,
        read=read,
        repo=repo,
        revision=repository.commit,
        handle=repository,
    )
    checkpoint = assemble(folder)
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
    root, cached = path.resolve(), _CACHED_MODEL.match(path.resolve().name)
    if cached and (root / "snapshots").is_dir():
        snapshot = _snapshot(root, label)
        return open_folder(snapshot, label=label, repo=f"{cached['org']}/{cached['name']}", revision=snapshot.name)
    try:
        entries = sorted(root.iterdir())
        sizes = {name: found.stat().st_size for name, found in _files(entries)}
    except OSError as error:
        raise HxaconvError(f"{label}: {error.strerror}") from None
    odd = [f"{entry.name} is {kind_of(entry)}" for entry in entries if entry.name not in sizes and _matters(entry)]
    raise_all(f"{label}: these should be files:", odd, hint="Put the files themselves there; download again.")

    def open_local(name: str) -> SourceFile:
        target = _inside(root, name, label)
        return SourceFile.local(target, name=name, label=f"{label.rstrip('/')}/{name}")

    folder = Folder(label=label, sizes=sizes, open=open_local, root=root, repo=repo, revision=revision)
    trained = find_trained(root, label)
    if trained is not None and (weights is not None or trained.folder == root or not folder.weights):
        return _from_trainer(trained, folder, root, weights)
    if weights is not None:
        raise HxaconvError(
            f"--weights {weights}: {label} was not saved by DeepSpeed's ZeRO, and has one set of weights",
            hint="Leave --weights out.",
        )
    found = assemble(folder)
    if trained is not None and any(0 in recipe.shape for recipe in found.unknown.values()):
        # A state dict that was saved under ZeRO-3 without gathering: the step beside it has the values.
        return _from_trainer(trained, folder, root, weights)
    return found


def _files(entries: Collection[Path]) -> Iterator[tuple[str, Path]]:
    """Files of a folder by their names in it; macOS's `._NAME` beside NAME are no files of the checkpoint."""
    for entry in entries:
        if entry.is_file() and not entry.name.startswith("._"):
            yield entry.name, entry
        elif entry.name == TEMPLATES and entry.is_dir():
            for inside in sorted(entry.iterdir()):
                if is_companion(f"{TEMPLATES}/{inside.name}") and inside.is_file():
                    yield f"{TEMPLATES}/{inside.name}", inside


def _snapshot(cache: Path, label: str) -> Path:
    """The snapshot of a model in the Hub's cache that its main branch names, or the only one.

    Raises:
        HxaconvError: when there is none, or one has to be chosen.
    """
    found = sorted(entry for entry in (cache / "snapshots").iterdir() if entry.is_dir())
    main = cache / "refs" / "main"
    if main.is_file():
        named = [entry for entry in found if entry.name == main.read_text(encoding="utf-8", errors="replace").strip()]
        found = named or found
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"snapshots/{entry.name}" for entry in found)
    raise HxaconvError(
        f"{label} is a model in the Hub's cache with {len(found)} snapshots",
        hint=f"Give one of them: {names}" if found else "Its download was never finished: run hf download again.",
    )


def _from_trainer(trained: Trained, folder: Folder, root: Path, weights: str | None) -> Checkpoint:
    """Open what several ranks saved; the small files are beside it, in the folder above, or in verl's `huggingface`."""
    files, contents = trained.read(weights)
    others = [place for place in (root / "huggingface", root.parent) if (place / "config.json").is_file()]
    if "config.json" not in folder.sizes and trained.folder == root and others:
        beside = others[0]

        def opener(name: str) -> SourceFile:
            return SourceFile.local(_inside(beside, name, str(beside)), name=name)

        folder = replace(
            folder, sizes={name: path.stat().st_size for name, path in _files(list(beside.iterdir()))}, open=opener
        )
    return _checkpoint(folder, [(files[0], contents)], _config(folder), files=files)


def _matters(entry: Path) -> bool:
    """Whether an entry that is no file stands where a checkpoint has one; folders may have any other name."""
    if entry.name.startswith("._"):
        return False
    if is_companion(entry.name) or entry.name == "config.json" or entry.name.endswith(".index.json"):
        return True
    return entry.name.endswith(WEIGHTS) and (not entry.is_dir() or entry.name.startswith(("model", "pytorch_model")))


def _inside(root: Path, name: str, label: str) -> Path:
    """The path of a file of the folder, unless a link leads out of it.

    Links into the Hub's cache are followed wherever it is: a file there is named by the digest of its content,
    so that whoever can write such a link knows the content already, and nothing private is copied by following it.
    """
    target = (root / name).resolve()
    model = target.parent.parent
    own = root.parent.name == "snapshots" and root.parent.parent == model
    blob = target.parent.name == "blobs" and (own or (model.name.startswith("models--") and _BLOB.match(target.name)))
    if not blob and not target.is_relative_to(root):
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
    root, where = path.parent.resolve(), str(path.parent)

    def beside(name: str) -> SourceFile:
        return SourceFile.local(_inside(root, name, where), label=str(path.parent / name))

    whole = path.suffix in (".safetensors", ".bin") and (root / "config.json").is_file()
    config = read_config(beside("config.json")) if whole else None
    contents = read_contents(file)
    sidecar = path.with_suffix(".json")
    named = [name for name, _ in _files(list(root.iterdir())) if is_companion(name)] if whole else []
    folder = Folder(label=label, sizes=dict.fromkeys(named, 0), open=beside, root=path.resolve())
    has_sidecar = contents.container != "safetensors" and sidecar.is_file()
    return _checkpoint(
        folder, [(file, contents)], config, sidecar=read_sidecar(beside(sidecar.name)) if has_sidecar else None
    )


def _config(folder: Folder) -> Mapping[str, Any] | None:
    return read_config(folder.open("config.json")) if "config.json" in folder.sizes else None


def assemble(folder: Folder) -> Checkpoint:
    """Open what a folder offers: choose the weight files and read their headers.

    Raises:
        HxaconvError: for files that are damaged, missing or ambiguous.
    """
    config = _config(folder)
    kind = kind_of_config(config or {})
    if kind is not None and folder.handle is not None:  # before anything large is read over the network
        return _nothing_of(folder, config, kind.error(folder.label))
    try:
        selection = select_weights(folder)
    except NoWeights as error:
        return _nothing_of(folder, config, kind.error(folder.label) if kind else error)
    opened = [(file, folder.read(file)) for file in map(folder.open, selection.names)]
    sidecar = None
    if len(opened) == 1 and opened[0][1].container != "safetensors":
        beside = str(PurePosixPath(selection.names[0]).with_suffix(".json"))
        sidecar = read_sidecar(folder.open(beside)) if beside in folder.sizes else None
    return _checkpoint(folder, opened, config, selection=selection, sidecar=sidecar)


def _nothing_of(folder: Folder, config: Mapping[str, Any] | None, problem: HxaconvError) -> Checkpoint:
    """A checkpoint of which nothing but its config is known."""
    return Checkpoint(
        label=folder.label,
        container="",
        key_format="",
        plan={},
        stored_names={},
        config=config,
        files=(),
        problem=problem,
    )


def _checkpoint(
    folder: Folder,
    opened: list[tuple[SourceFile, Contents]],
    config: Mapping[str, Any] | None,
    *,
    selection: Selection | None = None,
    files: Collection[SourceFile] = (),
    sidecar: Mapping[str, Any] | None = None,
) -> Checkpoint:
    selection = selection or Selection(names=())
    merged, problem = _merged(folder, opened, selection), None
    shell = {name: recipe for name, recipe in merged.items() if shells.is_part(name)}
    names = {shells.text_name(name): name for name in merged if name not in shell}
    shell_config = shells.shell_settings(config or {})
    wrapped = kind_of_shell(config or {})
    if config is not None and "text_config" in config:
        config = shells.text_config(config)
    key_format = detect_key_format(names)
    try:
        found_names, unknown = canonical_names(names, key_format, folder.label)
        canonical, unknown = {names[old]: new for old, new in found_names.items()}, [names[name] for name in unknown]
    except HxaconvError as error:
        canonical, unknown, problem = {}, [], problem or error
    plan = {new: merged[old] for old, new in canonical.items() if new is not None}
    misfits = {name: recipe for name, recipe in plan.items() if not _fits(name, recipe.shape)}
    first = opened[0][1]
    extra = {**first.extra, **facts_of(selection, opened)}
    for key in ("ignored", "aliases"):
        extra[key] = [entry for _, contents in opened for entry in contents.extra.get(key, ())]
    found = Checkpoint(
        label=folder.label,
        container=first.container,
        key_format=key_format,
        plan={name: recipe for name, recipe in plan.items() if name not in misfits},
        shell=shell,
        stored_names={new: old for old, new in canonical.items() if new is not None and new not in misfits},
        dropped=tuple(old for old, new in canonical.items() if new is None),
        unknown={name: merged[name] for name in unknown},
        config=config,
        sidecar=sidecar,
        record=folder.open(PROVENANCE_NAME) if PROVENANCE_NAME in folder.sizes else None,
        files=tuple(files or (file for file, _ in opened)),
        companions={name: folder.open(name) for name in folder.sizes if is_companion(name)},
        code_files={name: folder.open(name) for name in folder.sizes if re.fullmatch(r"[\w-]+\.py", name)},
        shell_config=shell_config,
        shell_files={name: folder.open(name) for name in shells.PROCESSOR_FILES if name in folder.sizes},
        root=folder.root,
        repo=folder.repo,
        revision=folder.revision,
        extra=extra,
        handle=folder.handle,
    )
    problem = problem or _problem(found, wrapped) or _misfit(misfits, folder.label)
    return replace(found, problem=problem, unknown={**found.unknown, **misfits})


def _merged(folder: Folder, opened: list[tuple[SourceFile, Contents]], selection: Selection) -> Plan:
    """All tensors by their stored names.

    Raises:
        HxaconvError: for one that several files hold, unless these are shards and it is the same in all of them.
    """
    merged: Plan = {}
    differing = []
    # Files that stand for themselves are models of their own, however much alike: which one is for the user to say.
    parts = bool(selection.weight_map) or all(SHARD.search(name) for name in selection.names)
    for file, contents in opened:
        for name in contents.tensors:
            if name not in merged:
                continue
            other = merged[name]
            same = parts and not any(
                source.path is None for recipe in (other, contents.tensors[name]) for source in recipe.make.sources()
            )
            if not same or not same_bytes(other, contents.tensors[name]):
                differing.append(f"{show(name)} ({other.origin}; {file.name})")
        merged |= {name: recipe for name, recipe in contents.tensors.items() if name not in merged}
    if not differing:
        return merged
    if not parts:
        each = "\n".join(f"  - {file.name}: {len(contents.tensors)} tensors" for file, contents in opened[:MAX_LISTED])
        raise HxaconvError(
            f"{folder.label} holds {len(opened)} files with the same tensors, each a checkpoint of its own:\n{each}",
            hint="Give the one file to convert by its path.",
        )
    hint = "One of the shards is stale: download the folder again."
    if selection.weight_map:
        hint = "Readers take either; take the stale copy out, or download the folder again."
    raise HxaconvError(
        f"{folder.label}: tensors that several files hold:\n" + "\n".join(f"  - {line}" for line in differing[:12]),
        hint=hint,
    )


def _problem(found: Checkpoint, wrapped: Kind | None = None) -> HxaconvError | None:
    """Why a checkpoint is neither teacher nor student: by its config first, then by names, dtypes and shapes."""
    kind = kind_of_config(found.config or {})
    if kind is not None:
        return kind.error(found.label)
    hybrid = (found.config or {}).get("rwkv_architecture") or "rwkv" in layer_kinds(found.plan).values()
    if (found.unknown or wrapped) and found.config is not None and not hybrid:
        try:
            teacher_config(
                found.config,
                where=found.label,
                has_head=HEAD in found.plan,
                rope_theta=1e4,
                rms_norm_eps=1e-5,
                allow_output_bias=True,
                drop_rope_scaling=True,
            )
        except HxaconvError as error:
            if wrapped is None:
                return error
            what = f"{found.label} is {wrapped.what}, which is not converted:"
            return HxaconvError(f"{what}\n{error.message}", hint=error.hint or wrapped.way_out)
    kind = kind_of_tensors({name: recipe.dtype for name, recipe in _all(found)}, found.unknown)
    if kind is not None:
        return kind.error(found.label)
    if found.unknown:
        return unknown_names(list(found.unknown), found.key_format, found.label)
    return None


def _all(found: Checkpoint) -> Iterator[tuple[str, Recipe]]:
    yield from found.plan.items()
    yield from found.unknown.items()


def _misfit(misfits: Plan, label: str) -> HxaconvError | None:
    """The error for shapes that a tensor of that name never has: nobody else has to expect them."""
    if not misfits:
        return None
    odd = [f"{name} has shape {list(recipe.shape)}" for name, recipe in misfits.items()]
    empty = sum(0 in recipe.shape for recipe in misfits.values())
    hint = ""
    if empty:
        hint = (
            f"{empty} are empty: ZeRO-3 saves them so where the trainer does not gather them first."
            " Give the folder that its step is in (global_step*, with the files of all ranks), or set"
            " stage3_gather_16bit_weights_on_model_save and save again."
        )
    what = f"{label}: tensors with the wrong number of dimensions, or without elements:"
    return HxaconvError(f"{what}\n{bullet_list(odd)}", hint=hint)


def _fits(name: str, shape: tuple[int, ...]) -> bool:
    last = name.rsplit(".", 1)[-1]
    if 0 in shape:
        return False
    if last == "bias" or name.endswith("norm.weight"):
        return len(shape) == 1
    if last == "weight" or last[-1] in "12":  # projections, embeddings, and the low-rank pairs
        return len(shape) == 2
    return len(shape) > 0 or last in ("layer_architecture", "head_size_record")
