"""Ctrl-C and SIGTERM outside of the writer: one line that says what is kept."""

from __future__ import annotations

import os
import signal

import pytest

from hxaconv.writing.interruption import Interrupted, interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_end_with_what_is_kept_then(number: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    done: list[int] = []

    @interruptible(lambda: f"{len(done)} layers are kept.")
    def work() -> None:
        done.append(1)
        os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as stop:
        work()
    assert stop.value.message == "Interrupted. 1 layers are kept."
    assert stop.value.exit_code == 128 + number
    assert signal.getsignal(signal.SIGTERM) is before
