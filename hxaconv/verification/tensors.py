"""Tensor level: two plans compared name by name, bits first, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD
from hxaconv.model.plan import Plan, Recipe, Scratch
from hxaconv.surgery.arithmetic import SERIAL_BYTES, torch_dtype
from hxaconv.verification.report import TensorResult


def with_head(model: Model) -> Plan:
    """The plan with the head spelled out: of a tied model that is the embedding."""
    if model.config.tie_word_embeddings and HEAD not in model.plan and EMBEDDING in model.plan:
        return model.plan | {HEAD: model.plan[EMBEDDING]}
    return model.plan


def compare_tensor(name: str, source: Recipe | None, other: Recipe | None) -> TensorResult:
    """One tensor of both sides; None where a side does not have it."""
    if source is None or other is None:
        found = source or other
        assert found is not None
        status = "only in source" if other is None else "only in other"
        return TensorResult(name, status, None, f"{found.dtype} {found.shape}")
    if source.shape != other.shape:
        return TensorResult(name, "misshapen", None, f"{source.shape} against {other.shape}")
    dtypes = "" if source.dtype == other.dtype else f"{source.dtype} against {other.dtype}"
    if not dtypes and source.make == other.make:
        return TensorResult(name, "equal", 0.0)
    equal, largest = True, 0.0
    for a, b in element_pairs(source, other):
        if not dtypes and same_bits(a, b):
            continue
        equal = False
        difference = (a.to(torch.float64) - b.to(torch.float64)).abs().max().item()
        largest = difference if difference != difference else max(largest, difference)
        if largest != largest:  # NaN on one side only, or on both with other bits
            break
    if equal:
        return TensorResult(name, "equal", 0.0)
    status = "equal values" if dtypes and largest == 0.0 else "different"
    return TensorResult(name, status, largest, dtypes)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype have the same bits: NaN equals itself, 0 and -0 differ."""
    whole_numbers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(whole_numbers), b.view(whole_numbers))


def element_pairs(a: Recipe, b: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """The elements of both, in stretches of equal length."""
    left, right = _flat(a), _flat(b)
    x = y = torch.empty(0)
    for _ in range(2 * (a.numel + 1)):
        if not len(x):
            x = next(left, x)
        if not len(y):
            y = next(right, y)
        count = min(len(x), len(y))
        if not count:
            return
        yield x[:count], y[:count]
        x, y = x[count:], y[count:]


def _flat(recipe: Recipe) -> Iterator[Tensor]:
    dtype = torch_dtype(recipe.dtype)
    for piece in recipe.pieces(Scratch(SERIAL_BYTES)):
        yield torch.frombuffer(bytearray(piece) if piece.readonly else piece, dtype=dtype)
