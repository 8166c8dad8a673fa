"""Threads whose number does not change a single bit of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

ROWS = 256
"""Rows of one piece of a product. Fixed, since BLAS may sum in another order for another shape."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool:
    """Workers that run one single-threaded torch operation each, without gradients.

    BLAS on several threads may split a sum by their number; pieces of fixed size, each on one thread, cannot.
    """

    def __init__(self, workers: int, device: str) -> None:
        self._executor = ThreadPoolExecutor(workers) if workers > 1 and device == "cpu" else None
        self._ended = False

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
        """For long work on a thread: end it where nobody waits for it any more, after Ctrl-C or an error."""
        if self._ended:
            raise CancelledError

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results in the items' order."""

        def run(item: Item) -> Result:
            # Both settings belong to a thread, a fresh one would have its own.
            torch.set_num_threads(1)
            with torch.no_grad():
                return function(item)

        return list(map(run, items) if self._executor is None else self._executor.map(run, items))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) times weight (out, in), and bias."""
        pieces = torch.split(x.reshape(-1, x.shape[-1]), ROWS)
        found = self.map(lambda piece: torch.nn.functional.linear(piece, weight, bias), pieces)
        return torch.cat(found).view(*x.shape[:-1], weight.shape[0])
