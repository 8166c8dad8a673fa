"""Interrupted scoring goes on where it stopped, and only there."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from selection_models import TEACHER, advised, as_if_trained

from hxaconv.forward import state as state_module
from hxaconv.forward.state import StateFile, fingerprint
from hxaconv.load import load_teacher
from hxaconv.selection.strategies import STRATEGIES
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
    measures = {name: STRATEGIES[name].score for name in ("mse", "entropy")}
    run = Sweep(teacher=teacher, student=student, measures=measures, mode=mode)
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
    run = Sweep(teacher=teacher, student=student, measures={}, mode="restore")
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
    run = Sweep(teacher=teacher, student=student, measures={}, mode="restore")
    run.run(torch.from_numpy(ids), StateFile(path, "a"))
    assert len(saved) == 1  # a pass of a second: the scores at its end
    monkeypatch.setattr(state_module, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(state_module, "SHARE_OF_SAVING", 1e9)
    run.run(torch.from_numpy(ids), StateFile(path, "b"))
    assert len(saved) > 10


@pytest.mark.parametrize("strategy", ["influence", "retrieval"])
def test_advice_goes_on_whatever_scores(teacher, ids, tmp_path, strategy):
    ids = np.load(TEACHER / "calibration_tokens.npy")[:, :64].astype(np.int64)
    cache, asked = tmp_path / "c.safetensors", {"ids": ids, "strategy": strategy, "count": 2}
    with pytest.raises(KeyboardInterrupt):
        advised(teacher, **asked, more={"cache": cache, "check": StopAfter(2)})
    assert cache.is_file()
    bar = Bar()
    resumed = advised(teacher, **asked, more={"cache": cache, "progress": bar})
    assert bar.seen[0] == "resumed"
    assert len(bar.seen) == 4  # layers 3 to 5
    assert bar.done == bar.total
    assert resumed == advised(teacher, **asked)


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
