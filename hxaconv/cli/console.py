"""Everything that people see: talk and progress on stderr, tables and JSON on stdout, errors in one place."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from hxaconv import ranks
from hxaconv.errors import HxaconvError
from hxaconv.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import TaskID

    from hxaconv.progress import Result

SECONDS_BETWEEN_LINES = 10.0
SECONDS_OF_ESTIMATE = 3600.0
WIDTH = 80
"""Columns that every table fits into: those of the narrowest usual terminal."""
WIDTH_OF_FILES = 100
"""Columns of results in files and pipes."""
STRIP_WIDTH = 60
"""Layers in a line of the layer strip."""
_UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters but for newlines, and those that turn the direction of what follows."""


def result_width() -> int:
    """Columns there are for results."""
    return _console(stderr=False).width


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDTH_OF_FILES
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def visible(text: str) -> str:
    """Text in which nothing acts on a terminal: it may quote a file from strangers."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _tell(text: str, style: str = "") -> None:
    """Text on stderr; in logs and pipes its lines are left whole, so that paths can be found and copied."""
    console, text = _console(stderr=True), visible(text)
    console.print(text, style=style if console.is_terminal else "", markup=False, soft_wrap=not console.is_terminal)


class Talk:
    """One per command: `quiet` silences all but errors, `json_output` turns results into JSON.

    Of several ranks the first one talks.
    """

    def __init__(self, *, quiet: bool = False, json_output: bool = False) -> None:
        self.quiet = quiet
        self.json_output = json_output
        self.plan_shown = False

    def say(self, text: str) -> None:
        """One line of talk, on stderr."""
        if not self.quiet and ranks.rank() == 0:
            _tell(text)

    def warn(self, text: str) -> None:
        """A warning, on stderr, quiet or not."""
        if ranks.rank() == 0:
            _tell(f"Warning: {text}", "yellow")

    def write(self, renderables: Iterable[RenderableType]) -> None:
        """Results for people, on stdout."""
        if not self.quiet and ranks.rank() == 0:
            console = _console(stderr=False)
            for renderable in renderables:
                if isinstance(renderable, str):
                    # In files and pipes lines are left whole, so that paths can be found and copied.
                    console.print(visible(renderable), markup=False, soft_wrap=not console.is_terminal)
                else:
                    console.print(renderable)
            sys.stdout.flush()

    def on_the_way(self, result: Result) -> None:
        """A result before the work goes on, for people: JSON has everything in one piece at the end."""
        from hxaconv.cli.tables import shown

        if not self.json_output:
            with contextlib.suppress(BrokenPipeError):  # the work goes on, whoever stops reading of it
                self.write(shown(result, result_width(), plan=not self.plan_shown))
            self.plan_shown = type(result).__name__ == "Outcome" and not self.plan_shown

    def show(self, result: Result) -> None:
        """What a command came to: JSON on stdout where wanted, else what people read; notes and warnings on stderr.

        Raises:
            CheckFailed: when the result is a check that failed.
        """
        from hxaconv.cli.tables import shown

        for warning in result.warnings:
            self.warn(warning)
        for note in result.notes:
            self.say(note)
        if self.json_output and ranks.rank() == 0:
            from hxaconv.formats.json_files import plain_data

            data = plain_data(result.to_dict())
            json.dump(data, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False, default=str)
            sys.stdout.write("\n")
        else:
            self.write(shown(result, result_width(), plan=not self.plan_shown))
        result.raise_if_failed()

    def progress(self) -> Progress | None:
        """A byte bar on stderr, now and then a line where stderr is no terminal; None when quiet."""
        return None if self.quiet or ranks.rank() else Bars(self) if sys.stderr.isatty() else Lines(self)


class Bars:
    """Rich's progress bars behind the Progress protocol; bars appear after a second of work."""

    def __init__(self, talk: Talk | None = None) -> None:
        """Without `talk`, in a notebook, notes and plans are left to the result."""
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        self._talk = talk
        self._bars = RichProgress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=24),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}", table_column=Column(no_wrap=True, ratio=1)),
            console=_console(stderr=True),
            transient=True,
            expand=True,
            # A step may take minutes: from the last half minute alone no time left could be told.
            speed_estimate_period=SECONDS_OF_ESTIMATE,
        )
        self._task: TaskID | None = None

    def start(self, title: str, total: int) -> None:
        """Show a bar."""
        self._task = self._bars.add_task(title, total=total, what="")
        self._bars.start()

    def advance(self, n: int, what: str = "") -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.advance(self._task, n)
            if what:
                self._bars.update(self._task, what=what)

    def stop(self) -> None:
        """Remove the bar."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        self._bars.stop()

    def note(self, text: str) -> None:
        """Say it."""
        if self._talk is not None:
            self._talk.say(text)

    def show(self, result: Result) -> None:
        """Show it."""
        if self._talk is not None:
            self._talk.on_the_way(result)


class Lines:
    """Progress for logs: nothing about short work, about long work a line now and then."""

    def __init__(self, talk: Talk, clock: Callable[[], float] = time.monotonic) -> None:
        self._talk, self._clock = talk, clock
        self.note, self.show = talk.say, talk.on_the_way

    def start(self, title: str, total: int) -> None:
        """Remember what begins."""
        self._title, self._total, self._done = title, total, 0
        # What is done before any time has passed (by an earlier run) says nothing about the speed.
        self._before: int | None = None
        self._began = self._told = self._clock()

    def advance(self, n: int, what: str = "") -> None:
        """A line, if the last one is long ago."""
        now = self._clock()
        self._done += n
        if self._before is None:
            self._before, self._began = self._done, now
        if now - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told = now
        parts = [self._title]
        if self._total:
            parts.append(f"{self._done / self._total:.0%}")
        parts += [what] if what else []
        done = self._done - self._before
        if done and self._done < self._total:
            left = (now - self._began) * (self._total - self._done) / done
            parts.append(f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left")
        self._talk.say(", ".join(parts))

    def stop(self) -> None:
        """Nothing: what comes next speaks for itself."""


def render_error(error: HxaconvError) -> None:
    """The one place that prints what went wrong: the problem, then what to do; once, where all ranks have it."""
    if error.shared and ranks.rank():
        return
    word = "Check failed" if error.exit_code == 1 else "Error"
    word += f" (rank {ranks.rank()})" if ranks.rank() else ""
    _tell(f"{word}: {error.message}", "bold red")
    if error.hint:
        _tell(f"What to do: {error.hint}")


def human_bytes(count: float) -> str:
    """`41.8 GB`: decimal units, as the Hub shows sizes."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_count(count: float) -> str:
    """`20.9B` parameters."""
    for unit in ("", "K", "M", "B"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.2f}T"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: int = 1) -> RenderableType:
    """A plain table of at most WIDTH columns; columns from number `right` on are aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        result.add_column(column, justify="right" if position >= right else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(visible(str(cell))) for cell in row))
    return result


def strip_lines(letters: str, width: int = STRIP_WIDTH) -> list[str]:
    """The layer strip in lines of `width`, each with the number of its first layer."""
    return [f"{start:>4}  {letters[start : start + width]}" for start in range(0, len(letters), width)]
