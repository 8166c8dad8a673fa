"""Statements about the tensors of a model, put to the test while a walk has them at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hxaconv.errors import shortened
from hxaconv.forward.pool import Pool
from hxaconv.model.config import StudentConfig
from hxaconv.model.names import is_attention, layer_index
from hxaconv.model.plan import Plan, Recipe, same_bytes
from hxaconv.verification import specification
from hxaconv.verification.report import Report
from hxaconv.verification.values import (
    expected_initial,
    is_copy,
    is_initial,
    is_multiple,
    is_padded,
    is_rounded,
    is_rounded_twice,
    part_of_mixer,
    teacher_name,
)

MADE, ORIGIN = "source", "other"
"""Roles in the walk of a comparison: what was made, and what it was made of."""


@dataclass(kw_only=True)
class Claim:
    """What is said of some tensors of the model that was made; subclasses say when it `holds` of one."""

    check: str
    """The name of the check that it becomes in the report."""
    good: str
    bad: str
    """What is said of the tensors of which it holds, and of those of which it does not."""
    wanted: Callable[[str], bool]
    """Of which tensors, by canonical name."""
    role: str = ORIGIN
    """Whose tensors they are held against."""
    complete: bool = False
    """Whether it also says that everything the other has is there."""
    held: dict[str, bool] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)

    def look(self, at_hand: Mapping[str, Plan], pool: Pool) -> None:
        """Test it on what is in memory."""
        made, origin = at_hand[MADE], at_hand.get(self.role, {})
        names = [name for name in made if self.wanted(name)]
        for name, holds in zip(names, pool.map(lambda n: self.holds(n, made[n], origin), names), strict=True):
            self.held[name] = self.held.get(name, True) and holds
        if self.complete:
            self.lacking += [name for name in origin if name not in made and self.wanted(name)]

    def holds(self, name: str, made: Recipe, origin: Plan) -> bool:
        """Of one tensor."""
        raise NotImplementedError

    def conclude(self, report: Report) -> None:
        """Add the check."""
        wrong = [name for name, holds in self.held.items() if not holds]
        text = listing(wrong, self.bad) or f"{len(self.held)} tensors {self.good}"
        report.check(self.check, not wrong, text)
        if self.complete:
            missing = listing(self.lacking, "are missing")
            report.check("nothing lost", not self.lacking, missing or "every tensor that has to be there is there")


@dataclass(kw_only=True)
class Copied(Claim):
    """They are the other's: the same bits, or rounded once to another dtype, or padded with zeros where `padded`."""

    padded: bool = False
    exact: bool = False
    """Only the same bits will do."""

    def holds(self, name: str, made: Recipe, origin: Plan) -> bool:
        other = origin.get(name)
        if other is None:
            return False
        if made is other:
            return True
        if made.shape != other.shape:
            return self.padded and ".mlp." in name and is_padded(made, other)
        if made.dtype == other.dtype:
            return same_bytes(made, other)
        return not self.exact and is_rounded(made, other)


@dataclass(kw_only=True)
class Scaled(Claim):
    """Projections of RWKV layers are the teacher's times a factor, norms are the teacher's."""

    factors: Mapping[str, float]
    cast_since: bool = False
    """Whether it may have been cast after it was initialised."""
    parts: set[str] = field(default_factory=set)

    def holds(self, name: str, made: Recipe, origin: Plan) -> bool:
        part, other = part_of_mixer(name), origin.get(teacher_name(name))
        self.parts.add(part)
        if other is None:
            return False
        factor = self.factors.get(part, 1.0)
        return is_rounded(made, other, factor) or (self.cast_since and is_rounded_twice(made, other, factor))

    def conclude(self, report: Report) -> None:
        self.good += "".join(f", {part} x {factor:g}" for part, factor in self.factors.items() if part in self.parts)
        super().conclude(report)


@dataclass(kw_only=True)
class Initial(Claim):
    """Parameters of RWKV layers have their published initial values; with a seed, the random ones are its own."""

    config: StudentConfig
    seed: int | None = None

    def holds(self, name: str, made: Recipe, origin: Plan) -> bool:
        return is_initial(name, made, self.config, seed=self.seed)


@dataclass
class States:
    """What has happened to the attention of every layer: `untrained` (GQA: `kept`), `calibrated` or `trained`."""

    config: StudentConfig
    found: dict[int, str] = field(default_factory=dict)

    def look(self, at_hand: Mapping[str, Plan], pool: Pool) -> None:
        """Judge the layer at hand."""
        made, origin = at_hand[MADE], at_hand.get(ORIGIN, {})
        names = [name for name in made if is_attention(name)]
        layers = {layer_index(name) for name in names}
        if len(layers) != 1:
            return
        layer = layers.pop()
        assert layer is not None
        if self.config.layer_kind(layer) == "gqa":
            kept = pool.map(lambda n: is_copy(made[n], origin.get(n)), names)
            moved = {part_of_mixer(n) for n, same in zip(names, kept, strict=True) if not same}
            calibrated = "calibrated" if moved <= specification.REFITTED else "trained"
            self.found[layer] = calibrated if moved else "kept"
            return
        touched = {
            part_of_mixer(n)
            for n, is_touched in zip(
                names, pool.map(lambda n: _touched(n, made[n], origin, self.config), names), strict=True
            )
            if is_touched
        }
        self.found[layer] = (
            "untrained" if not touched else "calibrated" if touched <= specification.FITTED else "trained"
        )

    def conclude(self, report: Report) -> None:
        """Say it; nothing of it is wrong."""
        report.attention = dict(self.found)
        report.check("attention", True, self.sentence() or "no layer was looked at")

    def sentence(self) -> str:
        """`trained: layers 0-7; kept: layer 8`."""
        return "; ".join(
            f"{state}: {_ranges([i for i, s in self.found.items() if s == state])}"
            for state in dict.fromkeys(self.found.values())
        )


def _ranges(layers: list[int]) -> str:
    parts: list[str] = []
    start = 0
    for i, layer in enumerate(layers):
        if i + 1 == len(layers) or layers[i + 1] != layer + 1:
            parts.append(f"{layers[start]}-{layer}" if i > start else str(layer))
            start = i + 1
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(parts)}"


def _touched(name: str, made: Recipe, origin: Plan, config: StudentConfig) -> bool:
    """Whether a tensor of an RWKV layer is not as an initialisation makes it, with whatever factor and seed."""
    part = part_of_mixer(name)
    if part in specification.FACTORS or part in specification.NORMS:
        other = origin.get(teacher_name(name))
        if other is None:
            return False
        return not (is_multiple(made, other) if part in specification.FACTORS else is_copy(made, other))
    return expected_initial(name, made, config, random=True) is not None


def listing(names: list[str], what: str) -> str:
    """`3 differ: a, b, c`, or nothing where no name is given."""
    return f"{len(names)} {what}: {shortened(names)}" if names else ""
