"""Every `--plot`: a comparison by depth, a calibration by layer, the scores that layers were chosen by."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats.diskio import write_result

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


def file_problems(option: str, file: str | Path | None, suffixes: Sequence[str], *, overwrite: bool) -> list[str]:
    """Why a result could not be written, a line each, checked before hours of computing it; None is no file."""
    if file is None:
        return []
    path, problems = Path(file), []
    folder = path.absolute().parent
    if suffixes and path.suffix not in suffixes:
        problems.append(f"{path.name}: its name ends in {', '.join(suffixes)}")
    if not folder.is_dir():
        problems.append(f"{folder} is not a folder")
    elif not os.access(folder, os.W_OK):
        problems.append(f"{folder}: nothing can be written there")
    if path.is_dir():
        problems.append(f"{path} is a folder")
    elif path.exists() and not overwrite:
        problems.append(f"{path} exists; --overwrite replaces it")
    if suffixes == SUFFIXES and importlib.util.find_spec("matplotlib") is None:
        problems.append("it needs matplotlib: pip install 'hxaconv[plot]'")
    return [f"{option} {path}: {problem}" for problem in problems]


def check_plot(path: str | Path | None, *, overwrite: bool) -> None:
    """Refuse a plot that could not be made, before hours of computing; None is no plot.

    Raises:
        HxaconvError: listing what stands in its way.
    """
    raise_all("this cannot be drawn:", file_problems("--plot", path, SUFFIXES, overwrite=overwrite))


def draw_report(report: Report, path: Path) -> None:
    """Draw a comparison into a .png, .svg or .pdf file; GQA layers are hatched, marks distinguish the lines.

    Raises:
        HxaconvError: without matplotlib, for another suffix, or for a report without layers.
    """
    if not report.layers:
        raise HxaconvError("--plot draws a comparison by depth, and nothing was compared", hint="Use --against.")
    layers, depth = report.layers, [result.layer for result in report.layers]
    errors = {"layer output": [r.output_error for r in layers], "mixer": [r.mixer_error for r in layers]}
    floor = f" (0 at {FLOOR:g})" if any(value < FLOOR for values in errors.values() for value in values) else ""
    with _by_depth(path, "layer (hatched: GQA)") as (figure, upper, lower):
        _lines(upper, depth, {name: [max(value, FLOOR) for value in values] for name, values in errors.items()})
        upper.set(yscale="log", ylabel=f"relative error\non equal input{floor}")
        _lines(lower, depth, {"": [r.cosine for r in layers]})
        lower.set_ylabel("cosine of the residual\nstreams, end to end")
        for axes, layer in ((axes, r.layer) for axes in (upper, lower) for r in layers if r.kind == "gqa"):
            axes.axvspan(layer - 0.4, layer + 0.4, facecolor="none", edgecolor="0.6", hatch="///", linewidth=0)
        figure.suptitle(f"{Path(report.source).name} against {Path(report.other or '').name}", fontsize=10)


def draw_calibration(report: CalibrationReport, path: Path) -> None:
    """Draw error before and after, and the decay of every head, layer by layer; readable without colours.

    Raises:
        HxaconvError: as `check_plot`, and when the file cannot be written.
    """
    layers, kl = report.layers, report.distances
    depth, after = [layer.layer for layer in layers], [layer.error_after for layer in layers]
    with _by_depth(path, "layer", width=max(7.0, len(layers) * 0.17)) as (figure, upper, lower):
        _lines(upper, depth, {"after": after, "before": [layer.error_before for layer in layers]})
        if kept := [(layer.layer, layer.error_after) for layer in layers if layer.fell_back]:
            upper.plot(*zip(*kept, strict=True), "kx", markersize=8, label="fell back")
        upper.set_ylim(bottom=0)
        upper.set_ylabel("held-out mixer error\n(teacher's energy: 1)")
        if points := [(layer.layer, 1 - decay) for layer in layers for decay in layer.decay]:
            lower.plot(*zip(*points, strict=True), "k_", markersize=6)
            lower.set_yscale("log")
        lower.set_ylabel("1 - decay per token\na mark per head")
        if kl is not None:
            used = "" if report.taken else ", not used"
            figure.suptitle(
                f"KL(teacher || student) on {kl.tokens} held-out tokens: {kl.calibrated:.3g} nats{used}"
                f" (baseline {kl.plain:.3g}, attention zeroed {kl.attention_zeroed:.3g})",
                fontsize=10,
            )


def draw_advice(advice: Advice, path: Path) -> None:
    """Bars of the deciding scores, GQA layers in colour, as an image.

    Raises:
        HxaconvError: when matplotlib is not installed, or the file cannot be written.
    """
    pick, layers = advice.pick, range(advice.num_layers)
    values = advice.columns[0].values if advice.columns else [float(i in pick.layers) for i in layers]
    with _saved(path, (max(6.0, advice.num_layers * 0.2), 3.0)) as figure:
        axes = figure.subplots()
        colours = ["#c2410c" if i in pick.layers else "#94a3b8" for i in layers]
        axes.bar(layers, [0.0 if value is None else value for value in values], color=colours)
        label = "layer (stays attention: orange)"
        axes.set(xlabel=label, ylabel=pick.strategy, xlim=(-0.7, advice.num_layers - 0.3))


@contextmanager
def _by_depth(path: Path, label: str, width: float = 8) -> Iterator[tuple[Figure, Axes, Axes]]:
    """A figure of two parts over the layers of a model, saved in the end."""
    from matplotlib.ticker import MaxNLocator

    with _saved(path, (width, 5)) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        yield figure, upper, lower
        upper.legend(fontsize=8)
        lower.set_xlabel(label)
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (upper, lower):
            axes.grid(visible=True, axis="y", linewidth=0.3, color="0.6")


def _lines(axes: Axes, depth: Sequence[int], values: Mapping[str, Sequence[float]]) -> None:
    """A line for each name, with marks and strokes of their own."""
    styles: tuple[dict[str, Any], ...] = ({"marker": "o"}, {"marker": "^", "linestyle": "--", "fillstyle": "none"})
    for style, (name, heights) in zip(styles, values.items(), strict=False):
        axes.plot(depth, heights, color="black", markersize=4, linewidth=1, label=name, **style)


@contextmanager
def _saved(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure, saved in the end in the format of its suffix; the same figure gives the same bytes.

    Raises:
        HxaconvError: when it cannot be drawn or written.
    """
    check_plot(path, overwrite=True)
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "hxaconv"}):
        try:
            figure.savefig(drawn, format=path.suffix[1:], dpi=150, metadata=_NO_DATE.get(path.suffix))
        except ValueError as error:
            raise HxaconvError(f"{path}: the plot cannot be drawn: {error}") from None
    write_result(path, drawn.getvalue())
