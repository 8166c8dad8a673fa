"""What follows the last tensor: small files are written, everything is read back from disk, and the record says so."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hxaconv.errors import CheckFailed, raise_all
from hxaconv.formats import FileLayout
from hxaconv.formats.json_files import PROVENANCE_NAME, json_chunks, plain_data
from hxaconv.formats.safetensors import INDEX_NAME, index
from hxaconv.model.plan import Buffers
from hxaconv.save.documents import settings_digest
from hxaconv.save.fill import Finished, digest_of_file
from hxaconv.save.output import Output
from hxaconv.save.staging import Staging

if TYPE_CHECKING:
    from hxaconv.options import Write
    from hxaconv.verification.report import Report

SMALL_BYTES = 64 * 1024
"""Records of a zip that are read back whole."""
VERDICT_DIGITS = 3
"""Significant digits of what a verification measured in hxaconv.json: beyond them, sums depend on the machine."""


class Check(Protocol):
    """What an output is put to before it gets its name; the caller brings it."""

    def settings(self, output: Output, raw: Mapping[str, Any], where: str) -> list[str]:
        """What is wrong with the settings that stand on disk; asked always."""
        ...

    def report(self, output: Output, staged: Path, *, allow_nonfinite: bool) -> Report:
        """What a verification of the staged checkpoint finds; asked unless --no-verify."""
        ...


def finish(
    staging: Staging, output: Output, tensors: Mapping[str, Finished], options: Write, check: Check | None
) -> Report | None:
    """Everything about an output but its tensors and its name; returns what its check found.

    Raises:
        CheckFailed: when what stands on disk is not what was to be written, or the check finds it wrong.
        OSError: naming the file.
    """
    for layout in output.files:
        staging.seal(layout, {fill.name: tensors[fill.name].crc32 or 0 for fill in layout.fills})
    buffers, report, verdict = Buffers(), None, None
    for name, file in output.copied_files.items():
        staging.write(staging.content / name, file.pieces(0, file.size, buffers.read))
    documents: dict[str, bytes | Mapping[str, Any]] = dict(output.documents)
    if output.is_folder and len(output.files) > 1:
        documents[INDEX_NAME] = index(output.tensors, output.files)
    for name, document in documents.items():
        put(staging, name, document)
    read_back(staging.content, output, tensors, check)
    if check is not None and options.verify:
        report = check.report(output, staging.checkpoint, allow_nonfinite=options.allow_nonfinite)
        report.raise_if_failed()
        verdict = plain_data(report.verdict(), VERDICT_DIGITS)
    record = {**output.provenance, "verification": verdict, "tensors": _tensors(output, tensors, options.digest)}
    if options.digest != "none":
        names = [*output.copied_files, *documents]
        record["files"] = {name: _file_digest(staging.content / name, output, options.digest) for name in names}
    nonfinite = {name: tensor.nonfinite for name, tensor in tensors.items() if tensor.nonfinite}
    if nonfinite:
        record["nonfinite"] = nonfinite
    if output.is_folder:
        put(staging, PROVENANCE_NAME, record)
    else:
        settings = json.loads(output.documents.get(output.sidecar_name, b"{}"))
        put(staging, output.sidecar_name, {**settings, "hxaconv": record})
    return report


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


def _tensors(output: Output, tensors: Mapping[str, Finished], kind: str) -> dict[str, dict[str, str]]:
    """The section `tensors` of a record: where each is from, and its digest."""
    found = {}
    for name, recipe in output.tensors.items():
        digest = tensors[name].digest(kind)
        found[name] = {"origin": recipe.origin, "digest": digest} if digest else {"origin": recipe.origin}
    return found


def _file_digest(path: Path, output: Output, kind: str) -> str:
    """That of a small file; of a sidecar, in which it is to stand, that of its settings."""
    if not output.is_folder and path.name == output.sidecar_name:
        return settings_digest(json.loads(path.read_bytes()), kind)
    return digest_of_file(path, kind)


def read_back(content: Path, output: Output, tensors: Mapping[str, Finished], check: Check | None) -> None:
    """Compare what stands on disk with what was to be written: settings, names, shapes, dtypes, places, checksums.

    Headers and directories are read by code that shares nothing with what wrote them.

    Raises:
        CheckFailed: listing everything that differs.
    """
    problems = []
    if check is not None:
        name = "config.json" if output.is_folder else output.sidecar_name
        problems += check.settings(output, json.loads((content / name).read_bytes()), name)
    sizes = {name: file.size for name, file in output.copied_files.items()} | {f.name: f.size for f in output.files}
    found = {name: (content / name).stat().st_size for name in sizes}
    problems += [
        f"{name} has {found[name]:,} bytes, expected {size:,}" for name, size in sizes.items() if found[name] != size
    ]
    for layout in output.files:
        if found[layout.name] == layout.size:
            problems += _layout_problems(content / layout.name, layout, output, tensors)
    raise_all(f"{content}: on disk is not what was to be written:", problems, kind=CheckFailed)


def _layout_problems(path: Path, layout: FileLayout, output: Output, tensors: Mapping[str, Finished]) -> list[str]:
    read: Callable[[Path], dict[str, list[Any]]] = _safetensors_tensors if output.is_folder else _zip_tensors
    wanted: dict[str, list[Any]] = {}
    for i, fill in enumerate(layout.fills):
        if output.is_folder:
            end = fill.offset + fill.recipe.nbytes
            wanted[fill.name] = [fill.recipe.dtype, [*fill.recipe.shape], fill.offset, end]
        else:
            wanted[f"data/{i}"] = [tensors[fill.name].crc32, fill.recipe.nbytes]
    try:
        found = read(path)
    except (ValueError, KeyError, TypeError, struct.error, zipfile.BadZipFile) as error:
        return [f"{path.name} cannot be read: {error}"]
    return [
        f"{path.name}: {name} is {found.get(name, 'not there')}, expected {wanted.get(name, 'nothing')}"
        for name in dict.fromkeys([*wanted, *found])
        if found.get(name) != wanted.get(name)
    ]


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
