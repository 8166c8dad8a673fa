"""Polish: the whole student gets nearer, and the bytes depend on nothing but tokens and models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_TEACHER
from models import GOLDEN

from hxaconv.calibration import polish as module
from hxaconv.calibration.polish import orthogonal, polish, sequences
from hxaconv.calibration.streaming import calibrate
from hxaconv.errors import HxaconvError
from hxaconv.forward import hxa079, llama
from hxaconv.forward.chunked import chunked
from hxaconv.load import load_teacher
from hxaconv.model.config import student_of
from hxaconv.model.model import Model
from hxaconv.options import Fit
from hxaconv.surgery.arithmetic import tensor
from hxaconv.surgery.init import PRESETS, InitSettings, init_from_teacher


def pair(folder, gqa_layers=()):
    teacher = load_teacher(str(folder))
    config = student_of(teacher.config, gqa_layers)
    plan = init_from_teacher(teacher.plan, config, InitSettings(PRESETS["openmose-stage1"], 0, "BF16"))
    return teacher, Model(config, plan, "student")


@pytest.fixture(scope="module")
def small():
    return pair(GOLDEN / "qwen3_tiny" / "teacher", (1,))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Sequences of 48 tokens, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(module, "LENGTH", 48)
    yield
    torch.set_num_threads(before)


def some_ids(model, tokens=48 * 5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator)


def stored(plan):
    return {name: tensor(recipe).view(torch.uint8).numpy().tobytes() for name, recipe in plan.items()}


def divergence(teacher, student, plan, rows):
    """By the reference forward."""
    theirs = {name: tensor(recipe, dtype=torch.float32) for name, recipe in teacher.plan.items()}.__getitem__
    mine = {name: tensor(recipe, dtype=torch.float32) for name, recipe in {**student.plan, **plan}.items()}.__getitem__
    found = []
    for row in rows[:, None]:
        p = llama.forward(row, theirs, teacher.config)[0].log_softmax(dim=-1)
        q = hxa079.forward(row, mine, student.student)[0].log_softmax(dim=-1)
        found.append(float((p.exp() * (p - q)).sum(dim=-1).mean()))
    return sum(found) / len(found)


def test_the_student_gets_nearer_on_tokens_it_was_not_trained_on(monkeypatch):
    monkeypatch.setattr(module, "LENGTH", 128)
    teacher, student = pair(TINY_TEACHER)
    ids = torch.from_numpy(np.load(TINY_TEACHER / "calibration_tokens.npy").astype(np.int64))
    fitted = calibrate(teacher, student, ids[:1], Fit(refine_steps=0)).replaced
    student = replace(student, plan={**student.plan, **fitted})
    replaced, report = polish(teacher, student, ids, 128 * 9)
    curve = dict(report.curve)
    assert (report.trained_sequences, report.held_out_sequences) == (8, 1)
    assert curve[report.best_step] == min(curve.values()) < 0.8 * curve[0]
    assert {name.partition("self_attn.")[2] for name in replaced} == {
        f"{part}.weight" for part in ("receptance", "key", "value", "output")
    }
    assert all(replaced[name].dtype == student.plan[name].dtype for name in replaced)
    held_out = sequences(ids, 128 * 9)[1]
    with torch.no_grad():
        assert divergence(teacher, student, {}, held_out) == pytest.approx(curve[0], rel=1e-3)
        best = divergence(teacher, student, replaced, held_out)
    assert best == pytest.approx(curve[report.best_step], rel=1e-3)


def test_gradients_are_those_of_the_whole_model(small, monkeypatch):
    """The streamed backward pass against autograd through everything, and not without what v_first hands back."""
    teacher, student = small
    ids, seen = some_ids(teacher), {}
    monkeypatch.setattr(module, "BATCH", 2)
    original = module._Polish._keep

    def spy(self, name, weight, momentum, later=0):
        original(self, name, weight, momentum, later)
        if later:
            seen[name] = momentum / (1 - module.MOMENTUM)
        if len(seen) == 4 * student.config.num_hidden_layers:
            raise KeyboardInterrupt

    monkeypatch.setattr(module._Polish, "_keep", spy)
    with pytest.raises(KeyboardInterrupt):
        polish(teacher, student, ids, ids.numel())
    weights = {name: tensor(recipe, dtype=torch.float32) for name, recipe in student.plan.items()}
    for name in seen:
        weights[name].requires_grad_()
    theirs = {name: tensor(recipe, dtype=torch.float32) for name, recipe in teacher.plan.items()}.__getitem__
    losses = []
    for row in sequences(ids, ids.numel())[0][:2, None]:
        x, carry = hxa079.embed(row, weights.__getitem__), hxa079.Carry()
        for i in range(student.config.num_hidden_layers):
            normed = hxa079.input_norm(x, weights.__getitem__, student.student, i)
            x = x + hxa079.mixer(normed, weights.__getitem__, student.student, i, carry, chunked)
            x = hxa079.feed_forward(x, weights.__getitem__, student.student, i)
        q = hxa079.logits(x, weights.__getitem__, student.student).log_softmax(dim=-1)
        p = llama.forward(row, theirs, teacher.config)[0].log_softmax(dim=-1)
        losses.append((p.exp() * (p - q)).sum(dim=-1).mean())
    (sum(losses) / len(losses)).backward()
    assert len(seen) == 4 * student.config.num_hidden_layers
    assert "model.layers.1.self_attn.q_proj.weight" in seen  # layers that stay attention are polished too
    for name, found in seen.items():
        expected = weights[name].grad
        assert float((found - expected).norm() / expected.norm()) < 1e-4, name


def test_same_bytes_on_any_number_of_threads_and_after_an_interruption(small, tmp_path):
    teacher, student = small
    ids = some_ids(teacher)
    one, report = polish(teacher, student, ids, ids.numel(), workers=1)
    assert report.best_step, "nothing was learned: the test says nothing"
    assert stored(polish(teacher, student, ids, ids.numel(), workers=2)[0]) == stored(one)

    class Stopping:
        def start(self, title, total):
            self.steps = 0

        def advance(self, n, what=""):
            self.steps += n
            if self.steps == 1:
                raise KeyboardInterrupt

        def stop(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        polish(teacher, student, ids, ids.numel(), folder=tmp_path, progress=Stopping())
    went_on, report_then = polish(teacher, student, ids, ids.numel(), folder=tmp_path)
    assert report_then == report
    assert stored(went_on) == stored(one)
    assert stored(polish(teacher, student, some_ids(teacher, seed=1), ids.numel())[0]) != stored(one)


def test_directions_are_orthogonal_head_by_head():
    gradient = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    for output in (False, True):
        found = orthogonal(gradient.T if output else gradient, 3, output)
        found = (found.T if output else found).reshape(2, 3, 10)
        assert float(found.square().mean()) == pytest.approx(1.0, abs=0.4)
        singular = torch.linalg.svdvals(found) / 10**0.5
        assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3


def test_too_few_tokens_are_refused(small):
    with pytest.raises(HxaconvError, match="two sequences of 48"):
        polish(*small, some_ids(small[0], 60), 60)


def test_a_start_that_cannot_be_bettered_is_left(small, monkeypatch):
    monkeypatch.setattr(module, "RATE", -0.025)  # uphill
    replaced, report = polish(*small, some_ids(small[0]), 48 * 5)
    assert report.best_step == 0 and not replaced
    assert report.curve[-1][1] > report.curve[0][1]
