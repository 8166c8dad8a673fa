"""The best K layers under spacing rules, exactly: dynamic programming over (last layer, run, layers left).

A choice is worth the sum of its layers' scores minus penalties of the gaps between neighbours
(gap = difference of layer numbers, so that adjacent layers have gap 1; before the first and after the
last layer there is none).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hxaconv.errors import HxaconvError

IMPOSSIBLE = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a choice must keep to (hard) and what it is charged for (soft)."""

    min_gap: int = 1
    max_gap: int | None = None
    max_consecutive: int | None = None
    """Longest run of adjacent layers."""
    exclude: frozenset[int] = frozenset()
    require: frozenset[int] = frozenset()
    gap_penalty: float = 0.02
    """Charged per gap, times |gap - ideal| / ideal, ideal = max(1, L // (K+1))."""
    wide_gap: int | None = None
    wide_gap_penalty: float = 0.0
    """Charged for every gap above wide_gap."""


SOFT_RULES = Rules()
LOG_RULES = Rules(max_consecutive=2, gap_penalty=0.1, wide_gap=8, wide_gap_penalty=0.75)
"""The rules of those who pick from a training log today."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The best layers, sorted, and what they are worth; `margins` is the price of overruling each layer."""

    layers: tuple[int, ...]
    value: float
    margins: tuple[float, ...] = ()
    """Per layer: what the best choice without it (taken) or with it (not taken) is worth less; inf: impossible."""


def ideal_gap(num_layers: int, count: int) -> int:
    """The gap that costs nothing: max(1, floor(L/(K+1)))."""
    return max(1, num_layers // (count + 1))


def gap_cost(gap: int, ideal: int, rules: Rules) -> float:
    """What one gap is charged."""
    wide = rules.wide_gap_penalty if rules.wide_gap is not None and gap > rules.wide_gap else 0.0
    return rules.gap_penalty * abs(gap - ideal) / ideal + wide


def allowed(layers: Sequence[int], rules: Rules) -> bool:
    """Whether a sorted choice keeps to the hard rules."""
    gaps = [after - before for before, after in itertools.pairwise(layers)]
    run, longest = 1, min(1, len(layers))
    for gap in gaps:
        run = run + 1 if gap == 1 else 1
        longest = max(longest, run)
    return (
        not rules.exclude & set(layers)
        and rules.require <= set(layers)
        and all(rules.min_gap <= gap and (rules.max_gap is None or gap <= rules.max_gap) for gap in gaps)
        and (rules.max_consecutive is None or longest <= rules.max_consecutive)
    )


def objective(layers: Sequence[int], scores: Sequence[float], rules: Rules) -> float:
    """What a sorted choice is worth; -inf where it breaks a hard rule."""
    if not allowed(layers, rules):
        return IMPOSSIBLE
    ideal = ideal_gap(len(scores), len(layers))
    costs = sum(gap_cost(after - before, ideal, rules) for before, after in itertools.pairwise(layers))
    return sum(scores[layer] for layer in layers) - costs


def choose(scores: Sequence[float], count: int, rules: Rules = SOFT_RULES, *, margins: bool = True) -> Choice:
    """The `count` layers with the highest objective; among equals the ones nearer the end.

    Raises:
        HxaconvError: when no choice keeps to the hard rules.
    """
    best = _solve(scores, count, rules)
    if best is None:
        raise HxaconvError(
            f"no choice of {count} of {len(scores)} layers keeps to the rules: {describe(rules)}",
            hint="Loosen --min-gap, --max-gap, --max-consecutive or --exclude, or ask for another --count.",
        )
    value, layers = best
    if not margins:
        return Choice(layers, value)
    return Choice(layers, value, tuple(_margin(scores, count, rules, layers, value, x) for x in range(len(scores))))


def _margin(
    scores: Sequence[float], count: int, rules: Rules, layers: tuple[int, ...], value: float, layer: int
) -> float:
    if layer in layers:
        other = replace(rules, exclude=rules.exclude | {layer})
    else:
        other = replace(rules, require=rules.require | {layer})
    best = _solve(scores, count, other)
    return float("inf") if best is None else max(0.0, value - best[0])


def _solve(scores: Sequence[float], count: int, rules: Rules) -> tuple[float, tuple[int, ...]] | None:
    num_layers, ideal = len(scores), ideal_gap(len(scores), count)
    last_required = max(rules.require, default=-1)
    next_required = [min((x for x in rules.require if x > i), default=num_layers) for i in range(-1, num_layers)]

    @functools.cache
    def rest(last: int, run: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Value and layers of the best `left` layers after `last`, which ends a run of `run` layers."""
        if left == 0:
            return (0.0, ()) if last >= last_required else (IMPOSSIBLE, ())
        best: tuple[float, tuple[int, ...]] = (IMPOSSIBLE, ())
        for layer in range(min(next_required[last + 1], num_layers - left), last, -1):
            gap = layer - last
            if layer in rules.exclude or (last >= 0 and not _gap_allowed(gap, rules)):
                continue
            new_run = run + 1 if last >= 0 and gap == 1 else 1
            if rules.max_consecutive is not None and new_run > rules.max_consecutive:
                continue
            value, layers = rest(layer, new_run if rules.max_consecutive is not None else 1, left - 1)
            value += scores[layer] - (gap_cost(gap, ideal, rules) if last >= 0 else 0.0)
            if value > best[0]:
                best = (value, (layer, *layers))
        return best

    value, layers = rest(-1, 0, count)
    return None if value == IMPOSSIBLE else (value, layers)


def _gap_allowed(gap: int, rules: Rules) -> bool:
    return gap >= rules.min_gap and (rules.max_gap is None or gap <= rules.max_gap)


def describe(rules: Rules) -> str:
    """The rules in one line."""
    parts = [
        f"gaps of at least {rules.min_gap}" if rules.min_gap > 1 else "",
        f"gaps of at most {rules.max_gap}" if rules.max_gap is not None else "",
        f"at most {rules.max_consecutive} adjacent layers" if rules.max_consecutive is not None else "",
        f"never layer {', '.join(map(str, sorted(rules.exclude)))}" if rules.exclude else "",
        f"{rules.gap_penalty:g} x |gap - ideal| / ideal for uneven gaps" if rules.gap_penalty else "",
        f"{rules.wide_gap_penalty:g} for every gap above {rules.wide_gap}" if rules.wide_gap_penalty else "",
    ]
    return ", ".join(filter(None, parts)) or "none"
