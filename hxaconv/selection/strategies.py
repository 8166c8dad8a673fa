"""The strategies, and how their numbers become a choice of layers.

A strategy is one function where layers are scored one by one, one row of the table where they are not.

A function takes a `Layer` (see sweep.py): the teacher's layer at hand, and the student's where one is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hxaconv.errors import HxaconvError
from hxaconv.model.layer_choice import LAYER_0_REASON, uniform
from hxaconv.selection.schedule import LOG_RULES, SOFT_RULES, Choice, Rules, choose, describe, ideal_gap, objective

if TYPE_CHECKING:
    from hxaconv.selection.sweep import Layer

Score = Callable[["Layer"], float]
WITH_TEACHER = frozenset({"teacher", "tokens"})
WITH_STUDENT = frozenset({"teacher", "student", "tokens"})


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to rank layers. `high` says whether layers with high numbers are the ones to keep as attention."""

    name: str
    meaning: str
    needs: frozenset[str] = frozenset()
    """What it looks at: `teacher`, `student` (every layer RWKV), `tokens`, `log`; nothing: only at the spacing."""
    high: bool = True
    rules: Rules = SOFT_RULES
    score: Score | None = None
    """The number of one layer, where layers are scored one by one."""


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("uniform", "evenly spaced, anchored at the last layer"),
        Strategy("last", "the last layers"),
        Strategy(
            "log",
            "how hard the layer was to align in stage 1, from the training log",
            needs=frozenset({"log"}),
            rules=LOG_RULES,
        ),
        Strategy(
            "kl",
            "how much nearer to the teacher's distribution attention in this layer brings the student",
            needs=WITH_STUDENT,
        ),
        Strategy("retrieval", "share of copied tokens that the best heads find again", needs=WITH_TEACHER),
    )
}
"""Those that follow add themselves."""


def strategy(
    meaning: str, *, needs: frozenset[str] = WITH_TEACHER, high: bool = True
) -> Callable[[Callable[[Layer], float]], Callable[[Layer], float]]:
    """Make a function the strategy of its name."""

    def added(function: Callable[[Layer], float]) -> Callable[[Layer], float]:
        name = function.__name__
        STRATEGIES[name] = Strategy(name, meaning, needs, high, score=function)
        return function

    return added


@strategy("error of the RWKV mixer on the teacher's inputs, as a share of the attention's energy", needs=WITH_STUDENT)
def mse(at: Layer) -> float:
    """0 where the attention adds nothing on these tokens: nothing can be missed there."""
    missed, energy = (part.double().square().sum().item() for part in (at.mixed - at.attended, at.attended))
    return missed / energy if energy else 0.0


@strategy("1 - mean cosine of the block's input and output")
def influence(at: Layer) -> float:
    """Near 0 where the block hardly turns the residual stream."""
    from torch.nn.functional import cosine_similarity

    return 1.0 - float(cosine_similarity(at.x.double(), at.after.double(), dim=-1).mean())


# Sharp heads look something up, which a state of fixed size is worst at.
@strategy("spread of the attention, 0 one position, 1 all alike; sharp layers stay", high=False)
def entropy(at: Layer) -> float:
    """Mean over sequences, heads and queries."""
    return at.entropy_and_distance[0]


@strategy("how far back the attention looks, 0 itself, 1 the first token")
def distance(at: Layer) -> float:
    """Mean over sequences, heads and queries."""
    return at.entropy_and_distance[1]


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
