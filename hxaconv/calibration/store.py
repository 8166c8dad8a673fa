"""What a calibration keeps, so that it can go on and so that ranks share it: tensors and facts by name.

    OUT.calibration/layer-007.safetensors     the tensors that a layer replaces, and its report
    OUT.calibration/stream-0.safetensors      the teacher's residual stream of a rank, before the next layer
    OUT.calibration/distances.safetensors     the divergences, measured once: a second measurement may round otherwise
    OUT.calibration/polish-...safetensors     see `polish`

Every file names the calibration that it belongs to. One run at a time writes them, see `locked`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from hxaconv.calibration.report import settings_of
from hxaconv.errors import HxaconvError
from hxaconv.formats import diskio
from hxaconv.forward.state import StateFile, fingerprint
from hxaconv.model.model import Model
from hxaconv.model.plan import Recipe
from hxaconv.options import Fit
from hxaconv.surgery.arithmetic import Computed

FORMAT = 7


def key_of(teacher: Model, student: Model, ids: Tensor, fit: Fit) -> str:
    """A digest of everything that fitted layers depend on; a polish comes later, and has a key of its own."""
    used = {name: value for name, value in settings_of(fit).items() if name not in ("polish_tokens", "polish_only")}
    return fingerprint({"teacher": teacher, "student": student}, ids.cpu().numpy(), used | {"format": FORMAT})


def locked(folder: Path) -> AbstractContextManager[None]:
    """One process at a time calibrates into a folder: a lock file beside it, which is removed in the end.

    Raises:
        HxaconvError: when another process is at it, or nothing can be written there.
    """
    return diskio.held(folder.with_name(f".{folder.name}.hxaconv-lock"), folder)


class Store:
    """A safetensors file for each name in a folder, or memory without one; files with another key do not count."""

    def __init__(self, folder: Path | None, key: str = "") -> None:
        self.folder, self.key = folder, key
        self._memory: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def save(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
        """Replace what is kept under this name.

        Raises:
            HxaconvError: when the folder cannot be written.
        """
        if self.folder is None:
            self._memory[name] = dict(tensors), dict(facts or {})
        else:
            self._file(name).save(tensors, facts or {})

    def load(
        self, name: str, device: str = "cpu", only: Collection[str] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What is kept under this name, all tensors or only these; None where there is nothing.

        Raises:
            HxaconvError: when a machine that sums otherwise has written it.
        """
        if self.folder is not None:
            return self._file(name).load(device, only)
        if name not in self._memory:
            return None
        tensors, facts = self._memory[name]
        return {key: x.to(device) for key, x in tensors.items() if only is None or key in only}, facts

    def facts(self, name: str) -> dict[str, Any] | None:
        """The facts under this name alone."""
        kept = self.load(name, only=())
        return None if kept is None else kept[1]

    def tensor(self, name: str, key: str) -> Tensor:
        """One tensor.

        Raises:
            HxaconvError: when it is gone, or of another calibration.
        """
        kept = self.load(name, only=(key,))
        if kept is None or key not in kept[0]:
            raise HxaconvError(
                f"{key} in {self._file(name).path} can no longer be read, or was replaced by another calibration",
                hint="Run the command again, without another one that calibrates to the same target.",
            )
        return kept[0][key]

    def recipe(self, name: str, key: str, before: Recipe, kind: str) -> Recipe:
        """A tensor that replaces another, read when it is written."""
        make = Computed(functools.partial(self.tensor, name, key), before.dtype, kind)
        return Recipe(before.dtype, before.shape, make, f"{kind} from {before.origin}")

    def _file(self, name: str) -> StateFile:
        return StateFile(None if self.folder is None else self.folder / f"{name}.safetensors", self.key)
