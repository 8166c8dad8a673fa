"""Statements about tensors, put to the test while a walk holds them: copies, multiples, initial values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch
from torch import Tensor

from hxaconv.errors import shortened
from hxaconv.forward.walk import Held, Walk
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD, is_attention, layer_index
from hxaconv.model.plan import Plan, Recipe, same_bytes
from hxaconv.surgery.arithmetic import Scaled as ToCome
from hxaconv.surgery.arithmetic import tensor
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


def teacher_name(name: str) -> str:
    """The teacher's name of what a projection or norm of an RWKV layer is made of."""
    prefix, _, rest = name.partition(".self_attn.")
    part = part_of_mixer(name)
    return f"{prefix}.self_attn.{rest.replace(part, (FACTORS | NORMS)[part], 1)}"


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


def is_drawn(name: str, values: Tensor, seed: int) -> bool:
    """Whether a random matrix is the one of this seed and name, which every machine makes alike."""
    from hxaconv.surgery.initial import orthogonal

    rows, columns = values.shape
    return same_bits(values, orthogonal((rows, columns), seed, name, specification.GAIN).to(values.dtype).contiguous())


def is_initial(name: str, values: Tensor, config: StudentConfig, *, exact: bool = True) -> bool:
    """Whether a parameter of an RWKV layer has its published initial value.

    Not `exact`: w0 and a0 may be off by a rounding of their dtype, as from trainers that compute in float32.
    """
    part, layer = part_of_mixer(name), layer_index(name)
    assert layer is not None
    wanted = specification.INITIAL.get(config.variant.name, {}).get(part)
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


def departure(name: str, values: Tensor, origins: Mapping[str, Tensor], config: StudentConfig) -> str | None:
    """What a tensor of an RWKV layer would be as `init-from-teacher` makes it, with any factor and seed; None if it is.

    `origins` are the teacher's tensors; records of the layer are left out.
    """
    part = part_of_mixer(name)
    if part in FACTORS | NORMS:
        origin = origins.get(teacher_name(name))
        if origin is not None and (is_multiple if part in FACTORS else is_copy)(values, origin):
            return None
        return f"{'a multiple of ' if part in FACTORS else ''}the teacher's {teacher_name(name)}"
    wanted = specification.INITIAL.get(config.variant.name, {}).get(part)
    if wanted is None or part == "layer_architecture" or is_initial(name, values, config, exact=False):
        return None
    return f"{wanted:g} everywhere" if isinstance(wanted, float) else "the published values"


# --- The same of models that are not walked through ------------------------------------------------------------------


def untouched_layers(student: Model) -> tuple[int, ...]:
    """RWKV layers that still hold the published constants and biases, so were never calibrated or trained."""
    config, touched = student.student, set()
    initial = specification.INITIAL.get(config.variant.name, {})
    for name, recipe in student.plan.items():
        exact = in_rwkv_layer(config, name) and initial.get(part_of_mixer(name), ORTHOGONAL) != ORTHOGONAL
        if exact and departure(name, tensor(recipe), {}, config):
            touched.add(layer_index(name))
    return tuple(layer for layer in config.rwkv_layers if layer not in touched)


def departures(student: Model, teacher: Model) -> dict[str, str]:
    """Name -> what it is no longer, of every tensor that is not as `init-from-teacher` makes it of this teacher.

    With any factors; random matrices say nothing. What stands outside RWKV mixers is copied, or padded with zeros.
    """
    found, config, origins = {}, student.student, with_head(teacher)
    initial = specification.INITIAL.get(config.variant.name, {})
    for name, recipe in with_head(student).items():
        part, rwkv = part_of_mixer(name), in_rwkv_layer(config, name)
        if not rwkv:
            if not _is_copied(name, recipe, origins.get(name)):
                found[name] = "the teacher's"
        elif initial.get(part) != ORTHOGONAL:
            origin = origins.get(teacher_name(name)) if part in FACTORS | NORMS else None
            if origin is None or _to_come(recipe, origin) is None:
                beside = {} if origin is None else {teacher_name(name): tensor(origin)}
                expected = departure(name, tensor(recipe), beside, config)
                found |= {} if expected is None else {name: expected}
    return found


def _is_copied(name: str, recipe: Recipe, origin: Recipe | None) -> bool:
    if origin is None:
        return False
    if recipe.dtype == origin.dtype and recipe.shape == origin.shape:
        return same_bytes(recipe, origin)
    if _to_come(recipe, origin) == 1.0:
        return True
    padded = ".mlp." in name and recipe.shape != origin.shape
    return (is_padded if padded else is_copy)(tensor(recipe), tensor(origin))


def _to_come(made: Recipe, origin: Recipe) -> float | None:
    """The factor where `made` is still to be computed from these very bytes: there is nothing to compare then."""
    return made.make.factor if isinstance(made.make, ToCome) and made.make.source == origin.make else None


# --- Statements ------------------------------------------------------------------------------------------------------


@dataclass
class Claim:
    """A statement about some tensors of the model that was made; subclasses define when it `holds` of one."""

    check: str
    """The name of the check that it becomes in the report."""
    good: str
    bad: str
    """The words for tensors of which it holds, and for those of which it does not."""
    wanted: Callable[[str], bool]
    """Of which tensors, by canonical name."""
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

    def holds(self, name: str, made: Held, origin: Mapping[str, Held]) -> bool:
        """Of one tensor, or of some rows of it."""
        raise NotImplementedError

    def conclude(self, report: Report) -> None:
        """Add the check, where there was anything to look at."""
        wrong = [name for name, holds in self.held.items() if not holds]
        if self.held:
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

    def holds(self, name: str, made: Held, origin: Mapping[str, Held]) -> bool:
        other = origin.get(name)
        if other is None or (self.exact and made.values.dtype != other.values.dtype):
            return False
        if made.values.shape != other.values.shape:
            return self.padded and ".mlp." in name and is_padded(made.values, other.values)
        return is_copy(made.values, other.values)


@dataclass(kw_only=True)
class Scaled(Claim):
    """Projections of RWKV layers are the teacher's times a factor, norms are the teacher's."""

    factors: Mapping[str, float]
    cast: bool = False
    """Whether it may have been cast after it was initialised."""
    parts: set[str] = field(default_factory=set)

    def holds(self, name: str, made: Held, origin: Mapping[str, Held]) -> bool:
        part, other = part_of_mixer(name), origin.get(teacher_name(name))
        self.parts.add(part)
        if other is None:
            return False
        ways = [None, torch.bfloat16, torch.float16] if self.cast else [None]
        return any(is_rounded(made.values, other.values, self.factors.get(part, 1.0), between) for between in ways)

    def conclude(self, report: Report) -> None:
        self.good += "".join(f", {part} x {factor:g}" for part, factor in self.factors.items() if part in self.parts)
        super().conclude(report)


@dataclass(kw_only=True)
class Initial(Claim):
    """Parameters of RWKV layers have their published initial values; with a seed, the random ones are its own."""

    config: StudentConfig
    seed: int | None = None
    sampled: bool = False
    """Draw one matrix of each layer again, another in the next: a fifth of the time, and a wrong seed shows in any."""

    def holds(self, name: str, made: Held, origin: Mapping[str, Held]) -> bool:
        if not is_initial(name, made.values, self.config):
            return False
        initial, layer = specification.INITIAL.get(self.config.variant.name, {}), layer_index(name)
        random = [part for part, value in initial.items() if value == ORTHOGONAL]
        part = part_of_mixer(name)
        if self.seed is None or layer is None or part not in random:
            return True
        left_out = self.sampled and part != random[layer % len(random)]
        return left_out or is_drawn(name, made.values, self.seed)


@dataclass
class States:
    """What has happened to the attention of every layer: `untrained` (GQA: `kept`), `calibrated` or `trained`.

    `calibrated` are calibrated layers by a record, of which nothing else has changed.
    """

    config: StudentConfig
    calibrated: Collection[int] = ()
    found: dict[int, str] = field(default_factory=dict)

    def look(self, walk: Walk) -> None:
        """Check the layer at hand."""
        made = {name: held.values for name, held in walk.held(MADE).items() if is_attention(name)}
        origin = {name: held.values for name, held in walk.held(ORIGIN).items()}
        layers = {layer_index(name) for name in made}
        layer = layers.pop() if len(layers) == 1 else None
        if layer is None:
            return
        gqa = self.config.layer_kind(layer) == "gqa"

        def touched(name: str) -> bool:
            if gqa:
                return name not in origin or not is_copy(made[name], origin[name])
            return departure(name, made[name], origin, self.config) is not None

        parts = {part_of_mixer(n) for n, changed in zip(made, walk.pool.map(touched, made), strict=True) if changed}
        fitted = layer in self.calibrated and parts <= (specification.REFITTED if gqa else specification.FITTED)
        before = "kept" if gqa else "untrained"
        self.found[layer] = before if not parts else "calibrated" if fitted else "trained"

    def conclude(self, report: Report) -> None:
        """The check, passed or failed."""
        report.attention = dict(self.found)
        if self.found:
            report.check("attention", True, self.sentence())

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


def listing(names: Iterable[str], what: str) -> str:
    """`3 differ: a, b, c`, or nothing where no name is given."""
    found = list(names)
    return f"{len(found)} {what}: {shortened(found)}" if found else ""
