"""Where a sweep over the layers stands between two steps, and as a file."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hxaconv.forward.batches import First

FIRSTS = ("first", "first_of_fork_0", "first_of_teacher")


@dataclass(slots=True)
class State:
    """A sweep between two layers."""

    layer: int
    """The next one."""
    teacher: Tensor
    base: Tensor | None = None
    forks: dict[int, Tensor] = field(default_factory=dict)
    first: First = None
    """v_first and k_first of layer 0, which base and all forks after layer 0 share."""
    first_of_fork_0: First = None
    """Those of layer 1, the first RWKV layer where layer 0 is GQA."""
    first_of_teacher: First = None
    """What layer 0 of the student makes of the teacher's stream."""
    scores: dict[str, list[float]] = field(default_factory=dict)
    moved: int = 0
    """Forks that have passed the next layer already: a sweep may stop between any two of them."""
    normed: bool = False
    """Whether the streams have passed the final norm."""
    room: Tensor | None = None
    """Memory of all forks, taken at once: streams that live long among short-lived tensors split the heap."""

    def fork(self, layer: int, values: Tensor, num_layers: int) -> None:
        """A new stream."""
        if self.room is None:
            self.room = values.new_empty(num_layers, *values.shape)
            for i, x in self.forks.items():
                self.forks[i] = self.room[i].copy_(x)
        self.forks[layer] = self.room[layer].copy_(values)

    def arrays(self) -> dict[str, np.ndarray]:
        """The state as plain arrays, for a file."""
        found: dict[str, Tensor | None] = {"teacher": self.teacher, "base": self.base}
        found |= {f"fork {i}": x for i, x in self.forks.items()}
        for name in FIRSTS:
            pair = getattr(self, name)
            found |= {f"{name} {i}": x for i, x in enumerate(pair or ())}
        arrays = {name: x.cpu().numpy() for name, x in found.items() if x is not None}
        numbers = {"layer": self.layer, "moved": self.moved, "normed": self.normed}
        return {**arrays, **score_arrays(self.scores), **{name: np.array(x) for name, x in numbers.items()}}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray], device: str) -> State:
        """The inverse of `arrays`."""

        def pair(name: str) -> First:
            return (x[f"{name} 0"], x[f"{name} 1"]) if f"{name} 0" in x else None

        x = {
            name: torch.from_numpy(values).to(device)
            for name, values in arrays.items()
            if values.dtype.kind == "f" and not name.startswith("score ")
        }
        forks = {int(name[5:]): values for name, values in x.items() if name.startswith("fork ")}
        firsts = pair("first"), pair("first_of_fork_0"), pair("first_of_teacher")
        between = int(arrays["moved"]), bool(arrays["normed"])
        return cls(int(arrays["layer"]), x["teacher"], x.get("base"), forks, *firsts, scores_of(arrays), *between)


def score_arrays(scores: dict[str, list[float]]) -> dict[str, np.ndarray]:
    """Scores as arrays, for a file: all that a finished sweep keeps."""
    return {f"score {name}": np.array(values) for name, values in scores.items()}


def scores_of(arrays: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """The inverse of `score_arrays`."""
    return {name[6:]: list(map(float, values)) for name, values in arrays.items() if name.startswith("score ")}
