"""How the numbers of a strategy become a choice of layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from hxaconv.errors import HxaconvError
from hxaconv.model.layer_choice import LAYER_0_REASON, uniform
from hxaconv.selection.schedule import SOFT_RULES, Choice, Rules, choose, describe, ideal_gap, objective
from hxaconv.selection.strategies import STRATEGIES

SPACED = tuple(name for name, strategy in STRATEGIES.items() if not strategy.needs)
"""Strategies that look at no numbers."""


@dataclass(frozen=True, slots=True)
class Column:
    """A strategy's numbers: as measured, and 0..1 with the layers to keep high. None: cannot be picked."""

    strategy: str
    values: tuple[float | None, ...]
    parts: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def scores(self, barred: Collection[int] = ()) -> tuple[float | None, ...]:
        """What the choice is made by: 0..1 over the layers that can be picked, the layers to keep high.

        The log's score is a weighted sum of parts in 0..1 already, and taken as it is.
        """
        values = [None if layer in barred else value for layer, value in enumerate(self.values)]
        known = [value for value in values if value is not None]
        if self.strategy == "log" or not known:
            return tuple(values)
        best, worst = max(known), min(known)
        if not STRATEGIES[self.strategy].high:
            best, worst = worst, best
        return tuple(None if x is None else (x - worst) / (best - worst) if best != worst else 0.0 for x in values)


def check_finite(column: Column) -> Column:
    """The column, if all its numbers are numbers.

    Raises:
        HxaconvError: naming the layers whose score is NaN or infinite.
    """
    bad = [i for i, value in enumerate(column.values) if value is not None and not abs(value) < float("inf")]
    if bad:
        several = "s" if len(bad) > 1 else ""
        raise HxaconvError(
            f"the {column.strategy} score of layer{several} {', '.join(map(str, bad))} is not a finite number",
            hint="Do the weights hold NaN or Inf? `hxaconv inspect PATH --stats` counts them, tensor by tensor.",
        )
    return column


@dataclass(frozen=True, slots=True)
class Pick:
    """A choice of layers and how it came about."""

    strategy: str
    layers: tuple[int, ...]
    rules: Rules
    choice: Choice | None = None
    """The dynamic programme's answer; None for strategies that look at no numbers."""
    uniform: tuple[int, ...] = ()
    uniform_value: float | None = None
    """What `uniform` would be worth under the same scores and rules; -inf where it breaks one."""
    scores: tuple[float | None, ...] = ()
    """What the choice was made by; None for layers that could not be picked."""
    meaning: str = ""
    """What the scores say, where the strategy's own words need to be more exact."""

    @property
    def overlap(self) -> int:
        """How many layers `uniform` would have picked too."""
        return len(set(self.layers) & set(self.uniform))


def check_request(
    strategy: str, num_layers: int, count: int, rules: Rules | None, *, allow_layer_0: bool = False
) -> None:
    """Refuse, before anything is scored, what no scores could answer.

    Raises:
        HxaconvError: for an unknown strategy, an impossible count, or rules that no choice keeps to.
    """
    if strategy not in STRATEGIES:
        raise HxaconvError(f"unknown strategy {strategy!r}", hint=f"Strategies: {', '.join(STRATEGIES)}.")
    most = num_layers - 1
    if not 1 <= count <= most:
        reason = "one layer has to become RWKV" if allow_layer_0 else LAYER_0_REASON
        beyond = f" ({reason})" if count == num_layers else ""
        raise HxaconvError(f"--count {count}: between 1 and {most} of {num_layers} layers can stay attention{beyond}")
    if strategy not in SPACED:
        choose([0.0] * num_layers, count, _without_layer_0(strategy, rules, allow_layer_0), margins=False)
    elif rules is not None and rules != SOFT_RULES:
        raise HxaconvError(
            f"--strategy {strategy} has no scores, so --min-gap, --max-gap, --max-consecutive and --exclude"
            " have nothing to decide by",
            hint="Choose a strategy with scores, or name the layers: --layers.",
        )


def _without_layer_0(strategy: str, rules: Rules | None, allow_layer_0: bool) -> Rules:
    rules = rules or STRATEGIES[strategy].rules
    return replace(rules, exclude=rules.exclude | (set() if allow_layer_0 else {0}))


def pick(
    strategy: str,
    num_layers: int,
    count: int,
    column: Column | None = None,
    rules: Rules | None = None,
    *,
    allow_layer_0: bool = False,
) -> Pick:
    """The `count` layers that stay attention; `rules` None takes the strategy's own.

    Raises:
        HxaconvError: for an unknown strategy, an impossible count, or rules that no choice keeps to.
    """
    check_request(strategy, num_layers, count, rules, allow_layer_0=allow_layer_0)
    even = uniform(num_layers, count)
    if strategy in SPACED:
        layers = even if strategy == "uniform" else tuple(range(num_layers - count, num_layers))
        return Pick(strategy, layers, SOFT_RULES, uniform=even)
    assert column is not None and column.strategy == strategy
    rules = _without_layer_0(strategy, rules, allow_layer_0)
    unknown = {layer for layer, value in enumerate(column.values) if value is None}
    rules = replace(rules, exclude=rules.exclude | unknown)
    found = column.scores(rules.exclude)
    scores = [0.0 if value is None else value for value in found]
    choice = choose(scores, count, rules)
    return Pick(strategy, choice.layers, rules, choice, even, objective(even, scores, rules), found)


def reasons(result: Pick) -> list[str]:
    """Why these layers, in sentences: the rule, then every layer where scores and choice part."""
    lines = [f"{result.strategy}: {result.meaning or STRATEGIES[result.strategy].meaning}"]
    if result.choice is None:
        return lines
    num_layers, count = len(result.scores), len(result.layers)
    lines.append(
        f"best total of 0..1 scores; rules: {describe(result.rules)}; ideal gap {ideal_gap(num_layers, count)}"
    )
    if 0 in result.rules.exclude:
        lines.append(LAYER_0_REASON)
    candidates = [layer for layer, score in enumerate(result.scores) if score is not None]
    order = sorted(candidates, key=lambda layer: -(result.scores[layer] or 0.0))
    for rank, layer in enumerate(order, 1):
        margin = result.choice.margins[layer]
        if rank <= count and layer not in result.layers:
            lines.append(f"layer {layer} ranks {rank}, but taking it would {_price(margin)}")
        elif rank > count and layer in result.layers:
            lines.append(f"layer {layer} ranks {rank}, but leaving it would {_price(margin)}")
    if result.uniform_value is not None:
        broken = result.uniform_value == float("-inf")
        other = "would break a rule" if broken else f"would be worth {result.uniform_value:.3f}"
        lines.append(f"the choice is worth {result.choice.value:.3f}; uniform {other}")
    return lines


def _price(margin: float) -> str:
    if margin == float("inf"):
        return "break a rule"
    return f"cost {margin:.3f} of the total" if margin >= 5e-4 else "be worth as much"
