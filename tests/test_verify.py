"""`verify`: what it says of models that are right, of models that are wrong, and where."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import re
from pathlib import Path

import pytest
import torch
from faults import FAULTS, Fault, measure
from models import AGREEMENT, CASES, FACTORS, Literal, changed, expected, failed, fresh, ids, student, teacher
from safetensors.torch import load_file
from torch import Tensor

from hxaconv.errors import CheckFailed, HxaconvError
from hxaconv.forward import pool as matrix_module
from hxaconv.forward import walk as walk_module
from hxaconv.forward.logits import Likelihood
from hxaconv.forward.tokens import checked_device
from hxaconv.forward.walk import Walk
from hxaconv.model.model import Model
from hxaconv.model.plan import Recipe
from hxaconv.surgery.arithmetic import cast
from hxaconv.verification.compare import Compute, Thresholds, compare_models, verify_model
from hxaconv.verification.invariants import History, Made, check_against
from hxaconv.verification.report import Report

TABLE = Path(__file__).parents[1] / "benchmarks" / "NEGATIVE_CONTROLS.md"


def recorded(fault: Fault) -> tuple[float, float, int]:
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if cells[1:3] == [fault.name, fault.case]:
            return float(cells[3]), float(cells[4]), int(cells[5])
    raise AssertionError(f"{fault.name} ({fault.case}) is not in {TABLE.name}")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.case}: {fault.name}")
def test_the_first_wrong_layer_is_named_and_the_effect_on_record(fault: Fault) -> None:
    effect, (difference, kl, layer) = measure(fault), recorded(fault)
    assert effect.first_layer == fault.layer == layer
    assert effect.max_difference == pytest.approx(difference, rel=0.02)
    assert effect.kl == pytest.approx(kl, rel=0.02)


@pytest.mark.parametrize("name", CASES)
def test_all_containers_hold_the_same_model(name: str) -> None:
    pth, folder = student(name), student(name, "student_hf")
    grafted = student(name, "trained_attention.pth")
    for other in (folder, grafted):
        report = compare_models(pth, other, ids=ids(pth))
        assert report.passed, report.reason
        assert report.expect == "identical"
        assert report.first_difference is None
        assert set(report.tensor_counts()) == {"equal"}
        assert report.logits is not None and report.logits.max_difference == 0
        assert all(result.cosine > 1 - 1e-12 for result in report.layers)


def test_one_bit_is_found() -> None:
    model = student("reka_tiny")
    name = "model.layers.3.mlp.up_proj.weight"

    def flip(values: Tensor) -> Tensor:
        bits = values.clone().view(torch.int16)
        bits[5, 7] ^= 1
        return bits.view(torch.bfloat16)

    report = compare_models(changed(model, name, flip), model, ids=ids(model))
    assert not report.passed
    assert report.first_difference == 3
    assert [r.name for r in report.tensors if r.status != "equal"] == [name]
    with pytest.raises(CheckFailed, match=re.escape(name)):
        report.raise_if_failed()
    only_tensors = compare_models(changed(model, name, flip), model, ids=None)
    assert not only_tensors.passed and only_tensors.logits is None


def test_a_record_that_no_forward_reads_counts_as_a_tensor() -> None:
    model = student("reka_tiny")
    lacking = {n: r for n, r in model.plan.items() if not n.endswith("1.self_attn.head_size_record")}
    report = compare_models(dataclasses.replace(model, plan=lacking), model, ids=ids(model))
    assert [check.name for check in report.checks if not check.passed] == ["tensors"]
    assert "only in other" in report.reason


def test_settings_count_even_where_tensors_agree() -> None:
    model = student("reka_tiny")
    other = dataclasses.replace(model, config=dataclasses.replace(model.student, rope_theta=1e6))
    report = compare_models(other, model, ids=ids(model))
    assert "rope_theta is 1000000.0, the other's is 8000000.0" in report.reason
    assert report.first_difference == 0


def test_a_tied_head_equals_its_explicit_copy() -> None:
    tied = student("qwen3_tiny")
    embedding = tied.plan["model.embed_tokens.weight"]
    explicit = Model(
        dataclasses.replace(tied.student, tie_word_embeddings=False),
        tied.plan | {"lm_head.weight": embedding},
        "explicit",
    )
    assert compare_models(explicit, tied, ids=ids(tied)).passed
    wrong = changed(explicit, "lm_head.weight", lambda values: values * 2)
    assert not compare_models(wrong, tied, ids=ids(tied)).passed


def test_a_cast_is_close_and_not_identical() -> None:
    model = student("reka_tiny")
    wide = dataclasses.replace(model, plan={n: cast(r, "F32") for n, r in model.plan.items()})
    assert compare_models(wide, model, ids=ids(model), expect="close").passed
    identical = compare_models(wide, model, ids=ids(model), expect="identical")
    assert "equal values" in identical.reason
    half = dataclasses.replace(model, plan={n: cast(r, "F16") for n, r in model.plan.items()})
    assert compare_models(half, model, ids=ids(model), expect="close").passed
    strict = Thresholds(layer=1e-9, kl=1e-12)
    far = changed(model, "model.layers.1.mlp.up_proj.weight", lambda values: values * 1.01)
    assert not compare_models(far, model, ids=ids(model), expect="close", thresholds=strict).passed


def test_models_of_other_sizes_are_refused() -> None:
    reka = student("reka_tiny")
    with pytest.raises(HxaconvError, match="hidden_size is 48 here, 40 there"):
        compare_models(reka, student("qwen3_tiny"), ids=ids(reka))


def test_teacher_and_student_are_reported_beside_the_yardstick() -> None:
    base, made = fresh()
    report = check_against(made, base, expect="report", ids=ids(base, 40))
    assert report.passed and report.outcome == "only reported" and "passed" not in report.headline
    seed = History([Made(layers=frozenset(made.student.rwkv_layers), factors=FACTORS, seed=0)])
    assert check_against(made, base, history=seed, ids=ids(base, 40)).outcome == "passed"
    limited = check_against(made, base, expect="report", ids=ids(base, 40), thresholds=Thresholds(kl=100.0))
    assert limited.outcome == "passed"
    assert report.logits is not None and report.logits.kl_attention_zeroed is not None
    assert report.logits.kl_other_source > 0
    assert any("plain initialisation" in note for note in report.notes)
    assert [r.nope_error is not None for r in report.layers] == [False, True, False, True]
    assert {r.status for r in report.tensors} == {"equal", "only in source", "only in other"}


def test_only_a_plain_student_is_excused_as_one() -> None:
    base, made = fresh()
    learned = changed(made, "model.layers.0.self_attn.g1", lambda values: values + 0.01)
    _, attention = fresh(gqa_layers=(0, 1, 2, 3))
    for student_of_base in (learned, attention):
        report = check_against(student_of_base, base, ids=ids(base, 40))
        assert report.logits is not None and report.logits.kl_attention_zeroed is not None
        assert not any("plain initialisation" in note for note in report.notes)
        assert any("nats per token" in note for note in report.notes)


def test_kl_and_agreement_are_what_they_say() -> None:
    base, made = fresh()
    tokens = ids(base, 10)
    report = compare_models(made, base, ids=tokens, how=Compute("float64"))
    mine, theirs = (logits_of(model, tokens).log_softmax(dim=-1) for model in (made, base))
    kl = torch.nn.functional.kl_div(mine, theirs, log_target=True, reduction="batchmean")
    assert report.logits is not None
    assert report.logits.kl_other_source == pytest.approx(kl.item())
    agreement = (mine.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    assert report.logits.top1_agreement == pytest.approx(agreement)


def logits_of(model: Model, tokens: Tensor) -> Tensor:
    with Walk({"model": model}, dtype=torch.float64) as walk:
        track = walk["model"]
        stream = track.start(tokens)
        for index in walk.layers():
            track.layer(stream, index)
        normed, parts = track.final_norm(stream.x), []
        for _ in walk.slices({"model": track.head}, "head"):
            parts.append(walk.product(normed, walk.held("model")["head"].values))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", CASES)
def test_layer_by_layer_gives_the_golden_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, golden = student(name), expected(name)
    wanted = golden["student_logits"].flatten(0, 1)
    assert (logits_of(model, golden["input_ids"]) - wanted).abs().max() < AGREEMENT
    # Blocks of a few rows, and a head in several slices.
    monkeypatch.setattr(walk_module, "SLICE_BYTES", 10 * 48 * 2)
    monkeypatch.setattr(walk_module, "SMALL", 0)
    monkeypatch.setattr(matrix_module, "BLOCK_BYTES", 3 * 48 * 2)
    assert (logits_of(model, golden["input_ids"]) - wanted).abs().max() < AGREEMENT


def test_long_inputs_take_the_chunked_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = student("reka_tiny")
    tokens = ids(model, 90)
    loop = logits_of(model, tokens)
    monkeypatch.setattr(walk_module, "LOOP_TOKENS", 1000)
    other = logits_of(model, tokens)
    assert not torch.equal(loop, other)
    assert (loop - other).abs().max() < 1e-10


def test_one_layer_is_held_at_a_time_and_once() -> None:
    model = student("reka_tiny")
    other = changed(model, "model.layers.3.mlp.up_proj.weight", lambda values: values + 1)
    with Walk({"one": model, "other": other}) as walk:
        for index in walk.layers():
            held = [walk.held("one"), walk.held("other")]
            assert {int(name.split(".")[2]) for name in held[0]} == {index}
            apart = [name for name in held[0] if held[0][name] is not held[1][name]]
            assert apart == (["model.layers.3.mlp.up_proj.weight"] if index == 3 else [])
            pointers = {values.values.data_ptr() for values in held[0].values()}
            assert len(pointers) == len(held[0])


@pytest.mark.parametrize("model", [student("reka_tiny"), teacher("qwen3_tiny")], ids=["student", "teacher"])
def test_a_good_model_passes_alone(model: Model) -> None:
    report = verify_model(model, ids=ids(model))
    assert report.passed, report.reason
    assert json.loads(json.dumps(report.to_dict()))["passed"]


def test_missing_unknown_and_misshapen_tensors_are_all_listed() -> None:
    model = student("reka_tiny")
    plan = dict(model.plan)
    del plan["model.layers.1.self_attn.w0"]
    plan["model.layers.2.self_attn.r_k"] = plan["model.layers.1.self_attn.r_k"]
    plan["model.norm.weight"] = Recipe("BF16", (3,), Literal(bytes(6)), "short")
    report = verify_model(dataclasses.replace(model, plan=plan), ids=ids(model))
    found = failed(report)["names and shapes"]
    assert "layers.1.self_attn.w0 is missing" in found
    assert "layers.2.self_attn.r_k is not part" in found
    assert "model.norm.weight has shape (3,)" in found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_found(value: float) -> None:
    def spoil(values: Tensor) -> Tensor:
        values = values.clone()
        values.view(-1)[3] = value
        return values

    model = student("reka_tiny")
    name = "model.layers.1.mlp.up_proj.weight"
    found = failed(verify_model(changed(model, name, spoil), ids=ids(model)))
    assert found["finite weights"] == name
    assert "lost in layer 1" in found["finite logits"]
    record = "model.layers.1.self_attn.head_size_record"
    unread = changed(model, record, lambda values: torch.full_like(values, value))
    assert set(failed(verify_model(unread, ids=ids(model)))) == {"finite weights"}
    against = compare_models(changed(model, name, spoil), model, ids=ids(model), expect="report")
    assert failed(against)["finite weights"] == name
    assert "lost in layer 1" in failed(against)["finite logits"]
    # A value that no forward reads, on either side, and on both.
    theirs = f"{record} of the other"
    for one, two, said in ((unread, model, record), (model, unread, theirs), (unread, unread, record)):
        for tokens in (ids(model), None):
            found = failed(compare_models(one, two, ids=tokens, expect="report"))
            assert found == {"finite weights": said}
    assert compare_models(model, model, ids=None, expect="report").passed


def test_a_report_without_any_check_has_not_passed() -> None:
    report = Report(source="nothing")
    assert not report.passed
    with pytest.raises(CheckFailed, match="nothing was checked"):
        report.raise_if_failed()
    report.check("something", True, "fine")
    assert report.passed


def test_a_config_that_contradicts_itself_is_found() -> None:
    model = student("reka_tiny")
    wrong = dataclasses.replace(model.student, rms_norm_eps=1.0, rope_theta=0.0)
    found = failed(verify_model(dataclasses.replace(model, config=wrong), ids=ids(model)))
    assert "rms_norm_eps" in found["config"] and "rope_theta" in found["config"]


def test_integers_are_no_weights() -> None:
    model = student("reka_tiny")
    name = "model.layers.0.input_layernorm.weight"
    plan = model.plan | {name: Recipe("I16", (48,), Literal(bytes(96)), "integers")}
    assert "I16" in failed(verify_model(dataclasses.replace(model, plan=plan), ids=ids(model)))["names and shapes"]


def test_logits_out_holds_everything(tmp_path: Path) -> None:
    model, golden = student("reka_tiny"), expected("reka_tiny")
    alone, beside = tmp_path / "alone.safetensors", tmp_path / "beside.safetensors"
    verify_model(model, ids=golden["input_ids"], how=Compute("float64", logits_out=alone))
    compare_models(model, model, ids=golden["input_ids"], how=Compute("float64", logits_out=beside))
    content = load_file(alone)
    assert torch.equal(content["input_ids"], golden["input_ids"])
    assert (content["logits"] - golden["student_logits"]).abs().max() < AGREEMENT
    for layer in range(5):
        assert (content[f"hidden.{layer}"] - golden["student_hidden"][layer]).abs().max() < AGREEMENT
    assert alone.read_bytes() == beside.read_bytes()


def test_logits_out_on_a_full_disk_is_an_error_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = student("reka_tiny"), tmp_path / "logits.safetensors"
    verify_model(model, ids=ids(model), how=Compute(logits_out=path))
    before, calls, real = path.read_bytes(), iter(range(99)), os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if next(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    for run in (verify_model, functools.partial(compare_models, model)):
        with pytest.raises(HxaconvError, match=r"logits\.safetensors: writing failed: No space left"):
            run(model, ids=ids(model), how=Compute(logits_out=path))
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == before


def test_another_device_gives_the_same_logits() -> None:
    model = student("reka_tiny")
    # Any device but plain "cpu" is filled by way of a copy.
    kinds = (Compute(), Compute(device="cpu:0"))
    plain, copied = (compare_models(model, model, ids=ids(model), how=how) for how in kinds)
    assert copied.passed and copied.logits == plain.logits


def test_what_cannot_be_run_on_is_refused() -> None:
    model = student("reka_tiny")
    with pytest.raises(HxaconvError, match=r"does not run in bfloat16"):
        verify_model(model, ids=ids(model), how=Compute("bfloat16"))
    with pytest.raises(HxaconvError, match=r"does not run in bfloat16"):
        compare_models(model, model, ids=ids(model), how=Compute("bfloat16"))
    for device in ("cuda:99", "nowhere"):
        with pytest.raises(HxaconvError, match="device"):
            checked_device(device)
    assert checked_device("cpu") == "cpu"


@pytest.mark.parametrize("layers", [((0, 2), (1, 3)), ((1,), (1, 3)), ((0,), (1,)), ((), (0, 1, 2, 3))])
def test_students_with_other_layer_maps_are_compared(layers: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    models = [fresh("qwen3_tiny", gqa_layers=chosen)[1] for chosen in layers]
    report = compare_models(*models, ids=ids(models[0]), expect="report")
    assert report.passed
    kept = [result for result in report.layers if result.kind == result.other_kind]
    assert all(result.output_error == 0 for result in kept)
    assert all(result.output_error > 0 for result in report.layers if result.kind != result.other_kind)


def test_the_likelihood_of_tokens_does_not_depend_on_the_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(7, 50, generator=generator), torch.randint(50, (7,), generator=generator)
    wanted = torch.nn.functional.cross_entropy(logits.double(), tokens, reduction="none")
    for step in (50, 8):
        nll = Likelihood(tokens)
        for start in range(0, 50, step):
            nll.add(start, logits[:, start : start + step])
        assert torch.allclose(nll.result(), wanted, rtol=1e-12)
    shifted = Likelihood(tokens)
    shifted.add(1, logits[:, 1:])
    assert not torch.allclose(shifted.result(), wanted, rtol=1e-3)
