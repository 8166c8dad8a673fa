"""Ctrl-C and SIGTERM: an end that leaves things tidy, and says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = ("SIGINT", "SIGTERM")


class Interrupted(KeyboardInterrupt):
    """The user or the system asked to stop. `message` is one line: what is kept, and how to continue."""

    def __init__(self, number: int, message: str = "Interrupted.") -> None:
        super().__init__(message)
        self.number = number
        self.message = message

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class Signals:
    """While entered (in the main thread), Ctrl-C and SIGTERM raise Interrupted, or wait while deferred."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferred and self.pending is None:
            self.pending = number
        else:
            raise Interrupted(number)

    def requested(self) -> bool:
        """Whether a deferred signal waits."""
        return self.pending is not None

    def stop_if_requested(self) -> None:
        """End here if a deferred signal waits.

        Raises:
            Interrupted: for that signal.
        """
        if self.pending is not None:
            raise Interrupted(self.pending)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a first signal only sets `pending`; a second one raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False


@contextmanager
def interruptible(kept: Callable[[], str]) -> Iterator[Signals]:
    """Inside, Ctrl-C and SIGTERM raise Interrupted with what `kept` says then: what is kept, how to go on."""
    with Signals() as signals:
        try:
            yield signals
        except KeyboardInterrupt as stop:
            number = getattr(stop, "number", signal.SIGINT)
            raise Interrupted(number, f"Interrupted. {kept()}") from None
