"""What tensors of a student are made of: copies, multiples of the teacher's, initial values."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import FACTORS, changed, fresh, student, teacher
from torch import Tensor

from hxaconv.model.config import student_of
from hxaconv.model.model import Model
from hxaconv.surgery.arithmetic import computed, scaled, tensor, torch_dtype
from hxaconv.surgery.init import InitSettings, init_from_teacher
from hxaconv.surgery.reshape import pad_ffn
from hxaconv.verification.claims import departures, is_multiple, untouched_layers

PREFIX = "model.layers.0.self_attn."


def stored(values: Tensor, dtype: str) -> Tensor:
    return values.to(torch_dtype(dtype))


def moved(values: Tensor) -> Tensor:
    """One value of many, by a hundredth of itself and a little."""
    flat = values.clone().flatten()
    flat[-1] = flat[-1] * 1.02 + 1e-3
    return flat.view(values.shape)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("factor", [0.3, 1.0, -2.5, 0.0])
def test_a_multiple_is_one_by_any_factor(dtype: str, factor: float) -> None:
    values = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    origin = stored(values, "BF16")
    made = stored(values.float() * factor, dtype)
    assert is_multiple(made, origin)
    recipe = computed(lambda: values, "BF16", tuple(values.shape), "made for a test")
    assert is_multiple(tensor(scaled(recipe, factor, dtype, "")), origin)
    assert not is_multiple(stored(moved(values.float() * factor), dtype), origin)
    assert not is_multiple(stored(values.float().T.contiguous() * factor, dtype), origin)
    assert not is_multiple(stored(values.float().flip(0) * 0.3, dtype), origin)


def test_values_that_are_not_finite_tell_nothing_of_a_factor() -> None:
    values = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    values[3, 4] = torch.nan
    assert is_multiple(stored(values * 0.3, "BF16"), stored(values, "F32"))
    assert not is_multiple(stored(moved(values * 0.3), "BF16"), stored(values, "F32"))
    assert not is_multiple(stored(values * torch.inf, "BF16"), stored(values.nan_to_num(), "F32"))


def test_a_fresh_student_is_untouched_by_any_preset() -> None:
    base, made = fresh()
    assert untouched_layers(made) == (0, 2) and departures(made, base) == {}
    factors = FACTORS | {"value": 0.123, "key": 1.0, "output": -0.7}
    config = student_of(base.config, (1, 3))
    other = Model(config, init_from_teacher(base.plan, config, InitSettings(factors, 7, "F16")), "other")
    assert untouched_layers(other) == (0, 2) and departures(other, base) == {}


def test_a_student_that_the_published_code_initialised_is_untouched() -> None:
    made, base = student("reka_tiny_init"), teacher("reka_tiny_init")
    assert untouched_layers(made) == made.student.rwkv_layers
    assert departures(made, base) == {}
    trained = student("reka_tiny")
    assert untouched_layers(trained) == ()


@pytest.mark.parametrize("part", ["v0", "k0", "r_k", "w0", "a0", "w1", "a1", "v1", "k1", "g1"])
def test_each_constant_and_bias_tells_of_training(part: str) -> None:
    _, made = fresh()
    assert untouched_layers(changed(made, PREFIX + part, moved)) == (2,)


@pytest.mark.parametrize("part", ["receptance", "key", "value", "output", "r_norm", "k_norm"])
def test_each_projection_tells_of_training_beside_the_teacher(part: str) -> None:
    base, made = fresh()
    name = f"{PREFIX}{part}.weight"
    touched = changed(made, name, moved)
    assert untouched_layers(touched) == (0, 2)
    assert list(departures(touched, base)) == [name]
    assert "the teacher's model.layers.0.self_attn." in departures(touched, base)[name]


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_what_a_student_copied_is_the_teachers(dtype: str) -> None:
    base, made = fresh(dtype=dtype)
    assert departures(made, base) == {}
    for name in ("embed_tokens.weight", "layers.2.mlp.up_proj.weight", "layers.1.self_attn.q_proj.weight"):
        assert departures(changed(made, f"model.{name}", moved, dtype), base)[f"model.{name}"] == "the teacher's"


def test_an_mlp_padded_with_zeros_is_the_teachers_still() -> None:
    made, base, name = student("reka_tiny_init"), teacher("reka_tiny_init"), "model.layers.0.mlp.up_proj.weight"
    plan, size = pad_ffn(made.plan, made.student, 64)
    padded = Model(dataclasses.replace(made.student, intermediate_size=size), plan, "padded")
    assert size > made.student.intermediate_size
    assert departures(padded, base) == {}
    assert list(departures(changed(padded, name, lambda values: values + 1), base)) == [name]
