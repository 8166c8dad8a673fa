"""The recipes that compute, and the way from a recipe to a torch tensor. Only this side imports torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from hxaconv.formats.dtypes import BY_NAME, BY_TORCH_NAME, FLOATS
from hxaconv.formats.files import SourceFile
from hxaconv.model.plan import Buffers, Bytes, Recipe, has_rows, rows

_LOCK = threading.Lock()
_COUNTS: list[int] = []
"""The thread count before, once per worker that is inside."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Within this, torch starts no threads of its own; workers may enter it at the same time.

    A sum split over several threads is rounded differently from one that is not. And the workers are threads
    already: with teams below them, they would wait for each other most of the time.
    """
    with _LOCK:
        _COUNTS.append(_COUNTS[0] if _COUNTS else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _LOCK:
            before = _COUNTS.pop()
            if not _COUNTS:
                torch.set_num_threads(before)


def torch_dtype(name: str) -> torch.dtype:
    """`BF16` -> torch.bfloat16."""
    dtype = getattr(torch, BY_NAME[name].torch_name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> `BF16`."""
    return BY_TORCH_NAME[str(dtype).removeprefix("torch.")].name


@dataclass(frozen=True, slots=True)
class Scaled:
    """factor * source in another dtype: the product in float32 (float64 for F64), rounded once.

    That is what `tensor * factor` of a bf16 tensor gives in torch, bit for bit.
    """

    source: Bytes
    source_dtype: str
    dtype: str
    factor: float
    kind: str = "scale"

    def chunks(self, buffers: Buffers) -> Iterator[memoryview]:
        """Each chunk of the source, converted in a buffer that is used again."""
        read_dtype, write_dtype = torch_dtype(self.source_dtype), torch_dtype(self.dtype)
        room = torch.frombuffer(buffers.compute, dtype=write_dtype)
        wide = torch.float64 if read_dtype == torch.float64 else torch.float32
        products = torch.empty(len(buffers.read) // read_dtype.itemsize, dtype=wide)
        with one_thread():
            for chunk in self.source.chunks(buffers):
                values = _values(chunk, read_dtype)
                out = room[: len(values)]
                # bf16 to fp16 too goes by way of float32: torch is three times as fast there.
                if self.factor != 1.0 or (values.dtype != products.dtype != out.dtype):
                    values = products[: len(values)].copy_(values)
                if self.factor != 1.0:
                    values *= self.factor
                out.copy_(values)
                yield buffers.compute[: len(values) * out.element_size()]

    def sources(self) -> Iterable[SourceFile]:
        """Those of what is scaled."""
        return self.source.sources()


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor that a function makes whole, when it is its turn to be written."""

    function: Callable[[], torch.Tensor]
    dtype: str
    kind: str = "init"
    files: tuple[SourceFile, ...] = ()

    def chunks(self, buffers: Buffers) -> Iterator[memoryview]:
        """The finished tensor's bytes."""
        with one_thread():
            values = self.function().to(torch_dtype(self.dtype)).contiguous()
        # A 0-dim tensor cannot be viewed as bytes, a flat one can.
        yield memoryview(values.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

    def sources(self) -> Iterable[SourceFile]:
        """The files the function reads."""
        return self.files


@runtime_checkable
class Rounded(Bytes, Protocol):
    """Bytes that are computed in more precision than they have, so that what is made of them is rounded once."""

    def exact(self) -> tuple[Bytes, str]:
        """The same before the rounding, and its dtype."""


def scaled(recipe: Recipe, factor: float, dtype: str, origin: str) -> Recipe:
    """The recipe times a factor, in `dtype`; the very same bytes where that changes nothing."""
    if factor == 1.0 and dtype == recipe.dtype:
        return replace(recipe, origin=origin)
    make, given = recipe.make.exact() if isinstance(recipe.make, Rounded) else (recipe.make, recipe.dtype)
    kind = "cast" if factor == 1.0 else "scale"
    return Recipe(dtype, recipe.shape, Scaled(make, given, dtype, factor, kind), origin)


def cast(recipe: Recipe, dtype: str) -> Recipe:
    """The recipe in another dtype; unchanged where it has it already, or is no float tensor."""
    if recipe.dtype == dtype or recipe.dtype not in FLOATS:
        return recipe
    return scaled(recipe, 1.0, dtype, f"{recipe.origin}, cast from {recipe.dtype}")


def computed(function: Callable[[], torch.Tensor], dtype: str, shape: tuple[int, ...], origin: str) -> Recipe:
    """A recipe for a tensor that `function` makes."""
    return Recipe(dtype, shape, Computed(function, dtype), origin)


SERIAL_BYTES = 60 * 1024
"""A chunk that torch handles on the calling thread: from 32,768 elements on it would split each one over all
threads, whose barriers cost many times the work on a machine with other things to do."""

_LOCAL = threading.local()


def tensor(recipe: Recipe, *, dtype: torch.dtype | None = None, into: torch.Tensor | None = None) -> torch.Tensor:
    """Make a recipe's tensor in memory: (shape), in `dtype` or its own; filled into `into` where given.

    `into` is a flat tensor of at least recipe.numel elements that is used again for the next weight;
    its dtype counts. Chunks are converted one at a time, so that no second copy is needed.
    """
    if not hasattr(_LOCAL, "buffers"):
        _LOCAL.buffers = Buffers(SERIAL_BYTES)
    source = torch_dtype(recipe.dtype)
    flat = torch.empty(recipe.numel, dtype=dtype or source) if into is None else into[: recipe.numel]
    done = 0
    for chunk in recipe.chunks(_LOCAL.buffers):
        values = _values(chunk, source)
        flat[done : done + len(values)].copy_(values)
        done += len(values)
    return flat.view(recipe.shape)


def _values(chunk: memoryview, dtype: torch.dtype) -> torch.Tensor:
    # torch warns about buffers it could write to by mistake; a copy is a writable one.
    return torch.frombuffer(bytearray(chunk) if chunk.readonly else chunk, dtype=dtype)


def tensor_rows(recipe: Recipe, indices: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a matrix by number, (*indices.shape, columns): only they are read, where it is a copy."""
    flat = indices.reshape(-1).cpu()
    if has_rows(recipe):
        unique, inverse = torch.unique(flat, return_inverse=True)
        picked = torch.cat([tensor(rows(recipe, int(i), int(i) + 1, recipe.origin), dtype=dtype) for i in unique])
        found = picked[inverse]
    else:
        found = tensor(recipe, dtype=dtype)[flat]
    return found.view(*indices.shape, recipe.shape[1])
