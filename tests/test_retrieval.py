"""Copying heads: a planted one is found, random ones are at chance."""

import numpy as np
import pytest
from selection_models import LENGTH, VOCAB, advised, copying_teacher

from hxaconv.errors import HxaconvError
from hxaconv.selection import strategies
from hxaconv.selection.heads import twice


@pytest.fixture
def copies(monkeypatch):
    def found(teacher):
        short = lambda *words, length=LENGTH, **more: twice(*words, length=LENGTH, **more)  # noqa: E731
        monkeypatch.setattr(strategies, "twice", short)
        random = np.zeros((1, 2), dtype=np.int64)
        return advised(teacher, ids=random, num_layers=2, are_text=False, strategy="retrieval", count=1)

    return found


def test_retrieval_finds_a_planted_copying_head(copies):
    found = copies(copying_teacher())
    assert found.heads[1][0] > 0.95
    chance = 1 / LENGTH
    others = [found.heads[0][0], found.heads[0][1], found.heads[1][1]]
    assert max(others) < 4 * chance
    assert found.columns[0].values[1] > 0.95
    assert found.columns[0].values[0] < 4 * chance
    assert len(found.warnings) == 1  # random tokens


def test_retrieval_without_the_planted_head_is_at_chance_and_says_so(copies):
    found = copies(copying_teacher(plant=False))
    assert max(max(row) for row in found.heads) < 0.1
    assert "no head copies" in found.warnings[1]


def test_texts_said_twice():
    text = np.arange(500) % 17
    ids = twice(VOCAB, text, separator=39, seed=3, length=LENGTH, count=4)
    assert ids.shape == (4, 2 * LENGTH + 1)
    assert (ids[:, LENGTH] == 39).all()
    assert (ids[:, :LENGTH] == ids[:, LENGTH + 1 :]).all()
    assert (ids[:2, :LENGTH] != 39).all()
    assert all(len(set(row.tolist())) == LENGTH for row in ids[:2, :LENGTH])  # random halves repeat nothing
    assert all(len(set(row.tolist())) == 17 + 1 for row in ids[2:])
    assert (ids == twice(VOCAB, text, separator=39, seed=3, length=LENGTH, count=4)).all()
    with pytest.raises(HxaconvError, match="at least 24"):
        twice(VOCAB, text[:9], separator=39, length=LENGTH)
