"""Whether kept results are of the same models, tokens and settings: a digest, without reading a weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hxaconv.errors import HxaconvError
from hxaconv.model.model import Model
from hxaconv.model.plan import Recipe, source_files

_FORMAT = 2


def fingerprint(models: Mapping[str, Model], ids: np.ndarray, settings: Mapping[str, Any]) -> str:
    """A digest of everything a score depends on: tensors and their files, tokens, settings."""
    parts: dict[str, Any] = {"format": _FORMAT, "settings": dict(settings)}
    for role, model in models.items():
        parts[role] = {
            "config": repr(model.config),
            "tensors": {name: _recipe(recipe) for name, recipe in model.plan.items()},
            "files": [(file.name, file.size, file.mtime_ns, file.header_digest) for file in source_files(model.plan)],
        }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    digest.update(str(ids.shape).encode() + np.ascontiguousarray(ids, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _recipe(recipe: Recipe) -> list[Any]:
    extents = getattr(recipe.make, "extents", ())
    where = [(extent.file.name if extent.file else None, extent.offset, extent.nbytes) for extent in extents]
    return [recipe.dtype, recipe.shape, recipe.make.kind, recipe.origin, where]


def computed_with(device: str = "cpu") -> dict[str, str]:
    """What sums depend on beside what is summed: PyTorch, the instruction set that it uses here, the GPU."""
    import torch

    found = {"torch": str(torch.__version__), "instructions": torch.backends.cpu.get_cpu_capability()}
    return found if device == "cpu" else found | {"gpu": torch.cuda.get_device_name(device)}


def refuse_to_mix(path: Path, then: str | None, now: str) -> None:
    """Refuse to go on with what another machine has begun; `then` and `now` are `computed_with` as JSON.

    Raises:
        HxaconvError: when they differ, naming both.
    """
    if then is not None and then != now:
        raise HxaconvError(
            f"{path} was begun with {_shown(then)}; here it is {_shown(now)}, and sums differ in their last bits",
            hint="Go on where it was begun (ATEN_CPU_CAPABILITY limits a newer CPU), or delete it to start over.",
        )


def _shown(text: str) -> str:
    return ", ".join(str(value) for value in json.loads(text).values())
