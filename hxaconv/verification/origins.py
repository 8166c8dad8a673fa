"""What tensors of a student are made of, judged by their values: copies, multiples, published initial values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention, layer_index
from hxaconv.model.plan import Plan, Recipe, same_bytes
from hxaconv.model.variants.base import Orthogonal, Parameter
from hxaconv.surgery.arithmetic import Scaled, tensor, torch_dtype
from hxaconv.verification.tensors import element_pairs, same_bits, with_head

SCALED = {"receptance": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
COPIED = {"r_norm": "q_norm", "k_norm": "k_norm"}
ROUNDED_ON_THE_WAY = 1e-5
"""What w0 and a0 may differ by where they were computed in float32; of the gain squared, what a Gram matrix may."""


def in_rwkv_layer(config: StudentConfig, name: str) -> bool:
    """Whether a tensor belongs to the mixer of an RWKV layer."""
    layer = layer_index(name)
    return layer is not None and is_attention(name) and config.layer_kind(layer) == "rwkv"


def is_scaled(made: Recipe, origin: Recipe, factor: float) -> bool:
    """Whether `made` is, bit for bit, factor * origin: multiplied in float32, rounded once to its dtype."""
    if made.shape != origin.shape:
        return False
    wide = torch.float64 if origin.dtype == "F64" else torch.float32
    for found, source in element_pairs(made, origin):
        expected = source if factor == 1.0 else source.to(wide) * factor
        if not same_bits(found, expected.to(torch_dtype(made.dtype))):
            return False
    return True


def is_multiple(made: Recipe, origin: Recipe) -> bool:
    """Whether `made` is origin times one factor, whatever it is, each value as near as its dtype can say.

    Values of the origin that are not finite tell nothing, and are left out.
    """
    if made.shape != origin.shape:
        return False
    if _factor_to_come(made, origin) is not None:
        return True
    products = squares = 0.0
    for found, source in _finite_pairs(made, origin):
        products += float((found * source).sum())
        squares += float(source.square().sum())
    factor = products / squares if squares else 0.0
    limits = torch.finfo(torch_dtype(made.dtype))
    step = max(limits.eps, torch.finfo(torch.float32).eps)
    for found, source in _finite_pairs(made, origin):
        wanted = source * factor
        if not bool(((found - wanted).abs() <= step * (wanted.abs() + limits.tiny)).all()):
            return False
    return True


def _finite_pairs(made: Recipe, origin: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    for found, source in element_pairs(made, origin):
        finite = torch.isfinite(source)
        yield found[finite].double(), source[finite].double()


def _factor_to_come(made: Recipe, origin: Recipe) -> float | None:
    """The factor where `made` is still to be computed from these very bytes: there is nothing to compare then."""
    return made.make.factor if isinstance(made.make, Scaled) and made.make.source == origin.make else None


def is_copy(made: Recipe, origin: Recipe) -> bool:
    """Whether `made` is the origin, bit for bit or, in another dtype, rounded once."""
    if made.dtype == origin.dtype:
        return same_bytes(made, origin)
    return _factor_to_come(made, origin) == 1.0 or is_scaled(made, origin, 1.0)


def is_padded(made: Recipe, origin: Recipe) -> bool:
    """Whether `made` is the origin with zeros below and to the right."""
    found, source = tensor(made), tensor(origin)
    if found.dim() != source.dim() or any(a < b for a, b in zip(found.shape, source.shape, strict=True)):
        return False
    inside = found[tuple(slice(size) for size in source.shape)]
    return torch.equal(inside, source.to(found.dtype)) and int(found.count_nonzero()) == int(inside.count_nonzero())


def is_constant(recipe: Recipe, value: float) -> bool:
    """Whether every value is this one, as the recipe's dtype has it."""
    found = tensor(recipe)
    return bool((found == torch.tensor(value, dtype=found.dtype)).all())


def is_orthogonal(recipe: Recipe, gain: float) -> bool:
    """Whether the rows of a (rows, columns) matrix, or its columns if they are fewer, are orthogonal with the gain.

    Rounding moves each value by eps/2 of itself at most, so an entry of the Gram matrix (Cauchy-Schwarz) by eps times
    the gain squared.
    """
    values = tensor(recipe).float()
    rows, columns = values.shape
    gram = values @ values.T if rows <= columns else values.T @ values
    square = gain**2 * max(1.0, rows / columns)
    limit = (torch.finfo(torch_dtype(recipe.dtype)).eps * 1.01 + ROUNDED_ON_THE_WAY) * square
    return bool(((gram - square * torch.eye(len(gram))).abs() <= limit).all())


def teacher_name(name: str) -> str:
    """The teacher's name of what a projection or norm of an RWKV layer is made of."""
    prefix, _, rest = name.partition(".self_attn.")
    part = part_of_mixer(name)
    return f"{prefix}.self_attn.{rest.replace(part, (SCALED | COPIED)[part], 1)}"


def part_of_mixer(name: str) -> str:
    """`receptance` of model.layers.3.self_attn.receptance.weight."""
    return name.partition(".self_attn.")[2].partition(".")[0]


def untouched_layers(student: Model, teacher: Model | None = None) -> tuple[int, ...]:
    """RWKV layers that still hold initial values, so were never calibrated or trained; see `touched_tensors`."""
    touched = {layer_index(name) for name in touched_tensors(student, teacher)}
    return tuple(layer for layer in student.student.rwkv_layers if layer not in touched)


def touched_tensors(student: Model, teacher: Model | None = None) -> dict[str, str]:
    """Name -> what it is no longer, of every tensor of an RWKV layer that is not as `init-from-teacher` makes it.

    Without a teacher, the published constants and biases count. With it, every projection also has to be some
    multiple of the teacher's, and every norm the teacher's. Random matrices say nothing.
    """
    found = {}
    for name, recipe in student.plan.items():
        if in_rwkv_layer(student.student, name):
            expected = expected_initial(name, recipe, student.student)
            if expected is None and teacher is not None:
                expected = _expected_origin(name, recipe, teacher.plan)
            if expected is not None:
                found[name] = expected
    return found


def expected_initial(name: str, recipe: Recipe, config: StudentConfig) -> str | None:
    """What a parameter of an RWKV layer should be by its variant, where it is not.

    None for projections and norms, and for random matrices and records, which say nothing about training.
    """
    parameter = next((p for p in config.variant.parameters if p.name == part_of_mixer(name)), None)
    if parameter is None or parameter.optional or parameter.initial is None:
        return None
    return None if isinstance(parameter.initial, Orthogonal) or is_initial(name, recipe, config) else _wanted(parameter)


def is_initial(name: str, recipe: Recipe, config: StudentConfig) -> bool:
    """Whether a parameter of an RWKV layer has its published initial value."""
    initial = {p.name: p.initial for p in config.variant.parameters}[part_of_mixer(name)]
    if isinstance(initial, Orthogonal):
        return is_orthogonal(recipe, initial.gain)
    if isinstance(initial, float):
        return is_constant(recipe, initial)
    layer = layer_index(name)
    assert layer is not None and initial is not None
    expected = initial(config, layer)
    step = torch.finfo(torch_dtype(recipe.dtype)).eps
    near = (tensor(recipe).double() - expected).abs() <= step * expected.abs() + ROUNDED_ON_THE_WAY
    return bool(near.all())


def _wanted(parameter: Parameter) -> str:
    return f"{parameter.initial:g} everywhere" if isinstance(parameter.initial, float) else "the published values"


def _expected_origin(name: str, recipe: Recipe, teacher: Plan) -> str | None:
    part = part_of_mixer(name)
    if part not in SCALED | COPIED:
        return None
    wanted = teacher_name(name)
    origin = teacher.get(wanted)
    kept = origin is not None and (is_multiple if part in SCALED else is_copy)(recipe, origin)
    return None if kept else f"{'a multiple of ' if part in SCALED else ''}the teacher's {wanted}"


def foreign_tensors(student: Model, teacher: Model) -> list[str]:
    """Names of a student's tensors outside RWKV mixers that are not copies of the teacher's, or padded ones."""
    origins = with_head(teacher)
    found = []
    for name, recipe in with_head(student).items():
        if in_rwkv_layer(student.student, name):
            continue
        origin = origins.get(name)
        padded = origin is not None and ".mlp." in name and recipe.shape != origin.shape
        if origin is None or not (is_padded if padded else is_copy)(recipe, origin):
            found.append(name)
    return found
