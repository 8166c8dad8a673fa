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
from hxaconv.model.plan import Buffers, Divisible, Plan, Recipe
from hxaconv.surgery.arithmetic import cast, one_thread, tensor, torch_dtype

BLOCK_ELEMENTS = 2**18
"""Rows that are merged at a time: 1 MiB of float32. Larger blocks are no faster."""

Change = Callable[[Tensor, int], Tensor]
"""(rows of a weight, number of the first) -> these rows, changed; they may be changed in place."""
Blocks = Callable[[], Iterator[tuple[int, Tensor]]]
"""The rows of a weight from the first to the last, some at a time, before a change."""


@dataclass(frozen=True, slots=True)
class Delta:
    """How one adapter changes one tensor."""

    recipes: tuple[Recipe, ...]
    """The adapter's tensors."""
    fits: Callable[[tuple[int, ...]], bool]
    """Whether it can change a tensor of this shape."""
    load: Callable[[torch.dtype, Blocks], Change]
    """Reads the adapter's tensors, for a computation in a dtype on the rows that come before."""
    multiple: int = 1
    """Rows have to be changed in multiples of it."""


def low_rank(a: Recipe, b: Recipe, scale: float) -> Delta:
    """LoRA: a (r, in), b (out, r)."""

    def fits(shape: tuple[int, ...]) -> bool:
        return len(a.shape) == len(shape) == 2 and a.shape[1] == shape[1] and b.shape == (shape[0], a.shape[0])

    def load(dtype: torch.dtype, before: Blocks) -> Change:
        right, left = tensor(a, dtype=dtype), tensor(b, dtype=dtype)

        def change(rows: Tensor, first: int) -> Tensor:
            product = left[first : first + len(rows)] @ right
            product *= scale
            rows += product
            return rows

        return change

    return Delta((a, b), fits, load)


def embedding_pair(a: Recipe, b: Recipe, scale: float) -> Delta:
    """LoRA of an embedding (V, C): a (r, V), b (C, r)."""

    def fits(shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and a.shape[1:] == shape[:1] and b.shape == (shape[1], a.shape[0])

    def load(dtype: torch.dtype, before: Blocks) -> Change:
        left, right = tensor(a, dtype=dtype), tensor(b, dtype=dtype)

        def change(rows: Tensor, first: int) -> Tensor:
            rows += (right @ left[:, first : first + len(rows)]).T * scale
            return rows

        return change

    return Delta((a, b), fits, load)


def row_normed(magnitude: Recipe) -> Delta:
    """The second half of PEFT's DoRA: rows divided by their norms and multiplied by the magnitude (out)."""

    def load(dtype: torch.dtype, before: Blocks) -> Change:
        factor = tensor(magnitude, dtype=dtype).view(-1)

        def change(rows: Tensor, first: int) -> Tensor:
            rows *= (factor[first : first + len(rows)] / torch.linalg.norm(rows, dim=1)).view(-1, 1)
            return rows

        return change

    return Delta((magnitude,), lambda shape: magnitude.numel == shape[0], load)


def column_normed(magnitude: Recipe) -> Delta:
    """The second half of RWKVInside's DoRA: divided by the norm of every column and multiplied by (1, in)."""

    def load(dtype: torch.dtype, before: Blocks) -> Change:
        squares = sum(rows.double().square().sum(dim=0) for _, rows in before())
        assert isinstance(squares, Tensor)
        factor = (tensor(magnitude, dtype=torch.float64).view(-1) / (squares.sqrt() + 1e-6)).to(dtype)
        return lambda rows, first: rows * factor

    return Delta((magnitude,), lambda shape: magnitude.numel == shape[-1], load)


def repeated(matrix: Recipe) -> Delta:
    """Bone with one matrix (r, out): its transpose is added to every r columns, to the last ones a part of it."""

    def fits(shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and matrix.shape[1] == shape[0] and matrix.shape[0] <= shape[1]

    def load(dtype: torch.dtype, before: Blocks) -> Change:
        columns = tensor(matrix, dtype=dtype).T.contiguous()

        def change(rows: Tensor, first: int) -> Tensor:
            part = columns[first : first + len(rows)]
            for start in range(0, rows.shape[1], part.shape[1]):
                changed = rows[:, start : start + part.shape[1]]
                changed += part[:, : changed.shape[1]]
            return rows

        return change

    return Delta((matrix,), fits, load)


def blockwise(blocks: Recipe) -> Delta:
    """Bone with blocks (in / r, r, r): every r x r block of a weight is changed by that of its columns."""
    count, r, other = blocks.shape

    def fits(shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and r == other and count * r == shape[1] and shape[0] % r == 0

    def load(dtype: torch.dtype, before: Blocks) -> Change:
        factors = tensor(blocks, dtype=dtype)

        def change(rows: Tensor, first: int) -> Tensor:
            cut = rows.view(-1, r, count, r).transpose(1, 2)
            return (cut + (cut @ factors + factors)).transpose(1, 2).reshape(rows.shape)

        return change

    return Delta((blocks,), fits, load, r)


def added(vector: Recipe, scale: float) -> Delta:
    """A vector that is added, as to a bias."""

    def load(dtype: torch.dtype, before: Blocks) -> Change:
        values = tensor(vector, dtype=dtype)

        def change(rows: Tensor, first: int) -> Tensor:
            rows += values[first : first + len(rows)] * scale
            return rows

        return change

    return Delta((vector,), lambda shape: vector.shape == shape, load)


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
        files = [*self.base.make.sources()]
        for recipe in (recipe for delta in self.deltas for recipe in delta.recipes):
            files += recipe.make.sources()
        return list(dict.fromkeys(files))

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
        with one_thread():
            changes = self._load()
        low, high = self.rows
        for first, rows in self._blocks(low, high):
            with one_thread():
                for change in changes:
                    rows = change(rows, first)
                wanted = rows[max(0, low - first) : max(0, high - first)]
                made = wanted.to(torch_dtype(self.dtype)).contiguous().view(-1)
            data = memoryview(made.view(torch.uint8).numpy())  # type: ignore[arg-type]
            for start in range(0, len(data), step):
                yield data[start : start + step]

    def _load(self) -> list[Change]:
        compute = torch_dtype(self.exact()[1])
        changes: list[Change] = []
        for delta in self.deltas:
            changes.append(delta.load(compute, self._before(tuple(changes))))
        return changes

    def _before(self, changes: Sequence[Change]) -> Blocks:
        def blocks() -> Iterator[tuple[int, Tensor]]:
            for first, rows in self._blocks(0, self.base.shape[0]):
                for change in changes:
                    rows = change(rows, first)
                yield first, rows

        return blocks

    def _blocks(self, low: int, high: int) -> Iterator[tuple[int, Tensor]]:
        """Blocks of the base that hold rows [low, high), in the compute dtype, with the number of their first row.

        The blocks are the same whichever rows are wanted: the product of a single row may be rounded otherwise.
        """
        compute, base = torch_dtype(self.exact()[1]), self.base
        columns = max(1, math.prod(base.shape[1:]))
        multiple = math.lcm(*(delta.multiple for delta in self.deltas))
        step = max(1, BLOCK_ELEMENTS // columns // multiple) * multiple
        whole = None if isinstance(base.make, Divisible) else tensor(base, dtype=compute)
        row = columns * BY_NAME[base.dtype].itemsize
        for first in range(low // step * step, high, step):
            last = min(base.shape[0], first + step)
            if whole is not None:
                yield first, whole[first:last].clone()
                continue
            assert isinstance(base.make, Divisible)
            part = base.make.part(first * row, (last - first) * row)
            yield first, tensor(Recipe(base.dtype, (last - first, *base.shape[1:]), part, base.origin), dtype=compute)


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
            base = merged[name]
            given = adapter.replaced.get(name)
            if given is not None and given.shape != base.shape:
                problems.append(f"{name}: the model has {list(base.shape)}, the adapter a tensor {list(given.shape)}")
                continue
            if base.dtype not in FLOATS:
                problems.append(f"{name}: the model's is {base.dtype}, not a float type")
            deltas = adapter.deltas.get(name, ())
            for delta in deltas:
                if not delta.fits(base.shape):
                    shapes = " and ".join(str(list(recipe.shape)) for recipe in delta.recipes)
                    problems.append(f"{name}: the model has {list(base.shape)}, the adapter {shapes}")
            if not problems:
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
