"""Advice on file: a layer map with its reasons, plain data, a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hxaconv.model.layer_maps import LayerMap, dump, of_config
from hxaconv.selection.scores import reasons

if TYPE_CHECKING:
    from hxaconv.model.config import ModelConfig
    from hxaconv.selection.advice import Advice


def figure_text(value: float | None) -> str:
    if value is None or value == float("inf"):
        return "-"
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"
    return text.lstrip("-") if float(text) == 0 else text


def fact_lines(advice: Advice) -> list[str]:
    pick = advice.pick
    overlap = f"{pick.overlap} of {len(pick.layers)} in common"
    return [
        f"uniform would take {', '.join(map(str, pick.uniform))}: {overlap}",
        *(f"{name}: {value:.4f} nats per token" for name, value in (advice.facts or {}).items()),
    ]


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
        *fact_lines(advice),
        *reasons(advice.pick),
        *(f"warning: {warning}" for warning in advice.warnings),
        "",
        ", ".join(["layer", *columns]) if columns else "",
        *(
            ", ".join([str(layer), *(figure_text(values[layer]) for values in columns.values())])
            + (" G" if layer in advice.pick.layers else "")
            for layer in range(advice.num_layers if columns else 0)
        ),
    ]
    return dump(chosen, _trimmed(comments))


def _trimmed(lines: list[str]) -> list[str]:
    while lines and not lines[-1]:
        lines = lines[:-1]
    return lines
