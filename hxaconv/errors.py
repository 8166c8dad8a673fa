"""The errors a user can cause. Everything that only we can cause is an assert."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

MAX_LISTED = 12
"""Entries of one kind that a message lists before it only counts the rest."""


FAULT = "this is a fault of hxaconv, not of what you gave it; please report it with the traceback above"


class HxaconvError(Exception):
    """Wrong use or bad input: `message` is what and where, `hint` what to do about it."""

    exit_code = 2
    shared = False
    """Whether every rank of a run raises it, so that one of them prints it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class NotConverted(HxaconvError):
    """What was opened is known for what it is, and is no model to convert: `inspect` describes it all the same."""


class NotOnHub(HxaconvError):
    """The Hub knows no such model, or cannot be asked."""


class Inconsistent(HxaconvError):
    """A checkpoint whose tensors and settings do not make one model; `verify` reports it as a failed check."""


class CheckFailed(HxaconvError):
    """A check ran to its end and found the checkpoint wrong."""

    exit_code = 1


def all_of(*checks: Callable[[], Any]) -> list[Any]:
    """What each of the checks returns; what several of them refuse is one error.

    Raises:
        HxaconvError: the one error, or one with the messages and hints of all.
    """
    results, errors = [], []
    for check in checks:
        try:
            results.append(check())
        except HxaconvError as error:
            errors.append(error)
    if len(errors) > 1:
        raise HxaconvError(
            "\n".join(error.message for error in errors), hint=" ".join(error.hint for error in errors if error.hint)
        )
    if errors:
        raise errors[0]
    return results


def out_of_memory(error: BaseException) -> HxaconvError | None:
    """The same as an error of ours, if memory has run out: Python's, numpy's, or PyTorch's on any device."""
    text = (str(error).strip().splitlines() or [""])[0].partition("DefaultCPUAllocator: ")
    reason = text[2] or text[0]
    if not isinstance(error, MemoryError) and not (text[2] or "out of memory" in reason):
        return None
    return HxaconvError(
        f"memory has run out{f': {reason}' if reason else ''}",
        hint="Take fewer tokens, skip the check with --no-verify where a command has it, or use a larger machine.",
    )


def meant(word: str, known: Iterable[str]) -> str:
    """` (did you mean this?)`, or nothing where nothing known is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def bullet_list(problems: Iterable[str]) -> str:
    """Problems as indented lines; those beyond MAX_LISTED are counted."""
    lines = list(problems)
    shown = [f"  - {line}" for line in lines[:MAX_LISTED]]
    if len(lines) > MAX_LISTED:
        shown.append(f"  ... and {len(lines) - MAX_LISTED} more")
    return "\n".join(shown)


def shortened(items: Iterable[str], separator: str = ", ", most: int = MAX_LISTED) -> str:
    """Items in one line, those beyond `most` counted: `a, b and 3 more`, or `a; b; and 3 more`."""
    found = list(items)
    line = separator.join(found[:most])
    joint = " " if separator == ", " else separator
    return f"{line}{joint}and {len(found) - most} more" if len(found) > most else line


def raise_all(
    summary: str, problems: Iterable[str], *, hint: str = "", kind: type[HxaconvError] = HxaconvError
) -> None:
    """Report every problem of one kind in one error; do nothing when there is none.

    Raises:
        HxaconvError: of this `kind`, when `problems` is not empty.
    """
    lines = list(problems)
    if lines:
        raise kind(f"{summary}\n{bullet_list(lines)}", hint=hint)
