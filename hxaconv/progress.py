"""How long work reports itself: a protocol that anybody can implement, and nothing that prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hxaconv.results import Result


class Progress(Protocol):
    """What long work tells about itself; `total` and `n` are bytes unless the title says otherwise.

    Derive from it to leave out methods that are of no interest.
    """

    def start(self, title: str, total: int) -> None:
        """A new stretch of work begins."""

    def advance(self, n: int, what: str = "") -> None:
        """`n` more of the total is done; `what` is at work now."""

    def stop(self) -> None:
        """The stretch has ended."""

    def note(self, text: str) -> None:
        """Something to know before the work goes on."""

    def show(self, result: Result) -> None:
        """A result on the way: what will be written, before its first byte is."""


@contextmanager
def bar(progress: Progress | None, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A stretch of work, ended however the work ends; yields what is called with what is done, and what is at work."""
    if progress is None:
        yield lambda n, what: None
        return
    progress.start(title, total)
    try:
        yield progress.advance
    finally:
        progress.stop()
