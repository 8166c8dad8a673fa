"""Published initial values of an RWKV layer, as its variant names them.

A random tensor depends on the seed and its own name alone: the same bytes in any order, alone or with
the rest, on any number of threads.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hxaconv.formats.dtypes import num_bytes
from hxaconv.formats.files import Extent, SourceFile
from hxaconv.model.config import StudentConfig, unpublished
from hxaconv.model.names import mixer_prefix
from hxaconv.model.plan import Buffers, Plan, Ranges, Recipe
from hxaconv.model.variants.base import Orthogonal
from hxaconv.surgery.arithmetic import Computed, computed, one_thread

CHOLESKY_RATIO = 4
"""Height over width from which the condition number of a normal matrix is about 3 at most."""


def orthogonal(shape: tuple[int, ...], seed: int, name: str, gain: float) -> torch.Tensor:
    """A semi-orthogonal (rows, columns) matrix times the gain, and sqrt(rows/columns) where rows > columns.

    Normal numbers from Philox keyed by seed and name, orthonormalised in float64 on one thread.
    """
    rows, columns = shape
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    generator = np.random.Generator(np.random.Philox(key=key))
    normal = torch.from_numpy(generator.standard_normal((max(shape), min(shape))))
    with one_thread():
        q = _orthonormal_rows(normal)
    gain = gain * math.sqrt(rows / columns) if rows > columns else gain
    return (q if rows <= columns else q.T).mul_(gain)


def _orthonormal_rows(tall: torch.Tensor) -> torch.Tensor:
    """Q^T of tall = QR with a positive diagonal of R, which makes the factorisation unique.

    R^T is also the Cholesky factor of tall^T tall: that way takes half the time of Householder's, and is as exact
    where the columns are far from dependent, as normal ones are in matrices much taller than wide.
    """
    height, width = tall.shape
    if height >= CHOLESKY_RATIO * width:
        factor = torch.linalg.cholesky(tall.T @ tall)
        rows: torch.Tensor = torch.linalg.solve_triangular(factor, tall.T, upper=False)
    else:
        q, r = torch.linalg.qr(tall)
        rows = (q * torch.sign(torch.diagonal(r))).T
    return rows


def initial_parameters(config: StudentConfig, layer: int, seed: int, dtype: str) -> Plan:
    """Recipes of everything in an RWKV layer that does not come from the teacher, by canonical name.

    Raises:
        HxaconvError: for a variant without published initial values.
    """
    if config.variant.ranks is None:
        raise unpublished(config.rwkv_architecture)
    plan: Plan = {}
    initials = {parameter.name: parameter.initial for parameter in config.variant.parameters}
    for parameter, shape in config.variant.shapes(config).items():
        name, initial, origin = mixer_prefix(layer) + parameter, initials[parameter], "published initial value"
        if initial == 0.0:
            plan[name] = Recipe(dtype, shape, Ranges((Extent(None, 0, num_bytes(dtype, shape)),), "init"), origin)
            continue
        make: Callable[[], torch.Tensor]
        if isinstance(initial, Orthogonal):
            make, origin = partial(orthogonal, shape, seed, name, initial.gain), f"{origin}, seed {seed}"
        elif isinstance(initial, float):
            make = partial(torch.full, shape, initial)
        else:
            assert initial is not None
            make = partial(initial, config, layer)
        plan[name] = computed(make, dtype, shape, origin)
    return plan


@dataclass(frozen=True, slots=True)
class Kept:
    """A random matrix that is made at its first use, and read from a file from then on."""

    make: Computed
    path: Path
    nbytes: int
    kind: str = "init"

    def chunks(self, buffers: Buffers) -> Iterator[memoryview]:
        """The matrix's bytes."""
        if not self.path.is_file() or self.path.stat().st_size != self.nbytes:
            self._fill(buffers)
        with open(self.path, "rb", buffering=0) as file:
            while count := file.readinto(buffers.read):
                yield buffers.read[:count]

    def _fill(self, buffers: Buffers) -> None:
        self.path.parent.mkdir(exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}-{threading.get_ident()}")
        with open(beside, "wb") as file:
            for chunk in self.make.chunks(buffers):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)

    def sources(self) -> Iterable[SourceFile]:
        """No files of a checkpoint."""
        return []


def made_once(plan: Plan, folder: Path) -> Plan:
    """The plan, each of whose random matrices is made once, however often it is used; they stand in `folder`."""

    def kept(recipe: Recipe) -> Recipe:
        made = recipe.make.function if isinstance(recipe.make, Computed) else None
        if not isinstance(recipe.make, Computed) or not isinstance(made, partial) or made.func is not orthogonal:
            return recipe
        known = hashlib.sha256(f"{made.args} {recipe.dtype}".encode()).hexdigest()
        return replace(recipe, make=Kept(recipe.make, folder / f"initial-{known[:24]}", recipe.nbytes))

    return {name: kept(recipe) for name, recipe in plan.items()}
