"""What every `--plot` shares: checks before anything is computed, and files that depend on the figure alone."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.save.diskio import write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
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


def check_plot(path: Path, *, overwrite: bool) -> None:
    """Refuse a plot that could not be made, before hours of computing.

    Raises:
        HxaconvError: listing what stands in its way.
    """
    raise_all(f"--plot {path}:", plot_problems(path, overwrite=overwrite))


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
