"""Open a folder, a file or a Hub id as a plan: canonical name -> where the bytes stand. Headers only, no torch."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from hxaconv.errors import HxaconvError, NotConverted, NotOnHub, bullet_list, raise_all, shortened
from hxaconv.formats import Contents, read_contents, sharded, zero
from hxaconv.formats.files import SourceFile, show
from hxaconv.formats.json_files import PROVENANCE_NAME, read_config, read_json, read_sidecar
from hxaconv.load.files import (
    ADAPTER,
    ADAPTER_LEFT_OUT,
    SHARD,
    Folder,
    Index,
    is_companion,
    listed,
    local_folder,
    open_inside,
    select_weights,
)
from hxaconv.load.kinds import Kind, kind_of_adapter, kind_of_config, kind_of_shell, kind_of_tensors
from hxaconv.model import shells
from hxaconv.model.config import teacher_config
from hxaconv.model.model import Checkpoint
from hxaconv.model.names import canonical_names, detect_key_format, layer_kinds, unknown_names
from hxaconv.model.plan import Plan, same_bytes
from hxaconv.options import text_of

if TYPE_CHECKING:
    from hxaconv.progress import Progress

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
_NO_ID = re.compile(r"^[./~]|\.(json|safetensors|bin|pth|pt|ckpt)$")
_HUB_PAGE = re.compile(r"https?://[\w.-]+/(?P<id>[\w.-]+/[\w.-]+)(/tree/(?P<revision>[\w.-]+))?/?$")
_CACHED_MODEL = re.compile(r"^models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)$")
_SHARDED = re.compile(r"^(pytorch_model_fsdp|sharded_state_dict)(_\d+)?$")
"""What accelerate calls the folder of a sharded model inside a checkpoint's."""
_Read = tuple[list[tuple[SourceFile, Contents]], Index | None, list[SourceFile]]
"""Files with the tensors in them, their index, and all files that were read."""


def open_checkpoint(
    spec: str | Path,
    *,
    revision: str | None = None,
    weights: str | None = None,
    validate: bool = True,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open a folder, a file or a Hub id (`org/name[@revision]`); a path that exists wins.

    Args:
        spec: What the user named.
        revision: Branch, tag or commit of a Hub id.
        weights: Of a trainer's folder: `master`, the optimizer's float32 weights, or `model`, those it computes with;
            of a pickle with several state dicts: the key of one.
        validate: Refuse what is neither teacher nor student; otherwise `Checkpoint.problem` has the reason.
        progress: Shows a download.

    Raises:
        HxaconvError: when there is nothing there, or it is damaged, ambiguous or of an unknown kind.
    """
    checkpoint = _open(spec, revision, weights, progress)
    if validate and checkpoint.problem is not None:
        raise checkpoint.problem
    return checkpoint


def _open(spec: str | Path, revision: str | None, weights: str | None, progress: Progress | None) -> Checkpoint:
    try:
        text = text_of(spec)
    except ValueError as error:
        raise HxaconvError(f"{error}: it cannot be opened", hint="Expected a folder, a file or a Hub id.") from None
    path = Path(os.path.expanduser(text))  # an unknown user is left in it
    if revision is not None and path.exists():
        raise HxaconvError(f"--revision {revision} is for Hub ids; {text} is here", hint="Leave it out.")
    if path.is_dir():
        return _open_folder(path, text, weights)
    if path.exists():
        return _open_file(path, text, weights)
    if weights is not None:
        raise HxaconvError(f"--weights {weights} is for folders and files here; {text} is none", hint="Leave it out.")
    if not isinstance(spec, Path) and _HUB_ID.match(text.rstrip("/")):
        text = text.rstrip("/")  # as completion of a shell leaves it
    page = _HUB_PAGE.match(text)
    if page:  # the address of a model's page, pasted
        text = page["id"] + (f"@{page['revision']}" if page["revision"] else "")
    elif isinstance(spec, Path) or not _HUB_ID.match(text) or _NO_ID.search(text.partition("@")[0]):
        raise HxaconvError(
            f"{text} does not exist",
            hint="Expected a folder, a .safetensors/.pth/.pt/.bin file, or a Hub id such as RekaAI/reka-flash-3.",
        )
    name, _, pinned = text.partition("@")
    if revision and pinned and revision != pinned:
        raise HxaconvError(f"{text} and --revision {revision} name two revisions", hint="Leave one of them out.")
    beside = Path(name).parent
    if not pinned and revision is None and beside.is_dir():
        try:
            return _open_hub(name, None, text, progress)
        except NotOnHub:
            raise HxaconvError(
                f"{text} does not exist: the folder {beside}/ is here, and holds no {Path(name).name}",
                hint="Check the path. As a Hub id, there is no such model, or the Hub cannot be reached.",
            ) from None
    return _open_hub(name, revision or pinned or None, text, progress)


def _open_hub(repo: str, revision: str | None, label: str, progress: Progress | None) -> Checkpoint:
    """Open a model of the Hub, or what the cache has of it without network."""
    from hxaconv.formats import hub

    repository = hub.open_repository(repo, revision, progress)
    if isinstance(repository, Path):
        return _open_folder(repository, label, repo=repo, revision=repository.name)
    folder = Folder(
        label=label,
        sizes=dict(sorted(repository.sizes.items())),
        open=repository.open,
        read=partial(repository.read, progress=progress),
        repo=repo,
        revision=repository.commit,
        handle=repository,
    )
    checkpoint = assemble(folder)
    hub.remember(repo, revision or "main", repository.commit)
    return checkpoint


def _open_folder(
    path: Path, label: str, weights: str | None = None, *, repo: str | None = None, revision: str | None = None
) -> Checkpoint:
    """Open a local folder: weight files as they are published, or, without any or by `weights`, a trainer's."""
    root, cached = path.resolve(), _CACHED_MODEL.match(path.resolve().name)
    if cached and (root / "snapshots").is_dir():
        snapshot = _snapshot(root, label)
        return _open_folder(snapshot, label, repo=f"{cached['org']}/{cached['name']}", revision=snapshot.name)
    folder, trained = local_folder(root, label, repo, revision), find_trained(root, label)
    if trained is not None and (weights is not None or trained.folder == root or not folder.weights):
        return _from_trainer(trained, folder, root, weights)
    found = assemble(replace(folder, read=partial(read_contents, key=weights)))
    if trained is not None and any(0 in recipe.shape for recipe in found.unknown.values()):
        # A state dict that was saved under ZeRO-3 without gathering: the step beside it has the values.
        return _from_trainer(trained, folder, root, weights)
    return found


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


class Trained(NamedTuple):
    """Weights that several ranks of a trainer saved, not opened yet."""

    folder: Path
    read: Callable[[str | None], tuple[list[SourceFile], Contents]]
    """Its files and the tensors in them; of several sets, that of this name."""


def find_trained(root: Path, label: str) -> Trained | None:
    """What a folder holds of a trainer: itself or one folder inside; None where it holds nothing of the kind.

    Raises:
        HxaconvError: when it names a step that is not there, or holds several.
    """
    inner = [path for path in sorted(root.iterdir()) if _SHARDED.match(path.name) and path.is_dir()]
    found = [root] if sharded.holds_dcp(root) else [path for path in inner if sharded.holds_dcp(path)]
    reader, step = sharded.read_dcp, zero.step_folder(root)
    if step is not None:
        reader, found = zero.read_zero, [step]
    elif found != [root] and sharded.holds_dtensors(root):
        reader, found = sharded.read_dtensors, [root]
    elif len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise HxaconvError(f"{label} holds several models: {names}", hint="Give one of these folders.")
    if not found:
        return None
    folder = found[0]
    where = label if folder == root else f"{label.rstrip('/')}/{folder.name}"
    return Trained(folder, partial(reader, folder, where))


def _from_trainer(trained: Trained, folder: Folder, root: Path, weights: str | None) -> Checkpoint:
    """Open what several ranks saved; the small files are beside it, in the folder above, or in verl's `huggingface`."""
    others = [place for place in (root / "huggingface", root.parent) if (place / "config.json").is_file()]
    if "config.json" not in folder.sizes and trained.folder == root and others:
        sizes = {name: path.stat().st_size for name, path in listed(others[0].iterdir())}
        folder = replace(folder, sizes=sizes, open=partial(open_inside, others[0], str(others[0])))

    def read() -> _Read:
        files, contents = trained.read(weights)
        return [(files[0], contents)], None, files

    return assemble(folder, read)


def _open_file(path: Path, label: str, weights: str | None) -> Checkpoint:
    """Open one weight file, with the config or sidecar beside it."""
    shard = SHARD.search(path.name)
    if shard and int(shard[2]) > 1:
        raise HxaconvError(f"{label} is one of {int(shard[2])} shards", hint=f"Give the folder instead: {path.parent}")
    if path.suffix == ".json":
        beside = path.with_suffix(".pth")
        hint = f"Give {beside}." if beside.is_file() else f"Give the folder that it is in: {path.parent}/"
        raise HxaconvError(f"{label} is not a file of weights", hint=hint)
    file = SourceFile.local(path, label=label)
    root = path.parent.resolve()
    names = [path.with_suffix(".json").name]
    if path.suffix in (".safetensors", ".bin") and (root / "config.json").is_file():
        names += ["config.json", *(name for name, _ in listed(root.iterdir()) if is_companion(name))]
    sizes = {name: (root / name).stat().st_size for name in sorted(names) if (root / name).is_file()}
    opened = partial(open_inside, root, str(path.parent))
    folder = Folder(label=label, sizes=sizes, open=opened, root=path.resolve())
    return assemble(folder, lambda: ([(file, read_contents(file, weights))], None, [file]))


def assemble(folder: Folder, read: Callable[[], _Read] | None = None) -> Checkpoint:
    """Open what a folder offers: choose the weight files, unless `read` does, and read their headers.

    Raises:
        HxaconvError: for files that are damaged, missing or ambiguous.
    """
    config = read_config(folder.open("config.json")) if "config.json" in folder.sizes else None
    kind = kind_of_config(config or {})
    if kind is not None and folder.handle is not None:  # before anything large is read over the network
        return Checkpoint(label=folder.label, config=config, problem=kind.error(folder.label))
    try:
        return _checkpoint(folder, config, *(read() if read else _chosen(folder)))
    except NotConverted as error:
        return Checkpoint(label=folder.label, config=config, problem=kind.error(folder.label) if kind else error)


def _chosen(folder: Folder) -> _Read:
    """The headers of the weight files of a folder."""
    names, index = select_weights(folder)
    try:
        opened = [(file, folder.read(file)) for file in map(folder.open, names)]
    except HxaconvError as error:
        if len(names) == 1 and folder.strays(names):  # what would be read if that file were not there
            sizes = {name: size for name, size in folder.sizes.items() if name not in names}
            with contextlib.suppress(HxaconvError):
                others, _ = select_weights(replace(folder, sizes=sizes))
                instead = f"If {shortened(others[:3])} hold the model, delete {names[0]}: they are read then."
                error.hint = f"{error.hint} {instead}".strip()
        raise
    return opened, index, [file for file, _ in opened]


def _checkpoint(
    folder: Folder,
    config: Mapping[str, Any] | None,
    opened: Sequence[tuple[SourceFile, Contents]],
    index: Index | None,
    files: Sequence[SourceFile],
) -> Checkpoint:
    """What stands in weight files that are open; `files` are all that were read for it."""
    merged, problem = _merged(folder.label, opened, index), None
    shell = {name: recipe for name, recipe in merged.items() if shells.is_part(name)}
    names = {shells.text_name(name): name for name in merged if name not in shell}
    text = shells.text_config(config) if config is not None and "text_config" in config else config
    key_format = detect_key_format(names)
    try:
        found_names, unknown = canonical_names(names, key_format, folder.label)
        canonical, unknown = {names[old]: new for old, new in found_names.items()}, [names[name] for name in unknown]
    except HxaconvError as error:
        canonical, unknown, problem = {}, [], error
    plan = {new: merged[old] for old, new in canonical.items() if new is not None}
    misfits = {name: recipe for name, recipe in plan.items() if not _fits(name, recipe.shape)}
    first, sidecar = opened[0][1], None
    beside = str(PurePosixPath(files[0].name).with_suffix(".json"))
    if len(files) == 1 and first.container != "safetensors" and beside in folder.sizes:
        sidecar = read_sidecar(folder.open(beside))
    found = Checkpoint(
        label=folder.label,
        container=first.container,
        key_format=key_format,
        plan={name: recipe for name, recipe in plan.items() if name not in misfits},
        shell=shell,
        stored_names={new: old for old, new in canonical.items() if new is not None and new not in misfits},
        dropped=tuple(old for old, new in canonical.items() if new is None),
        unknown={name: merged[name] for name in unknown},
        config=text,
        sidecar=sidecar,
        record=folder.open(PROVENANCE_NAME) if PROVENANCE_NAME in folder.sizes else None,
        files=tuple(files),
        companions={name: folder.open(name) for name in folder.sizes if is_companion(name)},
        code_files={name: folder.open(name) for name in folder.sizes if re.fullmatch(r"[\w-]+\.py", name)},
        shell_config=shells.shell_settings(config or {}),
        shell_files={name: folder.open(name) for name in shells.PROCESSOR_FILES if name in folder.sizes},
        warnings=tuple(_warnings(folder, opened, files)),
        root=folder.root,
        repo=folder.repo,
        revision=folder.revision,
        # None of it decides anything here: the architecture decides whether a tensor is missing or too much.
        extra=first.extra
        | {
            key: [one for _, contents in opened for one in contents.extra.get(key, ())]
            for key in ("ignored", "aliases")
        }
        | {
            "stray_files": folder.strays([PurePosixPath(file.name).name for file in files]),
            "index": index.name if index else None,
            "only_in_index": {k: file for k, file in (index.weight_map if index else {}).items() if k not in merged},
        },
        handle=folder.handle,
    )
    problem = problem or _problem(found, kind_of_shell(config or {}), misfits)
    return replace(found, problem=problem, unknown={**found.unknown, **misfits})


def _warnings(
    folder: Folder, opened: Sequence[tuple[SourceFile, Contents]], files: Sequence[SourceFile]
) -> Iterator[str]:
    """What people may take for a part of what was opened, and is none."""
    if ADAPTER in folder.sizes:
        try:
            kind = kind_of_adapter(read_json(folder.open(ADAPTER)))
        except HxaconvError:  # the model needs nothing of it
            kind = kind_of_adapter({})
        yield f"{folder.label} holds {kind.what.partition(',')[0]} {ADAPTER_LEFT_OUT}. {kind.way_out}"
    names = [file.name for file in files]
    if (beside := folder.others(names)) and not any("/" in name for name in names):
        taken = shortened(names[:3])
        yield f"{folder.label}: weights are taken of {taken}, not of {shortened(beside)} (move {taken} away for these)"
    for file, contents in opened:
        others = contents.extra.get("others")
        if others:
            taken = f"{file.label}: the weights under {contents.extra['nested_under']!r} are taken"
            yield f"{taken}, not those under {shortened(map(repr, others))}: --weights {others[0]} takes these"


def _merged(label: str, opened: Sequence[tuple[SourceFile, Contents]], index: Index | None) -> Plan:
    """All tensors by their stored names.

    Raises:
        HxaconvError: for one that several files hold, unless these are shards and it is the same in all of them.
    """
    merged: Plan = {}
    differing = []
    # Files that stand for themselves are models of their own, however much alike: the user has to choose.
    parts = index is not None or all(SHARD.search(file.name) for file, _ in opened)
    for file, contents in opened:
        for name, recipe in contents.tensors.items():
            other = merged.setdefault(name, recipe)
            if other is recipe:
                continue
            # Those of files that are not here yet are not compared.
            here = all(one.path is not None for both in (other, recipe) for one in both.make.sources())
            if not (parts and here and same_bytes(other, recipe)):
                differing.append(f"{show(name)} ({other.place(name)}; in {file.name})")
    if differing and not parts:
        each = bullet_list(f"{file.name}: {len(contents.tensors)} tensors" for file, contents in opened)
        raise NotConverted(
            f"{label} holds {len(opened)} files that share names of tensors, each a checkpoint of its own:\n{each}",
            hint="Give one of these files by its path.",
        )
    hint = "One of the shards is stale: download the folder again."
    if index is not None:
        hint = "Readers take either; take the stale copy out, or download the folder again."
    raise_all(f"{label}: tensors that several files hold, and not the same:", differing, hint=hint)
    return merged


def _problem(found: Checkpoint, wrapped: Kind | None, misfits: Plan) -> HxaconvError | None:
    """Why a checkpoint is neither teacher nor student: by its config first, then by names, dtypes and shapes."""
    kind, config = kind_of_config(found.config or {}), found.config
    if kind is not None:
        return kind.error(found.label)
    hybrid = (config or {}).get("rwkv_architecture") or "rwkv" in layer_kinds(found.plan).values()
    if (found.unknown or wrapped) and config is not None and not hybrid:
        given: dict[str, Any] = {"rope_theta": 1e4, "rms_norm_eps": 1e-5}
        try:
            teacher_config(config, where=found.label, allow_output_bias=True, drop_rope_scaling=True, **given)
        except HxaconvError as error:
            if wrapped is None:
                return error
            what = f"{found.label} is {wrapped.what}, which is not converted:"
            return HxaconvError(f"{what}\n{error.message}", hint=error.hint or wrapped.way_out)
    dtypes = {name: recipe.dtype for plan in (found.plan, found.unknown) for name, recipe in plan.items()}
    kind = kind_of_tensors(dtypes, found.unknown)
    if kind is not None:
        return kind.error(found.label)
    if found.unknown:
        return unknown_names(list(found.unknown), found.key_format, found.label)
    if not misfits:
        return None
    # Shapes that a tensor of that name never has: no other code has to expect them.
    what = f"{found.label}: tensors with the wrong number of dimensions, or without elements:"
    empty = sum(0 in recipe.shape for recipe in misfits.values())
    hint = (
        f"{empty} are empty: ZeRO-3 saves them so where the trainer does not gather them first. Give the folder that"
        " its step is in (global_step*, with the files of all ranks), or set"
        " stage3_gather_16bit_weights_on_model_save and save again."
    )
    odd = bullet_list(f"{name} has shape {list(recipe.shape)}" for name, recipe in misfits.items())
    return HxaconvError(f"{what}\n{odd}", hint=hint if empty else "")


def _fits(name: str, shape: tuple[int, ...]) -> bool:
    last = name.rsplit(".", 1)[-1]
    if 0 in shape:
        return False
    if last == "bias" or name.endswith("norm.weight"):
        return len(shape) == 1
    if last == "weight" or last[-1] in "12":  # projections, embeddings, and the low-rank pairs
        return len(shape) == 2
    return len(shape) > 0 or last in ("layer_architecture", "head_size_record")
