"""Everything that can be known to go wrong before the first byte is written, found all at once."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from hxaconv.errors import HxaconvError, raise_all, shortened
from hxaconv.formats.files import SourceFile
from hxaconv.formats.json_files import read_sidecar
from hxaconv.save import diskio
from hxaconv.save.output import Output
from hxaconv.save.staging import Staging, stagings_at

SLACK_BYTES, SLACK_BYTES_PER_TENSOR = 256 * 1024, 1024
"""For journal, index, provenance and the file system's own blocks."""
LONGEST_NAME = 255
"""Bytes of a file's name on the file systems in use."""
_REPLACEABLE = re.compile(
    r"(model|pytorch_model)((-\d{5}-of-\d{5})?\.(safetensors|bin)|\.(safetensors|bin)\.index\.json)"
    r"|(hxaconv|config|generation_config|preprocessor_config|processor_config|chat_template)\.json"
    r"|(tokenizer|vocab|merges|special_tokens|added_tokens)\w*\.(json|txt|model)|chat_template\.jinja"
    r"|README\.md|(LICENSE|NOTICE|USE_POLICY)(\.\w+)?|\.gitattributes|\.cache|__pycache__|additional_chat_templates"
    r"|(configuration|modeling|tokenization|processing|image_processing)_\w+\.py"
)
"""Names in a checkpoint's folder: what this package, transformers and downloads from the Hub put there."""


def bytes_needed(output: Output) -> int:
    """Disk space that writing an output takes; a source's file that can be linked takes none."""
    documents = sum(len(data) for data in output.documents.values())
    copied = sum(file.size for file in output.copied_files.values())
    slack = SLACK_BYTES + SLACK_BYTES_PER_TENSOR * len(output.tensors)
    parent = output.target.parent
    linked = sum(layout.size for layout in output.files if _same_device(layout.hard_link, parent))
    return output.nbytes - linked + documents + copied + slack


def _same_device(file: SourceFile | None, folder: Path) -> bool:
    """Whether the file is on the folder's file system, so that a link there can stand for it."""
    if file is None or file.path is None:
        return False
    try:
        return os.stat(file.path).st_dev == os.stat(folder).st_dev
    except OSError:
        return False


def check_place(output: Output, staging: Staging, *, overwrite: bool) -> None:
    """Refuse a place that nothing may be written to, not even a lock.

    Raises:
        HxaconvError: listing every problem, those that `check` would find as well.
    """
    problems = _place_problems(output, staging)
    if problems and output.target.parent.is_dir():
        problems += _content_problems(output, staging, overwrite)
    raise_all(f"{output.target} cannot be written:", problems, hint="Nothing was written.")


def check(output: Output, staging: Staging, *, overwrite: bool) -> None:
    """Refuse what is in the way, and what does not fit.

    Raises:
        HxaconvError: listing every problem.
    """
    problems = _content_problems(output, staging, overwrite)
    raise_all(f"{output.target} cannot be written:", problems, hint="Nothing was written.")


def _place_problems(output: Output, staging: Staging) -> list[str]:
    parent = output.target.parent
    if not parent.is_dir():
        return [f"{parent} is not a folder; create it first (mkdir -p)"]
    problems = []
    if not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"{parent} is not writable for this user")
    if len(os.fsencode(staging.path.name)) > LONGEST_NAME:
        problems.append(f"its name with the suffix of the work folder is longer than {LONGEST_NAME} bytes")
    target = output.target.resolve()
    for path in _source_paths(output):
        if path == target:
            problems.append(f"it is the source {path} itself")
        elif target in path.parents:
            problems.append(f"the source {path} lies inside it")
        elif path in target.parents:
            problems.append(f"it lies inside the source {path}")
    return problems


def _source_paths(output: Output) -> list[Path]:
    paths = [path.resolve() for path in output.source_roots]
    for file in output.sources():
        if file.path is not None:
            path = file.path.resolve()
            if not any(root == path or root in path.parents for root in paths):
                paths.append(path)
    return list(dict.fromkeys(paths))


def _content_problems(output: Output, staging: Staging, overwrite: bool) -> list[str]:
    problems = _space_problems(output, staging)
    for _, final in staging.moves():
        if not os.path.lexists(final):
            continue
        if not overwrite:
            problems.append(f"{final} exists; choose another name, or add --overwrite")
        elif final.is_symlink():
            problems.append(f"{final} is a symbolic link; name the place it points to, or remove it")
        elif final == output.target and output.is_folder:
            problems += _folder_problems(final, {*output.documents, *output.copied_files})
        elif not final.is_file():
            problems.append(f"{final} is not a file")
        elif final != output.target:
            problems += _sidecar_problems(final)
    return problems


def _folder_problems(folder: Path, new: Collection[str]) -> list[str]:
    """--overwrite deletes the folder: it may hold the files of a checkpoint, `new` ones too, and nothing else."""
    if not folder.is_dir():
        return [f"{folder} is not a folder"]
    foreign = [
        f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
        if entry.name not in new and not _REPLACEABLE.fullmatch(entry.name)
    ]
    if not foreign:
        return []
    return [
        f"--overwrite would delete what is no part of a checkpoint in {folder}: {shortened(foreign)}; move that away"
    ]


def _sidecar_problems(path: Path) -> list[str]:
    """What is no sidecar of ours may carry its name by chance."""
    try:
        if read_sidecar(SourceFile.local(path)) is not None:
            return []
    except HxaconvError:
        pass
    return [f"--overwrite would replace {path}, which is no sidecar of a .pth; move it away"]


def _space_problems(output: Output, staging: Staging) -> list[str]:
    parent = output.target.parent
    needed = bytes_needed(output)
    there = min(staging.allocated_bytes(), needed)
    free = diskio.free_bytes(parent)
    if free >= needed - there:
        return []
    already = f", {there:,} of them taken by the interrupted run" if there else ""
    others = [other for other in stagings_at(staging.target) if other.path != staging.path]
    could_go = "".join(f"; {o.path.name} of another run takes {o.allocated_bytes():,}" for o in others)
    return [f"{needed:,} bytes are needed{already}; {free:,} are free on the file system of {parent}{could_go}"]
