"""A file laid out before its first byte exists: fixed bytes, tensors at known offsets, a known size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hxaconv.formats.files import SourceFile
from hxaconv.model.plan import Recipe

Segment = tuple[int, bytes]
"""Offset and bytes."""


@dataclass(frozen=True, slots=True)
class Fill:
    """One tensor's place in a file."""

    name: str
    offset: int
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class FileLayout:
    """One file: `segments` are known now, `fills` are to be made, `seal` gives what depends on them."""

    name: str
    size: int
    segments: tuple[Segment, ...]
    fills: tuple[Fill, ...]
    seal: Callable[[Mapping[str, int]], list[Segment]] | None = None
    """CRC-32 by tensor name -> the bytes that hold checksums; None where the format has none."""
    hard_link: SourceFile | None = None
    """A source file that is this file already: linked or copied whole, not written."""
