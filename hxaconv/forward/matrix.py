"""A large weight as it is stored, which torch functions multiply with block by block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hxaconv.forward.pool import ROWS, Pool

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

        def one(piece: Tensor) -> Tensor:
            found = piece.new_zeros(len(piece), self.shape[1])
            for start in self._starts():
                block = self._block(start)
                found.addmm_(piece[:, start : start + len(block)], block)
            return found

        return torch.cat(self._pool.map(one, torch.split(x, ROWS)))

    def blocks(self) -> Iterator[Tensor]:
        """Its rows, some at a time, as stored."""
        for start in self._starts():
            yield self.stored[start : start + self._height]

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
