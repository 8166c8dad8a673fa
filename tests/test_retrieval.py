"""Copying heads: a planted one is found, random ones are at chance."""

import numpy as np
import pytest
import torch
from selection_models import LENGTH, VOCAB, copying_teacher

from hxaconv.errors import HxaconvError
from hxaconv.selection.attention import retrieval, separator_of, sequences


def copies(teacher):
    asked, expected = sequences(VOCAB, None, separator=separator_of(teacher), length=LENGTH)
    return retrieval(teacher, asked, expected)


def test_retrieval_finds_a_planted_copying_head():
    found = copies(copying_teacher())
    assert found.heads[1][0] > 0.95
    chance = 1 / LENGTH
    others = [found.heads[0][0], found.heads[0][1], found.heads[1][1]]
    assert max(others) < 4 * chance
    assert found.scores[1] > 0.95
    assert found.scores[0] < 4 * chance
    assert found.warnings == ()


def test_retrieval_without_the_planted_head_is_at_chance_and_says_so():
    found = copies(copying_teacher(plant=False))
    assert max(max(row) for row in found.heads) < 0.1
    assert "no head copies" in found.warnings[0]


def test_retrieval_sequences():
    text = np.arange(500) % 17
    ids, expected = sequences(VOCAB, text, separator=39, seed=3, length=LENGTH, count=4)
    assert ids.shape == (4, 2 * LENGTH + 1)
    assert (ids[:, LENGTH] == 39).all()
    assert torch.equal(ids[:, :LENGTH], ids[:, LENGTH + 1 :])
    assert (ids[:2, :LENGTH] != 39).all()
    assert all(len(set(row.tolist())) == LENGTH for row in ids[:2, :LENGTH])  # random halves repeat nothing
    assert (expected[:, : LENGTH + 1] == -1).all()
    for row, wanted in zip(ids, expected, strict=True):
        for t in range(LENGTH + 1, 2 * LENGTH + 1):
            assert int(wanted[t]) == next(i for i in range(LENGTH) if row[i] == row[t]) + 1
    # Text repeats tokens: behind the second of two equal ones, the copy goes on somewhere else.
    behind = torch.arange(1, LENGTH + 1)
    assert torch.equal(expected[0, LENGTH + 1 :], behind)
    assert not torch.equal(expected[2, LENGTH + 1 :], behind)
    again = sequences(VOCAB, text, separator=39, seed=3, length=LENGTH, count=4)
    assert torch.equal(ids, again[0])
    with pytest.raises(HxaconvError, match="at least 24"):
        sequences(VOCAB, text[:9], separator=39, length=LENGTH)
