"""Element types, named as safetensors names them, with what torch calls them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hxaconv.errors import HxaconvError


@dataclass(frozen=True, slots=True)
class DType:
    """One element type: safetensors name, bytes per element, torch attribute, torch storage class."""

    name: str
    itemsize: int
    torch_name: str
    storage_class: str | None
    """Class in a `.pth` pickle; None where torch.save has no typed storage for it."""


_ALL = (
    DType("BOOL", 1, "bool", "BoolStorage"),
    DType("U8", 1, "uint8", "ByteStorage"),
    DType("I8", 1, "int8", "CharStorage"),
    DType("I16", 2, "int16", "ShortStorage"),
    DType("F16", 2, "float16", "HalfStorage"),
    DType("BF16", 2, "bfloat16", "BFloat16Storage"),
    DType("I32", 4, "int32", "IntStorage"),
    DType("F32", 4, "float32", "FloatStorage"),
    DType("I64", 8, "int64", "LongStorage"),
    DType("F64", 8, "float64", "DoubleStorage"),
    DType("U16", 2, "uint16", None),
    DType("U32", 4, "uint32", None),
    DType("U64", 8, "uint64", None),
    DType("F8_E4M3", 1, "float8_e4m3fn", None),
    DType("F8_E5M2", 1, "float8_e5m2", None),
)

BY_NAME = {d.name: d for d in _ALL}
BY_TORCH_NAME = {d.torch_name: d for d in _ALL}
BY_STORAGE_CLASS = {d.storage_class: d for d in _ALL if d.storage_class}
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


def parse_dtype(text: str) -> str:
    """`bfloat16`, `bf16` or `BF16` -> `BF16`; floats only, since that is what a user may ask for.

    Raises:
        HxaconvError: for any other word.
    """
    aliases = {"fp16": "F16", "half": "F16", "fp32": "F32", "float": "F32", "fp64": "F64"}
    name = aliases.get(text.lower(), text.upper())
    if text.lower() in BY_TORCH_NAME:
        name = BY_TORCH_NAME[text.lower()].name
    if name not in FLOATS:
        raise HxaconvError(f"unknown dtype {text!r}", hint="Use bfloat16, float16 or float32.")
    return name


MAX_DIMS = 16


def are_sizes(*values: Any) -> bool:
    """Whether these can be sizes, offsets or strides."""
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def is_shape(value: Sequence[Any]) -> bool:
    """Whether these can be the sizes of a tensor, or an element's place in it."""
    return len(value) <= MAX_DIMS and are_sizes(*value)


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a contiguous tensor."""
    return BY_NAME[dtype].itemsize * math.prod(shape)


_EXPONENT_BITS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
"""A value is not finite exactly when all bits of its exponent are set."""


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
