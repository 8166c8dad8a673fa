"""The gate and the output matrix of a layer, in closed form.

M fitted tokens      Y (M, A) the heads' answers before the gate      O (M, C) the teacher's output
                     W (C, A) the student's output matrix             gain (A) the gate
"""

from __future__ import annotations

import torch
from torch import Tensor

from hxaconv.calibration.heads import DAMPING
from hxaconv.forward.pool import Pool

TOKENS_PER_COLUMN = 24
"""Below that many tokens per column, a fitted output matrix learns the tokens by heart: with 16, each layer's error
on held-out tokens falls a little and the divergence of the whole rises."""
RIDGES = (1e-3, 1e-2, 0.1, 1.0)
MAX_RESTORE = 2.0


def fit_gate(y: Tensor, target: Tensor, weight: Tensor, pool: Pool) -> Tensor:
    """The gain that minimises |O - (Y diag(gain)) W'|^2, damped: all heads at once, (A).

    Its normal equations are ((W'W) * (Y'Y)) gain = sum over tokens of Y * (O W), * elementwise.
    """
    columns = weight.T.contiguous()
    gram = pool.linear(columns, columns)
    gram *= pool.linear(y.T, y.T)
    right = (y * pool.linear(target, columns)).sum(dim=0).double()
    gram = gram.double()
    gram.diagonal().add_(float(gram.diagonal().mean()) * DAMPING + 1e-30)
    return solve_definite(gram, right[:, None])[:, 0].float()


def fit_output(gated: Tensor, target: Tensor, weight: Tensor, pool: Pool) -> tuple[Tensor, float]:
    """W nearest to the given one that explains O from the gated Y; (W, ridge).

    The ridge, in units of the mean energy of a column, is the one that predicts the last quarter best.
    """
    cut = gated.shape[0] * 3 // 4

    def refitted(tokens: int, ridge: float) -> Tensor:
        z, missing = gated[:tokens], target[:tokens] - pool.linear(gated[:tokens], weight)
        gram = pool.linear(z.T, z.T).double()
        gram.diagonal().add_(float(gram.diagonal().mean()) * ridge + 1e-30)
        change = solve_definite(gram, pool.linear(z.T, missing.T).double())
        return weight + change.T.float()

    def missed(ridge: float) -> float:
        # A ridge that gives no numbers must not win.
        value = float((target[cut:] - pool.linear(gated[cut:], refitted(cut, ridge))).square().sum())
        return value if value == value else float("inf")

    ridge = min(RIDGES, key=missed)
    return refitted(gated.shape[0], ridge), ridge


def solve_definite(gram: Tensor, right: Tensor) -> Tensor:
    """gram (n, n) symmetric and damped, right (n, k), float64; NaN where gram holds something not finite."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        return torch.full_like(right, torch.nan)
    return torch.cholesky_solve(right, factor)


def restoring(output: Tensor, target: Tensor) -> float:
    """By how much to amplify a fitted output so that it has the teacher's energy.

    Least squares shrinks what it cannot explain. The following layers and the head want the size they know:
    on trained models the KL falls although the layer's own error rises.
    """
    energy, found = float(target.square().sum()), float(output.square().sum())
    if not 0 < found < float("inf") or not 0 < energy < float("inf"):
        return 1.0
    return min(MAX_RESTORE, float((energy / found) ** 0.5))


def gate_weights(g2: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """g2 (rows, A) moved so that the gate is `gain` after storage in `dtype`; g1 must be zero.

    With g1 = 0 the gate is the sum of g2's rows over 2. All rows take an equal part, so that they stay the
    distinct directions that training needs; what rounding leaves goes to one of them.
    """
    rows = g2.shape[0]
    stored = (g2 + (2 * gain - g2.sum(dim=0)) / rows).to(dtype).float()
    for _ in range(2):
        residue = 2 * gain.double() - stored.double().sum(dim=0)
        # The smallest number of a column has the finest neighbours.
        row = stored.abs().argmin(dim=0, keepdim=True)
        moved = (stored.gather(0, row).double() + residue).to(dtype).float()
        stored.scatter_(0, row, moved)
    return stored.to(dtype)
