"""The strategies, one function each, and what they look at.

A function under `strategy` scores all layers by itself; with `each_layer`, the layer at hand (`Layer` of sweep.py), all
such functions that are wanted in one pass. Adding a strategy means adding a function here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from hxaconv.forward.state import StateFile, fingerprint
from hxaconv.model.model import Model
from hxaconv.progress import Progress
from hxaconv.selection.choice import LOG_RULES, SOFT_RULES, Rules
from hxaconv.selection.heads import FAINT, copying, separator_of, twice
from hxaconv.selection.log import read_log, score_log
from hxaconv.selection.sweep import Layer, Sweep
from hxaconv.verification.claims import untouched_layers

Values = tuple[float | None, ...]
"""A number for every layer; None for layers that cannot be picked."""
WITH_TEACHER = frozenset({"teacher", "tokens"})
WITH_STUDENT = frozenset({"teacher", "student", "tokens"})

CALIBRATE = (
    "Calibrate a student first (init-from-teacher with --gqa-layers none --init calibrated --text FILE), then score"
    " that one with --teacher TEACHER"
)
UNCALIBRATED = (
    "{count} of {total} layers, scored as RWKV, hold their initial values: {strategy} shows what the initial values"
    f" lose, not what training would leave, and that can MISLEAD. {CALIBRATE}"
)
HARMFUL = (
    "putting attention back makes the student worse in {count} of {total} layers: its RWKV layers compensate for"
    " each other, so that restore-one KL is a weak measure. {remedy}"
)
NOT_PLAIN = (
    "No layer is plain any more, so calibrating is no way out: score with --strategy retrieval or --kl-mode convert, on"
    " more text (--tokens), or score a student that was trained"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What strategies look at."""

    num_layers: int
    teacher: Model | None = None
    student: Model | None = None
    """Every layer RWKV."""
    ids: np.ndarray | None = None
    """Tokens (sequences, tokens)."""
    are_text: bool = True
    log: Path | None = None
    kl_mode: str = "restore"
    count: int = 1
    """How many are to be chosen,"""
    barred: frozenset[int] = frozenset()
    """and among which they are not."""
    device: str = "cpu"
    seed: int = 0
    cache: Path | None = None
    """Where an interrupted pass leaves its state, and a finished one its scores; the caller removes it."""
    check: Callable[[], None] = lambda: None
    """Called between steps; raises KeyboardInterrupt after a signal."""
    progress: Progress | None = None

    @property
    def models(self) -> dict[str, Model]:
        """By role."""
        roles = {"teacher": self.teacher, "student": self.student}
        return {role: model for role, model in roles.items() if model is not None}

    def kept(self, ids: np.ndarray, settings: Mapping[str, Any]) -> StateFile:
        """The state of a pass over these tokens with these settings."""
        return StateFile(self.cache, fingerprint(self.models, ids, settings) if self.cache else "", self.check)


@dataclass(frozen=True, slots=True)
class Column:
    """A strategy's numbers, as measured."""

    strategy: str
    values: Values
    parts: Mapping[str, Values] = field(default_factory=dict)
    other_meaning: str = ""
    """What they say, where that is not what the strategy's numbers say by themselves."""

    @property
    def meaning(self) -> str:
        """What they say."""
        return self.other_meaning or STRATEGIES[self.strategy].meaning


@dataclass(frozen=True, kw_only=True, repr=False)
class Found:
    """What a ranking found."""

    columns: tuple[Column, ...] = ()
    """The strategy's own, and what came with it."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """Single numbers, nats per token."""
    warnings: tuple[str, ...] = ()
    heads: tuple[tuple[float, ...], ...] = ()
    """Retrieval: share of copied positions per layer and head."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to rank layers. `high`: whether layers with high numbers are the ones to keep as attention."""

    name: str
    meaning: str
    needs: frozenset[str] = frozenset()
    """What it looks at: `teacher`, `student` (every layer RWKV), `tokens`, `log`; nothing: only at the spacing."""
    high: bool = True
    rules: Rules = SOFT_RULES
    score: Callable[[Layer], float] | None = None
    rank: Callable[[Given], Found] = lambda given: Found()


STRATEGIES = {
    "uniform": Strategy("uniform", "evenly spaced, anchored at the last layer"),
    "last": Strategy("last", "the last layers"),
}
"""By name. Those that follow add themselves."""
Function = TypeVar("Function", bound=Callable[..., Any])


def strategy(
    meaning: str, needs: frozenset[str] = WITH_TEACHER, *, each_layer: bool = False, **more: Any
) -> Callable[[Function], Function]:
    """Make a function the strategy of its name: one that ranks all layers, or one that scores each."""

    def added(function: Function) -> Function:
        name = function.__name__
        how = {"score": function, "rank": lambda given: swept(given, name)} if each_layer else {"rank": function}
        STRATEGIES[name] = Strategy(name, meaning, needs, **how, **more)
        return function

    return added


@strategy(
    "error of the RWKV mixer on the teacher's inputs, as a share of the attention's energy",
    WITH_STUDENT,
    each_layer=True,
)
def mse(at: Layer) -> float:
    """0 where the attention adds nothing on these tokens: nothing can be missed there."""
    missed, energy = (part.double().square().sum().item() for part in (at.mixed - at.attended, at.attended))
    return missed / energy if energy else 0.0


@strategy("1 - mean cosine of the block's input and output", each_layer=True)
def influence(at: Layer) -> float:
    """Near 0 where the block hardly turns the residual stream."""
    return 1.0 - float(cosine_similarity(at.x.double(), at.after.double(), dim=-1).mean())


# Sharp heads look something up, which a state of fixed size is worst at.
@strategy("spread of the attention, 0 one position, 1 all alike; sharp layers stay", each_layer=True, high=False)
def entropy(at: Layer) -> float:
    """Mean over sequences, heads and queries."""
    return at.entropy_and_distance[0]


@strategy("how far back the attention looks, 0 itself, 1 the first token", each_layer=True)
def distance(at: Layer) -> float:
    """Mean over sequences, heads and queries."""
    return at.entropy_and_distance[1]


BY_THE_WAY = ("mse", "influence", "entropy", "distance")
"""Columns that come almost free with another one of the same pass."""


@strategy("share of copied tokens that the best heads find again")
def retrieval(given: Given) -> Found:
    """A layer scores the sum of its best max(1, H // 16) heads on repeated texts."""
    assert given.teacher is not None
    config, text = given.teacher.config, given.ids if given.are_text else None
    asked = twice(config.vocab_size, text, separator=separator_of(given.teacher), seed=given.seed)
    shares = _run(replace(given, student=None), asked, "retrieval", {"heads": copying})["heads"]
    best, count = max(map(max, shares)), max(1, config.num_attention_heads // 16)
    faint = (
        f"no head copies more than {FAINT:.0%} of the positions (the best: {best:.1%}):"
        " this teacher has no clear copying heads, the retrieval scores are noise"
    )
    return Found(
        columns=(Column("retrieval", tuple(sum(sorted(row)[-count:]) for row in shares)),),
        warnings=(faint,) if best <= FAINT else (),
        heads=tuple(map(tuple, shares)),
    )


@strategy("how much nearer to the teacher's distribution attention in this layer brings the student", WITH_STUDENT)
def kl(given: Given) -> Found:
    """KL on the tokens, one layer at a time: attention put back into the student, or taken from the teacher."""
    found = swept(given, "kl", given.kl_mode)
    values = [value for value in found.columns[0].values if value is not None]
    harmful = sum(value < 0 for value in values)
    if given.kl_mode == "convert" or harmful * 2 <= len(values):
        return found
    worse = HARMFUL.format(count=harmful, total=len(values), remedy=CALIBRATE if found.warnings else NOT_PLAIN)
    return replace(found, warnings=(*found.warnings, worse))


MEANINGS: dict[tuple[str, str | None], str] = {
    ("kl", "convert"): "how far the teacher's distribution moves when this layer alone becomes RWKV",
    ("kl", "window"): "how far the teacher's distribution moves when this layer alone has a sliding window",
    ("nll", "restore"): "how much lower attention in this layer brings the student's NLL of repeated tokens",
    ("nll", "convert"): "how much the NLL of repeated tokens grows when this layer alone becomes RWKV",
}
"""Of the two columns of a pass with forks, where it is not the strategy's own."""


@strategy("how much the NLL of repeated tokens grows when this layer alone has a sliding window")
def nll(given: Given) -> Found:
    """NLL of answer tokens far behind what gives them away, as each layer alone of the teacher sees a window only.

    After arXiv 2606.27791, which trains nothing either. Here answers are repeated random tokens of the text, so that
    no questions are needed and only recall predicts them, and the window is as short as their distance demands.
    """
    return swept(given, "nll", "window")


@strategy("how far the gate from RWKV to attention opens when all gates are trained within the budget", WITH_STUDENT)
def gates(given: Given) -> Found:
    """Gates trained together in a model that mixes both mixers in every layer, after arXiv 2606.30562; see gates.py."""
    from hxaconv.selection.gates import train

    values, losses = train(given, torch.as_tensor(given.ids, dtype=torch.int64))
    steps = (("all gates alike", losses[0]), ("before the last step", losses[-1]))
    kinds = ("KL on text", "KL on tokens said again, which is recall's")
    facts = {f"{kind}, {when}": loss[i] for i, kind in enumerate(kinds) for when, loss in steps}
    return Found(columns=(Column("gates", tuple(values)),), facts=facts, warnings=_plain(given, "gates"))


def swept(given: Given, name: str, mode: str | None = None) -> Found:
    """One pass over the layers: the strategy, and the columns that come along with it."""
    assert given.ids is not None
    names = [each for each in sorted({name, *BY_THE_WAY}) if given.student or "student" not in STRATEGIES[each].needs]
    measures = {each: score for each in names if (score := STRATEGIES[each].score)}
    scores = _run(given, given.ids, name, measures, mode)
    first = ["kl", "nll"] if mode else [name]
    order = sorted(first, key=lambda each: each != name) + [each for each in measures if each != name]
    return Found(
        columns=tuple(Column(each, tuple(scores[each]), {}, MEANINGS.get((each, mode), "")) for each in order),
        facts={fact: values[0] for fact, values in scores.items() if fact not in order},
        warnings=_plain(given, name),
    )


def _run(
    given: Given, ids: np.ndarray, name: str, measures: Mapping[str, Callable[[Layer], Any]], mode: str | None = None
) -> dict[str, list[Any]]:
    assert given.teacher is not None
    sweep = Sweep(teacher=given.teacher, student=given.student, measures=measures, mode=mode, device=given.device)
    kept = given.kept(ids, {"strategy": name, "measures": list(measures), "mode": mode})
    return sweep.run(torch.as_tensor(ids, dtype=torch.int64), kept, given.progress)


def _plain(given: Given, name: str) -> tuple[str, ...]:
    """A warning where the student's layers hold their initial values."""
    looked_at = given.student if "student" in STRATEGIES[name].needs else None
    plain = untouched_layers(looked_at) if looked_at else ()
    return (UNCALIBRATED.format(count=len(plain), total=given.num_layers, strategy=name),) if plain else ()


@strategy("how hard the layer was to align in stage 1, from the training log", frozenset({"log"}), rules=LOG_RULES)
def log(given: Given) -> Found:
    """The weighted sum of the log's signs of difficulty."""
    assert given.log is not None
    values, parts, warnings = score_log(read_log(given.log), given.num_layers)
    return Found(columns=(Column("log", values, parts),), warnings=warnings)
