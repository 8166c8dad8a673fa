"""How the command line ends: exit codes, errors without a traceback, interruptions that say what is kept."""

from __future__ import annotations

import contextlib
import difflib
import io
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from hxaconv import ranks
from hxaconv.errors import HxaconvError, out_of_memory
from hxaconv.save.interruption import NOTHING_PUBLISHED, ignore_from_now


class Stopped(Exception):
    """Ctrl-C or SIGTERM, carried past Typer, which would swallow the message and the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """An interruption inside says what is kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        message = getattr(stop, "message", NOTHING_PUBLISHED)
        raise Stopped(message, getattr(stop, "exit_code", 130)) from None


def refuse_unknown(words: Sequence[str], commands: Iterable[str]) -> None:
    """Refuse a command that there is not, with the ones that were meant.

    Raises:
        HxaconvError: naming them.
    """
    word = next((word for word in words if not word.startswith("-")), None)
    known = list(commands)
    if word is None or word in known:
        return
    near = [name for name in known if name.startswith(word)] or difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    hint = (
        f"Did you mean {' or '.join(f'hxaconv {name}' for name in near)}?" if near else f"Commands: {', '.join(known)}."
    )
    raise HxaconvError(f"there is no command {word!r}", hint=hint)


def guarded(run: Callable[[], Any]) -> int:
    """Run the app: 0 done, 1 a check failed, 2 wrong use or bad input; a traceback with --debug or for our faults."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does it: what cannot be encoded, the names of some files, must not end a command.
        sys.stdout.reconfigure(errors="backslashreplace")
    debug = "--debug" in sys.argv[1:]
    if debug:
        sys.argv.remove("--debug")
    try:
        ranks.join()
        run()
    except (HxaconvError, MemoryError, RuntimeError) as error:
        told = error if isinstance(error, HxaconvError) else out_of_memory(error)
        if told is None:
            raise
        if debug:
            traceback.print_exc()
        else:
            from hxaconv.cli.console import render_error

            render_error(told)
        return told.exit_code
    except Stopped as stop:
        from hxaconv.cli.console import Talk

        Talk().say(stop.message)
        ignore_from_now()
        return stop.exit_code
    except BrokenPipeError:
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    return 0
