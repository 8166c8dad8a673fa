"""Interrupted scoring goes on where it stopped, and only there."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from selection_models import TEACHER, as_if_trained

from hxaconv.forward import state as state_module
from hxaconv.forward.state import StateFile, fingerprint
from hxaconv.load import load_teacher
from hxaconv.selection import attention as retrieval
from hxaconv.selection.advice import Request, advise
from hxaconv.selection.sweep import Sweep


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(TEACHER)


@pytest.fixture(scope="module")
def student(teacher):
    return as_if_trained(teacher)


@pytest.fixture(scope="module")
def ids():
    return np.load(TEACHER / "calibration_tokens.npy")[:1, :16].astype(np.int64)


class StopAfter:
    """A check that asks to stop once it was called a number of times."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


class Bar:
    """A progress that counts."""

    def __init__(self):
        self.total, self.done, self.seen = 0, 0, []

    def start(self, title, total):
        self.total = total

    def advance(self, n, what=""):
        self.done += n
        self.seen.append(what)

    def stop(self):
        pass


@pytest.mark.parametrize("mode", ["restore", "convert"])
def test_a_sweep_goes_on_from_every_step(teacher, student, ids, tmp_path, mode):
    run = Sweep(teacher=teacher, student=student, strategies=frozenset({"kl", "mse", "entropy"}), kl_mode=mode)
    path, ids = tmp_path / "scores.safetensors", torch.from_numpy(ids)
    whole = Bar()
    expected = run.run(ids, progress=whole)
    steps = len(whole.seen) - 1  # the first call says where the bar begins
    # A candidate leaves at every layer and passes all later ones; the head is one block here.
    assert steps == 6 + 15 + 1
    for calls in range(0, steps, 1 if mode == "restore" else 4):
        with pytest.raises(KeyboardInterrupt):
            run.run(ids, StateFile(path, "a", StopAfter(calls)))
        again = Bar()
        assert run.run(ids, StateFile(path, "a"), again) == expected
        # Interrupted after the head: its part of the work comes again.
        assert len(again.seen) - 1 == max(1, steps - calls - 1)
        assert again.done == pytest.approx(again.total, abs=1)
        path.unlink()


def test_a_finished_sweep_keeps_its_scores_alone(teacher, student, ids, tmp_path, monkeypatch):
    """What is still to be done with them (saving a map, writing a student) may fail: they are not computed again."""
    run = Sweep(teacher=teacher, student=student, strategies=frozenset({"kl"}))
    path, ids = tmp_path / "scores.safetensors", torch.from_numpy(ids)
    expected = run.run(ids, StateFile(path, "a"))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(Sweep, "_layer", None)
    assert run.run(ids, StateFile(path, "a")) == expected
    with pytest.raises(TypeError):  # negative control: another key computes
        run.run(ids, StateFile(path, "b"))


def test_a_pass_saves_by_itself_when_it_is_time(teacher, student, ids, tmp_path, monkeypatch):
    """After kill -9, nothing is said and the last saved state counts."""
    path, saved = tmp_path / "scores.safetensors", []
    monkeypatch.setattr(StateFile, "save", lambda *a, real=StateFile.save: (saved.append(1), real(*a)))
    run = Sweep(teacher=teacher, student=student, strategies=frozenset({"kl"}))
    run.run(torch.from_numpy(ids), StateFile(path, "a"))
    assert len(saved) == 1  # a pass of a second: the scores at its end
    monkeypatch.setattr(state_module, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(state_module, "SHARE_OF_SAVING", 1e9)
    run.run(torch.from_numpy(ids), StateFile(path, "b"))
    assert len(saved) > 10


def test_retrieval_goes_on_from_every_layer(teacher, ids, tmp_path):
    path = tmp_path / "scores.safetensors"
    asked, expected = retrieval.sequences(256, None, separator=0, length=16, count=2)
    found = retrieval.retrieval(teacher, asked, expected)
    for calls in range(6):
        with pytest.raises(KeyboardInterrupt):
            retrieval.retrieval(teacher, asked, expected, kept=StateFile(path, "a", StopAfter(calls)))
        bar = Bar()
        assert retrieval.retrieval(teacher, asked, expected, kept=StateFile(path, "a"), progress=bar) == found
        assert len(bar.seen) == 6 - calls
        assert bar.done == bar.total
        path.unlink()


@pytest.mark.parametrize("strategy", ["influence", "retrieval"])
def test_advice_goes_on_whatever_scores(teacher, ids, tmp_path, strategy):
    ids = np.load(TEACHER / "calibration_tokens.npy")[:, :64].astype(np.int64)
    request = Request(strategy=strategy, count=2, cache=tmp_path / "c.safetensors", check=StopAfter(2))
    with pytest.raises(KeyboardInterrupt):
        advise(6, request, teacher=teacher, ids=ids)
    assert request.cache.is_file()
    bar = Bar()
    resumed = advise(6, replace(request, check=lambda: None), teacher=teacher, ids=ids, progress=bar)
    assert bar.seen[0] == "resumed"
    assert resumed == advise(6, replace(request, check=lambda: None, cache=None), teacher=teacher, ids=ids)


def test_a_cache_of_other_inputs_is_not_used(teacher, student, ids, tmp_path):
    keys = {
        fingerprint({"teacher": teacher, "student": student}, ids, {"mode": "restore"}),
        fingerprint({"teacher": teacher, "student": student}, ids, {"mode": "convert"}),
        fingerprint({"teacher": teacher, "student": student}, ids[:, ::-1], {"mode": "restore"}),
        fingerprint({"teacher": teacher}, ids, {"mode": "restore"}),
        fingerprint({"teacher": replace(teacher, config=replace(teacher.config, rope_theta=2.0))}, ids, {}),
        fingerprint({"teacher": teacher}, ids, {}),
    }
    assert len(keys) == 6
    path = tmp_path / "cache.safetensors"
    StateFile(path, "a").save({}, {"layer": 3})
    assert StateFile(path, "a").load() is not None
    assert StateFile(path, "b").load() is None
    path.write_bytes(b"half a file")
    assert StateFile(path, "a").load() is None
