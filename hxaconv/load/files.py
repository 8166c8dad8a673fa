"""The files of a checkpoint, here or on the Hub: which of them hold the weights, and which travel along.

What travels along are the files that other programs need: tokenizers, templates, generation settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats import Contents, read_contents
from hxaconv.formats.files import TEMPLATES, SourceFile, kind_of, not_the_file, show
from hxaconv.formats.json_files import MAX_JSON_BYTES, parse_json, read_json
from hxaconv.load.kinds import kind_of_adapter, kind_of_files, kind_of_tensors
from hxaconv.model.model import Checkpoint

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_OTHER = re.compile(
    r"^(training_args|optimizer|scheduler|scaler|rng_state|random_states|lr_scheduler|sampler)([._-].*)?\.(bin|pt|pth)$"
    r"|^(optimizer|scheduler)_\d+\.(bin|pt|pth)$"
    r"|^adapter_model\.\w+$|^model-rank-\d+-part-\d+\.safetensors$"
)
_SECOND = re.compile(r"^consolidated[.\d]*\.(pth|safetensors)$")
"""A second copy of the weights, in another layout."""
_SECOND_FORM = re.compile(rf"{_SECOND.pattern}|^pytorch_model(-\d{{5}}-of-\d{{5}})?\.bin$")
ADAPTER = "adapter_config.json"
ADAPTER_LEFT_OUT = "beside the model, which is left out"
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.\w+$")
_BLOB = re.compile(r"^[0-9a-f]{40}([0-9a-f]{24})?$")

TOKENIZERS = re.compile(
    r"tokenizer\.json|tokenizer(\.mm)?\.model(\.v\d+(m\d+)?)?|tekken\.json|spiece\.model|sentencepiece(\.bpe)?\.model"
    r"|(source|target)\.spm|spm\.model|vocab\.(json|txt|bpe)|[\w.-]+\.tiktoken|rwkv_vocab\w*\.txt|bpe\.codes|\w+\.bpe"
)
"""What holds a vocabulary: the names that tokenizers of transformers, mistral-common and llama.cpp read."""
OTHERS = re.compile(
    r"tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|merges\.txt|generation_config\.json"
    r"|chat_template\.(jinja|json)|normalizer\.json|SYSTEM_PROMPT\.txt"
    rf"|{TEMPLATES}/[\w.-]+\.jinja"
)


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

    def strays(self, chosen: Collection[str]) -> tuple[str, ...]:
        """Weight files that are not among those chosen."""
        weights = (name for name in self.sizes if name.endswith(WEIGHTS) and not _OTHER.match(name))
        return tuple(name for name in weights if name not in chosen)

    def others(self, chosen: Collection[str]) -> list[str]:
        """Of the strays, those that are no second form of the same weights, by their names."""
        return [name for name in self.strays(chosen) if "/" not in name and not _SECOND_FORM.match(name)]


@dataclass(frozen=True, slots=True)
class Index:
    """The file that lists which shard holds which tensor."""

    name: str
    weight_map: Mapping[str, str]
    """Tensor name -> file name."""


# --- a local folder ---------------------------------------------------------------------------------


def local_folder(root: Path, label: str, repo: str | None = None, revision: str | None = None) -> Folder:
    """What stands in a folder here.

    Raises:
        HxaconvError: for one that cannot be listed, and for links and folders in place of files.
    """
    try:
        entries = sorted(root.iterdir())
        sizes = {name: found.stat().st_size for name, found in listed(entries)}
    except OSError as error:
        raise HxaconvError(f"{label}: {error.strerror}") from None
    odd = [f"{entry.name} is {kind_of(entry)}" for entry in entries if entry.name not in sizes and _matters(entry)]
    hint = "Put the files themselves there; download again."
    filled = [entry.name for entry in entries if entry.name.endswith(WEIGHTS) and entry.is_dir() and _weights_in(entry)]
    if filled:  # DeepSpeed's zero_to_fp32.py since 0.15.3, which takes the name of a folder
        hint = f"The weights are inside {filled[0]}: move its files beside config.json, and delete it."
    raise_all(f"{label}: these should be files:", odd, hint=hint)
    opened = partial(open_inside, root, label)
    return Folder(label=label, sizes=sizes, open=opened, root=root, repo=repo, revision=revision)


def _weights_in(folder: Path) -> bool:
    return any(path.name.endswith(WEIGHTS) for path in folder.iterdir())


def listed(entries: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Files of a folder by their names in it; macOS's `._NAME` beside NAME are no files of the checkpoint."""
    for entry in entries:
        if entry.is_file() and not entry.name.startswith("._"):
            yield entry.name, entry
        elif entry.name == TEMPLATES and entry.is_dir():
            for inner in sorted(entry.iterdir()):
                if is_companion(f"{TEMPLATES}/{inner.name}") and inner.is_file():
                    yield f"{TEMPLATES}/{inner.name}", inner


def _matters(entry: Path) -> bool:
    """Whether an entry that is no file stands where a checkpoint has one; folders may have any other name."""
    if entry.name.startswith("._"):
        return False
    if is_companion(entry.name) or entry.name == "config.json" or entry.name.endswith(".index.json"):
        return True
    return entry.name.endswith(WEIGHTS) and (not entry.is_dir() or entry.name.startswith(("model", "pytorch_model")))


def open_inside(root: Path, label: str, name: str) -> SourceFile:
    """A file of the folder, unless a link leads out of it.

    Links into the Hub's cache are followed wherever it is: a file there is named by the digest of its content,
    so that only those who have the content can write such a link, and nothing private is copied by following it.
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
    return SourceFile.local(root / name, name=name, label=f"{label.rstrip('/')}/{name}")


# --- which of them are the weights ------------------------------------------------------------------


def select_weights(folder: Folder) -> tuple[list[str], Index | None]:
    """The files that hold the weights, and their index: safetensors win over pickles, an index over its absence.

    Raises:
        HxaconvError: when there are none, or the index is not usable.
    """
    weights = folder.weights
    if not weights and not any(name.endswith(".index.json") for name in folder.sizes):
        raise _nothing(folder)
    for suffixes, stem in (((".safetensors",), "model"), ((".bin", ".pth", ".pt", ".ckpt"), "pytorch_model")):
        of_kind = [name for name in weights if name.endswith(suffixes)]
        single, index = f"{stem}{suffixes[0]}", f"{stem}{suffixes[0]}.index.json"
        if index in folder.sizes:
            listed_in = read_json(folder.open(index)).get("weight_map")
            only = isinstance(listed_in, dict) and set(map(str, listed_in.values())) == {single}
            if only or single not in of_kind:
                return _from_index(folder, index, listed_in, weights)
        if of_kind:
            chosen = [single] if single in of_kind else of_kind
            odd = [show(name) for name in chosen if not name.isprintable()]
            raise_all(f"{folder.label}: files whose names cannot be printed:", odd, hint="Rename them.")
            numbers: dict[tuple[str, int], set[int]] = {}
            for name in chosen:
                if part := SHARD.search(name):
                    numbers.setdefault((name[: part.start()], int(part[2])), set()).add(int(part[1]))
            missing = [
                f"{one}: {len(there)} of {total} parts are there"
                for (one, total), there in numbers.items()
                if len(there) != total
            ]
            what = f"{folder.label}: shards are missing, and there is no index:"
            raise_all(what, missing, hint="Download the folder again.")
            return chosen, None
    raise HxaconvError(f"{folder.label} has an index of an unknown name, and no weights that stand alone")


def _nothing(folder: Folder) -> HxaconvError:
    """The error for a folder without weights: what it is, or where there are some."""
    kind = kind_of_files(folder.sizes)
    adapter = next((name for name in folder.sizes if name.startswith("adapter_model.")), None)
    if ADAPTER in folder.sizes:
        kind = kind_of_adapter(read_json(folder.open(ADAPTER)))
    elif adapter is not None:
        held = folder.read(folder.open(adapter)).tensors
        named = kind_of_tensors({name: recipe.dtype for name, recipe in held.items()}, held)
        if named is not None:
            kind = replace(named, way_out=f"Copy its {ADAPTER} as well. {named.way_out}")
    if kind is not None:
        return kind.error(folder.label)
    root = folder.root
    entries = sorted(root.iterdir())[:1000] if root is not None and root.is_dir() else []
    found = [path.name for path in entries if path.is_dir() and _weights_in(path)]
    hint = "Expected *.safetensors, *.bin, *.pth, *.pt or *.ckpt in the folder itself."
    if found:
        hint = f"These folders in it hold some: {', '.join(found[:8])}. Give one of them."
    count = len(folder.sizes)
    return HxaconvError(f"{folder.label} holds no weights ({count} other file{'s' if count != 1 else ''})", hint=hint)


def _from_index(folder: Folder, index: str, weight_map: Any, weights: list[str]) -> tuple[list[str], Index]:
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise HxaconvError(f"{folder.label}: weight_map of {index} does not map tensor names to file names")
    if not weight_map:
        raise HxaconvError(f"{folder.label}: weight_map of {index} is empty")
    names = sorted(set(weight_map.values()))
    plain = re.compile(r"(?!\.\.?$)[^/\\:]+")
    outside = [show(name) for name in names if not (name.isprintable() and plain.fullmatch(name))]
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
    return names, Index(index, weight_map)


# --- what travels along -----------------------------------------------------------------------------


def is_companion(name: str) -> bool:
    """Whether a file of this name (relative to the checkpoint) is copied along."""
    return bool(TOKENIZERS.fullmatch(name) or OTHERS.fullmatch(name))


def refuse_broken(checkpoint: Checkpoint) -> None:
    """Stop before a file is copied that is not what its name suggests.

    Raises:
        HxaconvError: listing LFS pointers, web pages and empty files.
    """
    raise_all(
        "files that would be copied along are not what their names suggest:",
        broken_companions(checkpoint.companions),
        hint="Run `git lfs pull` in that folder, or download them again; delete what the model works without.",
    )


def broken_companions(companions: Mapping[str, SourceFile]) -> list[str]:
    """A line for each that is a pointer, a web page, or empty; those that are still on the Hub are not looked at."""
    found = []
    for file in companions.values():
        if file.path is None and file.size:
            continue
        start = file.read(0, min(file.size, 512))
        file.close()
        if (instead := not_the_file(start)) is not None:
            found.append(f"{file.label} is {instead[0]}")
        elif not start.strip() and not file.name.endswith((".jinja", ".txt")):
            found.append(f"{file.label} is empty")
    return found


def missing_code(checkpoint: Checkpoint, *, copied: bool) -> list[str]:
    """A line for each code file that tokenizer_config.json names and that will not be beside it.

    `copied`: whether the code files of the checkpoint are taken along.
    """
    file = checkpoint.companions.get("tokenizer_config.json")
    if file is None or file.path is None or file.size > MAX_JSON_BYTES:
        return []
    try:
        raw = parse_json(file.read(0, file.size))
    except ValueError:
        return [f"{file.label} is not valid JSON"]
    finally:
        file.close()
    named = raw.get("auto_map") if isinstance(raw, dict) else None
    entries = list(named.values()) if isinstance(named, dict) else [named]
    flat = [item for entry in entries for item in (entry if isinstance(entry, list) else [entry])]
    needed = {f"{item.partition('.')[0]}.py" for item in flat if isinstance(item, str) and "--" not in item}
    absent = sorted(name for name in needed if name not in checkpoint.code_files)
    left = sorted(needed - set(absent)) if not copied else []
    lines = [f"{file.label}: its auto_map names {show(name)}, which is not there" for name in absent]
    return lines + [f"{file.label}: its auto_map needs {name}; --copy-code takes it along" for name in left]


def tokenizer_warnings(checkpoints: Collection[Checkpoint], *, copied: bool) -> list[str]:
    """What will be amiss with the tokenizer of an output made of these checkpoints, for people."""
    lines = [line for checkpoint in checkpoints for line in missing_code(checkpoint, copied=copied)]
    if not any(TOKENIZERS.fullmatch(name) for checkpoint in checkpoints for name in checkpoint.companions):
        lines.append("no tokenizer is copied along: none of the sources has one beside its weights")
    return lines
