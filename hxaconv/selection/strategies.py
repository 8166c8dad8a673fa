"""The strategies: one function each where layers are scored one by one, one row each where they are not.

A function takes a `Layer` (see sweep.py): the teacher's layer at hand, and the student's where one is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hxaconv.selection.schedule import LOG_RULES, SOFT_RULES, Rules

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
