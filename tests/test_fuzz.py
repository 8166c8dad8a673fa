"""A short, seeded run of the fuzzer (`fuzz_readers.py` does the long ones), and proof that it can fail."""

from __future__ import annotations

import random

import fuzz_readers
import pytest
from fuzz_readers import TARGETS, Tally, mutate, run_random, seeds

EXECUTIONS = 4_000


def test_short_run() -> None:
    tally = Tally()
    run_random(EXECUTIONS, seed=20, tally=tally)
    assert sum(tally.executions.values()) == EXECUTIONS
    assert all(tally.executions.values())
    # A run in which nothing is ever accepted would test one refusal only.
    assert all(tally.accepted.values())


def test_the_same_seed_makes_the_same_inputs() -> None:
    first = seeds()[0]
    assert mutate(first, random.Random(3)) == mutate(first, random.Random(3))
    assert mutate(first, random.Random(3)) != mutate(first, random.Random(4))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("read_contents", KeyError("planted")),
        ("read_contents", RecursionError("planted")),
        ("check_promises", AssertionError("planted")),
    ],
)
def test_a_planted_fault_is_found(name: str, fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise fault

    monkeypatch.setattr(fuzz_readers, name, failing)
    with pytest.raises(type(fault), match="planted"):
        run_random(1_000, seed=0, tally=Tally())


def test_slow_inputs_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_readers, "SECONDS_LIMIT", 0)
    with pytest.raises(AssertionError, match="took"):
        Tally().execute(bytes([TARGETS.index(fuzz_readers.fuzz_header)]) + b"{}")


def test_inputs_without_end_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: object) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz_readers, "SECONDS_LIMIT", 0.1)
    monkeypatch.setattr(fuzz_readers, "mutate", lambda data, chance: bytes([TARGETS.index(fuzz_readers.fuzz_header)]))
    monkeypatch.setattr(Tally, "execute", lambda self, data: endless() if len(data) == 1 else None)
    with pytest.raises(AssertionError, match="took more than"):
        run_random(1_000, seed=0, tally=Tally())
