"""Weights of a model as tensors, one layer at a time, in memory that the next layer's take over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, is_attention, layer_prefix, template_of
from hxaconv.model.plan import Recipe
from hxaconv.surgery.arithmetic import tensor, tensor_rows


@dataclass(slots=True, eq=False)
class Compute:
    """Where and in which dtype a forward runs, and the memory that every layer's weights take in turn."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    _buffers: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def make(self, recipe: Recipe) -> Tensor:
        """A recipe's tensor, in memory of its own."""
        return tensor(recipe, dtype=self.dtype).to(self.device)

    def release(self) -> None:
        """Give the layers' memory back."""
        self._buffers.clear()

    def load(self, model: Model, names: Iterable[str], have: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Name -> tensor; those in `have` are not made again.

        A tensor is valid until one of that name in another layer is loaded. Mixers of a teacher and of a
        student do not share memory, everything else of theirs does.
        """
        have = have or {}
        return {name: have[name] if name in have else self._fill(model, name) for name in names}

    def _fill(self, model: Model, name: str) -> Tensor:
        recipe, key = model.plan[name], template_of(name)[0]
        if is_attention(name):
            key = f"{type(model.config).__name__} {key}"
        if key not in self._buffers or len(self._buffers[key]) < recipe.numel:
            self._buffers[key] = torch.empty(recipe.numel, dtype=self.dtype, device=self.device)
        buffer = self._buffers[key]
        if self.device == "cpu":
            return tensor(recipe, into=buffer)
        return buffer[: recipe.numel].view(recipe.shape).copy_(tensor(recipe))


def layer_names(model: Model, layer: int, *, mixer: bool | None = None) -> list[str]:
    """Names of one layer's tensors: all, the mixer's only, or all but the mixer's."""
    prefix = layer_prefix(layer)
    names = [name for name in model.plan if name.startswith(prefix)]
    return [name for name in names if mixer is None or is_attention(name) == mixer]


def embed(model: Model, ids: Tensor, compute: Compute) -> Tensor:
    """Token ids (B, T) -> (B, T, C); only the rows that are asked for are read."""
    return tensor_rows(model.plan[EMBEDDING], ids, dtype=compute.dtype).to(compute.device)
