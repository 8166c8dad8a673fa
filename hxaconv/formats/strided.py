"""Tensors that are not contiguous in their storage (a transposed matrix, a slice of columns)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hxaconv.formats.dtypes import num_elements
from hxaconv.formats.files import SourceFile
from hxaconv.model.plan import Buffers

if TYPE_CHECKING:
    import numpy as np

    Elements = np.ndarray[Any, np.dtype[Any]]

BLOCK_BYTES = 16 * 1024 * 1024
"""Rows gathered at a time; more rows make longer reads where rows are interleaved."""


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements stand in row-major order without gaps."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return num_elements(shape) == 0
        expected *= size
    return True


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements of the storage from the first to the last that the tensor uses."""
    if num_elements(shape) == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether some element may stand for several places, as in an expanded tensor."""
    reach = 0
    for stride, size in sorted((t, n) for n, t in zip(shape, strides, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


@dataclass(frozen=True, slots=True)
class Strided:
    """Elements picked from a storage in row-major order, a block of rows at a time."""

    file: SourceFile
    offset: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""
    kind: str = "gather"

    def sources(self) -> Iterable[SourceFile]:
        """The one file."""
        return [self.file]

    def pieces(self, buffers: Buffers) -> Iterator[memoryview]:
        """Row-major bytes in pieces no longer than the buffers buffer."""
        step = len(buffers.read) // 16 * 16
        for block in self._blocks(self.shape, self.strides, self.offset):
            data = block.view("u1").data.cast("B")
            for start in range(0, len(data), step):
                yield data[start : start + step]

    def _blocks(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Iterator[Elements]:
        import numpy as np

        row_bytes = num_elements(shape[1:]) * self.itemsize
        if len(shape) > 1 and row_bytes > BLOCK_BYTES:
            for row in range(shape[0]):
                yield from self._blocks(shape[1:], strides[1:], offset + row * strides[0] * self.itemsize)
            return
        rows = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, shape[0], rows):
            part = (min(rows, shape[0] - start), *shape[1:])
            block = np.empty(part, dtype=f"V{self.itemsize}")
            self._fill(block, strides, offset + start * strides[0] * self.itemsize)
            yield block.reshape(-1)

    def _fill(self, block: Elements, strides: tuple[int, ...], offset: int) -> None:
        import numpy as np

        wanted = span(block.shape, strides)
        # One read of everything between, unless most of it belongs to other rows.
        if wanted <= 4 * block.size or (block.ndim == 1 and wanted * self.itemsize <= BLOCK_BYTES):
            data = np.frombuffer(self.file.read(offset, wanted * self.itemsize), dtype=block.dtype)
            steps = tuple(stride * self.itemsize for stride in strides)
            block[...] = np.lib.stride_tricks.as_strided(data, block.shape, steps, writeable=False)
            return
        axis = max(range(block.ndim), key=lambda i: strides[i] if block.shape[i] > 1 else -1)
        for index in range(block.shape[axis]):
            rest = (slice(None),) * axis + (slice(index, index + 1),)
            narrowed = np.squeeze(block[rest], axis=axis)
            position = offset + index * strides[axis] * self.itemsize
            if narrowed.ndim == 0:
                block[rest] = np.frombuffer(self.file.read(position, self.itemsize), dtype=block.dtype)
            else:
                self._fill(narrowed, strides[:axis] + strides[axis + 1 :], position)
