"""Published initial values of an RWKV layer, one function per kind (section 5 of the specification).

A random tensor depends on the seed and its own name alone: the same bytes in any order, alone or with
the rest, on any number of threads.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch

from hxaconv.formats.dtypes import num_bytes
from hxaconv.formats.files import Extent
from hxaconv.model.architecture import mixer_tensors
from hxaconv.model.config import StudentConfig
from hxaconv.model.names import mixer_prefix
from hxaconv.model.plan import Plan, Ranges, Recipe
from hxaconv.surgery.arithmetic import computed
from hxaconv.surgery.one_thread import one_thread

LAYER_ARCHITECTURE = 78.0
"""What published trainers write into `layer_architecture`."""

ORTHOGONAL_GAIN = 0.1
VALUE_AND_KEY_MIX = 0.73
BONUS = -0.04
RANDOM = ("w2", "a2", "v2", "k2", "g2")
ZERO = ("w1", "a1", "v1", "k1", "g1")
CHOLESKY_RATIO = 4
"""Height over width from which the condition number of a normal matrix is about 3 at most."""


def _lin(width: int) -> torch.Tensor:
    return torch.arange(width, dtype=torch.float64) / (width - 1) - 0.5


def _zig(width: int, head_dim: int) -> torch.Tensor:
    middle = (head_dim - 1) / 2
    z = (torch.arange(width, dtype=torch.float64) % head_dim - middle) / middle
    return z * z.abs()


def decay_bias(width: int, head_dim: int, layer: int, num_layers: int) -> torch.Tensor:
    """w0, (1,1,A): -6 + 6*(n/(A-1))**(1 + q**0.3) + 0.5 + 2.5*zig, q = layer/(L-1)."""
    q = layer / max(1, num_layers - 1)
    ramp: torch.Tensor = (torch.arange(width, dtype=torch.float64) / (width - 1)) ** (1 + q**0.3)
    return (-6 + 6 * ramp + 0.5 + 2.5 * _zig(width, head_dim)).view(1, 1, width)


def iclr_bias(width: int, head_dim: int) -> torch.Tensor:
    """a0, (1,1,A): -0.19 + 0.3*zig + 0.4*lin."""
    return (-0.19 + 0.3 * _zig(width, head_dim) + 0.4 * _lin(width)).view(1, 1, width)


def orthogonal(shape: tuple[int, int], seed: int, name: str) -> torch.Tensor:
    """A semi-orthogonal (rows, columns) matrix times 0.1, and sqrt(rows/columns) where rows > columns.

    Normal numbers from Philox keyed by seed and name, orthonormalised in float64 on one thread.
    """
    rows, columns = shape
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    generator = np.random.Generator(np.random.Philox(key=key))
    normal = torch.from_numpy(generator.standard_normal((max(shape), min(shape))))
    with one_thread():
        q = _orthonormal_rows(normal)
    gain = ORTHOGONAL_GAIN * math.sqrt(rows / columns) if rows > columns else ORTHOGONAL_GAIN
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


def _maker(config: StudentConfig, layer: int, parameter: str, seed: int) -> Callable[[], torch.Tensor]:
    width, head_dim = config.attention_size, config.head_dim
    shape = mixer_tensors(config, layer)[parameter]
    if parameter == "w0":
        return functools.partial(decay_bias, width, head_dim, layer, config.num_hidden_layers)
    if parameter == "a0":
        return functools.partial(iclr_bias, width, head_dim)
    if parameter in RANDOM:
        rank, columns = shape
        return functools.partial(orthogonal, (rank, columns), seed, mixer_prefix(layer) + parameter)
    constants = {
        "v0": VALUE_AND_KEY_MIX,
        "k0": VALUE_AND_KEY_MIX,
        "r_k": BONUS,
        "layer_architecture": LAYER_ARCHITECTURE,
        "head_size_record": float(head_dim),
    }
    return functools.partial(torch.full, shape, constants[parameter])


def initial_parameters(config: StudentConfig, layer: int, seed: int, dtype: str) -> Plan:
    """Recipes of everything in an RWKV layer that does not come from the teacher, by canonical name."""
    plan: Plan = {}
    for parameter, shape in mixer_tensors(config, layer).items():
        if "." in parameter:
            continue
        name = mixer_prefix(layer) + parameter
        origin = f"published initial value{f', seed {seed}' if parameter in RANDOM else ''}"
        if parameter in ZERO:
            plan[name] = Recipe(dtype, shape, Ranges((Extent(None, 0, num_bytes(dtype, shape)),), "init"), origin)
        else:
            plan[name] = computed(_maker(config, layer, parameter, seed), dtype, shape, origin)
    return plan
