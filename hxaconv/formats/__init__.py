"""Containers: how tensors stand in files. Readers find them without torch, layouts describe how to write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError
from hxaconv.formats.files import SourceFile, broken, not_the_file

if TYPE_CHECKING:
    from hxaconv.model.plan import Plan, Recipe

Segment = tuple[int, bytes]
"""Offset and bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a reader finds: the tensors of one file by the names it gives them, and facts about the container."""

    container: str
    """`safetensors`, `pth` (zip), `legacy` (pickles before the zip form), or a trainer's: `zero`, `dcp`, `dtensor`."""
    tensors: Plan
    extra: dict[str, Any] = field(default_factory=dict)
    """Of pickles: `nested_under`, `ignored` (names of what is no tensor), `aliases` (groups of names that are one)."""


@dataclass(frozen=True, slots=True)
class Fill:
    """One tensor's place in a file."""

    name: str
    offset: int
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file laid out before its first byte: `segments` are known, `fills` to be made, `seal` depends on them."""

    name: str
    size: int
    segments: Callable[[], Iterable[Segment]]
    fills: tuple[Fill, ...]
    seal: Callable[[Mapping[str, int]], list[Segment]] | None = None
    """CRC-32 by tensor name -> the bytes that hold checksums; None where the format has none."""
    hard_link: SourceFile | None = None
    """A source file that is this file already: linked or copied whole, not written."""


_NOT_A_CHECKPOINT = (
    (b"GGUF", "is a GGUF file", "Convert from the original safetensors instead."),
    (b"\x89HDF", "is an HDF5 file (TensorFlow weights)", "Take the safetensors or PyTorch files of the model."),
    (b"\x93NUMPY", "is a NumPy array", "A checkpoint is .safetensors, .pth, .pt or .bin."),
    (b"\x1f\x8b", "is compressed with gzip", "Unpack it first."),
)


def read_contents(file: SourceFile, key: str | None = None) -> Contents:
    """The tensors of a weight file of any kind, recognised by its first bytes, not its name.

    `key` names one of several state dicts in a pickle.

    Raises:
        HxaconvError: when it is no checkpoint, or a damaged one, or has nothing under that key.
    """
    from hxaconv.formats.pickles import Refused
    from hxaconv.formats.state_dict import advised

    try:
        return _read(file, file.read(0, min(file.size, 512)), key)
    except Refused as refused:
        raise advised(refused, file, key) from None


def _read(file: SourceFile, start: bytes, key: str | None) -> Contents:
    # Not above: readers make plans, and plans stand on this package.
    from hxaconv.formats import legacy, safetensors, torchzip

    if start[:4] == b"PK\x03\x04":
        return torchzip.read_torchzip(file, key)
    if start[8:9] == b"{":  # before pickles: the length in front may begin with any byte
        if key is not None:
            raise HxaconvError(f"--weights {key}: {file.label} holds one set of weights", hint="Leave --weights out.")
        return safetensors.read_safetensors(file)
    if start[:1] == b"\x80" or start.startswith(legacy.PROTOCOL_1):
        return legacy.read_legacy(file, key)
    if (instead := not_the_file(start)) is not None:
        raise HxaconvError(f"{file.label} is {instead[0]}", hint=instead[1])
    for magic, what, hint in _NOT_A_CHECKPOINT:
        if start.startswith(magic):
            raise HxaconvError(f"{file.label} {what}", hint=hint)
    if start[257:262] == b"ustar" or start.startswith((b"sys_info\0", b"pickle\0", b"storages\0", b"tensors\0")):
        raise HxaconvError(
            f"{file.label} is a tar file, the form of torch.save before 2017",
            hint="Load it with torch.load(..., weights_only=False), if you trust it, and save it again.",
        )
    if not start.strip(b"\0"):
        raise broken(file.label, "the file is empty" if not start else "the file begins with zero bytes only")
    raise HxaconvError(
        f"{file.label} is neither safetensors nor a file of torch.save", hint="Check that it is the right file."
    )
