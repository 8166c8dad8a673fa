"""Progress where nobody watches a bar, and time left where steps are long."""

from __future__ import annotations

import pytest

from hxaconv.cli.console import Bars, Lines, Talk, filled
from hxaconv.progress import Result


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Said(Talk):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_long_work_leaves_a_line_in_a_log_now_and_then() -> None:
    clock, talk = Clock(), Said()
    lines = Lines(talk, clock)
    lines.start("calibrating", 100)
    lines.advance(20, "resumed")
    for layer in range(6):
        clock.now += 6
        lines.advance(10, f"layer {layer}")
    lines.stop()
    # 20 were there already: 20 of 80 took 12 seconds.
    assert talk.lines == [
        "calibrating, 40%, layer 1, about 36 s left",
        "calibrating, 60%, layer 3, about 24 s left",
        "calibrating, 80%, layer 5, about 12 s left",
    ]
    lines.start("waiting for somebody", 0)
    clock.now += 11
    lines.advance(0)
    assert talk.lines[3:] == ["waiting for somebody"]


def test_notes_follow_what_they_are_about(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(Result):
        warnings, notes = ("careful",), ("nothing was written",)

    talk, order = Said(), Said()
    monkeypatch.setattr("hxaconv.cli.console._print", lambda console, text, style: order.lines.append(text))
    monkeypatch.setattr(talk, "say", order.lines.append)
    monkeypatch.setattr(talk, "write", lambda result: order.lines.append("the plan"))
    talk.show(Told())
    assert order.lines == ["Warning: careful", "the plan", "nothing was written"]


def test_short_work_is_silent_in_a_log_and_quiet_work_everywhere() -> None:
    clock, talk = Clock(), Said()
    lines = Lines(talk, clock)
    lines.start("Writing", 100)
    clock.now += 9
    lines.advance(100)
    assert not talk.lines
    assert Talk(quiet=True).progress() is None
    assert isinstance(Talk().progress(), Lines)


def test_a_bar_knows_the_time_left_of_steps_that_take_minutes() -> None:
    clock, bars = Clock(), Bars()
    bars._bars.get_time = clock
    bars.start("calibrating", 4000)
    for _ in range(2):
        clock.now += 120
        bars.advance(1000)
    assert bars._bars.tasks[0].time_remaining == pytest.approx(240, abs=1)
    bars.stop()


@pytest.mark.parametrize("width", [40, 80])
def test_lines_of_a_terminal_break_between_words_and_never_inside_what_is_copied(width: int) -> None:
    path, command = f"/data/{'long-name/' * 9}x", "`hxaconv to-hf student.pth student-hf/ --layer-map reka-flash-3`"
    line = f"  - {path} does not exist; to write it, {command} is what has to be typed before anything else."
    broken = filled(line, width)
    assert path in broken and command in broken
    others = [part for part in broken.split("\n") if path not in part and command not in part]
    assert others and all(len(part) <= width and part.startswith("    ") for part in others)
    assert broken.startswith("  - /data")
    assert filled("short: a", width) == "short: a"
    assert filled(f"$ hxaconv verify {'word ' * 40}", width).count("\n") == 0
