"""Initial values: what is published is reproduced, what is random depends on seed and name alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_names import CONFIG

from hxaconv.model.variants.base import decay_ramp
from hxaconv.surgery import initial
from hxaconv.surgery.arithmetic import one_thread, tensor
from hxaconv.surgery.initial import orthogonal


@pytest.mark.parametrize("shape", [(32, 48), (256, 48), (40, 40), (16, 300)])
def test_orthogonal_is_orthogonal(shape: tuple[int, int]) -> None:
    made = orthogonal(shape, 0, "w2", 0.1)
    rows, columns = shape
    gram = made @ made.T if rows <= columns else made.T @ made
    gain = 0.01 * (rows / columns if rows > columns else 1)
    # float64: far below bf16's rounding, which is all that the output keeps.
    assert torch.allclose(gram, gain * torch.eye(len(gram), dtype=gram.dtype), atol=1e-12)


def test_orthogonal_depends_on_seed_and_name_alone() -> None:
    first = orthogonal((32, 48), 7, "a", 0.1)
    orthogonal((16, 16), 7, "b", 0.1)
    assert torch.equal(first, orthogonal((32, 48), 7, "a", 0.1))
    assert not torch.equal(first, orthogonal((32, 48), 8, "a", 0.1))
    assert not torch.equal(first, orthogonal((32, 48), 7, "b", 0.1))


def test_orthogonal_does_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    made = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            made.append(orthogonal((320, 640), 0, "w2", 0.1).bfloat16())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize("shape", [(32, 127), (32, 128), (128, 32)])
def test_orthogonal_is_the_q_of_qr_whichever_way_it_is_computed(shape: tuple[int, int], monkeypatch) -> None:
    made = {}
    for ratio in (1, math.inf):
        monkeypatch.setattr(initial, "CHOLESKY_RATIO", ratio)
        made[ratio] = orthogonal(shape, 0, "w2", 0.1)
    # Both are right to the rounding of float64, times the condition number (3 to 6 here).
    assert torch.allclose(made[1], made[math.inf], rtol=0, atol=1e-14)
    assert not torch.equal(made[1], made[math.inf]), "only one way was taken"


def test_the_number_of_threads_is_restored() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with one_thread(), one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_single_layer_has_no_division_by_zero() -> None:
    config = replace(CONFIG, num_hidden_layers=1)
    assert torch.isfinite(decay_ramp(config, 0)).all()


def test_a_random_matrix_is_made_once_and_read_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(seed: int) -> dict[str, Any]:
        return initial.initial_parameters(CONFIG, CONFIG.rwkv_layers[0], seed, "BF16")

    made: list[str] = []
    real = initial.orthogonal

    def counted(shape: tuple[int, int], seed: int, name: str, gain: float) -> torch.Tensor:
        made.append(name)
        return real(shape, seed, name, gain)

    monkeypatch.setattr(initial, "orthogonal", counted)
    expected = {name: tensor(recipe) for name, recipe in plan(0).items()}
    random = list(made)
    assert random
    for _ in range(3):
        for name, recipe in initial.made_once(plan(0), tmp_path / "kept").items():
            assert torch.equal(tensor(recipe), expected[name])
            assert recipe.make.kind == plan(0)[name].make.kind
    assert made == random * 2
    other = initial.made_once(plan(1), tmp_path / "kept")
    assert not torch.equal(tensor(other[random[0]]), expected[random[0]])
    for path in (tmp_path / "kept").iterdir():
        path.write_bytes(b"torn")
    assert torch.equal(tensor(initial.made_once(plan(0), tmp_path / "kept")[random[0]]), expected[random[0]])
