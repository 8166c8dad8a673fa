"""Gates of a model in which every layer mixes attention and RWKV, trained together under a budget: `gates`.

    x = x + (1 - gate) rwkv(norm x) + gate attention(norm x)          0 <= gate <= 1, the sum of all gates is K

After FlashMorph (arXiv 2606.30562): all weights are frozen, one gate per layer is trained, all of them together, so
that a gate counts what the others do already, on synthetic retrieval data; layers with the largest gates are kept.
Where this differs: the budget is kept at every step, where there a penalty pulls gates to linear attention; the loss
is the KL from the teacher, half of it on text and half on random tokens that are said a second time; attention is the
teacher's without RoPE, as it will be kept; and a dozen steps on a few sequences have to do.

Every step reads the weights twice, forward and backward. Streams before every layer are kept, (L + 1) * tokens * C * 4
bytes, and one layer's weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hxaconv.forward import hxa079
from hxaconv.forward.chunked import chunked
from hxaconv.forward.hxa079 import Carry
from hxaconv.forward.logits import kl_and_gradient
from hxaconv.forward.state import State
from hxaconv.forward.tokens import first_counted
from hxaconv.forward.walk import Walk
from hxaconv.model.model import Model
from hxaconv.model.plan import layer_bytes
from hxaconv.progress import bar
from hxaconv.selection.strategies import Given
from hxaconv.selection.sweep import needles

STEPS, RATE = 12, 0.3
"""The gate whose gradient is the largest moves by RATE in the first step, and by less and less in later ones."""
MOMENTUM = 0.5
NEEDLES = 4
LENGTH = 256
"""Tokens of a sequence: two matrices of logits are held for one at a time."""
RECIPE = {"steps": STEPS, "rate": RATE, "momentum": MOMENTUM, "length": LENGTH, "needles": NEEDLES}
TEACHER, STUDENT = "teacher", "student"


@dataclass
class Sequence:
    """One sequence in a step."""

    ids: Tensor
    """(1, T)."""
    counted: slice
    """Where its KL is taken."""
    share: float
    """Of its KL in the loss."""
    again: bool = False
    """Whether it is said twice."""
    wanted: Tensor = field(default_factory=lambda: torch.empty(0))
    """What the teacher's head sees there."""
    inputs: list[Tensor] = field(default_factory=list)
    """The stream before each layer, and after the last."""
    carry: Carry = field(default_factory=Carry)
    """v and k of layer 0, which no gate changes."""
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    """Of the KL, with respect to the stream where the backward pass stands."""


def sequences(ids: Tensor) -> list[Sequence]:
    """The text (B, T) in parts, and random tokens of it said twice."""
    length = min(LENGTH, ids.shape[1])
    text = ids[:, : ids.shape[1] // length * length].reshape(-1, length)
    again = needles(ids, NEEDLES)
    first = first_counted(again)
    return [
        *(Sequence(row[None], slice(None), 0.5 / len(text)) for row in text),
        *(Sequence(row[None], slice(first - 1, -1), 0.5 / len(again), again=True) for row in again),
    ]


def train(given: Given, ids: Tensor) -> tuple[list[float], list[tuple[float, float]]]:
    """(the gate of every layer; KL on text and on tokens said again, before every step) on token ids (B, T)."""
    teacher, student, num_layers, device = given.teacher, given.student, given.num_layers, given.device
    assert teacher is not None and student is not None
    kept = given.kept(
        ids.numpy(), {"strategy": "gates", "count": given.count, "barred": sorted(given.barred), **RECIPE}
    )
    some = sequences(ids)
    size = sum(layer_bytes(student.plan, i) for i in range(num_layers))
    free = torch.tensor([float(layer not in given.barred) for layer in range(num_layers)], dtype=torch.float64)
    gates, momentum, losses = (
        within_budget(free, free, given.count),
        torch.zeros_like(free),
        list[tuple[float, float]](),
    )
    saved = kept.load(device)
    if saved:
        (gates, momentum), losses = saved[0]["gates"].cpu(), [(text, again) for text, again in saved[1]["losses"]]

    def state() -> State:
        return {"gates": torch.stack([gates, momentum])}, {"losses": losses}

    with bar(given.progress, "training gates", size * (1 + 2 * STEPS)) as advance:
        if len(losses) < STEPS:
            _teach(teacher, some, device)
        advance(size * (1 + 2 * len(losses)), "resumed" if saved else "")
        with Walk({TEACHER: teacher, STUDENT: student}, device=device) as walk:
            while len(losses) < STEPS:
                loss, gradient = _step(walk, some, gates)
                gradient = (gradient - (gradient * free).sum() / free.sum()) * free  # all alike moves nothing
                momentum = MOMENTUM * momentum + gradient / gradient.abs().max().clamp_min(1e-30)
                rate = RATE * (1 - len(losses) / STEPS)
                gates = within_budget(
                    gates - rate * momentum / momentum.abs().max().clamp_min(1e-30), free, given.count
                )
                losses.append(loss)
                advance(2 * size, f"step {len(losses)} of {STEPS}, KL {sum(loss) / 2:.3g}")
                kept.pause(state)
    kept.save(*state())
    return gates.tolist(), losses


def within_budget(wanted: Tensor, free: Tensor, count: int) -> Tensor:
    """The nearest gates in 0..1 whose sum is `count`, those that are not free 0: all are shifted alike, and cut off."""
    low, high = float(wanted.min()) - 1, float(wanted.max()) + 1
    for _ in range(60):
        shift = (low + high) / 2
        over = float(((wanted - shift).clamp(0, 1) * free).sum()) > count
        low, high = (shift, high) if over else (low, shift)
    return (wanted - high).clamp(0, 1) * free


def _teach(teacher: Model, some: list[Sequence], device: str) -> None:
    """What the teacher's head sees of every sequence."""
    with torch.no_grad(), Walk({TEACHER: teacher}, device=device) as walk:
        streams = [walk[TEACHER].start(one.ids) for one in some]
        for layer in walk.layers():
            for stream in streams:
                walk[TEACHER].layer(stream, layer)
        for one, stream in zip(some, streams, strict=True):
            one.wanted = walk[TEACHER].final_norm(stream.x[:, one.counted])


def _step(walk: Walk, some: list[Sequence], gates: Tensor) -> tuple[tuple[float, float], Tensor]:
    """(KL from the teacher on text and on tokens said again, the gradient of their mean with respect to the gates)."""
    student, opened = walk[STUDENT], gates.float().to(walk.device)

    def block(x: Tensor, layer: int, gate: Tensor, carry: Carry) -> Tensor:
        normed = student.normed(x, layer)
        mixed = hxa079.time_mix(normed, student.weight, student.model.student, layer, carry, chunked)
        carry.states.clear()
        attended = hxa079.attention(normed, walk[TEACHER].weight, student.model.student, layer, Carry())
        return hxa079.feed_forward(x + mixed + gate * (attended - mixed), student.weight, student.model.student, layer)

    for one in some:
        one.inputs, one.carry = [student.start(one.ids).x], Carry()
    for layer in walk.layers():

        def forward(one: Sequence, layer: int = layer) -> None:
            one.inputs.append(block(one.inputs[-1], layer, opened[layer], one.carry))

        walk.pool.map(forward, some)
    loss = [0.0, 0.0]
    for one in some:
        x = one.inputs.pop().requires_grad_()
        with torch.enable_grad():
            normed = student.final_norm(x[:, one.counted])
        kl, gradient = kl_and_gradient(walk, STUDENT, normed.detach(), TEACHER, one.wanted)
        (one.gradient,) = torch.autograd.grad(normed, x, gradient)
        loss[one.again] += 2 * one.share * kl
    found = torch.zeros_like(gates)
    for layer in walk.layers(reversed(range(len(gates)))):

        def backward(one: Sequence, layer: int = layer) -> float:
            with torch.enable_grad():
                x, gate = one.inputs.pop().requires_grad_(), opened[layer].clone().requires_grad_()
                after = block(x, layer, gate, one.carry if layer else Carry())
            one.gradient, grown = torch.autograd.grad(after, (x, gate), one.gradient)
            return one.share * float(grown)

        found[layer] = sum(walk.pool.map(backward, some))
    return (loss[0], loss[1]), found
