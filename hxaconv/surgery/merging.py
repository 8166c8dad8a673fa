"""Adapters merged into tensors: PEFT's LoRA, and the lora, dora, pissa, bone and disha files of RWKV trainers.

Formulas, W the base weight (out, in), B A the product of the low-rank pair, s the scale:

| adapter | merged weight | where it is defined |
|---|---|---|
| LoRA | W + s B A | peft `lora/layer.py`; RWKV-PEFT `merge/merge_lora.py` |
| LoRA of an embedding | W + s (B A)^T | peft `lora/layer.py` |
| DoRA of PEFT | m (W + s B A) / norm of its rows | peft `lora/dora.py` |
| DoRA of RWKVInside | m (W + s B A) / (norm of its columns + 1e-6) | RWKVInside `train_scripts/merge_lora.py` |
| PiSSA | W - B0 A0 + B A | RWKV-PEFT `merge/merge_pissa.py` |
| Bone, one matrix (r, out) | W + its transpose, repeated along the columns | RWKV-PEFT `merge/merge_disha.py` |
| Bone, blocks (in / r, r, r) | W + W D + D in every r x r block | the same, and RWKVInside `loralinear.py` |

Each merged tensor is computed in float32 (float64 from a float64 base), some rows at a time, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hxaconv.errors import raise_all
from hxaconv.formats.dtypes import BY_NAME, FLOATS
from hxaconv.formats.files import SourceFile
from hxaconv.model.plan import Buffers, Plan, Recipe, has_rows, rows
from hxaconv.surgery.arithmetic import cast, one_thread, tensor, torch_dtype

BLOCK_ELEMENTS = 2**18
"""Rows that are merged at a time: 1 MiB of float32. Larger blocks are no faster."""

Blocks = Iterator[tuple[int, Tensor]]
"""The rows of a weight from the first to the last, some at a time, with the number of their first."""


@dataclass(frozen=True, slots=True)
class Delta:
    """How one adapter changes one tensor."""

    recipes: tuple[Recipe, ...]
    """The adapter's tensors."""
    fits: Callable[[tuple[int, ...]], bool]
    """Whether it can change a tensor of this shape."""
    change: Callable[..., Tensor]
    """(rows of a weight, number of the first, the adapter's tensors) -> these rows, changed, in place or not."""
    prepare: Callable[[list[Tensor], Blocks], list[Tensor]] | None = None
    """What `change` gets in place of the adapter's tensors, where that depends on the whole weight before."""
    multiple: int = 1
    """Rows have to be changed in multiples of it."""


def low_rank(a: Recipe, b: Recipe, scale: float) -> Delta:
    """LoRA: a (r, in), b (out, r)."""

    def fits(shape: tuple[int, ...]) -> bool:
        return len(a.shape) == len(shape) == 2 and a.shape[1] == shape[1] and b.shape == (shape[0], a.shape[0])

    def change(block: Tensor, first: int, right: Tensor, left: Tensor) -> Tensor:
        product = left[first : first + len(block)] @ right
        product *= scale
        block += product
        return block

    return Delta((a, b), fits, change)


def embedding_pair(a: Recipe, b: Recipe, scale: float) -> Delta:
    """LoRA of an embedding (V, C): a (r, V), b (C, r)."""

    def fits(shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and a.shape[1:] == shape[:1] and b.shape == (shape[1], a.shape[0])

    def change(block: Tensor, first: int, left: Tensor, right: Tensor) -> Tensor:
        block += (right @ left[:, first : first + len(block)]).T * scale
        return block

    return Delta((a, b), fits, change)


def row_normed(magnitude: Recipe) -> Delta:
    """The second half of PEFT's DoRA: rows divided by their norms and multiplied by the magnitude (out)."""

    def change(block: Tensor, first: int, factor: Tensor) -> Tensor:
        block *= (factor.view(-1)[first : first + len(block)] / torch.linalg.norm(block, dim=1)).view(-1, 1)
        return block

    return Delta((magnitude,), lambda shape: magnitude.numel == shape[0], change)


def column_normed(magnitude: Recipe) -> Delta:
    """The second half of RWKVInside's DoRA: divided by the norm of every column and multiplied by (1, in)."""

    def factors(given: list[Tensor], before: Blocks) -> list[Tensor]:
        squares = sum(block.double().square().sum(dim=0) for _, block in before)
        assert isinstance(squares, Tensor)
        return [(tensor(magnitude, dtype=torch.float64).view(-1) / (squares.sqrt() + 1e-6)).to(given[0].dtype)]

    fits = lambda shape: magnitude.numel == shape[-1]  # noqa: E731
    return Delta((magnitude,), fits, lambda block, first, factor: block * factor, factors)


def repeated(matrix: Recipe) -> Delta:
    """Bone with one matrix (r, out): its transpose is added to every r columns, to the last ones a part of it."""

    def fits(shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and matrix.shape[1] == shape[0] and matrix.shape[0] <= shape[1]

    def change(block: Tensor, first: int, columns: Tensor) -> Tensor:
        part = columns[:, first : first + len(block)].T
        for start in range(0, block.shape[1], part.shape[1]):
            changed = block[:, start : start + part.shape[1]]
            changed += part[:, : changed.shape[1]]
        return block

    return Delta((matrix,), fits, change)


def blockwise(blocks: Recipe) -> Delta:
    """Bone with blocks (in / r, r, r): every r x r block of a weight is changed by that of its columns."""
    count, r, other = blocks.shape

    def fits(shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and r == other and count * r == shape[1] and shape[0] % r == 0

    def change(block: Tensor, first: int, factors: Tensor) -> Tensor:
        cut = block.view(-1, r, count, r).transpose(1, 2)
        return (cut + (cut @ factors + factors)).transpose(1, 2).reshape(block.shape)

    return Delta((blocks,), fits, change, multiple=r)


def added(vector: Recipe, scale: float) -> Delta:
    """A vector that is added, as to a bias."""

    def change(block: Tensor, first: int, values: Tensor) -> Tensor:
        block += values[first : first + len(block)] * scale
        return block

    return Delta((vector,), lambda shape: vector.shape == shape, change)


@dataclass(frozen=True, slots=True)
class Merged:
    """A tensor with what adapters change in it, some rows at a time."""

    base: Recipe
    deltas: tuple[Delta, ...]
    dtype: str
    rows: tuple[int, int]
    """The rows, [first, last), that are wanted."""
    kind: str = "merge"

    def sources(self) -> Iterable[SourceFile]:
        """The base's files and the adapters'."""
        recipes = [self.base, *(recipe for delta in self.deltas for recipe in delta.recipes)]
        return dict.fromkeys(file for recipe in recipes for file in recipe.make.sources())

    def part(self, start: int, nbytes: int) -> Merged:
        """The rows that these bytes are."""
        row = math.prod(self.base.shape[1:]) * BY_NAME[self.dtype].itemsize
        first = self.rows[0] + start // row
        return replace(self, rows=(first, first + nbytes // row))

    def exact(self) -> tuple[Merged, str]:
        """The same before it is rounded, and its dtype."""
        dtype = "F64" if self.base.dtype == "F64" else "F32"
        return replace(self, dtype=dtype), dtype

    def chunks(self, buffers: Buffers) -> Iterator[memoryview]:
        """The merged rows, in chunks no longer than the buffers buffer."""
        step = len(buffers.read) // 16 * 16
        low, high = self.rows
        changes: list[tuple[Delta, list[Tensor]]] = []
        with one_thread():
            for delta in self.deltas:
                given = [tensor(recipe, dtype=torch_dtype(self.exact()[1])) for recipe in delta.recipes]
                if delta.prepare is not None:
                    given = delta.prepare(given, self._blocks(0, self.base.shape[0], changes))
                changes.append((delta, given))
        for first, block in self._blocks(low, high, changes):
            with one_thread():
                wanted = block[max(0, low - first) : max(0, high - first)]
                made = wanted.to(torch_dtype(self.dtype)).contiguous().view(-1)
            data = memoryview(made.view(torch.uint8).numpy())  # type: ignore[arg-type]
            for start in range(0, len(data), step):
                yield data[start : start + step]

    def _blocks(self, low: int, high: int, changes: Sequence[tuple[Delta, list[Tensor]]]) -> Blocks:
        """Changed blocks that hold rows [low, high), in the compute dtype.

        The blocks are the same whichever rows are wanted: the product of a single row may be rounded otherwise.
        """
        compute, base = torch_dtype(self.exact()[1]), self.base
        multiple = math.lcm(*(delta.multiple for delta in self.deltas))
        step = max(1, BLOCK_ELEMENTS // max(1, math.prod(base.shape[1:])) // multiple) * multiple
        whole = None if has_rows(base) else tensor(base, dtype=compute)
        for first in range(low // step * step, high, step):
            last = min(base.shape[0], first + step)
            if whole is None:
                block = tensor(rows(base, first, last, base.origin), dtype=compute)
            else:
                block = whole[first:last].clone()
            with one_thread():
                for delta, given in changes:
                    block = delta.change(block, first, *given)
            yield first, block


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's changes by canonical name of the tensor: deltas, and tensors that take the place of the base's."""

    label: str
    """As the user named it."""
    name: str
    """What the origin of a merged tensor calls it, without the path."""
    deltas: Mapping[str, tuple[Delta, ...]]
    replaced: Mapping[str, Recipe] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Every tensor that it changes."""
        return {*self.deltas, *self.replaced}


def merge(plan: Plan, adapters: Iterable[Adapter], where: str) -> Plan:
    """The plan with every adapter merged into it, in order; dtypes stay.

    Raises:
        HxaconvError: listing what an adapter changes and the plan does not have, and what has another shape.
    """
    merged = dict(plan)
    for adapter in adapters:
        lacking = sorted(adapter.names - plan.keys())
        raise_all(
            f"{adapter.label} changes {len(adapter.names)} tensors, {len(lacking)} of them are not in {where}:",
            lacking,
            hint="Is it an adapter of this model? A training checkpoint holds attention only: add --teacher.",
        )
        problems = []
        for name in adapter.names:
            base, given = merged[name], adapter.replaced.get(name)
            deltas = adapter.deltas.get(name, ())
            shapes = [] if given is None or given.shape == base.shape else [given.shape]
            shapes = shapes or [
                recipe.shape for delta in deltas if not delta.fits(base.shape) for recipe in delta.recipes
            ]
            if shapes:
                unfit = " and ".join(map(str, map(list, shapes)))
                problems.append(f"{name}: the model has {list(base.shape)}, the adapter {unfit}")
            elif base.dtype not in FLOATS:
                problems.append(f"{name}: the model's is {base.dtype}, not a float type")
            else:
                merged[name] = _with(base, given, deltas, adapter.name)
        raise_all(f"{adapter.label} does not fit {where}:", problems, hint="Is it an adapter of this model?")
    return merged


def _with(base: Recipe, given: Recipe | None, deltas: tuple[Delta, ...], adapter: str) -> Recipe:
    origin = f"{base.origin} + {adapter}" if given is None else f"{base.origin} replaced by that of {adapter}"
    before: tuple[Delta, ...] = ()
    make = base.make
    if given is not None:
        base = cast(given, base.dtype)  # in the model's own dtype, whatever the adapter is stored in
    elif isinstance(make, Merged):
        base, before = make.base, make.deltas
    if not deltas:
        return replace(base, origin=origin)
    shape = base.shape
    return Recipe(base.dtype, shape, Merged(base, before + deltas, base.dtype, (0, shape[0])), origin)
