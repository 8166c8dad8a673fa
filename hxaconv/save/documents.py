"""The small files of an output: documents, files taken over, the index, and where every tensor comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hxaconv.formats.json_files import PROVENANCE_NAME, as_bytes
from hxaconv.formats.layout import FileLayout
from hxaconv.formats.safetensors_layout import INDEX_NAME, index_json
from hxaconv.model.plan import Scratch
from hxaconv.save import diskio
from hxaconv.save.staging import Staging
from hxaconv.save.target import Output


def write_documents(staging: Staging, output: Output, files: Sequence[FileLayout]) -> None:
    """Files taken over, documents (config.json is the last of them), and then the index.

    Raises:
        OSError: naming the file.
    """
    scratch = Scratch()
    for name, file in output.copied_files.items():
        _write(staging, name, b"".join(bytes(piece) for piece in file.pieces(0, file.size, scratch.read)))
    for name, data in output.documents.items():
        _write(staging, name, data)
    if output.container == "safetensors" and len(files) > 1:
        _write(staging, INDEX_NAME, index_json(output.tensors, files))


def write_provenance(
    staging: Staging,
    output: Output,
    digests: Mapping[str, str | None],
    nonfinite: Mapping[str, int],
    verification: Mapping[str, Any] | None,
) -> None:
    """hxaconv.json, or the sidecar's key `hxaconv`: what was done, and what every tensor is.

    Raises:
        OSError: naming the file.
    """
    entries: dict[str, dict[str, str]] = {}
    for name, recipe in output.tensors.items():
        digest = digests[name]
        entries[name] = {"origin": recipe.origin} | ({"digest": digest} if digest else {})
    provenance = {**output.provenance, "verification": verification, "tensors": entries}
    if nonfinite:
        provenance["nonfinite"] = dict(nonfinite)
    if output.container == "safetensors":
        _write(staging, PROVENANCE_NAME, as_bytes(provenance))
        return
    sidecar = json.loads(output.documents.get(output.sidecar_name, b"{}"))
    _write(staging, output.sidecar_name, as_bytes({**sidecar, "hxaconv": provenance}))


def _write(staging: Staging, name: str, data: bytes) -> None:
    path = staging.content / name
    try:
        diskio.write_file(path, data, staging.path)
    except OSError as error:
        error.filename = path  # not all calls know it
        raise
