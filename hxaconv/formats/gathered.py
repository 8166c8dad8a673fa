"""Tensors whose bytes do not stand in one piece: stored with strides (a transposed matrix, a slice of columns), or cut
into chunks by the ranks that saved them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.files import Extent, SourceFile, broken, show
from hxaconv.model.plan import Buffers, Ranges, Recipe

if TYPE_CHECKING:
    import numpy as np

    Elements = np.ndarray[Any, np.dtype[Any]]

BLOCK_BYTES = 16 * 1024 * 1024
"""Rows gathered at a time; more rows make longer reads where rows are interleaved."""


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements, counted by torch's rule for empty dimensions."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements stand in row-major order without gaps."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return math.prod(shape) == 0
        expected *= size
    return True


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements of the storage from the first to the last that the tensor uses."""
    if math.prod(shape) == 0:
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


def _cut(block: Elements, buffers: Buffers) -> Iterator[memoryview]:
    """The bytes of a contiguous array, in chunks no longer than the read buffer."""
    data, step = block.reshape(-1).view("u1").data.cast("B"), len(buffers.read) // 16 * 16
    for start in range(0, len(data), step):
        yield data[start : start + step]


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

    def chunks(self, buffers: Buffers) -> Iterator[memoryview]:
        """Row-major bytes in chunks no longer than the read buffer."""
        for block in self._blocks(self.shape, self.strides, self.offset):
            yield from _cut(block, buffers)

    def _blocks(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Iterator[Elements]:
        import numpy as np

        row_bytes = math.prod(shape[1:]) * self.itemsize
        if len(shape) > 1 and row_bytes > BLOCK_BYTES:
            for row in range(shape[0]):
                yield from self._blocks(shape[1:], strides[1:], offset + row * strides[0] * self.itemsize)
            return
        rows = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, shape[0], rows):
            part = (min(rows, shape[0] - start), *shape[1:])
            block = np.empty(part, dtype=f"V{self.itemsize}")
            self._fill(block, strides, offset + start * strides[0] * self.itemsize)
            yield block

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


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor, and where its elements stand."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Extent

    def end(self, axis: int) -> int:
        return self.offsets[axis] + self.sizes[axis]


@dataclass(frozen=True, slots=True)
class Tiles:
    """A tensor cut along other axes than its first (tensor parallelism): its rows are gathered from several chunks."""

    shape: tuple[int, ...]
    itemsize: int
    tiles: tuple[Chunk, ...]
    rows: tuple[int, int]
    """The rows, [first, last), that are wanted."""
    kind: str = "copy"

    def chunks(self, buffers: Buffers) -> Iterator[memoryview]:
        """The tensor's bytes, as many whole rows at a time as the read buffer holds, at least one."""
        import numpy as np

        height = max(1, len(buffers.read) // (math.prod(self.shape[1:]) * self.itemsize))
        for low, high, covering in _bands(0, self.tiles):
            last = min(high, self.rows[1])
            for first in range(max(low, self.rows[0]), last, height):
                block = np.empty((min(height, last - first), *self.shape[1:]), dtype=f"V{self.itemsize}")
                for chunk in covering:
                    inside = tuple(slice(chunk.offsets[i], chunk.end(i)) for i in range(1, len(self.shape)))
                    block[(slice(None), *inside)] = self._rows(chunk, first, len(block))
                yield from _cut(block, buffers)

    def _rows(self, chunk: Chunk, first: int, count: int) -> Elements:
        """Rows of a chunk, by their number in the tensor."""
        import numpy as np

        row = math.prod(chunk.sizes[1:]) * self.itemsize
        assert chunk.place.file is not None
        data = chunk.place.file.read(chunk.place.offset + (first - chunk.offsets[0]) * row, count * row)
        return np.frombuffer(data, dtype=f"V{self.itemsize}").reshape(count, *chunk.sizes[1:])

    def sources(self) -> Iterable[SourceFile]:
        """The files of the chunks."""
        return [chunk.place.file for chunk in self.tiles if chunk.place.file is not None]

    def part(self, start: int, nbytes: int) -> Tiles:
        """The rows that these bytes are."""
        row = math.prod(self.shape[1:]) * self.itemsize
        first = self.rows[0] + start // row
        return replace(self, rows=(first, first + nbytes // row))


def _bands(axis: int, chunks: Sequence[Chunk]) -> Iterator[tuple[int, int, list[Chunk]]]:
    """The axis cut at every border of a chunk, with the chunks that lie across each stretch."""
    cuts = sorted({cut for chunk in chunks for cut in (chunk.offsets[axis], chunk.end(axis))})
    for low, high in pairwise(cuts):
        yield low, high, [chunk for chunk in chunks if chunk.offsets[axis] <= low and high <= chunk.end(axis)]


def joined(name: str, dtype: str, shape: tuple[int, ...], chunks: Sequence[Chunk], origin: str, where: str) -> Recipe:
    """The tensor that the chunks make: ranges of files where they are rows of it.

    Raises:
        HxaconvError: unless they hold every element exactly once.
    """
    chunks = [chunk for chunk in chunks if 0 not in chunk.sizes]
    if not _make_whole(shape, chunks):
        raise broken(where, f"the {len(chunks)} chunks of {show(name)} do not make a tensor of {list(shape)}")
    if len(chunks) == 1 or all(chunk.sizes[1:] == shape[1:] for chunk in chunks):
        places = [chunk.place for chunk in sorted(chunks, key=lambda chunk: chunk.offsets)]
        return Recipe(dtype, shape, Ranges(tuple(places)), origin)
    return Recipe(dtype, shape, Tiles(shape, BY_NAME[dtype].itemsize, tuple(chunks), (0, shape[0])), origin)


def _make_whole(shape: tuple[int, ...], chunks: Sequence[Chunk]) -> bool:
    if any(not len(chunk.sizes) == len(chunk.offsets) == len(shape) for chunk in chunks):
        return False
    if not shape or 0 in shape:
        return len(chunks) == (0 not in shape)
    inside = all(chunk.end(axis) <= size for chunk in chunks for axis, size in enumerate(shape))
    return inside and sum(math.prod(c.sizes) for c in chunks) == math.prod(shape) and _disjoint(0, chunks)


def _disjoint(axis: int, chunks: Sequence[Chunk]) -> bool:
    if len(chunks) < 2:
        return True
    if axis == len(chunks[0].sizes):
        return False
    return all(_disjoint(axis + 1, covering) for _, _, covering in _bands(axis, chunks))
