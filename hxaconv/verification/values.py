"""What tensors of a student are made of, judged by their values: copies, multiples, published initial values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD, is_attention, layer_index
from hxaconv.model.plan import Buffers, Plan, Recipe, same_bytes
from hxaconv.surgery.arithmetic import Scaled, tensor, torch_dtype
from hxaconv.verification import specification

ROUNDED_ON_THE_WAY = 1e-5
"""What w0 and a0 may differ by where they were computed in float32; of the gain squared, what a Gram matrix may."""
PIECE_BYTES = 512 * 1024


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
    return f"{prefix}.self_attn.{rest.replace(part, (specification.FACTORS | specification.NORMS)[part], 1)}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype have the same bits: NaN equals itself, 0 and -0 differ."""
    whole_numbers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(whole_numbers), b.view(whole_numbers))


def element_pairs(a: Recipe, b: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """The elements of both, in stretches of equal length."""
    left, right = _flat(a), _flat(b)
    x = y = torch.empty(0)
    for _ in range(2 * (a.numel + 1)):
        if not len(x):
            x = next(left, x)
        if not len(y):
            y = next(right, y)
        count = min(len(x), len(y))
        if not count:
            return
        yield x[:count], y[:count]
        x, y = x[count:], y[count:]


def _flat(recipe: Recipe) -> Iterator[Tensor]:
    dtype = torch_dtype(recipe.dtype)
    for piece in recipe.pieces(Buffers(PIECE_BYTES)):
        yield torch.frombuffer(bytearray(piece) if piece.readonly else piece, dtype=dtype)


def is_rounded(made: Recipe, origin: Recipe, factor: float = 1.0) -> bool:
    """Whether `made` is, bit for bit, factor * origin: multiplied in float32, rounded once to its dtype."""
    if made.shape != origin.shape:
        return False
    wide = torch.float64 if origin.dtype == "F64" else torch.float32
    dtype = torch_dtype(made.dtype)
    for found, source in element_pairs(made, origin):
        expected = source if factor == 1.0 else source.to(wide) * factor
        if not same_bits(found, expected.to(dtype)):
            return False
    return True


def is_rounded_twice(made: Recipe, origin: Recipe, factor: float) -> bool:
    """Whether `made` is factor * origin rounded to bf16 or fp16 first, as an initialisation that was cast later is."""
    return made.shape == origin.shape and any(
        all(
            same_bits(found, (source.float() * factor).to(between).to(found.dtype))
            for found, source in element_pairs(made, origin)
        )
        for between in (torch.bfloat16, torch.float16)
    )


def is_multiple(made: Recipe, origin: Recipe) -> bool:
    """Whether `made` is origin times one factor, whatever it is, each value as near as its dtype can say.

    Values of the origin that are not finite tell nothing, and are left out.
    """
    if made.shape != origin.shape:
        return False
    if _factor_to_come(made, origin) is not None:
        return True
    factor: float | None = None
    limits = torch.finfo(torch_dtype(made.dtype))
    step = max(limits.eps, torch.finfo(torch.float32).eps)
    wide = torch.float32 if limits.bits == 16 else torch.float64
    for found, source in element_pairs(made, origin):
        a, b = found.to(wide), source.to(wide)
        a, b = torch.where(torch.isfinite(b), a, 0.0), torch.where(torch.isfinite(b), b, 0.0)
        if factor is None:
            squares = float(b.double().square().sum())
            # Thousands of rounded values say the factor better than their dtype could.
            factor = float((a.double() * b.double()).sum()) / squares if squares else None
        wanted = b * (factor or 0.0)
        if not bool(((a - wanted).abs() <= step * (wanted.abs() + limits.tiny)).all()):
            return False
    return True


def _factor_to_come(made: Recipe, origin: Recipe) -> float | None:
    """The factor where `made` is still to be computed from these very bytes: there is nothing to compare then."""
    return made.make.factor if isinstance(made.make, Scaled) and made.make.source == origin.make else None


def is_copy(made: Recipe, origin: Recipe | None) -> bool:
    """Whether `made` is the origin, bit for bit or, in another dtype, rounded once."""
    if origin is None or made is origin:
        return made is origin
    if made.dtype == origin.dtype:
        return same_bytes(made, origin)
    return _factor_to_come(made, origin) == 1.0 or is_rounded(made, origin)


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


def is_orthogonal(recipe: Recipe) -> bool:
    """Whether the rows of a (rows, columns) matrix, or its columns if they are fewer, are orthogonal with the gain.

    Rounding moves each value by eps/2 of itself at most, so an entry of the Gram matrix (Cauchy-Schwarz) by eps times
    the gain squared.
    """
    values = tensor(recipe).float()
    rows, columns = values.shape
    gram = values @ values.T if rows <= columns else values.T @ values
    square = specification.GAIN**2 * max(1.0, rows / columns)
    limit = (torch.finfo(torch_dtype(recipe.dtype)).eps * 1.01 + ROUNDED_ON_THE_WAY) * square
    return bool(((gram - square * torch.eye(len(gram))).abs() <= limit).all())


def is_initial(
    name: str, recipe: Recipe, config: StudentConfig, *, exact: bool = True, seed: int | None = None
) -> bool:
    """Whether a parameter of an RWKV layer has its published initial value; with a seed, a random one its very bits.

    Not `exact`: w0 and a0 may be off by a rounding of their dtype, as from trainers that compute in float32.
    """
    part, layer = part_of_mixer(name), layer_index(name)
    assert layer is not None
    if part == "head_size_record":
        return is_constant(recipe, float(config.head_dim))
    wanted = specification.INITIAL[config.variant.name].get(part)
    if isinstance(wanted, float):
        return is_constant(recipe, wanted)
    if wanted == specification.ORTHOGONAL:
        return is_orthogonal(recipe) and (seed is None or _is_drawn(name, recipe, seed))
    if wanted is None:
        return False
    width, size = config.attention_size, config.head_dim
    if part == "w0":
        values = specification.decay_bias(width, size, layer, config.num_hidden_layers)
    else:
        values = specification.iclr_bias(width, size)
    expected = torch.from_numpy(values).view(1, 1, -1)
    found = tensor(recipe)
    if exact:
        # Another order of the same float64 operations: next to a tie, both neighbours are right.
        near = expected.abs() * 1e-12
        low, high = ((expected + sign * near).to(found.dtype) for sign in (-1, 1))
        return bool(((found == low) | (found == high)).all())
    step = torch.finfo(found.dtype).eps
    return bool(((found.double() - expected).abs() <= step * expected.abs() + ROUNDED_ON_THE_WAY).all())


def _is_drawn(name: str, recipe: Recipe, seed: int) -> bool:
    """Whether a random matrix is the one of this seed and name, which every machine makes alike."""
    from hxaconv.surgery.initial import orthogonal

    rows, columns = recipe.shape
    found = tensor(recipe)
    return same_bits(found, orthogonal((rows, columns), seed, name, specification.GAIN).to(found.dtype).contiguous())


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


def expected_initial(name: str, recipe: Recipe, config: StudentConfig, *, random: bool = False) -> str | None:
    """What a parameter of an RWKV layer should be by the specification, where it is not.

    None for projections, norms and records, which say nothing about training, nor do random matrices but for those
    that are no longer orthogonal, where `random` asks for them.
    """
    wanted = specification.INITIAL.get(config.variant.name, {}).get(part_of_mixer(name))
    if wanted is None or part_of_mixer(name) == "layer_architecture":
        return None
    if (wanted == specification.ORTHOGONAL and not random) or is_initial(name, recipe, config, exact=False):
        return None
    return f"{wanted:g} everywhere" if isinstance(wanted, float) else "the published values"


def _expected_origin(name: str, recipe: Recipe, teacher: Plan) -> str | None:
    part = part_of_mixer(name)
    if part not in specification.FACTORS | specification.NORMS:
        return None
    wanted = teacher_name(name)
    origin = teacher.get(wanted)
    kept = origin is not None and (is_multiple if part in specification.FACTORS else is_copy)(recipe, origin)
    return None if kept else f"{'a multiple of ' if part in specification.FACTORS else ''}the teacher's {wanted}"


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
