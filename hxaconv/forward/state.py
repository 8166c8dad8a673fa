"""Where an interrupted pass over the layers goes on: its tensors and figures in one file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, zeros

from hxaconv.errors import HxaconvError
from hxaconv.forward.fingerprint import computed_with, refuse_to_mix

SECONDS_BETWEEN_SAVES = 10.0
SHARE_OF_SAVING = 0.1
"""Of the time, what saving may take: streams of a large model are a gigabyte."""

State = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""Tensors by name, and what goes to JSON."""


class StateFile:
    """The state of one pass, a safetensors file; `path` None keeps nothing.

    `key` names what the pass is of (see `fingerprint`): a state of another one is not taken over. `check` raises
    KeyboardInterrupt where it was asked to stop.
    """

    def __init__(self, path: Path | None, key: str = "", check: Callable[[], None] = lambda: None) -> None:
        self.path, self.key = path, key
        self._check = check
        self._saved = time.monotonic()
        self._wait = SECONDS_BETWEEN_SAVES

    def load(self, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state of an interrupted pass with the same key, else None."""
        if self.path is None:
            return None
        try:
            with safe_open(self.path, "pt", device=device) as file:
                facts = file.metadata() or {}
                if facts.get("key") != self.key:
                    return None
                refuse_to_mix(self.path, facts.get("computed_with"), json.dumps(computed_with()))
                names = [name for name in file.keys() if name]  # noqa: SIM118
                return {name: file.get_tensor(name) for name in names}, json.loads(facts["state"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None  # nothing there yet, or half a file of a full disk: start over

    def pause(self, state: Callable[[], State]) -> None:
        """Between two steps: save the state if that is due, and end here if that was asked for.

        Raises:
            KeyboardInterrupt: from `check`; the state is saved.
            HxaconvError: when the file cannot be written.
        """
        try:
            self._check()
        except KeyboardInterrupt:
            self.save(*state())
            raise
        if self.path is not None and time.monotonic() - self._saved >= self._wait:
            self.save(*state())

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the file.

        Raises:
            HxaconvError: when it cannot be written.
        """
        if self.path is None:
            return
        begun = time.monotonic()
        beside = self.path.with_name(f"{self.path.name}.part")
        # A file without tensors is not read back by every version of safetensors.
        held = {name: values.contiguous().cpu() for name, values in tensors.items()} or {"": zeros(1)}
        told = {"key": self.key, "state": json.dumps(facts), "computed_with": json.dumps(computed_with())}
        try:
            save_file(held, beside, metadata=told)
            os.replace(beside, self.path)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise HxaconvError(
                f"{self.path}: the state of this pass cannot be kept: {getattr(error, 'strerror', None) or error}",
                hint="Free some space or write the result elsewhere.",
            ) from None
        self._saved = time.monotonic()
        self._wait = max(SECONDS_BETWEEN_SAVES, (self._saved - begun) / SHARE_OF_SAVING)
