"""A whole mixer brought nearer to the teacher's attention, some sequences at a time.

What `heads` has fitted group by group is the start. Here receptance, key, value and output are free: they move by
momentum that is made orthogonal head by head (Muon, see `polish`), and w0, a0 and r_k by Adam. The loss is
|output - teacher's|^2 as a share of the sequence's |teacher's output|^2, on the teacher's own hidden states. The
validation tokens choose the best moment on the way.

A thousand tokens are learnt by heart within some dozen steps. More are made of them, about which the teacher is asked
as about any text: the same text in other orders (`spans`), where half of the tokens are then replaced by what the
teacher says there (`rewritten`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hxaconv.calibration.polish import OUTPUTS, TRAINED, scheduled, stepped
from hxaconv.forward.pool import ROWS, Pool
from hxaconv.forward.walk import Walk

MATRICES = tuple(f"{part}.weight" for part in TRAINED)
RATE = 0.009
"""Of a matrix's own size, what a step moves it by at most."""
RATES = {"w0": 0.03, "a0": 0.03, "r_k": 0.01}
"""Of the others: how far Adam goes in a step."""
ADAM = (0.9, 0.98)
BATCH = 2
"""Sequences of a step, one for each worker."""
LOOKS = 4
"""How often the validation tokens are looked at on the way."""
TOKENS_OF_STEP, STEPS_OF_SEQUENCE = 128, 4
"""Fewer training tokens than so many for each step are completed by spans, in a sequence for so many steps at most."""
SHORTEST, LONGEST = 16, 128
"""Tokens of a span."""
REWRITTEN = 0.5
"""Of the tokens of added sequences, how many the teacher writes over."""
TOKENS_OF_STEPS, MOST_STEPS = 4096, 3.0
"""From so many training tokens on, steps grow in proportion to them, to MOST_STEPS times as many."""


Best = tuple[Tensor, Tensor]
"""Of some places, the highest noisy logit so far and its token."""


def steps_of(steps: int, training: Tensor) -> int:
    """How many steps are taken with these tokens of the text to train on, (B, T) as 1.0."""
    return round(steps * min(MOST_STEPS, max(1.0, float(training.sum()) / TOKENS_OF_STEPS)))


def spans(ids: Tensor, training: Tensor, steps: int) -> Tensor:
    """Sequences (count, T) of stretches of the training tokens among ids (B, T), as many as so many steps want."""
    length, text = ids.shape[1], ids[training.bool().cpu()].numpy()
    random, rows = np.random.default_rng(0), []
    missing = -(-max(0, steps * TOKENS_OF_STEP - len(text)) // length)
    for _ in range(min(-(-steps // STEPS_OF_SEQUENCE), missing)):
        row = np.empty(0, dtype=text.dtype)
        while len(row) < length:
            size = min(len(text), int(np.exp(random.uniform(math.log(SHORTEST), math.log(LONGEST)))))
            begin = random.integers(0, len(text) - size + 1)
            row = np.concatenate([row, text[begin : begin + size]])
        rows.append(row[:length])
    return torch.from_numpy(np.stack(rows)) if rows else ids[:0]


def rewritten(ids: Tensor, walk: Walk, role: str, advance: Callable[[int], None]) -> Tensor:
    """ids (B, T) where a share REWRITTEN of the tokens is drawn from what a model says of the tokens before them.

    The model is read once; `advance` is told each layer. Noise is drawn by seeds that name its place: threads change
    nothing.
    """
    count, length = ids.shape
    seen = torch.split(torch.cat(walk.hidden(role, ids, advance)), ROWS)
    best = [(x.new_full((len(x),), -torch.inf), torch.zeros(len(x), dtype=torch.long, device=x.device)) for x in seen]
    for start, _ in walk.slices({role: walk[role].head}, "head"):
        block = walk.held(role)["head"].values

        def drawn(i: int, start: int = start, block: Tensor = block, best: list[Best] = best) -> Best:
            logits, (highest, token) = walk.product(seen[i], block), best[i]
            # The largest of logits with Gumbel noise is a sample of their softmax.
            largest, where = (logits - _uniform(logits.shape, start, i).log_().neg_().log_().to(logits)).max(dim=1)
            better = largest > highest
            return torch.where(better, largest, highest), torch.where(better, where + start, token)

        best = walk.pool.map(drawn, range(len(seen)))
    said = torch.cat([tokens for _, tokens in best]).view(count, length).cpu()
    found = ids.clone()
    over = _uniform((count, length - 1), -1, 0) < REWRITTEN
    found[:, 1:] = torch.where(over, said[:, :-1], ids[:, 1:])
    return found


def _uniform(shape: Sequence[int], *place: int) -> Tensor:
    seed = 0
    for part in place:
        seed = seed * 1000003 + part + 1
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))


def descend(
    output: Callable[[int, Mapping[str, Tensor]], Tensor],
    moved: dict[str, Tensor],
    wanted: Tensor,
    training: Tensor,
    head_dim: int,
    steps: int,
    pool: Pool,
) -> dict[str, Tensor]:
    """What replaces `moved`, the free parameters of a mixer by short name; empty where no step was better than those.

    `output(i, values)` is the mixer's of sequence i with these values, (T, C). The teacher's output (B, T, C) with its
    bias, training tokens (B, T) as 1.0.
    """
    rows = [i for i in range(len(wanted)) if bool(training[i].any())]
    energy = (wanted.square().sum(dim=2) * training).sum(dim=1).clamp_min(1e-30)
    moved = {name: value.clone() for name, value in moved.items()}

    def gradients(i: int) -> tuple[Tensor, ...]:
        pool.check()
        with torch.enable_grad():
            values = {name: value.requires_grad_() for name, value in ((n, m.detach()) for n, m in moved.items())}
            missed = (output(i, values) - wanted[i]).square().sum(dim=1) @ training[i] / energy[i]
            return torch.autograd.grad(missed, list(values.values()))

    def missed(i: int) -> Tensor:
        return (output(i, moved) - wanted[i]).square().sum(dim=1) @ (1 - training[i])

    validated = [i for i in range(len(wanted)) if not bool(training[i].all())]

    def validation() -> float:
        return float(torch.stack(pool.map(missed, validated)).double().sum())

    best, update = validation(), _Update(moved, head_dim, pool)
    kept: dict[str, Tensor] = {}
    looks = {round(steps * (i + 1) / LOOKS) for i in range(LOOKS)}
    for step in range(steps):
        picked = [rows[(step * BATCH + i) % len(rows)] for i in range(min(BATCH, len(rows)))]
        found = pool.map(gradients, picked)
        sums = (functools.reduce(Tensor.add_, parts) for parts in zip(*found, strict=True))
        mean = {name: total.div_(len(found)) for name, total in zip(moved, sums, strict=True)}
        del found
        update(mean, scheduled(1.0, step, steps))
        if step + 1 in looks and (error := validation()) < best:
            best, kept = error, {name: value.clone() for name, value in moved.items()}
    return kept


class _Update:
    """The optimizers' state; a call moves the values by one step."""

    def __init__(self, moved: dict[str, Tensor], head_dim: int, pool: Pool) -> None:
        self.moved, self.head_dim, self.pool, self.count = moved, head_dim, pool, 0
        self.mean = {name: torch.zeros_like(value) for name, value in moved.items()}
        self.square = {name: torch.zeros_like(value) for name, value in moved.items() if not name.endswith(MATRICES)}
        # A bias or a norm moves by a share of its own size, as a matrix does.
        self.unit = {name: RATES.get(name) or RATE * float(moved[name].square().mean().sqrt()) for name in self.square}

    def __call__(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        self.count += 1

        def move(name: str) -> None:
            value, mean, gradient = self.moved[name], self.mean[name], gradients[name]
            if name in self.square:
                square = self.square[name]
                mean.lerp_(gradient, 1 - ADAM[0])
                square.lerp_(gradient.square(), 1 - ADAM[1])
                size = (square / (1 - ADAM[1] ** self.count)).sqrt() + 1e-12
                value -= mean / (1 - ADAM[0] ** self.count) / size * (rate * self.unit[name])
            else:
                self.moved[name], self.mean[name] = stepped(
                    value, gradient, mean, rate * RATE, self.head_dim, name.partition(".")[0] in OUTPUTS
                )

        # The large ones first, so that no thread waits long.
        self.pool.map(move, sorted(gradients, key=lambda name: -gradients[name].numel()))
