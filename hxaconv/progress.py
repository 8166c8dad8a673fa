"""How work reports: progress while it runs, by a protocol that is easy to implement, and results in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class Progress(Protocol):
    """What long work reports; `total` and `n` are bytes unless the title names another unit.

    Derive from it to leave out methods that are of no interest.
    """

    def start(self, title: str, total: int) -> None:
        """A new stretch of work begins."""

    def advance(self, n: int, what: str = "") -> None:
        """`n` more of the total is done; `what` is at work now."""

    def stop(self) -> None:
        """The stretch has ended."""

    def note(self, text: str) -> None:
        """A sentence to read before the work continues."""

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


class Result:
    """A dataclass of plain data. It pickles, and shows as the command line shows it, in a notebook as well."""

    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def headline(self) -> str:
        """The result in one line."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it: what the command prints with --json."""
        raise NotImplementedError

    def raise_if_failed(self) -> None:
        """Turn a failed check into an error; without checks there is nothing to fail.

        Raises:
            CheckFailed: naming what failed.
        """

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.headline}>"

    def _repr_html_(self) -> str:
        from hxaconv.cli.tables import html

        return html(self)
