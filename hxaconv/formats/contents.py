"""What a reader finds in one weight file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError, raise_all

if TYPE_CHECKING:
    from hxaconv.model.plan import Plan

MAX_NAME_LENGTH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The tensors of one file by the names it gives them, and facts about the container."""

    container: str
    """`safetensors`, `pth` (zip) or `legacy` (pickles before the zip form)."""
    tensors: Plan
    extra: dict[str, Any] = field(default_factory=dict)
    """Of pickles: what `find_state_dict` says, and `aliases`, groups of names that are one tensor."""


def show(text: str) -> str:
    """Text from a file as a message may print it: short, and without control characters."""
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return text if text.isprintable() else repr(text)


def check_names(names: list[str], where: str) -> None:
    """Refuse names that no reader could print or look up.

    Raises:
        HxaconvError: listing names that are empty, longer than 512 characters or not printable.
    """
    odd = [show(name) for name in names if not (0 < len(name) <= MAX_NAME_LENGTH and name.isprintable())]
    raise_all(f"{where}: tensor names must be printable text of at most {MAX_NAME_LENGTH} characters:", odd)


def broken(where: str, what: str) -> HxaconvError:
    """The error for a file whose structure contradicts itself."""
    return HxaconvError(f"{where}: {what}", hint="The file is damaged or truncated; download or copy it again.")
