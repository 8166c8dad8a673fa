"""`--plot`: relative error and cosine by depth, for screen and print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.cli.plots import check_plot, save_figure
from hxaconv.errors import HxaconvError
from hxaconv.verification.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOOR = 1e-9
"""Where an error of 0 is drawn: a logarithmic axis has no place for it."""


def plot(report: Report, path: Path) -> None:
    """Draw a comparison into a .png, .svg or .pdf file; GQA layers are hatched, shapes tell lines apart.

    Raises:
        HxaconvError: without matplotlib, for another suffix, or for a report without layers.
    """
    check_plot(path, overwrite=True)
    if not report.layers:
        raise HxaconvError("--plot draws a comparison by depth, and nothing was compared", hint="Use --against.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _errors(report, upper)
    _cosines(report, lower)
    for axes in (upper, lower):
        _mark_gqa(report, axes)
        axes.grid(visible=True, axis="y", linewidth=0.3, color="0.6")
    figure.suptitle(f"{Path(report.source).name} against {Path(report.other or '').name}", fontsize=10)
    save_figure(figure, path)


def _errors(report: Report, axes: Axes) -> None:
    depth = [result.layer for result in report.layers]
    lines: tuple[tuple[str, list[float], dict[str, Any]], ...] = (
        ("layer output", [r.output_error for r in report.layers], {"marker": "o", "linestyle": "-"}),
        ("mixer", [r.mixer_error for r in report.layers], {"marker": "^", "linestyle": "--", "fillstyle": "none"}),
    )
    for label, values, style in lines:
        drawn = [max(value, FLOOR) for value in values]
        axes.plot(depth, drawn, color="black", markersize=4, linewidth=1, label=label, **style)
    axes.set_yscale("log")
    has_floor = any(value < FLOOR for _, values, _ in lines for value in values)
    axes.set_ylabel("relative error\non equal input" + (f" (0 at {FLOOR:g})" if has_floor else ""))
    axes.legend(fontsize=8)


def _cosines(report: Report, axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    depth = [result.layer for result in report.layers]
    axes.plot(depth, [r.cosine for r in report.layers], color="black", marker="s", markersize=3, linewidth=1)
    axes.set_ylabel("cosine of the residual\nstreams, end to end")
    axes.set_xlabel("layer (hatched: GQA)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _mark_gqa(report: Report, axes: Axes) -> None:
    for result in report.layers:
        if result.kind == "gqa":
            axes.axvspan(
                result.layer - 0.4, result.layer + 0.4, facecolor="none", edgecolor="0.6", hatch="///", linewidth=0
            )
