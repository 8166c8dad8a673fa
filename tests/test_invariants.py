"""What each transformation promises: kept promises pass, each broken one is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from models import FACTORS, changed, failed, fresh, ids, student
from torch import Tensor

from hxaconv.errors import CheckFailed
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention
from hxaconv.surgery.arithmetic import cast, scaled
from hxaconv.surgery.init import PRESETS
from hxaconv.surgery.reshape import pad_ffn
from hxaconv.verification.compare import compare_models, verify_model
from hxaconv.verification.invariants import check_converted, check_initialised, completed, initial_claims


def test_a_fresh_student_keeps_every_promise() -> None:
    for dtype in ("BF16", "F32"):
        base, made = fresh(dtype=dtype)
        report = check_initialised(base, made, factors=FACTORS)
        assert report.passed, report.reason
        assert {"copied tensors", "scaled projections", "initial values", "GQA layers"} <= {
            check.name for check in report.checks
        }


def test_attention_alone_is_completed_by_the_teacher() -> None:
    base, made = fresh()
    alone = dataclasses.replace(made, plan={n: r for n, r in made.plan.items() if is_attention(n)})
    assert check_initialised(base, alone, factors=FACTORS).passed
    assert completed(made, base) is made


BROKEN: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "copied tensors": ("model.layers.2.mlp.down_proj.weight", lambda values: values * 1.01),
    "scaled projections": ("model.layers.0.self_attn.receptance.weight", lambda values: values * 2),
    "initial values": ("model.layers.2.self_attn.r_k", lambda values: values * 2),
    "GQA layers": ("model.layers.3.self_attn.v_proj.weight", lambda values: values.flip(0)),
}


@pytest.mark.parametrize("promise", BROKEN)
def test_a_broken_promise_is_named(promise: str) -> None:
    base, made = fresh()
    name, change = BROKEN[promise]
    report = check_initialised(base, changed(made, name, change), factors=FACTORS)
    assert promise in failed(report)
    assert name in report.reason
    with pytest.raises(CheckFailed):
        report.raise_if_failed()


def test_only_the_projections_that_were_checked_are_listed() -> None:
    base, made = fresh()
    kinds = (".receptance.", ".key.", ".k_norm.", ".r_norm.")
    replaced = [name for name in made.plan if any(kind in name for kind in kinds)]
    claims = initial_claims(made.student, FACTORS, without=replaced.__contains__)
    report = compare_models(made, base, ids=None, claims=claims)
    told = next(check.detail for check in report.checks if check.name == "scaled projections")
    assert told.startswith("4 tensors are the teacher's, value x 0.3, output x 0.5")


@pytest.mark.parametrize(
    "part", ["w0", "a0", "w1", "w2", "a2", "v2", "k2", "g2", "r_k", "layer_architecture", "head_size_record"]
)
def test_every_kind_of_initial_value_is_checked(part: str) -> None:
    base, made = fresh()
    name = f"model.layers.2.self_attn.{part}"
    wrong = changed(made, name, lambda values: values * 1.1 + 0.1)
    report = compare_models(wrong, base, ids=None, claims=initial_claims(made.student, FACTORS))
    assert [name in check.detail for check in report.checks if check.name == "initial values"] == [True]


def test_the_wrong_factor_is_found() -> None:
    base, made = fresh()
    assert "scaled projections" in failed(check_initialised(base, made, factors=PRESETS["openmose-stage2"]))


def test_a_lost_tensor_is_named() -> None:
    base, made = fresh()
    name = "model.layers.1.self_attn.q_norm.weight"
    lacking = dataclasses.replace(made, plan={n: r for n, r in made.plan.items() if n != name})
    with pytest.raises(KeyError):
        check_initialised(base, lacking, factors=FACTORS)
    assert name in failed(verify_model(lacking, ids=ids(made)))["names and shapes"]


def test_conversions_keep_the_model() -> None:
    model = student("reka_tiny")
    assert check_converted(model, student("reka_tiny", "student_hf")).expect == "identical"
    half = dataclasses.replace(model, plan={n: cast(r, "F16") for n, r in model.plan.items()})
    report = check_converted(model, half)
    assert report.passed and report.expect == "close"
    rounded_twice = dataclasses.replace(
        half, plan=half.plan | {n: scaled(r, 1.001, "F16", "x") for n, r in list(model.plan.items())[5:6]}
    )
    assert "tensors" in failed(check_converted(model, rounded_twice))


def test_padding_must_be_zeros() -> None:
    model = student("reka_tiny")
    plan, size = pad_ffn(model.plan, model.student, 64)
    padded = Model(dataclasses.replace(model.student, intermediate_size=size), plan, "padded")
    report = check_converted(model, padded)
    assert size == 128 and report.passed, report.reason
    wrong = changed(padded, "model.layers.0.mlp.up_proj.weight", lambda values: values + 1)
    assert "tensors" in failed(check_converted(model, wrong))


def test_attention_alone_is_compared_without_a_forward() -> None:
    model = student("reka_tiny")
    alone = dataclasses.replace(model, plan={n: r for n, r in model.plan.items() if is_attention(n)})
    report = check_converted(alone, alone)
    assert report.passed and report.logits is None
    assert any("no forward" in note for note in report.notes)
    other = changed(alone, "model.layers.0.self_attn.w0", lambda values: values + 1)
    assert not check_converted(alone, other).passed


def test_after_init_one_random_matrix_of_each_layer_is_drawn_again() -> None:
    base, made = fresh(gqa_layers=())
    assert check_initialised(base, made, factors=FACTORS, seed=0).passed
    assert check_initialised(base, made, factors=FACTORS).passed
    wrong = check_initialised(base, made, factors=FACTORS, seed=1)
    names = failed(wrong)["initial values"]
    assert [names.count(f"layers.{layer}.") for layer in range(4)] == [1, 1, 1, 1]
    assert len({name.rpartition(".")[2] for name in names.partition(": ")[2].split(", ")}) == 4  # another in each layer
