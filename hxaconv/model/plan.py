"""A plan: every tensor of a checkpoint, by name, with its shape, its origin and how to make its bytes.

A checkpoint that is opened, an intermediate result and an output are the same type, so that every
operation is a function from plans to plans. Insertion order is the order on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

from hxaconv.errors import HxaconvError, Inconsistent, raise_all
from hxaconv.formats.dtypes import BY_NAME, FLOATS, num_bytes
from hxaconv.formats.files import CHUNK_BYTES, Extent, SourceFile
from hxaconv.model.names import is_attention


class Buffers:
    """Buffers that one worker uses again for every tensor."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.read = memoryview(bytearray(chunk_bytes))

    @cached_property
    def compute(self) -> memoryview:
        """Room for a chunk after a cast that widens it (at most 2 -> 8 bytes per element); copies need none."""
        return memoryview(bytearray(4 * len(self.read)))


class Bytes(Protocol):
    """How the bytes of a tensor come about."""

    @property
    def kind(self) -> str:
        """`copy`, `scale`, `cast`, `init`, ...: the word for it in the plan's table."""

    def chunks(self, buffers: Buffers) -> Iterator[memoryview]:
        """Little-endian row-major bytes, in order; a chunk is valid until the next one is fetched."""

    def sources(self) -> Iterable[SourceFile]:
        """The files that will be read."""


@runtime_checkable
class Divisible(Bytes, Protocol):
    """Bytes of which whole rows can be made alone."""

    def part(self, start: int, nbytes: int) -> Bytes:
        """The bytes [start, start + nbytes), both multiples of a row."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One tensor: what it will be, how to make it, and, for people, where it comes from."""

    dtype: str
    shape: tuple[int, ...]
    make: Bytes
    origin: str

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return num_bytes(self.dtype, self.shape)

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def place(self, name: str) -> str:
        """The origin for a message that has named the tensor already: without its name."""
        return self.origin.removeprefix(f"{name} ")

    def chunks(self, buffers: Buffers) -> Iterator[memoryview]:
        """The tensor's bytes in chunks, checked to be as many as its shape says."""
        total = 0
        for chunk in self.make.chunks(buffers):
            total += len(chunk)
            yield chunk
        assert total == self.nbytes, f"{self.origin}: made {total} bytes, its shape takes {self.nbytes}"


Plan = dict[str, Recipe]


@dataclass(frozen=True, slots=True)
class Ranges:
    """Bytes that stand in source files already: copied, never interpreted."""

    extents: tuple[Extent, ...]
    kind: str = "copy"

    def chunks(self, buffers: Buffers) -> Iterator[memoryview]:
        """The ranges, one after the other."""
        for extent in self.extents:
            if extent.file is None:
                yield from _zeros(extent.nbytes)
            else:
                yield from extent.file.chunks(extent.offset, extent.nbytes, buffers.read)

    def sources(self) -> Iterable[SourceFile]:
        """The files the ranges are in."""
        return [extent.file for extent in self.extents if extent.file is not None]

    def part(self, start: int, nbytes: int) -> Ranges:
        """The bytes [start, start + nbytes): parts of the same ranges."""
        found, position = [], 0
        for extent in self.extents:
            low, high = max(start, position), min(start + nbytes, position + extent.nbytes)
            if low < high:
                found.append(Extent(extent.file, extent.offset + low - position, high - low))
            position += extent.nbytes
        return Ranges(tuple(found), self.kind)


def _zeros(count: int) -> Iterator[memoryview]:
    # Writable only for torch's sake, which warns about tensors on a buffer that is not.
    zeros = memoryview(bytearray(min(count, CHUNK_BYTES)))
    while count:
        chunk = zeros[: min(count, len(zeros))]
        yield chunk
        count -= len(chunk)


def stored(dtype: str, shape: tuple[int, ...], file: SourceFile, offset: int, origin: str) -> Recipe:
    """A contiguous tensor that stands in `file` at `offset`."""
    return Recipe(dtype, shape, Ranges((Extent(file, offset, num_bytes(dtype, shape)),)), origin)


def has_rows(recipe: Recipe) -> bool:
    """Whether rows of a tensor can be read alone."""
    return isinstance(recipe.make, Divisible)


def undivided(recipe: Recipe) -> HxaconvError:
    """What is said of a tensor whose rows cannot be made alone."""
    return HxaconvError(
        f"{recipe.origin} is not stored contiguously, so that its rows can be neither split nor padded",
        hint="Save the state dict with contiguous tensors: {k: v.contiguous() for k, v in state_dict.items()}.",
    )


def rows(recipe: Recipe, start: int, stop: int, origin: str) -> Recipe:
    """Rows [start, stop) of a tensor, made alone: of a copy, ranges of its files.

    Fused projections (Phi-3's `qkv_proj`) are split this way.

    Raises:
        HxaconvError: for a tensor that is stored transposed or as a slice of another.
    """
    assert 0 <= start < stop <= recipe.shape[0]
    if not isinstance(recipe.make, Divisible):
        raise undivided(recipe)
    row_bytes = recipe.nbytes // recipe.shape[0]
    part = recipe.make.part(start * row_bytes, (stop - start) * row_bytes)
    return Recipe(recipe.dtype, (stop - start, *recipe.shape[1:]), part, origin)


def copied(recipe: Recipe) -> Ranges:
    """The ranges of a tensor that is a copy.

    Raises:
        HxaconvError: for one that is stored transposed or as a slice of another, or is computed.
    """
    if not isinstance(recipe.make, Ranges):
        raise undivided(recipe)
    return recipe.make


def pad_rows(recipe: Recipe, num_rows: int) -> Recipe:
    """Zero rows below a copied matrix, up to `num_rows`."""
    more = (num_rows - recipe.shape[0]) * (recipe.nbytes // recipe.shape[0])
    make = Ranges((*copied(recipe).extents, Extent(None, 0, more)), "pad")
    return Recipe(recipe.dtype, (num_rows, *recipe.shape[1:]), make, f"{recipe.origin} + zero rows")


def pad_columns(recipe: Recipe, num_columns: int) -> Recipe:
    """Zero columns to the right of a copied matrix, up to `num_columns`."""
    assert len(recipe.shape) == 2
    whole, itemsize = copied(recipe), BY_NAME[recipe.dtype].itemsize
    row_bytes, more = recipe.shape[1] * itemsize, (num_columns - recipe.shape[1]) * itemsize
    extents: list[Extent] = []
    for row in range(recipe.shape[0]):
        extents += [*whole.part(row * row_bytes, row_bytes).extents, Extent(None, 0, more)]
    shape = (recipe.shape[0], num_columns)
    return Recipe(recipe.dtype, shape, Ranges(tuple(extents), "pad"), f"{recipe.origin} + zero columns")


def with_origin(recipe: Recipe, origin: str) -> Recipe:
    """The same tensor under another description of where it comes from."""
    return replace(recipe, origin=origin)


def total_bytes(plan: Mapping[str, Recipe]) -> int:
    """Bytes of all tensors together."""
    return sum(recipe.nbytes for recipe in plan.values())


def main_dtype(plan: Mapping[str, Recipe]) -> str:
    """The float dtype that most bytes have."""
    sums: dict[str, int] = {}
    for recipe in plan.values():
        if recipe.dtype in FLOATS:
            sums[recipe.dtype] = sums.get(recipe.dtype, 0) + recipe.nbytes
    return max(sums, key=lambda name: sums[name])


def layer_bytes(plan: Mapping[str, Recipe], layer: int) -> int:
    """Bytes of one layer."""
    prefix = f"model.layers.{layer}."
    return sum(recipe.nbytes for name, recipe in plan.items() if name.startswith(prefix))


def source_files(plan: Mapping[str, Recipe]) -> list[SourceFile]:
    """The files that making this plan will read, each once, in order of first use."""
    return list(dict.fromkeys(file for recipe in plan.values() for file in recipe.make.sources()))


def check(plan: Mapping[str, Recipe], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Compare a plan's names, shapes and dtypes with what the architecture demands.

    Raises:
        Inconsistent: listing every missing, unexpected, misshapen and quantized tensor at once.
    """
    problems = [f"{name} is missing, expected shape {shape}" for name, shape in expected.items() if name not in plan]
    problems += [f"{name} is not part of the architecture" for name in plan if name not in expected]
    problems += [
        f"{name} has dtype {recipe.dtype}: quantized weights are not converted, take the bf16 original"
        for name, recipe in plan.items()
        if recipe.dtype not in FLOATS
    ]
    problems += [
        f"{name} has shape {plan[name].shape}, the config implies {shape} ({plan[name].place(name)})"
        for name, shape in expected.items()
        if name in plan and plan[name].shape != shape
    ]
    raise_all(
        f"{what} does not match its config ({len(problems)} problems):",
        problems,
        hint="Is config.json from another model, or a shard missing?",
        kind=Inconsistent,
    )


def same_bytes(a: Recipe, b: Recipe) -> bool:
    """Whether two tensors have the same dtype, shape and bits; reads both, a chunk at a time."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.make == b.make:
        return True
    left, right = a.chunks(Buffers()), b.chunks(Buffers())
    # Comparing bytes is one memcmp; comparing memoryviews unpacks every element.
    return all(bytes(x) == bytes(y) for x, y in zip(left, right, strict=True))


def attention_of(plan: Plan) -> Plan:
    """The tensors of the mixers, of both kinds."""
    return {name: recipe for name, recipe in plan.items() if is_attention(name)}
