"""Tensor level: two plans compared name by name, bits first, a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hxaconv.forward.matrix import BLOCK_BYTES
from hxaconv.forward.walk import Held, Walk
from hxaconv.model.plan import Recipe
from hxaconv.verification.report import TensorResult
from hxaconv.verification.values import same_bits


def compare_held(walk: Walk, source: str, other: str) -> Iterator[TensorResult]:
    """What two models of a walk hold now, name by name."""
    one, two = walk.held(source), walk.held(other)
    for name in dict.fromkeys([*one, *two]):
        yield _compare(walk, name, one.get(name), two.get(name))


def joined(results: Iterable[TensorResult]) -> TensorResult:
    """The result for a tensor that was compared some rows at a time."""
    found = list(results)
    worst = min(found, key=lambda result: ORDER.index(result.status))
    differences = [result.max_difference or 0.0 for result in found]
    largest = math.nan if any(map(math.isnan, differences)) else max(differences)
    return TensorResult(worst.name, worst.status, largest, worst.detail)


ORDER = ("only in source", "only in other", "misshapen", "different", "equal values", "equal")
"""What a tensor can be found to be, the worst first."""


def _compare(walk: Walk, name: str, one: Held | None, two: Held | None) -> TensorResult:
    if one is None or two is None:
        return unpaired(name, one.recipe if one else None, two.recipe if two else None)
    if one is two:
        return TensorResult(name, "equal", 0.0)
    if one.recipe.shape != two.recipe.shape:
        return misshapen(name, one.recipe, two.recipe)
    dtypes = "" if one.recipe.dtype == two.recipe.dtype else f"{one.recipe.dtype} against {two.recipe.dtype}"
    step = BLOCK_BYTES // 8
    pairs = list(zip(torch.split(one.values.reshape(-1), step), torch.split(two.values.reshape(-1), step), strict=True))
    found = walk.pool.map(lambda pair: _difference(*pair), pairs)
    largest = math.nan if any(map(math.isnan, found)) else max(found, default=0.0)
    return TensorResult(name, "equal values" if dtypes and largest == 0.0 else "different", largest, dtypes)


def unpaired(name: str, source: Recipe | None, other: Recipe | None) -> TensorResult:
    """A tensor that only one side has."""
    found = source or other
    assert found is not None
    return TensorResult(name, f"only in {'source' if other is None else 'other'}", None, f"{found.dtype} {found.shape}")


def misshapen(name: str, source: Recipe, other: Recipe) -> TensorResult:
    """A tensor of another shape on the other side."""
    return TensorResult(name, "misshapen", None, f"{source.shape} against {other.shape}")


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest |a - b|; NaN where either has one, with other bits."""
    if a.dtype == b.dtype and same_bits(a, b):
        return 0.0
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return (a.to(wide) - b.to(wide)).abs().max().item()
