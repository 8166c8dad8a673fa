"""Counts NaN and infinite values in raw bytes: fast enough to look at every value that is copied."""

from __future__ import annotations

from hxaconv.formats.dtypes import BY_NAME

_EXPONENT_BITS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
"""A value is not finite exactly when all bits of its exponent are set."""


def count_nonfinite(piece: memoryview, dtype: str) -> int:
    """NaN and infinite values among these little-endian elements; 0 for types that have none.

    Read as a signed integer, a positive value that is not finite is the largest there is; read as an unsigned
    one, a negative value is. Two maxima without a temporary decide for all that is well.
    """
    exponent = _EXPONENT_BITS.get(dtype)
    if exponent is None or not len(piece):
        return 0
    import numpy as np

    itemsize = BY_NAME[dtype].itemsize
    unsigned = np.frombuffer(piece, dtype=f"<u{itemsize}")
    sign = 1 << (8 * itemsize - 1)
    if int(unsigned.view(f"<i{itemsize}").max()) < exponent and int(unsigned.max()) < exponent + sign:
        return 0
    mask = unsigned.dtype.type(exponent)
    return int(np.count_nonzero((unsigned & mask) == mask))
