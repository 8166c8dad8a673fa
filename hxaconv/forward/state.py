"""Where an interrupted pass over the layers goes on: its state in one file, with a fingerprint of its inputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, zeros

from hxaconv.errors import HxaconvError
from hxaconv.model.model import Model
from hxaconv.model.plan import source_files

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

    def load(
        self, device: str = "cpu", only: Collection[str] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state of an interrupted pass with the same key, all tensors or only these; else None."""
        if self.path is None:
            return None
        try:
            with safe_open(self.path, "pt", device=device) as file:
                facts = file.metadata() or {}
                if facts.get("key") != self.key:
                    return None
                self._refuse_to_mix(facts.get("computed_with"))
                names = [name for name in file.keys() if name and (only is None or name in only)]  # noqa: SIM118
                return {name: file.get_tensor(name) for name in names}, json.loads(facts["state"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None  # nothing there yet, or half a file of a full disk: start over

    def pause(self, state: Callable[[], State]) -> None:
        """Between two steps: save the state if that is due, and end here if a signal has come.

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
        metadata_of_state = {"key": self.key, "state": json.dumps(facts), "computed_with": json.dumps(computed_with())}
        try:
            self.path.parent.mkdir(exist_ok=True)
            save_file(held, beside, metadata=metadata_of_state)
            os.replace(beside, self.path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise HxaconvError(
                f"{self.path}: the state of this pass cannot be kept: {getattr(error, 'strerror', None) or error}",
                hint="Free some space or write the result elsewhere.",
            ) from None
        self._saved = time.monotonic()
        self._wait = max(SECONDS_BETWEEN_SAVES, (self._saved - begun) / SHARE_OF_SAVING)

    def _refuse_to_mix(self, then: str | None) -> None:
        """Refuse to go on with what a machine that rounds otherwise has begun."""
        if then is not None and then != json.dumps(now := computed_with()):
            shown = [", ".join(map(str, found.values())) for found in (json.loads(then), now)]
            raise HxaconvError(
                f"{self.path} was begun with {shown[0]}; here it is {shown[1]}, and sums differ in their last bits",
                hint="Go on where it was begun (ATEN_CPU_CAPABILITY limits a newer CPU), or delete it to start over.",
            )


_FORMAT = 2


def fingerprint(models: Mapping[str, Model], ids: np.ndarray, settings: Mapping[str, Any]) -> str:
    """A digest of everything a score depends on: tensors and their files, tokens, settings."""
    parts: dict[str, Any] = {"format": _FORMAT, "settings": dict(settings)}
    for role, model in models.items():
        tensors = {}
        for name, recipe in model.plan.items():
            extents = getattr(recipe.make, "extents", ())
            where = [(extent.file.name if extent.file else None, extent.offset, extent.nbytes) for extent in extents]
            tensors[name] = [recipe.dtype, recipe.shape, recipe.make.kind, recipe.origin, where]
        parts[role] = {
            "config": repr(model.config),
            "tensors": tensors,
            "files": [(file.name, file.size, file.mtime_ns, file.header_digest) for file in source_files(model.plan)],
        }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    digest.update(str(ids.shape).encode() + np.ascontiguousarray(ids, dtype=np.int64).tobytes())
    return digest.hexdigest()


def computed_with(device: str = "cpu") -> dict[str, str]:
    """What sums depend on beside what is summed: PyTorch, the instruction set that it uses here, the GPU."""
    import torch

    found = {"torch": str(torch.__version__), "instructions": torch.backends.cpu.get_cpu_capability()}
    return found if device == "cpu" else found | {"gpu": torch.cuda.get_device_name(device)}
