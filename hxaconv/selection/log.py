"""Scores from the CSV that stage-1 training writes: which layers were hardest to align.

Columns: step, layer_{i}_rawMSE, layer_{i}_scaledMSE, layer_{i}_scale (and others, ignored), in any order.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hxaconv.errors import HxaconvError, raise_all

WEIGHTS = {
    "residue": 0.30,
    "slow convergence": 0.25,
    "slow alignment": 0.20,
    "scale mismatch": 0.15,
    "instability": 0.10,
}
_COLUMN = re.compile(r"layer_(\d{1,6})_(\w+)", re.ASCII)
_NEEDED = ("rawMSE", "scale")
TINY = 1e-8


@dataclass(frozen=True, slots=True)
class Log:
    """steps (T,), raw MSE and scale (T, layers); `layers` are the numbers in the column names, sorted."""

    layers: tuple[int, ...]
    steps: np.ndarray
    raw: np.ndarray
    scale: np.ndarray
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LogScores:
    """Per layer, 0..1: the score, and the parts it is the weighted sum of. Layers without columns are None."""

    values: tuple[float | None, ...]
    parts: dict[str, tuple[float | None, ...]]
    warnings: tuple[str, ...]


def read_log(path: Path) -> Log:
    """Read a training log.

    Raises:
        HxaconvError: when it has no layer columns, or no two rows of numbers.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except OSError as error:
        raise HxaconvError(f"training log {path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise HxaconvError(f"training log {path} is not a CSV file: {error}") from None
    if not rows:
        raise HxaconvError(f"training log {path} is empty")
    header = _without_end([cell.strip() for cell in rows[0]])
    columns = {kind: _columns(header, kind) for kind in _NEEDED}
    _check_columns(path, header, columns)
    cells, warnings = _cells(rows[1:], header, columns, path)
    layers = sorted(columns["rawMSE"])
    where = np.array([[header.index(columns[kind][i]) for i in layers] for kind in _NEEDED])
    table = np.array([[_number(cell) for cell in row] for row in cells]).reshape(-1, len(header))
    layers, where, unknown = _known(layers, where, table, header, cells, path)
    steps, (raw, scale) = table[:, header.index("step")], (table[:, columns] for columns in where)
    usable = np.isfinite(raw).all(axis=1) & np.isfinite(scale).all(axis=1) & np.isfinite(steps)
    if not usable.all():
        warnings.append(f"{int((~usable).sum())} of {len(usable)} rows hold missing or infinite numbers: left out")
    order = np.flatnonzero(usable)[np.argsort(steps[usable], kind="stable")]
    if len(order) < 2:
        raise HxaconvError(
            f"training log {path} has {len(order)} usable rows, at least 2 are needed",
            hint="A row needs its step, and rawMSE and scale of every layer as finite numbers.",
        )
    if (np.diff(steps[usable]) <= 0).any():
        warnings.append("steps go back: the log of a run that was resumed; rows are sorted by step")
    return Log(tuple(layers), steps[order], raw[order], scale[order], (*warnings, *unknown))


def _without_end(cells: list[str]) -> list[str]:
    """Cells without the empty ones at the end, which spreadsheets and closing commas add."""
    while cells and not cells[-1]:
        cells = cells[:-1]
    return cells


def _known(
    layers: list[int], where: np.ndarray, table: np.ndarray, header: list[str], cells: list[list[str]], path: Path
) -> tuple[list[int], np.ndarray, list[str]]:
    """Layers and columns (2, layers) without those that have no finite number in any row; a warning of them."""
    finite = np.isfinite(table).any(axis=0)[where]
    for kind, found in zip(_NEEDED, finite, strict=True):
        if len(table) and not found.any():
            column = int(where[_NEEDED.index(kind), 0])
            raise HxaconvError(
                f"training log {path}: no layer has a finite {kind} in any row; {header[column]} is"
                f" {cells[0][column]!r} in the first"
            )
    known = finite.all(axis=0) if len(table) else np.ones(len(layers), dtype=bool)
    lost = [layer for layer, found in zip(layers, known, strict=True) if not found]
    warnings = [f"layers {lost} have no finite rawMSE or scale in any row: they cannot be picked"] if lost else []
    return [layer for layer in layers if layer not in lost], where[:, known], warnings


def _columns(header: Sequence[str], kind: str) -> dict[int, str]:
    matches = ((_COLUMN.fullmatch(name), name) for name in header)
    return {int(match[1]): name for match, name in matches if match and match[2] == kind}


def _check_columns(path: Path, header: Sequence[str], columns: dict[str, dict[int, str]]) -> None:
    problems = [] if "step" in header else ["there is no column step"]
    known = [(int(match[1]), match[2]) for match in map(_COLUMN.fullmatch, header) if match]
    problems += [
        f"layer {layer} has its {kind} twice, its number written in two ways"
        for (layer, kind), count in Counter(known).items()
        if count > 1 and header.count(f"layer_{layer}_{kind}") < count
    ]
    for kind in _NEEDED:
        if not columns[kind]:
            problems.append(f"there is no column layer_{{i}}_{kind}")
    uneven = set(columns["rawMSE"]) ^ set(columns["scale"])
    if uneven and not problems:
        problems.append(f"layers {sorted(uneven)} have rawMSE or scale, not both")
    twice = sorted({name for name in header if header.count(name) > 1 and name})
    if twice:
        problems.append(f"columns that occur twice: {', '.join(twice)}")
    raise_all(f"training log {path}:", problems, hint="Is this the CSV that stage-1 training writes?")


def _cells(
    rows: Sequence[Sequence[str]], header: list[str], columns: dict[str, dict[int, str]], path: Path
) -> tuple[list[list[str]], list[str]]:
    """(rows with one cell per name of the header, warnings)."""
    # Some trainers write a header of 3L+1 names over rows of 2L+1 numbers: step, raw MSE and scale, the scaled
    # MSE left out. Read by position, the scales land under scaledMSE and the scale columns stay empty.
    short = [name for name in header if not name.endswith("_scaledMSE")]
    trimmed = [_without_end([cell.strip() for cell in row]) for row in rows]
    trimmed = [row for row in trimmed if row != header]
    scales = [header.index(name) for name in columns["scale"].values()]
    if trimmed and all(_ends_without(row, scales, len(header), len(short)) for row in trimmed):
        trimmed = [row[: len(short)] for row in trimmed]
    faulty = sum(len(row) == len(short) < len(header) for row in trimmed)
    ragged = sum(len(row) not in (len(short), len(header)) for row in trimmed)
    if faulty and max(map(header.index, columns["rawMSE"].values())) > min(scales):
        raise HxaconvError(
            f"training log {path}: {faulty} rows have {len(short)} fields under a header of {len(header)}, whose names"
            " do not stand in the order rawMSE, scale: which field is which cannot be told",
            hint="Give the header one name per field, in the order of the rows.",
        )
    warnings = []
    if faulty:
        warnings.append(
            f"{faulty} rows of {path.name} have {len(short)} fields under a header of {len(header)}: the known"
            " fault of these logs, the scaledMSE columns were never written. The scales that would be read as"
            " scaledMSE have been put under scale"
        )
    if ragged:
        warnings.append(f"{ragged} rows of {path.name} have neither {len(header)} nor {len(short)} fields: left out")
    names = {len(short): short, len(header): header}
    by_name = [dict(zip(names[len(row)], row, strict=True)) for row in trimmed if len(row) in names]
    return [[row.get(name, "") for name in header] for row in by_name], warnings


def _ends_without(row: Sequence[str], scales: Sequence[int], whole: int, short: int) -> bool:
    """Whether a row is one of the faulty ones that a table program has filled up: no scale, all before."""
    return len(row) == whole and all(row[i].lower() in ("", "nan") for i in scales) and min(scales) >= short


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def normalised(values: np.ndarray) -> np.ndarray:
    """Linearly to 0..1, lowest to highest; zeros where all are the same."""
    low, high = values.min(), values.max()
    return np.zeros_like(values) if high - low < 1e-12 else (values - low) / (high - low)


def score_log(log: Log, num_layers: int) -> LogScores:
    """The score that is in use today: 0.30 residue + 0.25 slow convergence + 0.20 slow alignment + ...

    Raises:
        HxaconvError: when the log names layers that the model does not have.
    """
    outside = [layer for layer in log.layers if layer >= num_layers]
    if outside:
        raise HxaconvError(
            f"the training log has layers up to {max(outside)}, the model has {num_layers} layers",
            hint="Is the log from another model?",
        )
    parts = _parts(log)
    values = sum(weight * parts[name] for name, weight in WEIGHTS.items())
    assert isinstance(values, np.ndarray)
    warnings = list(log.warnings)
    missing = sorted(set(range(num_layers)) - set(log.layers))
    if missing:
        warnings.append(f"the log has no columns for layers {missing}: they cannot be picked")

    def spread(numbers: np.ndarray) -> tuple[float | None, ...]:
        known = dict(zip(log.layers, map(float, numbers), strict=True))
        return tuple(known.get(layer) for layer in range(num_layers))

    return LogScores(spread(values), {name: spread(part) for name, part in parts.items()}, tuple(warnings))


def _parts(log: Log) -> dict[str, np.ndarray]:
    raw, first, last = log.raw, log.raw[0], log.raw[-1]
    centred = log.steps - log.steps.mean()
    # Slope of the least-squares line of log raw MSE on step; no step, no slope.
    slopes = centred @ np.log(np.maximum(raw, TINY)) / max(float(centred @ centred), 1e-300)
    return {
        "residue": normalised(last),
        "slow convergence": 1 - normalised(-slopes),
        "slow alignment": 1 - normalised((first - last) / (first + TINY)),
        "scale mismatch": normalised(log.scale[-1]),
        "instability": normalised(np.diff(raw, axis=0).var(axis=0)),
    }
