"""Everything that people see: notes, progress and errors on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import textwrap
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from hxaconv import ranks
from hxaconv.errors import HxaconvError
from hxaconv.progress import Progress, Result

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0
SECONDS_OF_ESTIMATE = 3600.0
WIDTH_OF_FILES = 100
"""Columns of results in files and pipes."""
_UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters but for newlines, and those that turn the direction of what follows."""


def visible(text: str) -> str:
    """Text in which nothing acts on a terminal: it may quote a file from strangers."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    width = None if (sys.stderr if stderr else sys.stdout).isatty() else WIDTH_OF_FILES
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def _print(console: Console, text: str, style: str = "") -> None:
    """Lines that fit the terminal; in logs and pipes they are left whole, so that they can be searched."""
    text = visible(text)
    if console.is_terminal:
        text = "\n".join(filled(line, console.width) for line in text.split("\n"))
    console.print(text, style=style if console.is_terminal else "", soft_wrap=True)


def filled(line: str, width: int) -> str:
    """A line as lines of `width`, broken between words: paths and commands (in backticks, after $) stay whole."""
    if re.match(r" *(\$|>>>) ", line):
        return line
    mark = line[: len(line) - len(line.lstrip(" -"))]
    whole = re.sub("`[^`]*`", lambda found: found[0].replace(" ", "\0"), line.removeprefix(mark))
    lines = textwrap.wrap(whole, width - len(mark), break_long_words=False, break_on_hyphens=False)
    return mark + f"\n{' ' * len(mark)}".join(lines).replace("\0", " ")


class Talk:
    """One per command: `quiet` silences all but errors, `json_output` turns results into JSON.

    Of several ranks the first one talks.
    """

    def __init__(self, *, quiet: bool = False, json_output: bool = False) -> None:
        self.quiet = quiet
        self.json_output = json_output
        self.plan_shown = False

    def say(self, text: str) -> None:
        """A note, on stderr."""
        if not self.quiet and ranks.rank() == 0:
            _print(_console(stderr=True), text)

    def write(self, result: Result) -> None:
        """A result for people, on stdout."""
        if self.quiet or ranks.rank():
            return
        from hxaconv.cli.tables import shown

        console = _console(stderr=False)
        for part in shown(result, console.width, plan=not self.plan_shown):
            if isinstance(part, str):
                _print(console, part)
            else:
                console.print(part)
        sys.stdout.flush()

    def on_the_way(self, result: Result) -> None:
        """A result before the work is done, for people: JSON has everything in one piece at the end."""
        if not self.json_output:
            with contextlib.suppress(BrokenPipeError):  # work continues when its reader has gone
                self.write(result)
            self.plan_shown = type(result).__name__ == "Outcome" and not self.plan_shown

    def show(self, result: Result) -> None:
        """The result of a command: as JSON or for people on stdout; its notes and warnings on stderr.

        Raises:
            CheckFailed: when the result is a check that failed.
        """
        for warning in result.warnings if ranks.rank() == 0 else ():  # quiet or not
            _print(_console(stderr=True), f"Warning: {warning}", "yellow")
        if self.json_output and ranks.rank() == 0:
            from hxaconv.formats.json_files import plain_data

            data = plain_data(result.to_dict())
            json.dump(data, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False, default=str)
            sys.stdout.write("\n")
        else:
            self.write(result)
        for note in result.notes:
            self.say(note)
        result.raise_if_failed()

    def progress(self) -> Progress | None:
        """A byte bar on stderr, now and then a line where stderr is no terminal; None when quiet."""
        return None if self.quiet or ranks.rank() else Bars(self) if sys.stderr.isatty() else Lines(self)


class _Talking(Progress):
    """Notes and plans go to a talk; without one, in a notebook, they are left to the result."""

    def __init__(self, talk: Talk | None = None) -> None:
        self._talk = talk

    def stop(self) -> None:
        """Nothing: what comes next speaks for itself."""

    def note(self, text: str) -> None:
        if self._talk is not None:
            self._talk.say(text)

    def show(self, result: Result) -> None:
        if self._talk is not None:
            self._talk.on_the_way(result)


class Bars(_Talking):
    """Rich's progress bars behind the Progress protocol."""

    def __init__(self, talk: Talk | None = None) -> None:
        from rich import progress
        from rich.table import Column

        super().__init__(talk)
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            progress.BarColumn(bar_width=24),
            progress.DownloadColumn(binary_units=True),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[what]}", table_column=Column(no_wrap=True, ratio=1)),
            console=_console(stderr=True),
            transient=True,
            expand=True,
            # A step may take minutes: the last half minute alone would give no estimate.
            speed_estimate_period=SECONDS_OF_ESTIMATE,
        )

    def start(self, title: str, total: int) -> None:
        self._task = self._bars.add_task(title, total=total, what="")
        self._bars.start()

    def advance(self, n: int, what: str = "") -> None:
        self._bars.advance(self._task, n)
        if what:
            self._bars.update(self._task, what=what)

    def stop(self) -> None:
        self._bars.remove_task(self._task)
        self._bars.stop()


class Lines(_Talking):
    """Progress for logs: nothing about short work, about long work a line now and then."""

    def __init__(self, talk: Talk, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(talk)
        self._clock = clock

    def start(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        # What is done before any time has passed (by an earlier run) is no measure of the speed.
        self._before: int | None = None
        self._began = self._last = self._clock()

    def advance(self, n: int, what: str = "") -> None:
        """A line, if the last one is long ago."""
        now = self._clock()
        self._done += n
        if self._before is None:
            self._before, self._began = self._done, now
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        parts = [self._title, f"{self._done / self._total:.0%}" if self._total else "", what]
        done = self._done - self._before
        if done and self._done < self._total:
            left = (now - self._began) * (self._total - self._done) / done
            parts.append(f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left")
        self.note(", ".join(filter(None, parts)))


def render_error(error: HxaconvError) -> None:
    """The one place that prints what went wrong: the problem, then what to do; once, where all ranks have it."""
    if error.shared and ranks.rank():
        return
    word = "Check failed" if error.exit_code == 1 else "Error"
    word += f" (rank {ranks.rank()})" if ranks.rank() else ""
    console = _console(stderr=True)
    _print(console, f"{word}: {error.message}", "bold red")
    if error.hint:
        _print(console, f"What to do: {error.hint}")
