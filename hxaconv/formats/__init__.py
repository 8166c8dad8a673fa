"""Containers: how tensors stand in files. Readers find them without torch; layouts say how to write them."""

from __future__ import annotations

from hxaconv.errors import HxaconvError
from hxaconv.formats.contents import Contents, broken
from hxaconv.formats.files import SourceFile
from hxaconv.formats.pickle_machine import Refused

__all__ = ["Contents", "read_contents"]

_NOT_A_CHECKPOINT = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "Run `git lfs pull` in that folder."),
    (b"<", "is a web page or XML, not a checkpoint", "The download went wrong; download it again."),
    (b"GGUF", "is a GGUF file", "Convert from the original safetensors instead."),
    (b"\x89HDF", "is an HDF5 file (TensorFlow weights)", "Take the safetensors or PyTorch files of the model."),
    (b"\x93NUMPY", "is a NumPy array", "A checkpoint is .safetensors, .pth, .pt or .bin."),
    (b"\x1f\x8b", "is compressed with gzip", "Unpack it first."),
)


def read_contents(file: SourceFile) -> Contents:
    """The tensors of a weight file of any kind; what it is, its first bytes say, not its name.

    Raises:
        HxaconvError: when it is no checkpoint, or a damaged one.
    """
    try:
        return _read(file, file.read(0, min(file.size, 512)))
    except Refused as refused:
        from hxaconv.formats.state_dict import advised

        raise advised(refused, file) from None


def _read(file: SourceFile, start: bytes) -> Contents:
    # Not above: readers make plans, and plans stand on this package.
    from hxaconv.formats.legacy_reader import MAGIC, read_legacy
    from hxaconv.formats.safetensors_reader import read_safetensors
    from hxaconv.formats.torchzip_reader import read_torchzip

    if start[:4] == b"PK\x03\x04":
        return read_torchzip(file)
    if start[8:9] == b"{":  # before pickles: the length in front may begin with any byte
        return read_safetensors(file)
    if start[:1] == b"\x80" or start.startswith(b"L%dL\n" % MAGIC):  # protocols 2 and up, and 1
        return read_legacy(file)
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
