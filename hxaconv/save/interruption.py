"""Ctrl-C, SIGTERM, and memory that runs out: an end that leaves things tidy, with a message on how to go on.

The command line handles signals for the life of its process (`for_life`). Python code that calls the package keeps
its own handlers, but for the time of long work.
"""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hxaconv.errors import out_of_memory

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
NOTHING_PUBLISHED = "Interrupted; nothing was published."


class Interrupted(KeyboardInterrupt):
    """The user or the system asked to stop. `message` is one line: what is kept, and how to continue."""

    def __init__(self, number: int, message: str = NOTHING_PUBLISHED) -> None:
        super().__init__(message)
        self.number = number
        self.message = message

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class Signals:
    """Once installed, Ctrl-C and SIGTERM raise Interrupted, or wait while deferred.

    While one is under way, further signals are ignored, so that its message is printed.
    """

    def __init__(self) -> None:
        self.message = NOTHING_PUBLISHED
        """That of an interruption outside of long work."""
        self.pending: int | None = None
        self._deferred = False
        self._all_deferred = False
        # A reference that does not keep it: one that a library or a destructor has swallowed must not be the last.
        self._under_way: Callable[[], Interrupted | None] = lambda: None

    def install(self) -> dict[int, Any]:
        """Handle signals from now on; returns the handlers so far. For the main thread only."""
        return {number: signal.signal(number, self._handle) for number in _NUMBERS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._under_way() is not None:
            return
        if self._deferred and (self.pending is None or self._all_deferred):
            self.pending = number
        else:
            raise self._interruption(number)

    def _interruption(self, number: int) -> Interrupted:
        error = Interrupted(number, self.message)
        self._under_way = weakref.ref(error)
        return error

    def requested(self) -> bool:
        """Whether a deferred signal waits."""
        return self.pending is not None

    def stop_if_requested(self) -> None:
        """End here if a deferred signal waits.

        Raises:
            Interrupted: for that signal.
        """
        if self.pending is not None:
            raise self._interruption(self.pending)

    @contextmanager
    def deferred(self, *, all_of_them: bool = False) -> Iterator[None]:
        """Inside, a first signal only sets `pending`; a second one raises, unless all are deferred."""
        self._deferred, self._all_deferred = True, all_of_them
        try:
            yield
        finally:
            self._deferred = False


_lasting: Signals | None = None
"""Those of the command line, once it has begun."""


def for_life() -> None:
    """Handle signals until the process ends; for a program, not for code that others call."""
    global _lasting
    if threading.current_thread() is threading.main_thread():
        _lasting = Signals()
        _lasting.install()


def ignore_from_now() -> None:
    """Let no signal disturb the end of a program that has printed its last line; without effect on other code."""
    if _lasting is not None:
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def interruptible(kept: Callable[[], str]) -> Iterator[Signals]:
    """What cuts the work inside short ends with the text that `kept` gives then: what is kept, how to go on.

    Signals interrupt the main thread only. They are the program's; in another program, some that last as long as the
    block.

    Raises:
        Interrupted: on Ctrl-C and SIGTERM.
        HxaconvError: when memory runs out.
    """
    here = threading.current_thread() is threading.main_thread()
    signals = _lasting if _lasting is not None and here else Signals()
    before = signals.install() if here and signals is not _lasting else {}
    try:
        signals.stop_if_requested()
        yield signals
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        parts = ["Interrupted.", *getattr(stop, "__notes__", ()), kept()]
        raise Interrupted(number, " ".join(parts)) from None
    except (MemoryError, RuntimeError) as error:
        failure = out_of_memory(error)
        if failure is None:
            raise
        failure.hint = f"{failure.hint} {kept()}"
        raise failure from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
