"""What the functions of the package return: short to look at, whole as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
