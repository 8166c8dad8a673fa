"""Advice on GQA layers: the numbers of every strategy that can be had, and the choice by one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.model.layer_maps import LAYER_0_REASON, LayerMap, default_count, dump, parse_numbers, uniform
from hxaconv.options import Choice, option_words
from hxaconv.progress import Result
from hxaconv.selection.choice import Pick, Rules, choose, margins, solve
from hxaconv.selection.strategies import STRATEGIES, Column, Found, Given, Strategy, Values

RANDOM_TOKENS = "scores were taken on random tokens, which no model was trained on: real text ranks layers better"


@dataclass(frozen=True, kw_only=True, repr=False)
class Advice(Found, Result):
    """The choice, every column of numbers (the deciding one first), single numbers, and what to be wary of."""

    num_layers: int
    pick: Pick
    notes: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    """What the scores are of, and depend on, in lines for a layer map."""

    @property
    def headline(self) -> str:
        """The choice."""
        layers = ", ".join(map(str, self.pick.layers))
        return f"{len(self.pick.layers)} of {self.num_layers} layers stay attention by {self.pick.strategy}: {layers}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, plain."""
        pick, columns = self.pick, self.columns
        result: dict[str, Any] = {
            "num_layers": self.num_layers,
            "strategy": pick.strategy,
            "gqa_layers": list(pick.layers),
            "uniform": list(pick.uniform),
            "overlap_with_uniform": pick.overlap,
            "scores": {column.strategy: list(column.values) for column in columns},
            "parts": {column.strategy: {k: list(v) for k, v in column.parts.items()} for column in columns},
            "meanings": {column.strategy: column.meaning for column in columns},
            "facts": dict(self.facts),
            "why": pick.reasons,
            "warnings": list(self.warnings),
        }
        if pick.value is not None:
            result["decided_by"] = list(pick.scores)
            result["value"] = pick.value
            result["margins"] = [None if margin == float("inf") else margin for margin in pick.margins]
        if self.heads:
            result["heads"] = [list(row) for row in self.heads]
        return result

    @property
    def fact_lines(self) -> list[str]:
        """What is known beside the scores."""
        overlap = f"{self.pick.overlap} of {len(self.pick.layers)} in common"
        return [
            f"uniform would take {', '.join(map(str, self.pick.uniform))}: {overlap}",
            *(f"{name}: {value:.4f} nats per token" for name, value in self.facts.items()),
        ]

    def layer_map_text(self, chosen: LayerMap, *, date: str) -> str:
        """The TOML of `--save`: strategy, figures and `date` (as the caller writes it) in comments."""
        columns = {column.strategy: column.values for column in self.columns}
        columns |= self.columns[0].parts if self.columns else {}
        comments = [
            f"{len(self.pick.layers)} of {self.num_layers} layers stay attention, chosen on {date}",
            *self.settings,
            *self.fact_lines,
            *self.pick.reasons,
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        if columns:
            comments += ["", ", ".join(["layer", *columns])]
            for layer in range(self.num_layers):
                figures = ", ".join([str(layer), *(figure_text(values[layer]) for values in columns.values())])
                comments.append(f"{figures} G" if layer in self.pick.layers else figures)
        return dump(chosen, comments)


def figure_text(value: float | None) -> str:
    """A score in a table."""
    if value is None or value == float("inf"):
        return "-"
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"
    return text.lstrip("-") if float(text) == 0 else text


def strategy_of(choice: Choice) -> Strategy:
    """The strategy that is named."""
    return STRATEGIES[choice.strategy or "uniform"]


def advise(choice: Choice, given: Given) -> Advice:
    """Score all layers by the strategy of `choice`, and choose.

    With a teacher and tokens at hand, the other scores of the same pass are taken along for the table.

    Raises:
        HxaconvError: when something that the strategy needs is missing, or does not fit the model.
    """
    entry, at_hand = strategy_of(choice), {"tokens": given.ids, "log": given.log, **given.models}
    missing = sorted(what for what in entry.needs if at_hand.get(what) is None)
    if missing:
        raise HxaconvError(f"--strategy {entry.name} needs: {', '.join(missing)}")
    rules, count = checked_choice(choice, given.num_layers)
    found = entry.rank(replace(given, count=count, barred=rules.exclude))
    random = (RANDOM_TOKENS,) if "tokens" in entry.needs and not given.are_text else ()
    made = pick(choice, given.num_layers, found.columns[0] if found.columns else None)
    return Advice(num_layers=given.num_layers, pick=made, **vars(found) | {"warnings": (*random, *found.warnings)})


def checked_choice(choice: Choice, num_layers: int) -> tuple[Rules, int]:
    """(the strategy's own rules with the options over them, and without layer 0; how many layers are to be chosen).

    Raises:
        HxaconvError: before anything is scored, for what no scores could answer: an impossible count, rules that
            contradict each other or that no choice keeps to, and --exclude that names no layers of the model.
    """
    entry, count = strategy_of(choice), default_count(num_layers) if choice.count is None else choice.count
    gaps = {key: getattr(choice, key) for key in ("min_gap", "max_gap", "max_consecutive")}
    given = {key: value for key, value in gaps.items() if value is not None}
    problems = [f"{option_words([key])} {value}: from 1 on" for key, value in given.items() if value < 1]
    if not problems and choice.min_gap and choice.max_gap and choice.min_gap > choice.max_gap:
        problems.append(f"--min-gap {choice.min_gap} is more than --max-gap {choice.max_gap}")
    raise_all("the rules cannot be kept:", problems, hint="Adjacent layers have gap 1, and are a run of 2.")
    excluded = parse_numbers(choice.exclude, num_layers, "--exclude") if choice.exclude else ()
    barred = frozenset(excluded) | (frozenset() if choice.allow_gqa_layer_0 else {0})
    rules = replace(entry.rules, exclude=barred, **given)
    if not 1 <= count < num_layers:
        reason = "one layer has to become RWKV" if choice.allow_gqa_layer_0 else LAYER_0_REASON
        beyond = f" ({reason})" if count == num_layers else ""
        raise HxaconvError(
            f"--count {count}: between 1 and {num_layers - 1} of {num_layers} layers can stay attention{beyond}"
        )
    if entry.needs:
        choose([0.0] * num_layers, count, rules)
    elif given or choice.exclude:
        raise HxaconvError(
            f"--strategy {entry.name} has no scores, so --min-gap, --max-gap, --max-consecutive and --exclude"
            " have nothing to decide by",
            hint="Choose a strategy with scores, or name the layers: --layers.",
        )
    return rules, count


def pick(choice: Choice, num_layers: int, column: Column | None) -> Pick:
    """The layers that stay attention, by these numbers; without, by their place alone.

    Raises:
        HxaconvError: for numbers that are not finite, or when no choice keeps to the rules.
    """
    entry, (rules, count) = strategy_of(choice), checked_choice(choice, num_layers)
    even = uniform(num_layers, count)
    if column is None:
        layers = even if entry.name == "uniform" else tuple(range(num_layers - count, num_layers))
        return Pick(entry.name, entry.meaning, layers, even)
    bad = [i for i, value in enumerate(column.values) if value is not None and not abs(value) < float("inf")]
    if bad:
        several = "s" if len(bad) > 1 else ""
        raise HxaconvError(
            f"the {column.strategy} score of layer{several} {', '.join(map(str, bad))} is not a finite number",
            hint="Do the weights hold NaN or Inf? `hxaconv inspect PATH --stats` counts them, tensor by tensor.",
        )
    rules = replace(rules, exclude=rules.exclude | {i for i, value in enumerate(column.values) if value is None})
    deciding = scaled(column, rules.exclude)
    scores = [0.0 if value is None else value for value in deciding]
    value, layers = choose(scores, count, rules)
    with_even = solve(scores, count, replace(rules, require=frozenset(even)))
    return Pick(
        strategy=entry.name,
        meaning=column.meaning,
        layers=layers,
        uniform=even,
        rules=rules,
        scores=deciding,
        value=value,
        margins=margins(scores, rules, layers, value),
        uniform_value=None if with_even is None else with_even[0],
    )


def scaled(column: Column, barred: frozenset[int]) -> Values:
    """What the choice is made by: 0..1 over the layers that can be picked, the layers to keep high.

    The log's score is a weighted sum of parts in 0..1 already, and taken as it is.
    """
    values = [None if layer in barred else value for layer, value in enumerate(column.values)]
    known = [value for value in values if value is not None]
    if column.strategy == "log" or not known:
        return tuple(values)
    worst, best = (min(known), max(known))[:: 1 if STRATEGIES[column.strategy].high else -1]
    return tuple(None if x is None else (x - worst) / (best - worst) if best != worst else 0.0 for x in values)
