"""Write-behind: what is written goes to disk in windows, in step with the writing."""

from __future__ import annotations

from collections.abc import Sequence

from hxaconv.formats.files import SourceFile
from hxaconv.save import diskio

WINDOW_BYTES = 32 * 1024 * 1024
"""Bytes that a worker writes before it asks for them to go to disk."""


class WriteBehind:
    """Sends written ranges to disk a window at a time, and keeps big totals out of the page cache."""

    def __init__(self, *, keep_cache: bool) -> None:
        self._keep_cache = keep_cache
        self._window: list[tuple[int, int]] = []
        self._before: list[tuple[int, int]] = []
        self._window_bytes = 0
        self.sources: Sequence[SourceFile] = ()

    def wrote(self, fd: int, offset: int, count: int) -> None:
        """Take note of a range that was written, and send it off with others once they fill a window."""
        if self._window and sum(self._window[-1]) == offset:
            self._window[-1] = (self._window[-1][0], self._window[-1][1] + count)
        else:
            self._window.append((offset, count))
        self._window_bytes += count
        if self._window_bytes >= WINDOW_BYTES:
            self.turn(fd)

    def turn(self, fd: int) -> None:
        """Start writing this window, wait for the one before and drop its pages."""
        for offset, count in self._window:
            diskio.start_writing_back(fd, offset, count)
        if not self._keep_cache:
            for offset, count in self._before:
                diskio.wait_written_back(fd, offset, count)
                diskio.drop_cached(fd, offset, count)
            for source in self.sources:
                diskio.drop_cached(source.open())
        self._before, self._window, self._window_bytes = self._window, [], 0

    def flush(self, fd: int) -> None:
        """Let go of everything."""
        self.turn(fd)
        self.turn(fd)
