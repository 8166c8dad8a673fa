"""The dynamic programme against exhaustive search, with every rule on and off."""

import itertools
import random

import pytest

from hxaconv.errors import HxaconvError
from hxaconv.selection.choice import LOG_RULES, Rules, choose, ideal_gap, margins, solve

# Sums of at most 12 numbers near 1 in another order: far below any real difference between choices.
TOLERANCE = 1e-12


def allowed(layers, rules):
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


def objective(layers, scores, rules):
    """What a sorted choice is worth; -inf where it breaks a hard rule."""
    if not allowed(layers, rules):
        return float("-inf")
    value, ideal = sum(scores[layer] for layer in layers), ideal_gap(len(scores), len(layers))
    for before, after in itertools.pairwise(layers):
        value -= rules.gap_penalty * abs(after - before - ideal) / ideal
        value -= rules.wide_gap_penalty * (rules.wide_gap is not None and after - before > rules.wide_gap)
    return value


def exhaustive(scores, count, rules):
    """The highest objective over all choices, None where none is allowed."""
    values = [objective(c, scores, rules) for c in itertools.combinations(range(len(scores)), count)]
    best = max(values)
    return None if best == float("-inf") else best


def some_rules(rng, num_layers):
    exclude = frozenset(rng.sample(range(num_layers), rng.randint(0, min(3, num_layers - 1))))
    require = frozenset(rng.sample(sorted(set(range(num_layers)) - exclude), rng.randint(0, 1)))
    return Rules(
        min_gap=rng.choice([1, 1, 2, 3]),
        max_gap=rng.choice([None, 3, 4, 6]),
        max_consecutive=rng.choice([None, 1, 2, 3]),
        exclude=exclude,
        require=require,
        gap_penalty=rng.choice([0.0, 0.02, 0.5]),
        wide_gap=rng.choice([None, 2, 4]),
        wide_gap_penalty=rng.choice([0.0, 0.75]),
    )


@pytest.mark.parametrize("seed", range(40))
def test_equals_exhaustive_search(seed):
    rng = random.Random(seed)
    feasible = 0
    for _ in range(10):
        num_layers = rng.randint(1, 11)
        count = rng.randint(1, min(5, num_layers))
        # Few distinct values, so that ties and penalties decide often; negative scores (kl) too.
        scores = [rng.choice([rng.random(), rng.randint(-2, 3) / 2]) for _ in range(num_layers)]
        rules = some_rules(rng, num_layers)
        best = exhaustive(scores, count, rules)
        if best is None:
            with pytest.raises(HxaconvError, match="keeps to the rules"):
                choose(scores, count, rules)
            continue
        feasible += 1
        value, layers = choose(scores, count, rules)
        assert allowed(layers, rules)
        assert value == pytest.approx(best, abs=TOLERANCE)
        assert objective(layers, scores, rules) == pytest.approx(value, abs=TOLERANCE)
    assert feasible


def test_the_rules_of_the_log_strategy_with_many_layers():
    rng = random.Random(5)
    scores = [rng.random() for _ in range(18)]
    assert choose(scores, 5, LOG_RULES)[0] == pytest.approx(exhaustive(scores, 5, LOG_RULES), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("rule", "without"),
    [
        (Rules(max_consecutive=2), Rules()),
        (Rules(min_gap=3), Rules()),
        (Rules(exclude=frozenset({4, 5})), Rules()),
        (Rules(gap_penalty=1.0), Rules(gap_penalty=0.0)),
        (Rules(wide_gap=2, wide_gap_penalty=9.0, gap_penalty=0), Rules(gap_penalty=0)),
        (Rules(max_gap=2), Rules()),
    ],
)
def test_each_rule_changes_the_choice(rule, without):
    """Negative control: without the rule, the same scores give another answer."""
    scores = [0.9, 0, 0, 0, 1.0, 1.0, 1.0, 0, 0, 0.1, 0.2]
    assert choose(scores, 4, rule)[1] != choose(scores, 4, without)[1]


def test_ties_go_to_the_end_and_are_stable():
    assert choose([0.5] * 9, 3, Rules(gap_penalty=0))[1] == (6, 7, 8)
    assert choose([0.5] * 9, 3, Rules(gap_penalty=0)) == choose([0.5] * 9, 3, Rules(gap_penalty=0))


def test_margins_are_the_price_of_overruling_the_choice():
    scores = [0.1, 0.8, 0.2, 0.7, 0.3, 0.6]
    rules = Rules(gap_penalty=0.1, exclude=frozenset({0}))
    value, layers = choose(scores, 2, rules)
    prices = margins(scores, rules, layers, value)
    for layer, margin in enumerate(prices):
        others = [
            objective(c, scores, rules)
            for c in itertools.combinations(range(6), 2)
            if (layer in c) != (layer in layers)
        ]
        assert margin == pytest.approx(value - max(others), abs=TOLERANCE)
    assert prices[0] == float("inf")
    assert solve(scores, 2, Rules(require=frozenset({1, 4})))[0] == objective((1, 4), scores, Rules())


def test_large_models_are_quick_enough_to_solve_with_margins():
    rng = random.Random(0)
    scores = [rng.random() for _ in range(64)]
    value, layers = choose(scores, 12, LOG_RULES)
    assert len(layers) == 12
    assert len(margins(scores, LOG_RULES, layers, value)) == 64
