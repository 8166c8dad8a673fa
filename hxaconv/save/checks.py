"""What is looked at before the first byte of an output, and after its last tensor, when small files follow."""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import CheckFailed, HxaconvError, bullet_list, raise_all, shortened
from hxaconv.formats import FileLayout, diskio
from hxaconv.formats.files import SourceFile
from hxaconv.formats.json_files import PROVENANCE_NAME, json_chunks, plain_data, read_sidecar
from hxaconv.formats.safetensors import INDEX_NAME, index
from hxaconv.model.plan import Buffers
from hxaconv.save.documents import settings_digest
from hxaconv.save.fill import Finished, digest_of_file, type_text
from hxaconv.save.output import Output
from hxaconv.save.staging import Staging, stagings_at

if TYPE_CHECKING:
    from hxaconv.options import Write
    from hxaconv.verification.report import Report
    from hxaconv.verification.written import OutputCheck

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
SMALL_BYTES = 64 * 1024
"""Records of a zip that are read back whole."""
VERDICT_DIGITS = 3
"""Significant digits of what a verification measured in hxaconv.json: beyond them, sums depend on the machine."""


class NonfiniteError(HxaconvError):
    """Tensors that hold NaN or infinite values, which were not allowed."""


# Before the first byte: what can be known to go wrong, found all at once


def bytes_needed(output: Output) -> int:
    """Disk space that writing an output takes; a source's file that can be linked takes none."""

    def device(path: Path | None) -> int | None:
        return os.stat(path).st_dev if path and path.exists() else None

    here = device(output.target.parent)
    taken = [file.size for file in output.files if not file.hard_link or device(file.hard_link.path) != here]
    taken += [len(data) for data in output.documents.values()]
    taken += [file.size for file in output.copied_files.values()]
    return sum(taken) + SLACK_BYTES + SLACK_BYTES_PER_TENSOR * len(output.tensors)


def refuse_place(output: Output, staging: Staging) -> None:
    """Refuse a place that nothing may be written to, not even a lock.

    Raises:
        HxaconvError: listing every problem.
    """
    target, parent, problems = staging.target.resolve(), staging.target.parent, []
    if not parent.is_dir():
        problems.append(f"{parent} is not a folder; create it first (mkdir -p)")
    elif not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"{parent} is not writable for this user")
    if len(os.fsencode(staging.path.name)) > LONGEST_NAME:
        problems.append(f"its name with the suffix of the work folder is longer than {LONGEST_NAME} bytes")
    sources = [source.root for source in output.record.sources.values()] + [file.path for file in output.sources()]
    for path in dict.fromkeys(source.resolve() for source in sources if source is not None):
        if path == target:
            problems.append(f"it is the source {path} itself")
        elif target in path.parents:
            problems.append(f"the source {path} lies inside it")
        elif path in target.parents:
            problems.append(f"it lies inside the source {path}")
    raise_all(f"{output.target} cannot be written:", problems)


def refuse_content(output: Output, staging: Staging, *, overwrite: bool) -> None:
    """Refuse what does not fit, and what is in the way of it.

    Raises:
        HxaconvError: listing every problem.
    """
    parent, needed, problems = staging.target.parent, bytes_needed(output), []
    there, free = min(staging.allocated_bytes(), needed), diskio.free_bytes(parent)
    if free < needed - there:
        already = f", {there:,} of them taken by the interrupted run" if there else ""
        others = [other for other in stagings_at(staging.target) if other.path != staging.path]
        could_go = "".join(f"; {o.path.name} of another run takes {o.allocated_bytes():,}" for o in others)
        free_there = f"{free:,} are free on the file system of {parent}{could_go}"
        problems.append(f"{needed:,} bytes are needed{already}; {free_there}")
    for _, final in staging.moves():
        if not os.path.lexists(final):
            continue
        if not overwrite:
            problems.append(f"{final} exists; choose another name, or add --overwrite")
        elif final.is_symlink():
            problems.append(f"{final} is a symbolic link; name the place it points to, or remove it")
        elif final == staging.target and output.is_folder:
            problems += _folder_problems(final, output)
        elif not final.is_file():
            problems.append(f"{final} is not a file")
        elif final != staging.target and not _is_sidecar(final):
            problems.append(f"--overwrite would replace {final}, which is no sidecar of a .pth; move it away")
    raise_all(f"{output.target} cannot be written:", problems)


def _folder_problems(folder: Path, output: Output) -> list[str]:
    """--overwrite deletes the folder: it may hold the files of a checkpoint, new ones too, and nothing else."""
    if not folder.is_dir():
        return [f"{folder} is not a folder"]
    new = {*output.documents, *output.copied_files}
    foreign = [
        f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
        if entry.name not in new and not _REPLACEABLE.fullmatch(entry.name)
    ]
    what = f"--overwrite would delete what is no part of a checkpoint in {folder}: {shortened(foreign)}; move that away"
    return [what] if foreign else []


def _is_sidecar(path: Path) -> bool:
    """Whether it is ours: others may have that name by chance."""
    try:
        return read_sidecar(SourceFile.local(path)) is not None
    except HxaconvError:
        return False


# After the last tensor


def refuse_nonfinite(output: Output, tensors: Mapping[str, Finished]) -> None:
    """Name all tensors with NaN or infinite values.

    Raises:
        NonfiniteError: when there are any.
    """
    found = {name: recipe for name, recipe in output.tensors.items() if tensors[name].nonfinite}
    if not found:
        return
    problems = [f"{name}: {tensors[name].nonfinite} of {r.numel} ({r.origin})" for name, r in found.items()]
    hint = "The source is damaged or its training diverged. To convert it all the same, add --allow-nonfinite."
    if any(recipe.dtype == "F16" and recipe.make.kind in ("cast", "scale") for recipe in found.values()):
        hint = "float16 ends at 65504: use --dtype bfloat16 or float32, or add --allow-nonfinite."
    raise NonfiniteError(f"these tensors hold NaN or infinite values:\n{bullet_list(problems)}", hint=hint)


def finish(
    staging: Staging, output: Output, tensors: Mapping[str, Finished], options: Write, check: OutputCheck | None
) -> Report | None:
    """Everything about an output but its tensors and its name; returns what its check found.

    Raises:
        CheckFailed: when what stands on disk is not what was to be written, or the check finds it wrong.
        OSError: naming the file.
    """
    for layout in output.files:
        with diskio.explained(staging.content / layout.name):
            staging.seal(layout, {fill.name: tensors[fill.name].crc32 or 0 for fill in layout.fills})
    buffers, report, verdict = Buffers(), None, None
    for name, file in output.copied_files.items():
        staging.write(staging.content / name, file.chunks(0, file.size, buffers.read))
    documents: dict[str, bytes | Mapping[str, Any]] = dict(output.documents)
    if output.is_folder and len(output.files) > 1:
        documents[INDEX_NAME] = index(output.tensors, output.files)
    for name, document in documents.items():
        put(staging, name, document)
    settings_name = "config.json" if output.is_folder else output.sidecar_name
    read_back(staging.content, output, tensors)
    settings = json.loads((staging.content / settings_name).read_bytes()) if settings_name in documents else {}
    if check is not None:
        wrong = check.settings(output, settings, settings_name)
        raise_all(f"{staging.content}: on disk is not what was to be written:", wrong, kind=CheckFailed)
    if check is not None and options.verify:
        report = check.report(output, staging.checkpoint, allow_nonfinite=options.allow_nonfinite)
        report.raise_if_failed()
        verdict = plain_data(report.verdict(), VERDICT_DIGITS)
    record = {**output.provenance, "verification": verdict, "tensors": Tensors(output, tensors, options.digest)}
    if options.digest != "none":
        # That of a sidecar, in which it is to stand, is of its settings.
        record["files"] = {
            name: digest_of_file(staging.content / name, options.digest)
            if output.is_folder
            else settings_digest(settings, options.digest)
            for name in (*output.copied_files, *documents)
        }
    if nonfinite := {name: tensor.nonfinite for name, tensor in tensors.items() if tensor.nonfinite}:
        record["nonfinite"] = nonfinite
    if output.is_folder:
        put(staging, PROVENANCE_NAME, record)
    else:
        put(staging, output.sidecar_name, {**settings, "hxaconv": record})
    return report


class Tensors(dict[str, Any]):
    """The section `tensors` of a record, made while it is written: where each is from, its type, and its digest."""

    def __init__(self, output: Output, finished: Mapping[str, Finished], kind: str) -> None:
        super().__init__(output.tensors)
        self._finished, self._kind = finished, kind

    def items(self) -> Iterator[tuple[str, dict[str, str]]]:  # type: ignore[override]
        """Name -> what is recorded of it."""
        for name, recipe in super().items():
            digest = self._finished[name].digest(self._kind)
            entry = {"origin": recipe.origin, "type": type_text(recipe)}
            yield name, entry | ({"digest": digest} if digest else {})


def put(staging: Staging, name: str, document: bytes | Mapping[str, Any]) -> None:
    """Write a small file, and read it back; JSON goes in chunks, as it is long where there are 20,000 tensors.

    Raises:
        CheckFailed: when something else stands on disk then.
        OSError: naming the file.
    """

    def chunks() -> Iterable[bytes]:
        return [document] if isinstance(document, bytes) else json_chunks(document)

    path = staging.content / name
    staging.write(path, chunks())
    with open(path, "rb") as file:
        if not all(file.read(len(chunk)) == chunk for chunk in chunks()) or file.read(1):
            raise CheckFailed(f"{path}: on disk is not what was to be written")


def read_back(content: Path, output: Output, tensors: Mapping[str, Finished]) -> None:
    """Compare what stands on disk with what was to be written: sizes, names, shapes, dtypes, places, checksums.

    Headers and directories are read by code that shares nothing with what wrote them.

    Raises:
        CheckFailed: listing everything that differs.
    """
    problems = []
    expected: dict[str, SourceFile | FileLayout] = {**output.copied_files, **{file.name: file for file in output.files}}
    for name, file in expected.items():
        size = (content / name).stat().st_size
        if size != file.size:
            problems.append(f"{name} has {size:,} bytes, expected {file.size:,}")
        elif isinstance(file, FileLayout):
            problems += _layout_problems(content / name, file, output, tensors)
    raise_all(f"{content}: on disk is not what was to be written:", problems, kind=CheckFailed)


def _layout_problems(path: Path, layout: FileLayout, output: Output, tensors: Mapping[str, Finished]) -> list[str]:
    try:
        found = _safetensors_tensors(path) if output.is_folder else _zip_tensors(path)
    except (ValueError, KeyError, TypeError, struct.error, zipfile.BadZipFile) as error:
        return [f"{path.name} cannot be read: {error}"]
    problems = []
    for i, fill in enumerate(layout.fills):
        recipe, name, end = fill.recipe, fill.name, fill.offset + fill.recipe.nbytes
        expected: list[Any] = [recipe.dtype, [*recipe.shape], fill.offset, end]
        if not output.is_folder:
            name, expected = f"data/{i}", [tensors[fill.name].crc32, recipe.nbytes]
        if (there := found.pop(name, None)) != expected:
            problems.append(f"{path.name}: {name} is {there or 'not there'}, expected {expected}")
    return [*problems, *(f"{path.name}: {name} is {there}, expected nothing" for name, there in found.items())]


def _safetensors_tensors(path: Path) -> dict[str, list[Any]]:
    """Name -> dtype, shape, first and last byte in the file, by the format's own description.

    Source: https://github.com/huggingface/safetensors#format
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: [entry["dtype"], entry["shape"], *(8 + length + offset for offset in entry["data_offsets"])]
        for name, entry in header.items()
    }


def _zip_tensors(path: Path) -> dict[str, list[Any]]:
    """Record -> CRC-32 and size of the tensors in a `.pth`, by Python's zipfile, which compares those it reads."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        for info in entries.values():
            if info.file_size <= SMALL_BYTES or "/data/" not in info.filename:
                archive.read(info)
    return {name: [info.CRC, info.file_size] for name, info in entries.items() if name.startswith("data/")}
