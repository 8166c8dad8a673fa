"""torch on the calling thread alone, for as long as a worker computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
