"""Interrupted scoring goes on where it stopped: the state of a sweep in a file beside the output."""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hxaconv.errors import HxaconvError

SECONDS_BETWEEN_SAVES = 10.0
SHARE_OF_SAVING = 0.1
"""Of the time, what saving may take: streams of a large model are a gigabyte."""


def _nothing() -> None:
    pass


class Cache:
    """One file that holds the state of one pass; `path` None keeps nothing.

    `check` raises KeyboardInterrupt when somebody asks to stop.
    """

    def __init__(self, path: Path | None, key: str, check: Callable[[], None] = _nothing) -> None:
        self.path, self.key = path, key
        self._check = check
        self._saved = time.monotonic()
        self._wait = SECONDS_BETWEEN_SAVES

    def load(self) -> dict[str, np.ndarray] | None:
        """The state of an interrupted pass with the same key, else None."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as data:
                if str(data["key"]) != self.key:
                    return None
                return {name: data[name] for name in data.files if name != "key"}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # half a file of another program or of a full disk: start over

    def pause(self, arrays: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Between two steps: save the state if that is due, and end here if somebody asks to stop.

        Raises:
            KeyboardInterrupt: from `check`; the state is saved.
            HxaconvError: when the file cannot be written.
        """
        try:
            self._check()
        except KeyboardInterrupt:
            self.save(arrays())
            raise
        if self.path is not None and time.monotonic() - self._saved >= self._wait:
            self.save(arrays())

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the file.

        Raises:
            HxaconvError: when it cannot be written.
        """
        if self.path is None:
            return
        begun = time.monotonic()
        beside = self.path.with_name(f"{self.path.name}.part")
        try:
            with open(beside, "wb") as file:
                np.savez(file, **{**arrays, "key": np.array(self.key)})  # type: ignore[arg-type]
            os.replace(beside, self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise HxaconvError(
                f"{self.path}: the state of the scoring cannot be kept: {error.strerror}",
                hint="Free some space or write the result elsewhere.",
            ) from None
        self._saved = time.monotonic()
        self._wait = max(SECONDS_BETWEEN_SAVES, (self._saved - begun) / SHARE_OF_SAVING)
