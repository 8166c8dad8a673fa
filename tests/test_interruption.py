"""What cuts work short outside of the writer and the command line: one line that says what is kept."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest
import torch

from hxaconv.errors import HxaconvError
from hxaconv.save.interruption import Interrupted, interruptible


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


def test_a_second_signal_does_not_hinder_the_first_one() -> None:
    def kept() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "All is kept."

    with pytest.raises(Interrupted) as stop, interruptible(kept):
        os.kill(os.getpid(), signal.SIGTERM)
    assert (stop.value.message, stop.value.exit_code) == ("Interrupted. All is kept.", 143)


def test_a_second_signal_ends_what_the_first_one_only_asks_to_end() -> None:
    requested: list[bool] = []

    def work() -> None:
        with interruptible(lambda: "") as signals, signals.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            requested.append(signals.requested())
            os.kill(os.getpid(), signal.SIGTERM)
            requested.clear()

    with pytest.raises(Interrupted) as stop:
        work()
    assert requested == [True]
    assert stop.value.exit_code == 143


def test_one_that_got_lost_is_not_the_last() -> None:
    @interruptible(lambda: "")
    def work() -> None:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        work()


def test_other_threads_work_and_leave_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), list[object]()

    def work() -> None:
        with interruptible(lambda: "") as signals, signals.deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 64 bytes"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory has run out"),
        (MemoryError("Unable to allocate 2.0 GiB"), "memory has run out: Unable to allocate 2.0 GiB"),
        (RuntimeError(ALLOCATOR), "memory has run out: can't allocate memory: 64 bytes"),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore."), "memory has run out: CUDA out of memory."),
    ],
)
def test_memory_that_runs_out_is_told_with_what_is_kept(error: Exception, said: str) -> None:
    with pytest.raises(HxaconvError) as caught, interruptible(lambda: "2 layers are kept."):
        raise error
    assert caught.value.message == said
    assert "--no-verify" in caught.value.hint
    assert caught.value.hint.endswith(" 2 layers are kept.")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"), interruptible(lambda: ""):
        raise RuntimeError("size mismatch")
