"""Whether kept results are of the same models, tokens and settings: a digest, without reading a weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

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
