"""Weights from a plan, one layer at a time, converted into a buffer that is used again for every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from hxaconv.model.names import layer_index
from hxaconv.model.plan import Plan, Recipe, is_one_range, rows
from hxaconv.surgery.arithmetic import tensor, tensor_rows

SLICE_BYTES = 128 * 2**20
"""Memory for a slice of the head: a whole one has 2.5 GB at Reka's vocabulary in float32."""


class Weights:
    """`weights(name)` is a weight in the compute dtype; it stays valid until `release`."""

    def __init__(self, plan: Plan, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.plan, self.dtype, self.device = plan, dtype, device
        self._held: dict[str, Tensor] = {}
        self._arena: Tensor | None = None
        self._used = 0

    def __call__(self, name: str) -> Tensor:
        """The tensor, read at first use. Kept until `release`."""
        if name not in self._held:
            self._held[name] = self._load(self.plan[name])
        return self._held[name]

    def release(self) -> None:
        """Forget all weights: the next layer's take their place."""
        self._held.clear()
        self._used = 0

    def held(self) -> dict[str, Tensor]:
        """The weights in memory now."""
        return dict(self._held)

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Rows of a matrix by number, (*indices.shape, columns); only they are read where it is a copy."""
        return tensor_rows(self.plan[name], indices, dtype=self.dtype).to(self.device)

    def slices(self, name: str) -> Iterator[Tensor]:
        """All rows of a matrix in order, in slices of about SLICE_BYTES; each is valid until the next."""
        recipe = self.plan[name]
        num_rows, num_columns = recipe.shape
        step = max(1, SLICE_BYTES // (num_columns * self.dtype.itemsize))
        if num_rows <= step or not is_one_range(recipe):
            yield tensor(recipe, dtype=self.dtype).to(self.device)
            return
        buffer = torch.empty(step * num_columns, dtype=self.dtype)
        for start in range(0, num_rows, step):
            part = rows(recipe, start, min(start + step, num_rows), recipe.origin)
            yield tensor(part, into=buffer).to(self.device)

    def _load(self, recipe: Recipe) -> Tensor:
        if self._arena is None:
            self._arena = torch.empty(_largest_layer(self.plan), dtype=self.dtype, device=self.device)
        room = self._arena[self._used :]
        if recipe.numel > len(room):
            return tensor(recipe, dtype=self.dtype).to(self.device)
        self._used += recipe.numel
        if self.device == "cpu":
            return tensor(recipe, into=room)
        return room[: recipe.numel].view(recipe.shape).copy_(tensor(recipe))


def _largest_layer(plan: Plan) -> int:
    sizes: Counter[int | None] = Counter()
    for name, recipe in plan.items():
        sizes[layer_index(name)] += recipe.numel
    return max((size for layer, size in sizes.items() if layer is not None), default=0)
