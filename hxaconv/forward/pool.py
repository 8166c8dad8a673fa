"""Threads of one torch thread each, whose number does not change a single bit, and large weights multiplied on them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

ROWS = 256
"""Rows of one chunk of a product. Fixed, since BLAS may sum in another order for another shape."""
FLOAT32_ERROR = 2e-6
"""Relative, of a product of ROWS columns: 4e-7 where nothing is rounded, 2e-3 in bf16 and 3e-4 in TF32."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool:
    """Workers that run one single-threaded torch operation each, without gradients.

    BLAS on several threads may split a sum by their number; chunks of fixed size, each on one thread, cannot. And
    torch's own teams of threads wait for each other at barriers, which takes many times the work where other programs
    keep cores busy. Within the pool the calling thread runs torch on one thread as well.
    """

    def __init__(self, workers: int | None = None, device: str = "cpu") -> None:
        """`workers` None: as many as torch has threads, which OMP_NUM_THREADS limits."""
        workers = torch.get_num_threads() if workers is None else workers
        self._executor = ThreadPoolExecutor(workers, initializer=self._begin) if workers > 1 else None
        self._executor = self._executor if device == "cpu" else None
        self._thread = threading.local()
        self._ended = False

    def _begin(self) -> None:
        # The number of threads belongs to a thread, a fresh one would have its own.
        torch.set_num_threads(1)
        self._thread.is_worker = True

    def __enter__(self) -> Pool:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def check(self) -> None:
        """For long work on a thread: end it where its result is no longer needed, after Ctrl-C or an error."""
        if self._ended:
            raise CancelledError

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results in the items' order; within a worker they are made one after the other."""
        items = list(items)

        def run(item: Item) -> Result:
            with torch.no_grad():
                return function(item)

        if self._executor is None or len(items) < 2 or getattr(self._thread, "is_worker", False):
            return list(map(run, items))
        return list(self._executor.map(run, items))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) times weight (out, in), and bias."""
        chunks = torch.split(x.reshape(-1, x.shape[-1]), ROWS)
        found = self.map(lambda chunk: torch.nn.functional.linear(chunk, weight, bias), chunks)
        return torch.cat(found).view(*x.shape[:-1], weight.shape[0])


@contextlib.contextmanager
def float32_by_onednn() -> Iterator[None]:
    """Products of float32 on a CPU by oneDNN instead of MKL, which on AMD's processors uses half of a vector's width.

    torch takes oneDNN where it may round to bf16. Without AMX it does not round: that is tried first, and where a
    product is not as near as float32 can be, nothing changes. For fits; checks stay with torch's default.
    """
    products = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
    if products is None:
        yield
        return
    before, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        if not _rounds_as_float32():
            products.fp32_precision = before
        yield
    finally:
        products.fp32_precision = before


def _rounds_as_float32() -> bool:
    x = torch.randn(ROWS, ROWS, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double()
    return float((x @ x - exact).norm() / exact.norm()) < FLOAT32_ERROR


BLOCK_BYTES = 512 * 1024
"""Of a weight as it is stored: the block and its cast stay in the cache of one core."""

_LOCAL = threading.local()


class Matrix:
    """A weight (rows, columns) in the dtype of its file: half the memory of float32 for bf16.

    `torch.nn.functional.linear(x, matrix)` casts a block of rows at a time to the compute dtype and multiplies it, each
    block on one thread. Other functions of torch see the whole matrix in the compute dtype. Gradients go to x, as
    long as the weight stands where it is: within its layer.
    """

    def __init__(self, stored: Tensor, dtype: torch.dtype, pool: Pool) -> None:
        self.stored, self.dtype, self._pool = stored, dtype, pool

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)."""
        return self.stored.shape

    def whole(self) -> Tensor:
        """In the compute dtype."""
        return self.stored.to(self.dtype)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        named: Mapping[str, Any] = kwargs or {}
        if function is torch.nn.functional.linear:
            return args[1].linear(args[0], *args[2:], **named)
        return function(*(x.whole() if isinstance(x, Matrix) else x for x in args), **named)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., columns) -> (..., rows)."""
        flat = x.reshape(-1, x.shape[-1])
        found = _Product.apply(flat, self) if x.requires_grad else self.product(flat)  # type: ignore[no-untyped-call]
        found = found if bias is None else found + bias
        shaped: Tensor = found.view(*x.shape[:-1], self.shape[0])
        return shaped

    def product(self, x: Tensor) -> Tensor:
        """(tokens, columns) -> (tokens, rows)."""
        if x.device.type != "cpu":
            return x @ self.whole().T
        found, columns = x.new_empty(self.shape[0], len(x)), x.T

        def one(start: int) -> None:
            block = self._block(start)
            torch.mm(block, columns, out=found[start : start + len(block)])

        self._pool.map(one, self._starts())
        return found.T.contiguous()

    def transposed_product(self, x: Tensor) -> Tensor:
        """(tokens, rows) -> (tokens, columns): what a gradient needs."""
        if x.device.type != "cpu":
            return x @ self.whole()

        def one(chunk: Tensor) -> Tensor:
            found = chunk.new_zeros(len(chunk), self.shape[1])
            for start in self._starts():
                block = self._block(start)
                found.addmm_(chunk[:, start : start + len(block)], block)
            return found

        return torch.cat(self._pool.map(one, torch.split(x, ROWS)))

    @property
    def _height(self) -> int:
        return max(1, BLOCK_BYTES // (self.shape[1] * self.stored.element_size()))

    def _starts(self) -> range:
        return range(0, self.shape[0], self._height)

    def _block(self, start: int) -> Tensor:
        """Rows from `start` on in the compute dtype; valid until this thread's next one."""
        block = self.stored[start : start + self._height]
        if block.dtype == self.dtype:
            return block
        buffer: Tensor | None = getattr(_LOCAL, "buffer", None)
        if buffer is None or buffer.dtype != self.dtype or len(buffer) < block.numel():
            buffer = _LOCAL.buffer = torch.empty(block.numel(), dtype=self.dtype)
        return buffer[: block.numel()].view(block.shape).copy_(block)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        matrix: Matrix = ctx.matrix
        return matrix.transposed_product(gradient), None
