"""Every `--plot`: a comparison by depth, a calibration by layer, the scores that layers were chosen by."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.save.diskio import write_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hxaconv.calibration.report import CalibrationReport
    from hxaconv.selection.advice import Advice
    from hxaconv.verification.report import Report

SUFFIXES = (".png", ".svg", ".pdf")
FLOOR = 1e-9
"""Where an error of 0 is drawn: a logarithmic axis has no place for it."""
_NO_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def plot_problems(path: Path, *, overwrite: bool) -> list[str]:
    """Why a plot could not be saved as `path`, a line each."""
    problems = []
    if path.suffix not in SUFFIXES:
        problems.append(f"{path.name}: a plot is one of {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        problems.append(f"{path.absolute().parent} is not a folder")
    if path.is_dir():
        problems.append(f"{path} is a folder")
    elif path.exists() and not overwrite:
        problems.append(f"{path} exists; --overwrite replaces it")
    if importlib.util.find_spec("matplotlib") is None:
        problems.append("it needs matplotlib: pip install 'hxaconv[plot]'")
    return problems


def check_plot(path: str | Path | None, *, overwrite: bool) -> None:
    """Refuse a plot that could not be made, before hours of computing; None is no plot.

    Raises:
        HxaconvError: listing what stands in its way.
    """
    if path is not None:
        raise_all(f"--plot {path}:", plot_problems(Path(path), overwrite=overwrite))


def save_figure(figure: Figure, path: Path) -> None:
    """Save as the suffix says; the same figure gives the same bytes.

    Raises:
        HxaconvError: when it cannot be written.
    """
    import matplotlib

    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "hxaconv"}):
        try:
            figure.savefig(drawn, format=path.suffix[1:], dpi=150, metadata=_NO_DATE.get(path.suffix))
        except ValueError as error:
            raise HxaconvError(f"{path}: the plot cannot be drawn: {error}") from None
    write_result(path, drawn.getvalue())


def draw_report(report: Report, path: Path) -> None:
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
    _report_errors(report, upper)
    _cosines(report, lower)
    for axes in (upper, lower):
        _mark_gqa(report, axes)
        axes.grid(visible=True, axis="y", linewidth=0.3, color="0.6")
    figure.suptitle(f"{Path(report.source).name} against {Path(report.other or '').name}", fontsize=10)
    save_figure(figure, path)


def _report_errors(report: Report, axes: Axes) -> None:
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


def draw_calibration(report: CalibrationReport, path: Path) -> None:
    """Draw error before and after, and the decay of every head, layer by layer; readable without colours.

    Raises:
        HxaconvError: as `check_plot`, and when the file cannot be written.
    """
    check_plot(path, overwrite=True)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, len(report.layers) * 0.17), 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _fit_errors(report, upper)
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


def _fit_errors(report: CalibrationReport, axes: Axes) -> None:
    depth = [layer.layer for layer in report.layers]
    after: dict[str, Any] = {"marker": "o", "linestyle": "-", "label": "after"}
    before: dict[str, Any] = {"marker": "^", "linestyle": "--", "fillstyle": "none", "label": "before"}
    for style, values in (
        (before, [layer.error_before for layer in report.layers]),
        (after, [layer.error_after for layer in report.layers]),
    ):
        axes.plot(depth, values, color="black", markersize=4, linewidth=1, **style)
    kept = [layer for layer in report.layers if layer.fell_back]
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


def draw_advice(advice: Advice, path: Path) -> None:
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
