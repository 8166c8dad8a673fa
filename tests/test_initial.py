"""Initial values: what is published is reproduced, what is random depends on seed and name alone."""

from __future__ import annotations

import pytest
import torch

from hxaconv.initial import decay_bias, orthogonal


@pytest.mark.parametrize("shape", [(32, 48), (256, 48), (40, 40)])
def test_orthogonal_is_orthogonal(shape: tuple[int, int]) -> None:
    made = orthogonal(shape, 0, "w2")
    rows, columns = shape
    gram = made @ made.T if rows <= columns else made.T @ made
    gain = 0.01 * (rows / columns if rows > columns else 1)
    # float64 QR: far below bf16's rounding, which is all that the output keeps.
    assert torch.allclose(gram, gain * torch.eye(len(gram), dtype=gram.dtype), atol=1e-12)


def test_orthogonal_depends_on_seed_and_name_alone() -> None:
    first = orthogonal((32, 48), 7, "a")
    orthogonal((16, 16), 7, "b")
    assert torch.equal(first, orthogonal((32, 48), 7, "a"))
    assert not torch.equal(first, orthogonal((32, 48), 8, "a"))
    assert not torch.equal(first, orthogonal((32, 48), 7, "b"))


def test_orthogonal_does_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    made = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            made.append(orthogonal((320, 640), 0, "w2").bfloat16())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1])


def test_a_single_layer_has_no_division_by_zero() -> None:
    assert torch.isfinite(decay_bias(48, 12, 0, 1)).all()
