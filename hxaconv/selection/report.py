"""Advice to look at: a table of all layers, the strip with bars, a layer map, JSON, a plot."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.cli.console import STRIP_WIDTH, WIDTH, strip_lines, table
from hxaconv.cli.plots import check_plot, save_figure
from hxaconv.model.layer_maps import LayerMap, dump, of_config
from hxaconv.selection.scores import reasons
from hxaconv.selection.strategies import STRATEGIES

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hxaconv.model.config import ModelConfig
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
    last = {"margin": [_figure(margin) for margin in pick.choice.margins]} if pick.choice else {}
    left_out = []
    decider = advice.decider
    scores = {decider.strategy: decider.values} if decider else {}
    if pick.choice and pick.strategy != "log":  # whose score is within 0..1 as it is
        scores["0..1"] = pick.scores
    scores |= {column.strategy: column.values for column in advice.columns}
    parts = decider.parts if decider else {}
    scores |= {SHORT.get(part, part): values for part, values in parts.items()}
    for name, values in scores.items():
        wider = columns | {name: [_figure(value) for value in values]}
        if _width(wider | last) <= width:
            columns = wider
        else:
            left_out.append(name)
    return columns | last, left_out


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    return sum(max(map(len, (name, *cells))) + 3 for name, cells in columns.items())


def _figure(value: float | None) -> str:
    if value is None or value == float("inf"):
        return "-"
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"
    return text.lstrip("-") if float(text) == 0 else text


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
        *_facts(advice),
    ]
    lines += [("why: " if i == 0 else "     ") + line for i, line in enumerate(reasons(pick))]
    return [part for line in lines for part in textwrap.wrap(line, width, subsequent_indent="       ")]


def _facts(advice: Advice) -> list[str]:
    pick = advice.pick
    overlap = f"{pick.overlap} of {len(pick.layers)} in common"
    return [
        f"uniform would take {', '.join(map(str, pick.uniform))}: {overlap}",
        *(f"{name}: {value:.4f} nats per token" for name, value in (advice.facts or {}).items()),
    ]


def to_json(advice: Advice) -> dict[str, Any]:
    """Everything, plain."""
    pick = advice.pick
    result: dict[str, Any] = {
        "num_layers": advice.num_layers,
        "strategy": pick.strategy,
        "gqa_layers": list(pick.layers),
        "uniform": list(pick.uniform),
        "overlap_with_uniform": pick.overlap,
        "scores": {column.strategy: list(column.values) for column in advice.columns},
        "parts": {column.strategy: {k: list(v) for k, v in column.parts.items()} for column in advice.columns},
        "meanings": {column.strategy: STRATEGIES[column.strategy].meaning for column in advice.columns},
        "facts": dict(advice.facts or {}),
        "why": reasons(pick),
        "warnings": list(advice.warnings),
    }
    if pick.choice:
        result["decided_by"] = list(pick.scores)
        result["value"] = pick.choice.value
        result["margins"] = [None if margin == float("inf") else margin for margin in pick.choice.margins]
    if advice.heads:
        result["heads"] = [list(row) for row in advice.heads]
    return result


def layer_map(advice: Advice, config: ModelConfig, *, name: str, model: str, model_ids: Sequence[str] = ()) -> LayerMap:
    """The choice as a layer map for models like `config`; `model` is what its title calls them."""
    pick = advice.pick
    return of_config(
        name,
        config,
        pick.layers,
        title=f"{model}, {len(pick.layers)} of {advice.num_layers} layers by {pick.strategy}",
        model_ids=tuple(model_ids),
        source=f"hxaconv, strategy {pick.strategy}",
    )


def layer_map_text(advice: Advice, chosen: LayerMap, *, date: str, settings: Sequence[str] = ()) -> str:
    """The TOML of `--save`: strategy, figures and `date` (as the caller writes it) in comments."""
    columns = {column.strategy: column.values for column in advice.columns}
    columns |= advice.decider.parts if advice.decider else {}
    comments = [
        f"{len(advice.pick.layers)} of {advice.num_layers} layers stay attention, chosen on {date}",
        *settings,
        *_facts(advice),
        *reasons(advice.pick),
        *(f"warning: {warning}" for warning in advice.warnings),
        "",
        ", ".join(["layer", *columns]) if columns else "",
        *(
            ", ".join([str(layer), *(_figure(values[layer]) for values in columns.values())])
            + (" G" if layer in advice.pick.layers else "")
            for layer in range(advice.num_layers if columns else 0)
        ),
    ]
    return dump(chosen, _trimmed(comments))


def _trimmed(lines: list[str]) -> list[str]:
    while lines and not lines[-1]:
        lines = lines[:-1]
    return lines


def plot(advice: Advice, path: Path) -> None:
    """Bars of the deciding scores, GQA layers in colour, as an image.

    Raises:
        HxaconvError: when matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path, overwrite=True)
    from matplotlib.figure import Figure

    pick, decider = advice.pick, advice.decider
    values = decider.values if decider else tuple(float(i in pick.layers) for i in range(advice.num_layers))
    figure = Figure(figsize=(max(6.0, advice.num_layers * 0.2), 3.0), layout="constrained")
    axes = figure.subplots()
    colours = ["#c2410c" if i in pick.layers else "#94a3b8" for i in range(advice.num_layers)]
    axes.bar(range(advice.num_layers), [0.0 if value is None else value for value in values], color=colours)
    axes.set_xlabel("layer (stays attention: orange)")
    axes.set_ylabel(pick.strategy)
    axes.set_xlim(-0.7, advice.num_layers - 0.3)
    save_figure(figure, path)
