"""Scores from the CSV that stage-1 training writes: which layers were hardest to align.

Columns: step, layer_{i}_rawMSE, layer_{i}_scaledMSE, layer_{i}_scale (and others, ignored), in any order.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
TINY = 1e-8


@dataclass(frozen=True, slots=True)
class Log:
    """steps (T,), raw MSE and scale (T, layers); `layers` are the numbers in the column names, sorted."""

    layers: tuple[int, ...]
    steps: np.ndarray
    raw: np.ndarray
    scale: np.ndarray
    warnings: tuple[str, ...] = ()


def read_log(path: Path) -> Log:
    """Read a training log.

    Raises:
        HxaconvError: when it has no layer columns, or no two rows of numbers.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [_stripped(row) for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except OSError as error:
        raise HxaconvError(f"training log {path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise HxaconvError(f"training log {path} is not a CSV file: {error}") from None
    if not rows:
        raise HxaconvError(f"training log {path} is empty")
    names = _columns(path, rows[0])
    cells, warnings = _cells(path, rows[0], rows[1:], names)

    def table(columns: Iterable[str]) -> np.ndarray:
        return np.array([[_number(row.get(name, "")) for name in columns] for row in cells])

    layers = sorted(names["rawMSE"])
    columns = {kind: [found[layer] for layer in layers] for kind, found in names.items()}
    lost: set[int] = set()
    for kind, mine in columns.items() if cells else ():
        finite = np.isfinite(table(mine)).any(axis=0)
        if not finite.any():
            raise HxaconvError(
                f"training log {path}: no layer has a finite {kind} in any row; {mine[0]} is"
                f" {cells[0].get(mine[0], '')!r} in the first"
            )
        lost |= {layer for layer, found in zip(layers, finite, strict=True) if not found}
    unknown = (f"layers {sorted(lost)} have no finite rawMSE or scale in any row: they cannot be picked",)
    layers = [layer for layer in layers if layer not in lost]
    rest = [[names[kind][layer] for layer in layers] for kind in ("rawMSE", "scale")]
    numbers = table(["step", *rest[0], *rest[1]]).reshape(-1, 1 + 2 * len(layers))
    usable = np.isfinite(numbers).all(axis=1)
    if not usable.all():
        warnings.append(f"{int((~usable).sum())} of {len(usable)} rows hold missing or infinite numbers: left out")
    numbers = numbers[usable]
    if len(numbers) < 2:
        raise HxaconvError(
            f"training log {path} has {len(numbers)} usable rows, at least 2 are needed",
            hint="A row needs its step, and rawMSE and scale of every layer as finite numbers.",
        )
    if (np.diff(numbers[:, 0]) <= 0).any():
        warnings.append("steps go back: the log of a run that was resumed; rows are sorted by step")
    numbers = numbers[np.argsort(numbers[:, 0], kind="stable")]
    raw, scale = np.split(numbers[:, 1:], 2, axis=1)
    return Log(tuple(layers), numbers[:, 0], raw, scale, (*warnings, *(unknown if lost else ())))


def _stripped(row: Iterable[str]) -> list[str]:
    """Cells without the empty ones at the end, which spreadsheets and closing commas add."""
    cells = [cell.strip() for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _columns(path: Path, header: list[str]) -> dict[str, dict[int, str]]:
    """For rawMSE and for scale: layer -> name of its column."""
    known = [(int(match[1]), match[2], match[0]) for match in map(_COLUMN.fullmatch, header) if match]
    columns = {wanted: {layer: name for layer, kind, name in known if kind == wanted} for wanted in ("rawMSE", "scale")}
    problems = [] if "step" in header else ["there is no column step"]
    problems += [
        f"layer {layer} has its {kind} twice, its number written in two ways"
        for (layer, kind), names in Counter((layer, kind) for layer, kind, _ in set(known)).items()
        if names > 1
    ]
    problems += [f"there is no column layer_{{i}}_{kind}" for kind, found in columns.items() if not found]
    uneven = columns["rawMSE"].keys() ^ columns["scale"].keys()
    if uneven and not problems:
        problems.append(f"layers {sorted(uneven)} have rawMSE or scale, not both")
    twice = sorted(name for name, count in Counter(header).items() if count > 1 and name)
    if twice:
        problems.append(f"columns that occur twice: {', '.join(twice)}")
    raise_all(f"training log {path}:", problems, hint="Is this the CSV that stage-1 training writes?")
    return columns


def _cells(
    path: Path, header: list[str], rows: Sequence[list[str]], columns: Mapping[str, Mapping[int, str]]
) -> tuple[list[dict[str, str]], list[str]]:
    """(every row as name -> cell, warnings)."""
    # Some trainers write a header of 3L+1 names over rows of 2L+1 numbers: step, raw MSE and scale, the scaled
    # MSE left out. Read by position, the scales land under scaledMSE and the scale columns stay empty. Table
    # programs fill such rows up.
    short = [name for name in header if not name.endswith("_scaledMSE")]
    scales = [header.index(name) for name in columns["scale"].values()]
    rows = [row for row in rows if row != header]

    def filled_up(row: list[str]) -> bool:
        empty = all(row[i].lower() in ("", "nan") for i in scales) if len(row) == len(header) else False
        return empty and min(scales) >= len(short)

    if rows and all(map(filled_up, rows)):
        rows = [row[: len(short)] for row in rows]
    faulty = sum(len(row) == len(short) < len(header) for row in rows)
    if faulty and max(map(header.index, columns["rawMSE"].values())) > min(scales):
        raise HxaconvError(
            f"training log {path}: {faulty} rows have {len(short)} fields under a header of {len(header)}, whose names"
            " do not stand in the order rawMSE, scale: which field is which is unknown",
            hint="Give the header one name per field, in the order of the rows.",
        )
    names = {len(short): short, len(header): header}
    found = [dict(zip(names[len(row)], row, strict=True)) for row in rows if len(row) in names]
    warnings = []
    if faulty:
        warnings.append(
            f"{faulty} rows of {path.name} have {len(short)} fields under a header of {len(header)}: the known"
            " fault of these logs, the scaledMSE columns were never written. The scales that would be read as"
            " scaledMSE have been put under scale"
        )
    if len(found) < len(rows):
        warnings.append(
            f"{len(rows) - len(found)} rows of {path.name} have neither {len(header)} nor {len(short)} fields: left out"
        )
    return found, warnings


Values = tuple[float | None, ...]


def score_log(log: Log, num_layers: int) -> tuple[Values, dict[str, Values], tuple[str, ...]]:
    """The score that is in use today: 0.30 residue + 0.25 slow convergence + 0.20 slow alignment + ...

    Per layer, 0..1: the score, and the parts it is the weighted sum of; None without columns. Warnings come last.

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
    total = np.sum([weight * parts[name] for name, weight in WEIGHTS.items()], axis=0)
    missing = sorted(set(range(num_layers)) - set(log.layers))
    absent = (f"the log has no columns for layers {missing}: they cannot be picked",) if missing else ()

    def spread(numbers: np.ndarray) -> Values:
        known = dict(zip(log.layers, map(float, numbers), strict=True))
        return tuple(known.get(layer) for layer in range(num_layers))

    return spread(total), {name: spread(part) for name, part in parts.items()}, (*log.warnings, *absent)


def normalised(values: np.ndarray) -> np.ndarray:
    """Linearly to 0..1, lowest to highest; zeros where all are the same."""
    low, high = values.min(), values.max()
    return np.zeros_like(values) if high - low < 1e-12 else (values - low) / (high - low)


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
