"""Checksums of a tensor and the count of its NaN and infinite values, computed as its bytes pass by."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

from hxaconv.formats.dtypes import BY_NAME

DIGESTS = ("crc32", "sha256", "none")
_EXPONENT_BITS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
"""A value is not finite exactly when all bits of its exponent are set."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A tensor whose bytes are written: its checksums, and how many of its values are NaN or infinite."""

    name: str
    crc32: int | None
    sha256: str | None
    nonfinite: int

    def digest(self, kind: str) -> str | None:
        """`crc32:0a1b2c3d` or `sha256:...`; None for `none`."""
        if kind == "crc32":
            assert self.crc32 is not None
            return f"crc32:{self.crc32:08x}"
        return f"sha256:{self.sha256}" if kind == "sha256" else None


class Checks:
    """Checksums and the count of values that are not finite, over the chunks of one tensor."""

    def __init__(self, dtype: str, *, crc32: bool, sha256: bool, finite: bool = True) -> None:
        self._dtype = dtype if finite else None
        self._crc = 0 if crc32 else None
        self._sha = hashlib.sha256() if sha256 else None
        self._nonfinite = 0

    def update(self, chunk: memoryview) -> None:
        """Count in the next bytes of the tensor."""
        if self._crc is not None:
            self._crc = zlib.crc32(chunk, self._crc)
        if self._sha is not None:
            self._sha.update(chunk)
        if self._dtype is not None:
            self._nonfinite += count_nonfinite(chunk, self._dtype)

    def finished(self, name: str) -> Finished:
        """What was found, as that of the tensor `name`."""
        sha = None if self._sha is None else self._sha.hexdigest()
        return Finished(name, self._crc, sha, self._nonfinite)

    def agrees(self, earlier: Finished) -> bool:
        """Whether these bytes have the checksums that were recorded; without any there is no telling."""
        now = self.finished(earlier.name)
        if now.sha256 is None and now.crc32 is None:
            return False
        return (now.crc32, now.sha256) == (earlier.crc32, earlier.sha256)


def digest_of(data: bytes, kind: str) -> str:
    """The digest of a small file, as those of tensors are written; sha256 where tensors have none."""
    return f"crc32:{zlib.crc32(data):08x}" if kind == "crc32" else f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_of_file(path: Path, kind: str) -> str:
    """The same of a file, which may be large."""
    checks = Checks("U8", crc32=kind == "crc32", sha256=kind != "crc32", finite=False)
    with open(path, "rb") as file:
        while chunk := file.read(1024 * 1024):
            checks.update(memoryview(chunk))
    return checks.finished(path.name).digest("crc32" if kind == "crc32" else "sha256") or ""


def count_nonfinite(chunk: memoryview, dtype: str) -> int:
    """NaN and infinite values among these little-endian elements; 0 for types that have none.

    Read as a signed integer, a positive value that is not finite is the largest there is; read as an unsigned
    one, a negative value is. Two maxima without a temporary decide for all that is well.
    """
    exponent = _EXPONENT_BITS.get(dtype)
    if exponent is None or not len(chunk):
        return 0
    import numpy as np

    itemsize = BY_NAME[dtype].itemsize
    unsigned = np.frombuffer(chunk, dtype=f"<u{itemsize}")
    sign = 1 << (8 * itemsize - 1)
    if int(unsigned.view(f"<i{itemsize}").max()) < exponent and int(unsigned.max()) < exponent + sign:
        return 0
    mask = unsigned.dtype.type(exponent)
    return int(np.count_nonzero((unsigned & mask) == mask))
