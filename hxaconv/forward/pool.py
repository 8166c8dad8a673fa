"""Threads of one torch thread each, whose number does not change a single bit of the result."""

from __future__ import annotations

import threading
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

    BLAS on several threads may split a sum by their number; pieces of fixed size, each on one thread, cannot. And
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
        """For long work on a thread: end it where nobody waits for it any more, after Ctrl-C or an error."""
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
        pieces = torch.split(x.reshape(-1, x.shape[-1]), ROWS)
        found = self.map(lambda piece: torch.nn.functional.linear(piece, weight, bias), pieces)
        return torch.cat(found).view(*x.shape[:-1], weight.shape[0])
