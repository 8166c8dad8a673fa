"""Tensors that a file stores as one and the architecture knows as several: split into ranges of what is stored."""

from __future__ import annotations

from hxaconv.errors import Inconsistent
from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.strided import Strided
from hxaconv.model.config import ModelConfig
from hxaconv.model.experts import FUSED
from hxaconv.model.names import template_of
from hxaconv.model.plan import Divisible, Plan, Ranges, Recipe, rows

GATE_UP, DOWN = (f"model.layers.{{i}}.{name}" for name in FUSED)


def split_fused(plan: Plan, config: ModelConfig) -> Plan:
    """Phi-3's qkv_proj and gate_up_proj, and fused experts, as the parts they are made of; other tensors as they are.

    Raises:
        Inconsistent: for a fused tensor whose shape the config does not explain.
    """
    a, kv, f = config.attention_size, config.key_value_size, config.intermediate_size
    parts = {
        "model.layers.{i}.self_attn.qkv_proj.weight": (("q_proj", a), ("k_proj", kv), ("v_proj", kv)),
        "model.layers.{i}.mlp.gate_up_proj.weight": (("gate_proj", f), ("up_proj", f)),
    }
    result: Plan = {}
    for name, recipe in plan.items():
        template = template_of(name)[0]
        if template in (GATE_UP, DOWN):
            result |= _experts(name, plan, config)
        elif template in parts:
            result |= _rows(name, recipe, parts[template])
        else:
            result[name] = recipe
    return result


def _rows(name: str, recipe: Recipe, pieces: tuple[tuple[str, int], ...]) -> Plan:
    if recipe.shape[0] != sum(size for _, size in pieces):
        sizes = " + ".join(str(size) for _, size in pieces)
        raise Inconsistent(f"{name} has {recipe.shape[0]} rows, the config implies {sizes}")
    result: Plan = {}
    start, fused = 0, name.rsplit(".", 2)[1]
    for part, size in pieces:
        result[name.replace(fused, part)] = rows(recipe, start, start + size, f"{name} rows {start}:{start + size}")
        start += size
    return result


def _experts(name: str, plan: Plan, config: ModelConfig) -> Plan:
    """One layer's experts: as transformers 5 has them, (E, 2I, C) and (E, C, I), or each matrix transposed."""
    if config.experts is None:
        raise Inconsistent(f"{name} holds experts, and config.json has no num_experts")
    recipe, count = plan[name], config.experts.num_experts
    matrix = _matrix(name, config)
    if recipe.shape not in ((count, *matrix), (count, *reversed(matrix))):
        turned = (count, *reversed(matrix))
        raise Inconsistent(
            f"{name}: shape {recipe.shape}, the config implies {(count, *matrix)}, or {turned} transposed"
        )
    make = _transposed if _is_transposed(name, plan, config) else _straight
    base, _, fused = name.rpartition(".")
    number = matrix[0] // 2 if fused == "gate_up_proj" else matrix[0]
    parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
    return {
        f"{base}.{expert}.{part}.weight": make(recipe, matrix, expert, place * number, number)
        for expert in range(count)
        for place, part in enumerate(parts)
    }


def _matrix(name: str, config: ModelConfig) -> tuple[int, int]:
    """(rows, columns) of one expert's matrix in a fused tensor."""
    assert config.experts is not None
    c, i = config.hidden_size, config.experts.moe_intermediate_size
    return (2 * i, c) if name.endswith("gate_up_proj") else (c, i)


def _is_transposed(name: str, plan: Plan, config: ModelConfig) -> bool:
    """By its shape; where its matrices are square, by that of the layer's other one."""
    base = name.rpartition(".")[0]
    for one in (name, f"{base}.gate_up_proj", f"{base}.down_proj"):
        matrix = _matrix(one, config)
        if one in plan and matrix[0] != matrix[1]:
            return plan[one].shape[1:] != matrix
    return False


def _straight(recipe: Recipe, matrix: tuple[int, int], expert: int, first: int, number: int) -> Recipe:
    """Rows of one expert's matrix."""
    assert isinstance(recipe.make, Divisible)
    itemsize = BY_NAME[recipe.dtype].itemsize
    start, size = (expert * matrix[0] + first) * matrix[1], number * matrix[1]
    part = recipe.make.part(start * itemsize, size * itemsize)
    return Recipe(recipe.dtype, (number, matrix[1]), part, f"{recipe.origin}[{expert}] rows {first}:{first + number}")


def _transposed(recipe: Recipe, matrix: tuple[int, int], expert: int, first: int, number: int) -> Recipe:
    """The same rows where they are stored as columns."""
    assert isinstance(recipe.make, Ranges)
    extent, itemsize = recipe.make.extents[0], BY_NAME[recipe.dtype].itemsize
    assert extent.file is not None
    offset = extent.offset + (expert * matrix[0] * matrix[1] + first) * itemsize
    make = Strided(extent.file, offset, itemsize, (number, matrix[1]), (1, matrix[0]))
    origin = f"{recipe.origin}[{expert}] columns {first}:{first + number}"
    return Recipe(recipe.dtype, (number, matrix[1]), make, origin)
