"""A whole mixer brought nearer to the teacher's attention, some sequences at a time.

What `heads` has fitted group by group is the start. Here receptance, key, value and output are free: they move by
momentum that is made orthogonal head by head (Muon, see `polish`), and w0, a0 and r_k by Adam. The loss is
|output - teacher's|^2 as a share of the sequence's |teacher's output|^2, on the teacher's own hidden states. The
validation tokens choose the best moment on the way.

A thousand tokens are learnt by heart within some dozen steps. `spans` makes more of them: the same text in other
orders, about which the teacher is asked as about any text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hxaconv.calibration.polish import OUTPUTS, scheduled, stepped
from hxaconv.forward import hxa079
from hxaconv.forward.chunked import chunked
from hxaconv.forward.pool import Pool
from hxaconv.forward.walk import First
from hxaconv.model.config import StudentConfig
from hxaconv.model.names import mixer_prefix

PROJECTIONS = ("receptance.weight", "key.weight", "value.weight", "output.weight")
RATE = 0.009
"""Of a matrix's own size, what a step moves it by at most."""
RATES = {"w0": 0.03, "a0": 0.03, "r_k": 0.01}
"""Of the others: how far Adam goes in a step."""
ADAM = (0.9, 0.98)
BATCH = 2
"""Sequences of a step, one for each worker."""
LOOKS = 4
"""How often the validation tokens are looked at on the way."""
TOKENS = 8192
MOST = 16
"""Fewer training tokens than TOKENS are completed to so many by `spans`, in MOST sequences at most."""
SHORTEST, LONGEST = 16, 128
"""Tokens of a span."""


def spans(ids: Tensor, training: Tensor) -> Tensor:
    """Sequences (count, T) of stretches of the training tokens among ids (B, T), so that there are TOKENS."""
    length, text = ids.shape[1], ids[training.bool().cpu()].numpy()
    random, rows = np.random.default_rng(0), []
    for _ in range(min(MOST, -(-max(0, TOKENS - len(text)) // length))):
        row = np.empty(0, dtype=text.dtype)
        while len(row) < length:
            size = min(len(text), int(np.exp(random.uniform(math.log(SHORTEST), math.log(LONGEST)))))
            begin = random.integers(0, len(text) - size + 1)
            row = np.concatenate([row, text[begin : begin + size]])
        rows.append(row[:length])
    return torch.from_numpy(np.stack(rows)) if rows else ids[:0]


def descend(
    inputs: Tensor,
    wanted: Tensor,
    training: Tensor,
    weights: Mapping[str, Tensor],
    first: First,
    config: StudentConfig,
    layer: int,
    steps: int,
    pool: Pool,
) -> dict[str, Tensor]:
    """What replaces `weights`, a mixer by short name; empty where no step was better than the start.

    Normed inputs (B, T, C), the teacher's output (B, T, C) with its bias, training tokens (B, T) as 1.0.
    """
    narrow, prefix = _narrowed(weights), mixer_prefix(layer)
    rows = [i for i in range(len(inputs)) if bool(training[i].any())]
    energy = (wanted.square().sum(dim=2) * training).sum(dim=1).clamp_min(1e-30)
    moved = {name: weights[name].clone() for name in (*PROJECTIONS, *RATES) if name in weights}

    def output(i: int, values: Mapping[str, Tensor]) -> Tensor:
        def get(name: str) -> Tensor:
            short = name.removeprefix(prefix)
            return values[short] if short in values else narrow[short]

        carry = hxa079.Carry(first[0][i : i + 1], first[1][i : i + 1]) if first else hxa079.Carry()
        return hxa079.time_mix(inputs[i : i + 1], get, config, layer, carry, chunked)[0]

    def gradients(i: int) -> tuple[Tensor, ...]:
        pool.check()
        with torch.enable_grad():
            values = {name: value.requires_grad_() for name, value in ((n, m.detach()) for n, m in moved.items())}
            missed = (output(i, values) - wanted[i]).square().sum(dim=1) @ training[i] / energy[i]
            return torch.autograd.grad(missed, list(values.values()))

    def missed(i: int) -> Tensor:
        return (output(i, moved) - wanted[i]).square().sum(dim=1) @ (1 - training[i])

    validated = [i for i in range(len(inputs)) if not bool(training[i].all())]

    def validation() -> float:
        return float(torch.stack(pool.map(missed, validated)).double().sum())

    best, update = validation(), _Update(moved, config.head_dim)
    kept: dict[str, Tensor] = {}
    looks = {round(steps * (i + 1) / LOOKS) for i in range(LOOKS)}
    for step in range(steps):
        picked = [rows[(step * BATCH + i) % len(rows)] for i in range(min(BATCH, len(rows)))]
        found = pool.map(gradients, picked)
        mean = {name: torch.stack(parts).mean(dim=0) for name, *parts in zip(moved, *found, strict=True)}
        update(mean, scheduled(1.0, step, steps))
        if step + 1 in looks and (error := validation()) < best:
            best, kept = error, {name: value.clone() for name, value in moved.items()}
    return kept


class _Update:
    """The optimizers' state; a call moves the values by one step."""

    def __init__(self, moved: dict[str, Tensor], head_dim: int) -> None:
        self.moved, self.head_dim, self.count = moved, head_dim, 0
        self.mean = {name: torch.zeros_like(value) for name, value in moved.items()}
        self.square = {name: torch.zeros_like(value) for name, value in moved.items() if name in RATES}

    def __call__(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        self.count += 1
        for name, gradient in gradients.items():
            value, mean = self.moved[name], self.mean[name]
            if name in RATES:
                square = self.square[name]
                mean.lerp_(gradient, 1 - ADAM[0])
                square.lerp_(gradient.square(), 1 - ADAM[1])
                size = (square / (1 - ADAM[1] ** self.count)).sqrt() + 1e-12
                value -= mean / (1 - ADAM[0] ** self.count) / size * (rate * RATES[name])
            else:
                self.moved[name], self.mean[name] = stepped(
                    value, gradient, mean, rate * RATE, self.head_dim, name.partition(".")[0] in OUTPUTS
                )


def _narrowed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same mixer where low-rank pairs that are zero have rank 1: most of their work is to multiply by zero."""
    found = dict(weights)
    for name, first in weights.items():
        second = f"{name[:-1]}2"
        if name.endswith("1") and second in weights and not bool(first.any()):
            found[name] = first[:, :1]
            # The gate's inner function makes 1/2 of 0, the others' 0.
            found[second] = weights[second].sum(dim=0, keepdim=True) if name == "g1" else weights[second][:1]
    return found
