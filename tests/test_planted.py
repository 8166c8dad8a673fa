"""Which layers look something up: strategies find those that were planted."""

import pytest
import torch
from selection_models import advised, calibrated_student, induction_ids, induction_teacher

from hxaconv.forward import hxa079, llama
from hxaconv.selection import gates
from hxaconv.surgery.arithmetic import tensor


@pytest.fixture(scope="module")
def planted():
    teacher, layers = induction_teacher(0)
    return teacher, calibrated_student(teacher, 0, steps=0), layers


def test_answer_tokens_find_the_layers_that_look_up(planted):
    teacher, student, layers = planted
    found = advised(teacher, student, induction_ids(0), num_layers=8, strategy="nll", count=2)
    assert found.pick.layers == layers
    worth = found.columns[0].values
    assert min(worth[i] for i in layers) > 1.5 * max(worth[i] for i in range(8) if i not in layers)
    assert found.facts["recall of the teacher"] < 1.5 < 2 < torch.tensor(40.0).log()
    # Negative control: what turns the stream most is elsewhere.
    other = advised(teacher, student, induction_ids(0), num_layers=8, strategy="influence", count=2)
    assert other.pick.layers != layers


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 20), marks=pytest.mark.slow)])
def test_copying_heads_find_them_in_every_teacher(seeds):
    """The strategy that is recommended, with the teacher alone."""
    for seed in seeds:
        teacher, layers = induction_teacher(seed)
        found = advised(teacher, ids=induction_ids(seed), num_layers=8, strategy="retrieval", count=2)
        assert found.pick.layers == layers, seed


@pytest.mark.slow
def test_gates_find_the_layers_that_look_up(planted, tmp_path):
    teacher, student, layers = planted
    asked = {"num_layers": 8, "strategy": "gates", "count": 2}
    found = advised(teacher, student, induction_ids(0), **asked)
    assert found.pick.layers == layers
    assert sum(found.columns[0].values) == pytest.approx(2, abs=1e-6)
    assert found.columns[0].values[0] == 0.0  # never picked, so that it takes nothing of the budget


def test_interrupted_gates_go_on(planted, tmp_path, monkeypatch):
    teacher, student, _ = planted
    monkeypatch.setattr(gates, "STEPS", 2)
    asked, cache, calls = {"num_layers": 8, "strategy": "gates", "count": 2}, tmp_path / "scores", []

    def stop():
        calls.append(1)
        raise KeyboardInterrupt

    ids = induction_ids(0)[:1, :16]
    whole = advised(teacher, student, ids, **asked)
    with pytest.raises(KeyboardInterrupt):
        advised(teacher, student, ids, **asked, more={"cache": cache, "check": stop})
    steps = []
    real = gates._step
    monkeypatch.setattr(gates, "_step", lambda *words: (steps.append(1), real(*words))[1])
    assert advised(teacher, student, ids, **asked, more={"cache": cache}) == whole
    assert len(calls) == len(steps) == 1


def test_the_gradient_of_the_gates_is_autograd_s(planted):
    """Through a whole model in memory, all gates at once."""
    teacher, student, _ = planted
    ids = torch.from_numpy(induction_ids(0)[:1, :24])
    some = gates.sequences(ids)[:1]
    some[0].share = 1.0
    gates._teach(teacher, some, "cpu")
    opened = torch.linspace(0.1, 0.8, 8, dtype=torch.float64)
    with torch.no_grad(), gates.Walk({"teacher": teacher, "student": student}) as walk:
        loss, gradient = gates._step(walk, some, opened)

    get, theirs = (
        {name: tensor(recipe, dtype=torch.float64) for name, recipe in model.plan.items()}.__getitem__
        for model in (student, teacher)
    )
    config, leaf, carry = student.student, opened.clone().requires_grad_(), hxa079.Carry()
    x = hxa079.embed(ids, get)
    for i in range(8):
        normed = hxa079.input_norm(x, get, config, i)
        mixed = hxa079.time_mix(normed, get, config, i, carry, hxa079.loop)
        attended = hxa079.attention(normed, theirs, config, i, hxa079.Carry())
        x = hxa079.feed_forward(x + (1 - leaf[i]) * mixed + leaf[i] * attended, get, config, i)
    p = llama.forward(ids, theirs, teacher.config)[0].log_softmax(-1)
    kl = (p.exp() * (p - hxa079.logits(x, get, config).log_softmax(-1))).sum(-1).mean()
    kl.backward()
    assert loss == (pytest.approx(2 * float(kl.detach()), rel=1e-4), 0.0)
    assert gradient.numpy() == pytest.approx(leaf.grad.numpy(), rel=1e-2, abs=1e-4)
    assert float(leaf.grad.abs().min()) > 1e-3  # no layer's would be missed


def test_gates_within_a_budget():
    free = torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64)
    assert gates.within_budget(free, free, 2).tolist() == pytest.approx([0, 0.5, 0.5, 0.5, 0.5])
    found = gates.within_budget(torch.tensor([9.0, 3, 0.6, 0.2, -1], dtype=torch.float64), free, 2)
    assert found.tolist() == pytest.approx([0, 1, 0.7, 0.3, 0])
