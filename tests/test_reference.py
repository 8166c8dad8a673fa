"""The reference forward against the published code's numbers, and against its own mistakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from faults import FAULTS, Fault
from models import AGREEMENT, CASES, CONTAINERS, expected, student, teacher
from torch import Tensor

from hxaconv.forward import hxa079, llama
from hxaconv.forward.chunked import chunked, first_token
from hxaconv.forward.hxa079 import Get
from hxaconv.model.model import Model
from hxaconv.surgery.arithmetic import tensor

ROUNDING = 1e-12
"""Float64, where only the order of summation differs."""


def weights(model: Model) -> Get:
    return lambda name: tensor(model.plan[name], dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_student_logits_and_every_hidden_state_are_golden(name: str, container: str) -> None:
    model, golden = student(name, container), expected(name)
    logits, hidden = hxa079.forward(golden["input_ids"], weights(model), model.student)
    assert (logits - golden["student_logits"]).abs().max() < AGREEMENT
    for layer, x in enumerate(hidden):
        assert (x - golden["student_hidden"][layer]).abs().max() < AGREEMENT, layer


@pytest.mark.parametrize("name", CASES)
def test_teacher_logits_are_golden(name: str) -> None:
    model, golden = teacher(name), expected(name)
    logits, _ = llama.forward(golden["input_ids"], weights(model), model.config)
    assert (logits - golden["teacher_logits"]).abs().max() < AGREEMENT
    without, _ = llama.forward(golden["input_ids"], weights(model), model.config, rope=False)
    assert (without - golden["teacher_logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.case}: {fault.name}")
def test_every_mistake_shows_in_the_golden_logits(fault: Fault) -> None:
    model, golden = fault.model(student(fault.case)), expected(fault.case)
    logits, _ = fault.module().forward(golden["input_ids"], weights(model), model.student)
    # The smallest effect is that of eps: 20 times what the golden logits are met with.
    assert (logits - golden["student_logits"]).abs().max() > 20 * AGREEMENT


def test_a_module_without_a_fault_is_the_reference() -> None:
    model, golden = student("reka_tiny"), expected("reka_tiny")
    logits, _ = Fault("none", "reka_tiny", 0).module().forward(golden["input_ids"], weights(model), model.student)
    assert torch.equal(logits, hxa079.forward(golden["input_ids"], weights(model), model.student)[0])


def student_forward(name: str) -> Callable[[Tensor], Tensor]:
    model = student(name)
    get = weights(model)
    return lambda ids: hxa079.forward(ids, get, model.student)[0]


def teacher_forward(name: str) -> Callable[[Tensor], Tensor]:
    model = teacher(name)
    get = weights(model)
    return lambda ids: llama.forward(ids, get, model.config)[0]


@pytest.mark.parametrize("forward", [student_forward, teacher_forward])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_a_prefix_gives_the_same_logits(forward: Callable[[str], Callable[[Tensor], Tensor]], length: int) -> None:
    run, ids = forward("qwen3_tiny"), expected("qwen3_tiny")["input_ids"]
    whole = run(ids)
    assert (run(ids[:, :length]) - whole[:, :length]).abs().max() < ROUNDING
    changed = ids.clone()
    changed[:, length - 1] = (changed[:, length - 1] + 1) % 97
    assert (run(changed[:, :length]) - whole[:, :length]).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [1, 5])
def test_a_student_continues_from_its_state(name: str, steps: int) -> None:
    model, ids = student(name), expected(name)["input_ids"][:1]
    get, carry = weights(model), hxa079.Carry()
    whole, _ = hxa079.forward(ids, get, model.student)
    parts = [hxa079.forward(part, get, model.student, carry)[0] for part in ids.split(steps, dim=1)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < ROUNDING
    fresh = hxa079.forward(ids[:, steps:], get, model.student)[0]
    assert (fresh - whole[:, steps:]).abs().max() > 1e-3


def test_a_teacher_continues_from_its_cache() -> None:
    model, ids = teacher("reka_tiny"), expected("reka_tiny")["input_ids"][:1]
    get, cache = weights(model), {}
    whole, _ = llama.forward(ids, get, model.config)
    parts = [llama.forward(part, get, model.config, cache=cache)[0] for part in ids.split(3, dim=1)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < ROUNDING


def test_position_zero_everywhere_is_no_rope() -> None:
    model, ids = teacher("reka_tiny"), expected("reka_tiny")["input_ids"]
    get = weights(model)
    x = llama.input_norm(llama.embed(ids, get), get, model.config, 0)
    nowhere = torch.zeros(ids.shape[1], dtype=torch.int64)
    zeroed = llama.attention(x, get, model.config, 0, positions=nowhere)
    assert torch.equal(zeroed, llama.attention(x, get, model.config, 0, rope=False))
    assert (zeroed - llama.attention(x, get, model.config, 0)).abs().max() > 1e-4


def recurrence_inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    r, k, v, w, a, state = (torch.randn(2, length, 3, 10, generator=generator, dtype=torch.float64) for _ in range(6))
    # From nearly no decay to the strongest there is.
    w = -torch.nn.functional.softplus(-4 * w) - 0.5
    kk = torch.nn.functional.normalize(k, dim=-1)
    state = torch.randn(2, 3, 10, 10, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (r, w, k, v, kk, a.sigmoid(), state)]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("chunk", [1, 7, 32, 128])
def test_the_chunked_recurrence_is_the_loop(length: int, chunk: int) -> None:
    inputs = recurrence_inputs(length, torch.float64)
    y, state = hxa079.loop(*inputs)
    other, other_state = chunked(*inputs, chunk=chunk)
    assert (y - other).abs().max() < 1e-11
    assert (state - other_state).abs().max() < 1e-11


def test_a_first_token_needs_no_state() -> None:
    *inputs, state = recurrence_inputs(1, torch.float64)
    y, _ = hxa079.loop(*inputs, torch.zeros_like(state))
    assert (y - first_token(*inputs, state)[0]).abs().max() < 1e-13
    assert (y - hxa079.loop(*inputs, state)[0]).abs().max() > 0.1


def test_the_chunked_recurrence_holds_in_float32_at_the_strongest_decay() -> None:
    inputs = recurrence_inputs(256, torch.float32)
    inputs[1] = torch.full_like(inputs[1], -0.5)
    exact, _ = hxa079.loop(*(x.double() for x in inputs))
    for chunk in (32, 128):
        y, _ = chunked(*inputs, chunk=chunk)
        assert (y - exact).norm() / exact.norm() < 2e-6


def test_the_current_token_is_answered_with_its_own_value_and_bonus() -> None:
    # One head, one token: y = v (k . r), whatever the rest does.
    r, w, k, v, kk, a, _ = recurrence_inputs(1, torch.float64)
    y, state = hxa079.loop(r, w, k, v, kk, a, torch.zeros(2, 3, 10, 10, dtype=torch.float64))
    assert torch.allclose(y, v * (k * r).sum(dim=-1, keepdim=True))
    assert torch.allclose(state, v[:, 0, :, :, None] * k[:, 0, :, None, :])
