"""Everything that can be known to go wrong before the first byte is written, found all at once."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from hxaconv.errors import HxaconvError, raise_all, shortened
from hxaconv.formats.files import SourceFile
from hxaconv.formats.json_files import read_sidecar
from hxaconv.formats.layout import FileLayout
from hxaconv.save import diskio
from hxaconv.save.staging import Staging, stagings_at
from hxaconv.save.target import Output

SLACK_BYTES, SLACK_BYTES_PER_TENSOR = 256 * 1024, 1024
"""For journal, index, provenance and the file system's own blocks."""
_REPLACEABLE = re.compile(
    r"(model|pytorch_model)((-\d{5}-of-\d{5})?\.(safetensors|bin)|\.(safetensors|bin)\.index\.json)"
    r"|(hxaconv|config|generation_config|preprocessor_config|processor_config|chat_template)\.json"
    r"|(tokenizer|vocab|merges|special_tokens|added_tokens)\w*\.(json|txt|model)|chat_template\.jinja"
    r"|README\.md|(LICENSE|NOTICE|USE_POLICY)(\.\w+)?|\.gitattributes|\.cache|__pycache__"
    r"|(configuration|modeling|tokenization|processing|image_processing)_\w+\.py"
)
"""Names in a checkpoint's folder: what this package, transformers and downloads from the Hub put there."""
_WITHOUT_LINKS = ("vfat", "msdos", "fat", "exfat")
_LARGEST_FILE = {"vfat": 0xFFFFFFFF, "msdos": 0xFFFFFFFF, "fat": 0xFFFFFFFF}


def bytes_needed(output: Output, files: Sequence[FileLayout]) -> int:
    """Disk space that writing an output takes; a source's file that can be linked takes none."""
    documents = sum(len(data) for data in output.documents.values())
    copied = sum(file.size for file in output.copied_files.values())
    slack = SLACK_BYTES + SLACK_BYTES_PER_TENSOR * len(output.tensors)
    mirrored = [layout for layout in files if layout.mirror is not None]
    links = bool(mirrored) and _file_system(output.target.parent) not in _WITHOUT_LINKS
    linked = sum(layout.size for layout in mirrored if links and _same_device(layout.mirror, output.target.parent))
    return sum(layout.size for layout in files) - linked + documents + copied + slack


def _same_device(file: SourceFile | None, folder: Path) -> bool:
    """Whether the file is on the folder's file system, so that a link there can stand for it."""
    if file is None or file.path is None:
        return False
    try:
        return os.stat(file.path).st_dev == os.stat(folder).st_dev
    except OSError:
        return False


def check_place(output: Output, files: Sequence[FileLayout], staging: Staging, *, overwrite: bool) -> None:
    """Refuse a place that nothing may be written to, not even a lock.

    Raises:
        HxaconvError: listing every problem, those that `check` would find as well.
    """
    problems = [*_place_problems(output), *_name_problems(output, files, staging)]
    if problems and output.target.parent.is_dir():
        problems += _content_problems(output, files, staging, overwrite)
    _refuse(output, problems)


def check(output: Output, files: Sequence[FileLayout], staging: Staging, *, overwrite: bool) -> None:
    """Refuse what is in the way, and what does not fit.

    Raises:
        HxaconvError: listing every problem.
    """
    _refuse(output, _content_problems(output, files, staging, overwrite))


def _refuse(output: Output, problems: Sequence[str]) -> None:
    raise_all(f"{output.target} cannot be written:", problems, hint="Nothing was written.")


def _content_problems(output: Output, files: Sequence[FileLayout], staging: Staging, overwrite: bool) -> list[str]:
    return [
        *_existing_problems(output, staging, overwrite),
        *_space_problems(output, files, staging),
    ]


def _place_problems(output: Output) -> list[str]:
    parent = output.target.parent
    if not parent.is_dir():
        return [f"{parent} is not a folder; create it first (mkdir -p)"]
    problems = []
    if not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"{parent} is not writable for this user")
    return problems + _overlap_problems(output)


def _overlap_problems(output: Output) -> list[str]:
    target = output.target.resolve()
    problems = []
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


def _existing_problems(output: Output, staging: Staging, overwrite: bool) -> list[str]:
    problems = []
    for _, final in staging.moves():
        if not os.path.lexists(final):
            continue
        if not overwrite:
            problems.append(f"{final} exists; choose another name, or add --overwrite")
        elif final.is_symlink():
            problems.append(f"{final} is a symbolic link; name the place it points to, or remove it")
        elif final == output.target and output.container == "safetensors":
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


def _name_problems(output: Output, files: Sequence[FileLayout], staging: Staging) -> list[str]:
    parent = output.target.parent
    problems = []
    longest = _pathconf(parent, "PC_NAME_MAX")
    if longest is not None and len(os.fsencode(f"{staging.path.name}")) > longest:
        problems.append(f"its name with the suffix of the work folder is longer than {longest} bytes")
    limit, why = _largest_file(parent)
    problems += [
        f"{layout.name} has {layout.size:,} bytes, {why} holds at most {limit:,} per file; lower --max-shard-size"
        for layout in files
        if limit is not None and layout.size > limit
    ]
    return problems


def _pathconf(folder: Path, name: str) -> int | None:
    try:
        return os.pathconf(folder, name)
    except (AttributeError, OSError, ValueError):
        return None


def _largest_file(folder: Path) -> tuple[int | None, str]:
    """Bytes that one file may have here, and who says so."""
    kind = _file_system(folder)
    if kind in _LARGEST_FILE:
        return _LARGEST_FILE[kind], f"a {kind} file system"
    try:
        import resource
    except ImportError:
        return None, ""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return (None, "") if limit == resource.RLIM_INFINITY else (limit, "this process (ulimit -f)")


def _file_system(folder: Path) -> str | None:
    """The kind of file system a folder is on, where /proc says it."""
    try:
        lines = Path("/proc/mounts").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    best, kind = "", None
    for mount_point, name in (line.split()[1:3] for line in lines if len(line.split()) >= 3):
        inside = folder.is_relative_to(mount_point.replace("\\040", " "))
        if inside and len(mount_point) >= len(best):
            best, kind = mount_point, name
    return kind


def _space_problems(output: Output, files: Sequence[FileLayout], staging: Staging) -> list[str]:
    parent = output.target.parent
    needed = bytes_needed(output, files)
    there = min(staging.allocated_bytes(), needed)
    free = diskio.free_bytes(parent)
    if free >= needed - there:
        return []
    already = f", {there:,} of them taken by the interrupted run" if there else ""
    others = [other for other in stagings_at(staging.target) if other.path != staging.path]
    could_go = "".join(f"; {o.path.name} of another run takes {o.allocated_bytes():,}" for o in others)
    return [f"{needed:,} bytes are needed{already}; {free:,} are free on the file system of {parent}{could_go}"]
