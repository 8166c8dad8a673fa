"""Scores from the CSV that stage-1 training writes: which layers were hardest to align.

Columns: step, layer_{i}_rawMSE, layer_{i}_scaledMSE, layer_{i}_scale (and others, ignored), in any order.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
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
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except OSError as error:
        raise HxaconvError(f"training log {path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise HxaconvError(f"training log {path} is not a CSV file: {error}") from None
    for row in rows:
        while row and not row[-1]:  # spreadsheets and closing commas add empty cells at the end
            row.pop()
    rows = [row for row in rows if row]
    if not rows:
        raise HxaconvError(f"training log {path} is empty")
    header, *rows = rows
    columns = _columns(path, header)
    layers = sorted(columns["rawMSE"])
    names = [columns[kind][layer] for kind in ("rawMSE", "scale") for layer in layers]
    rows, places, warnings = _fields(path, header, [row for row in rows if row != header], names)
    numbers = np.array([[_number(row[i]) for i in places[len(row)]] for row in rows]).reshape(-1, 1 + len(names))
    known = np.isfinite(numbers[:, 1:]).any(axis=0).reshape(2, -1)
    for i, kind in enumerate(columns if rows else ()):
        if not known[i].any():
            first = rows[0][places[len(rows[0])][1 + i * len(layers)]]
            raise HxaconvError(
                f"training log {path}: no layer has a finite {kind} in any row; {names[i * len(layers)]} is {first!r}"
                " in the first"
            )
    kept = known.all(axis=0) | (not rows)
    lost = [layer for layer, both in zip(layers, kept, strict=True) if not both]
    numbers = numbers[:, [True, *kept, *kept]]
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
    if lost:
        warnings.append(f"layers {lost} have no finite rawMSE or scale in any row: they cannot be picked")
    numbers = numbers[np.argsort(numbers[:, 0], kind="stable")]
    raw, scale = np.split(numbers[:, 1:], 2, axis=1)
    return Log(tuple(layer for layer in layers if layer not in lost), numbers[:, 0], raw, scale, tuple(warnings))


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


def _fields(
    path: Path, header: list[str], rows: list[list[str]], names: list[str]
) -> tuple[list[list[str]], dict[int, list[int]], list[str]]:
    """(rows that can be read; by the length of a row, where the step and `names` stand in it; warnings)."""
    # Some trainers write a header of 3L+1 names over rows of 2L+1 numbers: step, raw MSE and scale, the scaled
    # MSE left out. Read by position, the scales land under scaledMSE and the scale columns stay empty. Table
    # programs fill such rows up.
    short = [name for name in header if not name.endswith("_scaledMSE")]
    places = {len(found): [found.index(name) for name in ("step", *names)] for found in (short, header)}
    whole, half = places[len(header)], len(names) // 2
    raw, scale = whole[1 : 1 + half], whole[1 + half :]
    if rows and min(scale) >= len(short):
        filled = (len(row) == len(header) and all(row[i].lower() in ("", "nan") for i in scale) for row in rows)
        rows = [row[: len(short)] for row in rows] if all(filled) else rows
    faulty, warnings = sum(len(row) == len(short) < len(header) for row in rows), []
    if faulty and max(raw) > min(scale):
        raise HxaconvError(
            f"training log {path}: {faulty} rows have {len(short)} fields under a header of {len(header)}, whose names"
            " do not stand in the order rawMSE, scale: which field is which is unknown",
            hint="Give the header one name per field, in the order of the rows.",
        )
    if faulty:
        warnings.append(
            f"{faulty} rows of {path.name} have {len(short)} fields under a header of {len(header)}: the known"
            " fault of these logs, the scaledMSE columns were never written. The scales that would be read as"
            " scaledMSE have been put under scale"
        )
    found = [row for row in rows if len(row) in places]
    if len(found) < len(rows):
        lengths = f"neither {len(header)} nor {len(short)}"
        warnings.append(f"{len(rows) - len(found)} rows of {path.name} have {lengths} fields: left out")
    return found, places, warnings


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
