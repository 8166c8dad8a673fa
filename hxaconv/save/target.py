"""What a command wants written, and which files that gives: everything but the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hxaconv.errors import HxaconvError
from hxaconv.formats import safetensors_layout, torchzip_layout
from hxaconv.formats.files import SourceFile
from hxaconv.formats.layout import FileLayout
from hxaconv.model.plan import Plan, source_files
from hxaconv.save.checksums import DIGESTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Everything that a finished target will hold, decided before its first byte."""

    target: Path
    """The folder (safetensors) or the file (pth) that will appear."""
    container: Literal["safetensors", "pth"]
    tensors: Plan
    """Names as stored, in order on disk."""
    max_shard_bytes: int
    documents: Mapping[str, bytes]
    """Small files by name: in the folder, or, for a `.pth`, beside it."""
    copied_files: Mapping[str, SourceFile] = field(default_factory=dict)
    """Files taken over from the source as they are (tokenizer); folders only."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Published as hxaconv.json, or under the key `hxaconv` of the sidecar; no times, no run options."""
    command: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    """With `command`: how to compute this output again. Recorded beside the target, never published."""
    ordered_dict: bool = True
    """For a `.pth`: whether it holds an OrderedDict, or a plain dict as trainers save it."""
    shards: Sequence[safetensors_layout.Shard] | None = None
    """For a folder: a sharding that is decided already; None: by size."""
    source_roots: Sequence[Path] = ()
    """Folders and files the sources were opened from: the target may not be one of them, nor inside one."""

    @property
    def sidecar_name(self) -> str:
        """The JSON file beside a `.pth`."""
        return f"{self.target.stem}.json"

    def sources(self) -> list[SourceFile]:
        """Every file that will be read."""
        return list(dict.fromkeys([*source_files(self.tensors), *self.copied_files.values()]))


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteSettings:
    """How to write, as against what: none of this changes a byte of the tensors."""

    overwrite: bool = False
    resume: bool = False
    workers: int | None = None
    """None: two, or the core count if smaller."""
    digest: str = "crc32"
    """Recorded per tensor in the provenance: crc32, sha256 or none."""
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.digest not in DIGESTS:
            raise HxaconvError(f"--digest {self.digest!r} is not known", hint=f"It takes {', '.join(DIGESTS)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteResult:
    """What `write` did."""

    path: Path
    """The target if it was published, else the folder where the work so far stands."""
    published: bool
    nbytes: int
    """Of all weight files."""
    digests: Mapping[str, str]
    """Tensor name -> digest; empty for `none`."""
    nonfinite: Mapping[str, int]
    """Tensor name -> NaN and infinite values, where there are any."""
    verification: Mapping[str, Any] | None
    leftovers: tuple[Path, ...] = ()
    """Folders of other interrupted runs on the same target."""


@dataclass(frozen=True, slots=True)
class FileDescription:
    """One weight file of an output."""

    name: str
    nbytes: int
    tensors: int


def layouts(output: Output) -> tuple[FileLayout, ...]:
    """The weight files of an output, laid out.

    Raises:
        HxaconvError: when the container cannot hold the tensors.
    """
    if output.container == "safetensors":
        if output.shards is not None:
            return safetensors_layout.given_layouts(output.tensors, output.shards)
        return safetensors_layout.shard_layouts(output.tensors, output.max_shard_bytes)
    return (torchzip_layout.file_layout(output.target.name, output.tensors, ordered=output.ordered_dict),)


def describe(output: Output) -> list[FileDescription]:
    """The weight files that writing this output would give."""
    return [FileDescription(layout.name, layout.size, len(layout.fills)) for layout in layouts(output)]
