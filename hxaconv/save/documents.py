"""The small files of an output: written, and read back from disk before anything is published."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hxaconv.errors import CheckFailed, raise_all
from hxaconv.formats.json_files import PROVENANCE_NAME, as_bytes
from hxaconv.formats.layout import FileLayout
from hxaconv.formats.safetensors_layout import INDEX_NAME, index_json
from hxaconv.model.plan import Scratch
from hxaconv.save import diskio
from hxaconv.save.checksums import Finished, digest_of, digest_of_file
from hxaconv.save.output import Output
from hxaconv.save.staging import Staging

SMALL_BYTES = 64 * 1024
"""Records of a zip that are read back whole."""


def write_documents(staging: Staging, output: Output) -> None:
    """Files taken over, documents (config.json is the last of them), and then the index.

    Raises:
        OSError: naming the file.
    """
    buffers = Scratch()
    for name, file in output.copied_files.items():
        _write(staging, name, file.pieces(0, file.size, buffers.read))
    for name, data in _documents(output).items():
        _write(staging, name, [data])


def _documents(output: Output) -> dict[str, bytes]:
    """The documents as they are to stand on disk before there is a verdict."""
    if not output.is_folder or len(output.files) < 2:
        return dict(output.documents)
    return {**output.documents, INDEX_NAME: index_json(output.tensors, output.files)}


def write_provenance(
    staging: Staging,
    output: Output,
    tensors: Mapping[str, Finished],
    verification: Mapping[str, Any] | None,
    digest: str,
) -> None:
    """hxaconv.json, or the sidecar's key `hxaconv`: what was done, and what every tensor and small file is.

    Raises:
        OSError: naming the file.
    """
    entries: dict[str, dict[str, str]] = {}
    for name, recipe in output.tensors.items():
        found = tensors[name].digest(digest)
        entries[name] = {"origin": recipe.origin} | ({"digest": found} if found else {})
    provenance = {**output.provenance, "verification": verification, "tensors": entries}
    if digest != "none":
        provenance["files"] = _file_digests(staging, output, digest)
    nonfinite = {name: tensor.nonfinite for name, tensor in tensors.items() if tensor.nonfinite}
    if nonfinite:
        provenance["nonfinite"] = nonfinite
    name, document = PROVENANCE_NAME, provenance
    if not output.is_folder:
        settings = json.loads(output.documents.get(output.sidecar_name, b"{}"))
        name, document = output.sidecar_name, {**settings, "hxaconv": provenance}
    _write(staging, name, [as_bytes(document)])
    read = json.loads((staging.content / name).read_bytes())
    raise_all(
        f"{staging.content / name} is not what was written:",
        [key for key in {*read, *document} if read.get(key) != json.loads(json.dumps(document.get(key)))],
        kind=CheckFailed,
    )


def _file_digests(staging: Staging, output: Output, kind: str) -> dict[str, str]:
    """Small files by name; of a sidecar, in which this is to stand, its settings."""
    found = {name: digest_of_file(staging.content / name, kind) for name in [*output.copied_files, *_documents(output)]}
    if not output.is_folder and output.sidecar_name in found:
        settings = json.loads((staging.content / output.sidecar_name).read_bytes())
        found[output.sidecar_name] = settings_digest(settings, kind)
    return found


def settings_digest(sidecar: Mapping[str, Any], kind: str) -> str:
    """The digest of a sidecar's settings: all of it but the key `hxaconv`."""
    settings = {key: value for key, value in sidecar.items() if key != "hxaconv"}
    return digest_of(json.dumps(settings, sort_keys=True).encode(), kind)


def read_back(staging: Staging, output: Output, tensors: Mapping[str, Finished]) -> None:
    """Compare what stands on disk with what was to be written: documents, names, shapes, dtypes, places, checksums.

    Headers and directories are read by code that shares nothing with what wrote them.

    Raises:
        CheckFailed: listing everything that differs.
    """
    content = staging.content
    problems = _settings_problems(content, output)
    for name, data in _documents(output).items():
        if (content / name).read_bytes() != data:
            problems.append(f"{name} is not what was written")
    for name, file in output.copied_files.items():
        problems += _size_problem(content / name, file.size)
    for layout in output.files:
        wrong = _size_problem(content / layout.name, layout.size)
        problems += wrong or _layout_problems(content / layout.name, layout, output, tensors)
    raise_all(f"{content}: on disk is not what was to be written:", problems, kind=CheckFailed)


def _layout_problems(path: Path, layout: FileLayout, output: Output, tensors: Mapping[str, Finished]) -> list[str]:
    try:
        if output.is_folder:
            found: dict[str, Any] = _safetensors_tensors(path)
            wanted = {
                fill.name: [fill.recipe.dtype, [*fill.recipe.shape], fill.offset, fill.offset + fill.recipe.nbytes]
                for fill in layout.fills
            }
        else:
            found = _zip_tensors(path)
            wanted = {f"data/{i}": [tensors[f.name].crc32, f.recipe.nbytes] for i, f in enumerate(layout.fills)}
    except (ValueError, KeyError, TypeError, struct.error, zipfile.BadZipFile) as error:
        return [f"{path.name} cannot be read: {error}"]
    return [
        f"{path.name}: {name} is {found.get(name, 'not there')}, expected {wanted.get(name, 'nothing')}"
        for name in dict.fromkeys([*wanted, *found])
        if found.get(name) != wanted.get(name)
    ]


def _settings_problems(content: Path, output: Output) -> list[str]:
    """What the settings on disk say of the model against what was asked, by the literal specification."""
    if output.student is None:
        return []
    from hxaconv.verification.specification import wrong_values
    from hxaconv.verification.written import intended

    name = "config.json" if output.is_folder else output.sidecar_name
    raw = json.loads((content / name).read_bytes())
    return wrong_values(intended(output.student.student, output.dtype), raw, name)


def _size_problem(path: Path, expected: int) -> list[str]:
    size = path.stat().st_size
    return [] if size == expected else [f"{path.name} has {size:,} bytes, expected {expected:,}"]


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


def _write(staging: Staging, name: str, chunks: Iterable[bytes | memoryview]) -> None:
    path = staging.content / name
    try:
        path.parent.mkdir(exist_ok=True)
        diskio.write_file(path, chunks, staging.path)
        if path.parent != staging.content:
            diskio.sync_folder(path.parent)
    except OSError as error:
        error.filename = path  # not all calls know it
        raise
