"""Casts and factors in pieces give the bits that torch gives of the whole tensor."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from hxaconv.formats.files import SourceFile
from hxaconv.model.plan import Recipe, stored
from hxaconv.surgery.arithmetic import dtype_name, scaled, tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FACTORS = (1.0, 0.5, 0.3, -1.7)


def in_a_file(values: torch.Tensor, path: Path) -> Recipe:
    path.write_bytes(values.view(torch.uint8).numpy().tobytes())
    return stored(dtype_name(values.dtype), tuple(values.shape), SourceFile.local(path), 0, "here")


def awkward(dtype: torch.dtype) -> torch.Tensor:
    """Several pieces of random values of many sizes, halfway cases of a rounding to bf16, the ends of the range."""
    values = torch.randn(33_001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:1000] *= 1e-6
    values[1000:2000] = 1 + torch.arange(1000, dtype=torch.float64) / 256
    values[2000:2004] = torch.tensor([0.0, -0.0, 65504.0, -65504.0], dtype=torch.float64)
    return values.to(dtype)


@pytest.mark.parametrize(("source", "target", "factor"), list(itertools.product(DTYPES, DTYPES, FACTORS)))
def test_a_product_is_rounded_once(source: torch.dtype, target: torch.dtype, factor: float, tmp_path: Path) -> None:
    values = awkward(source)
    made = tensor(scaled(in_a_file(values, tmp_path / "x"), factor, dtype_name(target), "scaled"))
    wide = values if source == torch.float64 else values.float()
    expected = (wide * factor).to(target)
    assert made.dtype == target and torch.equal(made.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_in_the_same_dtype_is_what_torch_gives(dtype: torch.dtype, tmp_path: Path) -> None:
    values = awkward(dtype)
    made = tensor(scaled(in_a_file(values, tmp_path / "x"), 0.3, dtype_name(dtype), "scaled"))
    assert torch.equal(made, values * 0.3)
    twice = (values * 3.0) * 0.1
    assert not torch.equal(made, twice), "rounding twice would not be seen"
