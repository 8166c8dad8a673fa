"""The best K layers under spacing rules, exactly: dynamic programming over (last layer, run, layers left).

A choice is worth the sum of its layers' scores minus penalties of the gaps between neighbours
(gap = difference of layer numbers, so that adjacent layers have gap 1; before the first and after the
last layer there is none).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hxaconv.errors import HxaconvError
from hxaconv.model.layer_maps import LAYER_0_REASON

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
class Pick:
    """A choice of layers and how it came about; what has defaults is for strategies with scores."""

    strategy: str
    meaning: str
    """What the strategy goes by."""
    layers: tuple[int, ...]
    uniform: tuple[int, ...]
    """Evenly spaced ones."""
    rules: Rules = SOFT_RULES
    scores: tuple[float | None, ...] = ()
    """What the choice was made by; None for layers that could not be picked."""
    value: float | None = None
    margins: tuple[float, ...] = ()
    """Per layer: what the best choice without it (taken) or with it (not taken) is worth less; inf: impossible."""
    uniform_value: float | None = None
    """What evenly spaced ones are worth under the same scores and rules; None where they break one."""

    @property
    def overlap(self) -> int:
        """How many layers are evenly spaced ones too."""
        return len(set(self.layers) & set(self.uniform))

    @property
    def reasons(self) -> list[str]:
        """Why these layers, in sentences: the rule, then every layer where scores and choice part."""
        lines = [f"{self.strategy}: {self.meaning}"]
        if self.value is None:
            return lines
        num_layers, count = len(self.scores), len(self.layers)
        ideal = ideal_gap(num_layers, count)
        lines.append(f"best total of 0..1 scores; rules: {described(self.rules)}; ideal gap {ideal}")
        if 0 in self.rules.exclude:
            lines.append(LAYER_0_REASON)
        candidates = [layer for layer, score in enumerate(self.scores) if score is not None]
        order = sorted(candidates, key=lambda layer: -(self.scores[layer] or 0.0))
        for rank, layer in enumerate(order, 1):
            if (rank <= count) != (layer in self.layers):
                what, margin = "taking" if rank <= count else "leaving", self.margins[layer]
                price = f"cost {margin:.3f} of the total" if margin >= 5e-4 else "be worth as much"
                price = "break a rule" if margin == float("inf") else price
                lines.append(f"layer {layer} ranks {rank}, but {what} it would {price}")
        even = "would break a rule" if self.uniform_value is None else f"would be worth {self.uniform_value:.3f}"
        return [*lines, f"the choice is worth {self.value:.3f}; uniform {even}"]


def ideal_gap(num_layers: int, count: int) -> int:
    """The gap that costs nothing: max(1, floor(L/(K+1)))."""
    return max(1, num_layers // (count + 1))


def choose(scores: Sequence[float], count: int, rules: Rules) -> tuple[float, tuple[int, ...]]:
    """The `count` layers of the highest value, and that value; among equals the layers nearer the end.

    Raises:
        HxaconvError: when no choice keeps to the hard rules.
    """
    best = solve(scores, count, rules)
    if best is None:
        raise HxaconvError(
            f"no choice of {count} of {len(scores)} layers keeps to the rules: {described(rules)}",
            hint="Loosen --min-gap, --max-gap, --max-consecutive or --exclude, or ask for another --count.",
        )
    return best


def margins(scores: Sequence[float], rules: Rules, layers: tuple[int, ...], value: float) -> tuple[float, ...]:
    """Of every layer, the price of deciding about it otherwise than in the best choice."""
    found = []
    for layer in range(len(scores)):
        barred, wanted = ({layer}, set()) if layer in layers else (set(), {layer})
        other = replace(rules, exclude=rules.exclude | barred, require=rules.require | wanted)
        best = solve(scores, len(layers), other)
        found.append(float("inf") if best is None else max(0.0, value - best[0]))
    return tuple(found)


def solve(scores: Sequence[float], count: int, rules: Rules) -> tuple[float, tuple[int, ...]] | None:
    """Value and layers of the best choice; None where the hard rules leave none."""
    num_layers, ideal = len(scores), ideal_gap(len(scores), count)
    last_required = max(rules.require, default=-1)
    next_required = [min((x for x in rules.require if x > i), default=num_layers) for i in range(-1, num_layers)]
    max_gap, longest = rules.max_gap or num_layers, rules.max_consecutive or num_layers

    def cost(gap: int) -> float:
        wide = rules.wide_gap_penalty if rules.wide_gap is not None and gap > rules.wide_gap else 0.0
        return rules.gap_penalty * abs(gap - ideal) / ideal + wide

    @functools.cache
    def rest(last: int, run: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Value and layers of the best `left` layers after `last`, which ends a run of `run` layers."""
        if left == 0:
            return (0.0, ()) if last >= last_required else (IMPOSSIBLE, ())
        best: tuple[float, tuple[int, ...]] = (IMPOSSIBLE, ())
        for layer in range(min(next_required[last + 1], num_layers - left), last, -1):
            gap = layer - last
            new_run = run + 1 if last >= 0 and gap == 1 else 1
            if layer in rules.exclude or new_run > longest or (last >= 0 and not rules.min_gap <= gap <= max_gap):
                continue
            # Runs that no rule counts are not distinguished: fewer states.
            value, layers = rest(layer, new_run if rules.max_consecutive is not None else 1, left - 1)
            value += scores[layer] - (cost(gap) if last >= 0 else 0.0)
            if value > best[0]:
                best = (value, (layer, *layers))
        return best

    value, layers = rest(-1, 0, count)
    return None if value == IMPOSSIBLE else (value, layers)


def described(rules: Rules) -> str:
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
