"""Statements about tensors, put to the test while a walk holds them: copies, multiples, initial values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch
from torch import Tensor

from hxaconv.forward.walk import Held, Walk
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD, is_attention, layer_index
from hxaconv.model.plan import Plan, same_bytes
from hxaconv.surgery.arithmetic import Scaled as ToCome
from hxaconv.surgery.arithmetic import tensor
from hxaconv.surgery.initial import orthogonal
from hxaconv.verification import specification
from hxaconv.verification.report import Report
from hxaconv.verification.specification import FACTORS, NORMS, ORTHOGONAL

MADE, ORIGIN = "source", "other"
"""Roles in the walk of a comparison: what was made, and what it was made of."""
ROUNDED_ON_THE_WAY = 1e-5
"""What w0 and a0 may differ by where they were computed in float32; of the gain squared, what a Gram matrix may."""
BLOCK = 30 * 1024
"""Elements that torch handles on the calling thread, and that stay in the cache of its core."""


def with_head(model: Model) -> Plan:
    """The plan with the head spelled out: of a tied model that is the embedding."""
    if model.config.tie_word_embeddings and HEAD not in model.plan and EMBEDDING in model.plan:
        return model.plan | {HEAD: model.plan[EMBEDDING]}
    return model.plan


def in_rwkv_layer(config: StudentConfig, name: str) -> bool:
    """Whether a tensor belongs to the mixer of an RWKV layer."""
    layer = layer_index(name)
    return layer is not None and is_attention(name) and config.layer_kind(layer) == "rwkv"


def part_of_mixer(name: str) -> str:
    """`receptance` of model.layers.3.self_attn.receptance.weight."""
    return name.partition(".self_attn.")[2].partition(".")[0]


def source_name(config: StudentConfig, name: str) -> str | None:
    """The teacher's name of what a student's tensor is made of; None for what an RWKV layer has of its own."""
    part = part_of_mixer(name)
    if not in_rwkv_layer(config, name):
        return name
    return name.replace(f".{part}.", f".{(FACTORS | NORMS)[part]}.") if part in FACTORS | NORMS else None


# --- What one tensor is, of another or by itself ---------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype have the same bits: NaN equals itself, 0 and -0 differ."""
    whole_numbers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return np.array_equal(a.view(whole_numbers).numpy(), b.view(whole_numbers).numpy())  # torch takes ten times as long


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(a.reshape(-1), BLOCK), torch.split(b.reshape(-1), BLOCK), strict=True)


def is_rounded(made: Tensor, origin: Tensor, factor: float = 1.0, between: torch.dtype | None = None) -> bool:
    """Whether `made` is, bit for bit, factor * origin: multiplied in float32, rounded once, or to `between` first."""
    if made.shape != origin.shape:
        return False
    wide = torch.float64 if origin.dtype == torch.float64 else torch.float32
    for found, source in _blocks(made, origin):
        expected = source if factor == 1.0 else source.to(wide) * factor
        expected = expected if between is None else expected.to(between)
        if not same_bits(found, expected.to(found.dtype)):
            return False
    return True


def is_copy(made: Tensor, origin: Tensor) -> bool:
    """Whether `made` is the origin, bit for bit or, in another dtype, rounded once."""
    if made is origin:
        return True
    return made.shape == origin.shape and (same_bits if made.dtype == origin.dtype else is_rounded)(made, origin)


def is_multiple(made: Tensor, origin: Tensor) -> bool:
    """Whether `made` is origin times one factor, whatever it is, each value as near as its dtype allows.

    Values of the origin that are not finite are left out.
    """
    if made.shape != origin.shape:
        return False
    factor: float | None = None
    limits = torch.finfo(made.dtype)
    step = max(limits.eps, torch.finfo(torch.float32).eps)
    wide = torch.float32 if limits.bits == 16 else torch.float64
    for found, source in _blocks(made, origin):
        a, b = found.to(wide), source.to(wide)
        a, b = torch.where(torch.isfinite(b), a, 0.0), torch.where(torch.isfinite(b), b, 0.0)
        if factor is None:
            squares = float(b.double().square().sum())
            # Thousands of rounded values determine the factor better than their dtype.
            factor = float((a.double() * b.double()).sum()) / squares if squares else None
        wanted = b * (factor or 0.0)
        if not bool(((a - wanted).abs() <= step * (wanted.abs() + limits.tiny)).all()):
            return False
    return True


def is_padded(made: Tensor, origin: Tensor) -> bool:
    """Whether `made` is the origin with zeros below and to the right."""
    if made.dim() != origin.dim() or any(a < b for a, b in zip(made.shape, origin.shape, strict=True)):
        return False
    inside = made[tuple(slice(size) for size in origin.shape)]
    return torch.equal(inside, origin.to(made.dtype)) and int(made.count_nonzero()) == int(inside.count_nonzero())


def is_taken_over(name: str, made: Tensor, origin: Tensor) -> bool:
    """Whether a tensor that no surgery computes is its origin: a copy, or of an MLP padded with zeros."""
    if ".mlp." in name and made.shape != origin.shape:
        return is_padded(made, origin)
    return is_copy(made, origin)


def is_orthogonal(values: Tensor) -> bool:
    """Whether the rows of a (rows, columns) matrix, or its columns if they are fewer, are orthogonal with the gain.

    Rounding moves each value by eps/2 of itself at most, so an entry of the Gram matrix (Cauchy-Schwarz) by eps times
    the gain squared.
    """
    eps, values = torch.finfo(values.dtype).eps, values.float()
    rows, columns = values.shape
    gram = values @ values.T if rows <= columns else values.T @ values
    square = specification.GAIN**2 * max(1.0, rows / columns)
    limit = (eps * 1.01 + ROUNDED_ON_THE_WAY) * square
    return bool(((gram - square * torch.eye(len(gram))).abs() <= limit).all())


def is_initial(name: str, values: Tensor, config: StudentConfig, *, exact: bool = True) -> bool:
    """Whether a parameter of an RWKV layer has its published initial value.

    Not `exact`: w0 and a0 may be off by a rounding of their dtype, as from trainers that compute in float32.
    """
    part, layer = part_of_mixer(name), layer_index(name)
    assert layer is not None
    wanted = _initial_values(config).get(part)
    if part == "head_size_record":
        wanted = float(config.head_dim)
    if isinstance(wanted, float):
        constant = torch.tensor(wanted, dtype=values.dtype)
        return same_bits(values, constant.expand_as(values).contiguous()) if exact else bool((values == constant).all())
    if wanted is None or wanted == ORTHOGONAL:
        return wanted is not None and is_orthogonal(values)
    width, size = config.attention_size, config.head_dim
    if part == "w0":
        biases = specification.decay_bias(width, size, layer, config.num_hidden_layers)
    else:
        biases = specification.iclr_bias(width, size)
    expected = torch.from_numpy(biases).view(1, 1, -1)
    if exact:
        # Another order of the same float64 operations: next to a tie, both neighbours are right.
        near = expected.abs() * 1e-12
        low, high = ((expected + sign * near).to(values.dtype) for sign in (-1, 1))
        return bool(((values == low) | (values == high)).all())
    step = torch.finfo(values.dtype).eps
    return bool(((values.double() - expected).abs() <= step * expected.abs() + ROUNDED_ON_THE_WAY).all())


def _initial_values(config: StudentConfig) -> Mapping[str, float | str]:
    return specification.INITIAL.get(config.variant.name, {})


def departure(name: str, values: Tensor, origin: Tensor | None, config: StudentConfig) -> str | None:
    """What a student's tensor would be as `init-from-teacher` makes it, with any factor and seed; None if it is.

    `origin` is what it is made of, by `source_name`; records of the layer are left out.
    """
    part, of = part_of_mixer(name), source_name(config, name)
    if not in_rwkv_layer(config, name):
        return None if origin is not None and is_taken_over(name, values, origin) else "the teacher's"
    if of is not None:
        if origin is not None and (is_multiple if part in FACTORS else is_copy)(values, origin):
            return None
        return f"{'a multiple of ' if part in FACTORS else ''}the teacher's {of}"
    wanted = _initial_values(config).get(part)
    if wanted is None or part == "layer_architecture" or is_initial(name, values, config, exact=False):
        return None
    return f"{wanted:g} everywhere" if isinstance(wanted, float) else "the published values"


# --- The same of models that are not walked through ------------------------------------------------------------------


def untouched_layers(student: Model) -> tuple[int, ...]:
    """RWKV layers that still hold the published constants and biases, so were never calibrated or trained."""
    config, touched = student.student, set()
    for name, recipe in student.plan.items():
        exact = _initial_values(config).get(part_of_mixer(name), ORTHOGONAL) != ORTHOGONAL
        if exact and in_rwkv_layer(config, name) and departure(name, tensor(recipe), None, config):
            touched.add(layer_index(name))
    return tuple(layer for layer in config.rwkv_layers if layer not in touched)


def departures(student: Model, teacher: Model) -> dict[str, str]:
    """Name -> what it is no longer, of every tensor that is not as `init-from-teacher` makes it of this teacher.

    With any factors; random matrices say nothing. What stands outside RWKV mixers is copied, or padded with zeros.
    """
    found, config, origins = dict[str, str | None](), student.student, with_head(teacher)
    for name, recipe in with_head(student).items():
        of, rwkv = source_name(config, name), in_rwkv_layer(config, name)
        origin = None if of is None else origins.get(of)
        if rwkv and _initial_values(config).get(part_of_mixer(name)) == ORTHOGONAL:
            continue
        if origin is not None and isinstance(recipe.make, ToCome) and recipe.make.source == origin.make:
            # Still to be computed from these very bytes: there is nothing to compare.
            found[name] = None if rwkv or recipe.make.factor == 1.0 else "the teacher's"
        elif origin is not None and not rwkv and (recipe.dtype, recipe.shape) == (origin.dtype, origin.shape):
            found[name] = None if same_bytes(recipe, origin) else "the teacher's"
        else:
            found[name] = departure(name, tensor(recipe), None if origin is None else tensor(origin), config)
    return {name: expected for name, expected in found.items() if expected}


# --- Statements ------------------------------------------------------------------------------------------------------

Holds = Callable[[str, Held, Mapping[str, Held]], bool]
"""Whether something is true of a tensor, or of some rows of it: its name, it, and what is held of the other model."""


def taken_over(name: str, made: Held, origin: Mapping[str, Held]) -> bool:
    """It is the other's: the same bits, or rounded once to another dtype, or of an MLP padded with zeros."""
    return name in origin and is_taken_over(name, made.values, origin[name].values)


def bits_taken_over(name: str, made: Held, origin: Mapping[str, Held]) -> bool:
    """It has the other's bits."""
    return name in origin and made.recipe.dtype == origin[name].recipe.dtype and taken_over(name, made, origin)


@dataclass
class Claim:
    """A statement about some tensors of the model that was made."""

    check: str
    """The name of the check that it becomes in the report."""
    good: str | Callable[[Iterable[str]], str]
    bad: str
    """The words for tensors of which it holds (their names may matter), and for those of which it does not."""
    wanted: Callable[[str], bool]
    """Of which tensors, by canonical name."""
    holds: Holds = taken_over
    _: KW_ONLY
    role: str = ORIGIN
    """Whose tensors they are held against."""
    complete: bool = False
    """Whether it also claims that everything the other has is there."""
    held: dict[str, bool] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)

    def look(self, walk: Walk) -> None:
        """Test it on what is in memory."""
        made, origin = walk.held(MADE), walk.held(self.role)
        names = [name for name in made if self.wanted(name)]
        for name, holds in zip(names, walk.pool.map(lambda n: self.holds(n, made[n], origin), names), strict=True):
            self.held[name] = self.held.get(name, True) and holds
        if self.complete:
            self.lacking += [name for name in origin if name not in made and self.wanted(name)]

    def conclude(self, report: Report) -> None:
        """Add the check, where there was anything to look at."""
        wrong = [name for name, holds in self.held.items() if not holds]
        if self.held:
            good = self.good if isinstance(self.good, str) else self.good(self.held)
            report.problems(self.check, wrong, f"{len(self.held)} tensors {good}", self.bad)
        if self.complete:
            good = "every tensor that has to be there is there"
            report.problems("nothing lost", self.lacking, good, "are missing")


def copied(config: StudentConfig, *, without: Callable[[str], bool] = lambda name: False, but: str = "") -> Claim:
    """Everything outside the mixers of RWKV layers is the teacher's, but for some names, which `but` describes."""

    def wanted(name: str) -> bool:
        return not in_rwkv_layer(config, name) and not without(name)

    good, bad = f"are the teacher's{f'; {but}' if but else ''}", "differ from the teacher's"
    return Claim("copied tensors", good, bad, wanted, complete=True)


def initial_claims(
    config: StudentConfig,
    factors: Mapping[str, float],
    *,
    layers: Collection[int] | None = None,
    without: Callable[[str], bool] = lambda name: False,
    role: str = ORIGIN,
    seed: int | None = None,
    sampled: bool = False,
    cast: bool = False,
) -> list[Claim]:
    """RWKV layers (all, or some) are as they were initialised, but for some names.

    Args:
        role: whose projections they were made of.
        seed: of their random matrices, which every machine draws alike.
        sampled: whether one matrix of each layer is drawn again, another in the next: a fifth of the time, and a wrong
            seed shows in any.
        cast: whether they may have been cast after that.
    """
    random = [part for part, value in _initial_values(config).items() if value == ORTHOGONAL]

    def wanted(name: str) -> bool:
        return in_rwkv_layer(config, name) and (layers is None or layer_index(name) in layers) and not without(name)

    def scaled(name: str, made: Held, origin: Mapping[str, Held]) -> bool:
        other, factor = origin.get(source_name(config, name) or ""), factors.get(part_of_mixer(name), 1.0)
        ways = [None, torch.bfloat16, torch.float16] if cast else [None]
        return other is not None and any(is_rounded(made.values, other.values, factor, between) for between in ways)

    def multiples(names: Iterable[str]) -> str:
        parts = {part_of_mixer(name) for name in names}
        return "are the teacher's" + "".join(f", {p} x {factor:g}" for p, factor in factors.items() if p in parts)

    def initial(name: str, made: Held, origin: Mapping[str, Held]) -> bool:
        part, layer, values = part_of_mixer(name), layer_index(name), made.values
        if not is_initial(name, values, config):
            return False
        if seed is None or part not in random or (sampled and part != random[(layer or 0) % len(random)]):
            return True
        rows, columns = values.shape
        drawn = orthogonal((rows, columns), seed, name, specification.GAIN)
        return same_bits(values, drawn.to(values.dtype).contiguous())

    good = "are as published, random matrices orthogonal"
    if seed is not None:
        good = f"{good}, one of each layer drawn again from seed {seed}" if sampled else f"are those of seed {seed}"
    return [
        Claim(
            "scaled projections",
            multiples,
            "are not what they should be",
            lambda name: wanted(name) and source_name(config, name) is not None,
            scaled,
            role=role,
        ),
        Claim(
            "initial values",
            good,
            "are not what they should be",
            lambda name: wanted(name) and source_name(config, name) is None,
            initial,
        ),
    ]


class States(Claim):
    """What has happened to the attention of every layer: `untrained` (GQA: `kept`), `calibrated` or `trained`.

    `calibrated` are calibrated layers by a record, of which nothing else has changed.
    """

    def __init__(self, config: StudentConfig, calibrated: Collection[int] = ()) -> None:
        def untouched(name: str, made: Held, origin: Mapping[str, Held]) -> bool:
            other = origin.get(source_name(config, name) or "")
            return departure(name, made.values, None if other is None else other.values, config) is None

        super().__init__("attention", "", "", is_attention, untouched)
        self.config, self.calibrated = config, calibrated

    @property
    def found(self) -> dict[int, str]:
        """Layer -> its state."""
        changed, states = dict[int, set[str]](), dict[int, str]()
        for name, holds in self.held.items():
            parts = changed.setdefault(layer_index(name) or 0, set())
            parts |= set() if holds else {part_of_mixer(name)}
        for layer, parts in changed.items():
            gqa = self.config.layer_kind(layer) == "gqa"
            fitted = layer in self.calibrated and parts <= (specification.REFITTED if gqa else specification.FITTED)
            states[layer] = "calibrated" if parts and fitted else "trained" if parts else "kept" if gqa else "untrained"
        return states

    def conclude(self, report: Report) -> None:
        """The check, which always passes: each layer's state, where there is any attention."""
        report.attention = self.found
        if self.held:
            report.check("attention", True, self.sentence())

    def sentence(self) -> str:
        """`trained: layers 0-7; kept: layer 8`."""
        found = self.found
        of_state = {state: [i for i, s in found.items() if s == state] for state in dict.fromkeys(found.values())}
        return "; ".join(f"{state}: {_ranges(layers)}" for state, layers in of_state.items())


def _ranges(layers: list[int]) -> str:
    runs = itertools.groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])
    found = [[layer for _, layer in run] for _, run in runs]
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(parts)}"
