"""`--plot`: what a calibration did to every layer, for screen and print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.calibration.report import CalibrationReport
from hxaconv.cli.plots import check_plot, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(report: CalibrationReport, path: Path) -> None:
    """Draw error before and after, and the decay of every head, layer by layer; readable without colours.

    Raises:
        HxaconvError: as `check_plot`, and when the file cannot be written.
    """
    check_plot(path, overwrite=True)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, len(report.layers) * 0.17), 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _errors(report, upper)
    _decays(report, lower)
    for axes in (upper, lower):
        axes.grid(visible=True, axis="y", linewidth=0.3, color="0.6")
    if report.distances is not None:
        kl, used = report.distances, "" if report.taken else ", not used"
        figure.suptitle(
            f"KL(teacher || student) on {kl.tokens} held-out tokens: {kl.calibrated:.3g} nats{used}"
            f" (plain {kl.plain:.3g}, attention zeroed {kl.attention_zeroed:.3g})",
            fontsize=10,
        )
    save_figure(figure, path)


def _errors(report: CalibrationReport, axes: Axes) -> None:
    depth = [layer.layer for layer in report.layers]
    after: dict[str, Any] = {"marker": "o", "linestyle": "-", "label": "after"}
    before: dict[str, Any] = {"marker": "^", "linestyle": "--", "fillstyle": "none", "label": "before"}
    for style, values in (
        (before, [layer.error_before for layer in report.layers]),
        (after, [layer.error_after for layer in report.layers]),
    ):
        axes.plot(depth, values, color="black", markersize=4, linewidth=1, **style)
    kept = [layer for layer in report.layers if layer.kept_plain]
    if kept:
        places = [layer.layer for layer in kept], [layer.error_after for layer in kept]
        axes.plot(*places, "kx", markersize=8, label="kept plain")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("held-out mixer error\n(teacher's energy: 1)")
    axes.legend(fontsize=8)


def _decays(report: CalibrationReport, axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    points = [(layer.layer, 1 - decay) for layer in report.layers for decay in layer.decay]
    if points:
        axes.plot(*zip(*points, strict=True), "k_", markersize=6)
        axes.set_yscale("log")
    axes.set_ylabel("1 - decay per token\na mark per head")
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
