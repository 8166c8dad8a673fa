"""Advice on layers for people: a strip with bars, a table of all layers, and the reasons."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hxaconv.cli.console import STRIP_WIDTH, WIDTH, strip_lines, table
from hxaconv.selection.report import fact_lines, figure_text
from hxaconv.selection.scores import reasons

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hxaconv.selection.advice import Advice

BARS = " ▁▂▃▄▅▆▇█"

SHORT = {
    "slow convergence": "conv",
    "slow alignment": "align",
    "scale mismatch": "scale",
    "instability": "unstable",
}
"""What a table calls the parts of a score, where their names are too long."""


def shown(advice: Advice, width: int = WIDTH) -> list[RenderableType]:
    """Bars, table and reasons for a terminal of `width` columns."""
    columns, left_out = _columns(advice, width)
    note = f"Too wide for {width} columns, left out: {', '.join(left_out)}; --json has all."
    return [
        *strip(advice, min(STRIP_WIDTH, max(1, width - 6))),
        table("", list(columns), list(zip(*columns.values(), strict=True)), right=3),
        *(textwrap.wrap(note, width) if left_out else []),
        *summary(advice, width),
    ]


def _columns(advice: Advice, width: int) -> tuple[dict[str, Sequence[str]], list[str]]:
    """(every layer with every score: taken or not, what uniform takes, the price of overruling; scores left out).

    Scores are left out where they would make it wider than `width`, the later ones first.
    """
    pick, layers = advice.pick, range(advice.num_layers)
    columns: dict[str, Sequence[str]] = {
        "layer": [str(layer) for layer in layers],
        "": ["G" if layer in pick.layers else "R" for layer in layers],
        "even": ["•" if layer in pick.uniform else "" for layer in layers],
    }
    last = {"margin": [figure_text(margin) for margin in pick.choice.margins]} if pick.choice else {}
    left_out = []
    decider = advice.decider
    scores = {decider.strategy: decider.values} if decider else {}
    if pick.choice and pick.strategy != "log":  # whose score is within 0..1 as it is
        scores["0..1"] = pick.scores
    scores |= {column.strategy: column.values for column in advice.columns}
    parts = decider.parts if decider else {}
    scores |= {SHORT.get(part, part): values for part, values in parts.items()}
    for name, values in scores.items():
        wider = columns | {name: [figure_text(value) for value in values]}
        if _width(wider | last) <= width:
            columns = wider
        else:
            left_out.append(name)
    return columns | last, left_out


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    return sum(max(map(len, (name, *cells))) + 3 for name, cells in columns.items())


def strip(advice: Advice, width: int = STRIP_WIDTH) -> list[str]:
    """Bars of the deciding scores over the layers' letters, `width` layers to a block.

    24  ▂▁▃▅▁▂▁▁▄
        RRRRRGRRR
    """
    scores = advice.pick.scores or tuple(1.0 if i in advice.pick.layers else 0.0 for i in range(advice.num_layers))
    known = [score for score in scores if score is not None]
    low, high = min(known), max(known)
    bars = "".join(" " if score is None else _bar((score - low) / (high - low or 1.0)) for score in scores)
    letters = "".join("G" if i in advice.pick.layers else "R" for i in range(advice.num_layers))
    numbered = zip(strip_lines(bars, width), strip_lines(letters, width), strict=True)
    return [line for over, under in numbered for line in (over, f"      {under[6:]}")]


def _bar(share: float) -> str:
    return BARS[1 + round(share * (len(BARS) - 2))]


def summary(advice: Advice, width: int = WIDTH) -> list[str]:
    """What the columns say, the pick, its overlap with uniform, and why."""
    pick, parts = advice.pick, bool(advice.decider and advice.decider.parts)
    lines = [
        "G: stays attention; even: what uniform takes"
        + ("; 0..1: what decides" if pick.choice and not parts else "")
        + ("; margin: the price of overruling it" if pick.choice else ""),
        *([f"Parts of log: {', '.join(f'{short} = {part}' for part, short in SHORT.items())}"] if parts else []),
        f"GQA layers ({len(pick.layers)} of {advice.num_layers}): {', '.join(map(str, pick.layers))}",
        *fact_lines(advice),
    ]
    lines += [("why: " if i == 0 else "     ") + line for i, line in enumerate(reasons(pick))]
    return [part for line in lines for part in textwrap.wrap(line, width, subsequent_indent="       ")]
