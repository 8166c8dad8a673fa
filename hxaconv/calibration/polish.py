"""Polish: the projections of all mixers trained together on KL(teacher || student), one layer in memory at a time.

A fit of single layers cannot see how their errors add up. A step of the polish takes some sequences through the whole:

    forward     the input of every layer is kept, (T, C) for each sequence
    head        the gradient of KL with respect to the student's logits is softmax(student) - softmax(teacher)
    backward    from the last layer to the first: its forward once more, its gradients, and its update on the spot

so that memory holds one layer, its gradients, and the streams. The weights are read twice for each step.

Projections move by momentum that is made orthogonal head by head (Muon, Jordan et al. 2024): every direction of a
head moves equally far, which takes a fraction of Adam's tokens here. The distance is a share of the matrix's own
size, so that one rate fits models of any width. Held-out sequences choose the best moment; where none is better
than the start, nothing is replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hxaconv.calibration.report import PolishReport
from hxaconv.calibration.store import Store
from hxaconv.errors import HxaconvError
from hxaconv.forward import hxa079
from hxaconv.forward.chunked import chunked
from hxaconv.forward.logits import kl_and_gradient
from hxaconv.forward.pool import ROWS, float32_by_onednn
from hxaconv.forward.state import fingerprint
from hxaconv.forward.walk import Walk
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD, is_attention, is_expert, layer_index
from hxaconv.model.plan import Plan
from hxaconv.progress import Progress, bar
from hxaconv.surgery.arithmetic import tensor, torch_dtype

LENGTH = 512
"""Tokens of a sequence: longer ones cost steps, and the state forgets most of what is farther back."""
BATCH = 2
"""Sequences of a step, one for each worker."""
PASSES = 8
"""Over the sequences: from a good fit, so many small steps come nearer than half of them, larger."""
RATE = 0.015
"""Of a matrix's own size, what a step moves it by at most, in one layer: divided by the root of their number."""
MOMENTUM = 0.8
WARM_UP = 3
LAST_RATE = 0.1
"""Of the rate, where the cosine schedule ends."""
HELD_OUT = 16
"""One sequence of so many is held out, at least one."""
LOOKS = 4
"""How often the held-out sequences are looked at on the way."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
TRAINED = ("receptance", "key", "value", "output", "q_proj", "k_proj", "v_proj", "o_proj")
WEIGHTS = tuple(f".{part}.weight" for part in TRAINED)
OUTPUTS = ("output", "o_proj")
STUDENT, TEACHER = "student", "teacher"
BEST = "polish-best"
HEADS = 8
"""Whose directions are made at once."""
OPERATIONS_PER_CPU_SECOND = 1.2e11
"""1.0e11 at SmolLM2's shape, 1.4e11 at Reka's, on one core of a virtual machine with AVX-512."""
M_MMAP_THRESHOLD = -3
"""Of malloc.h."""
RECIPE = {"format": 3, "batch": BATCH, "passes": PASSES, "rate": RATE, "momentum": MOMENTUM, "looks": LOOKS}

First = tuple[Tensor | None, Tensor | None]
"""v_first and k_first, or gradients of theirs; None before the first RWKV layer, and where a variant has none."""


def sequences(ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Of token ids (B, T), the first so many as sequences of LENGTH: (those to train on, those held out), (.., LENGTH).

    Raises:
        HxaconvError: when there are fewer than two.
    """
    flat = ids.flatten()[:tokens]
    length = min(LENGTH, ids.shape[1])
    rows = flat[: len(flat) // length * length].view(-1, length)
    if len(rows) < 2:
        raise HxaconvError(
            f"{len(flat)} tokens are too few to polish on: two sequences of {length} are the least",
            hint="Give more text, or a larger --polish-tokens.",
        )
    kept = max(1, len(rows) // HELD_OUT)
    return rows[:-kept], rows[-kept:]


def steps_of(trained: int) -> int:
    """How many steps so many sequences make."""
    return -(-trained // BATCH) * PASSES


def polish(
    teacher: Model,
    student: Model,
    ids: Tensor,
    tokens: int,
    *,
    folder: Path | None = None,
    key: str | None = None,
    device: str = "cpu",
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, PolishReport]:
    """Train the mixers' projections of a complete student on the first `tokens` of token ids (B, T).

    Returns the recipes that replace the student's, and the figures. With a `folder` the weights are kept there after
    every step, an interrupted run goes on after it, and the replaced tensors are read from there when they are
    written. `key` identifies their origin, where the student is the
    result of a computation, which its files do not identify. The result does not depend on the workers.

    Raises:
        HxaconvError: for too few tokens, and when the folder cannot be written.
    """
    return_large_blocks()
    trained, held_out = sequences(ids, tokens)
    models = {TEACHER: teacher, STUDENT: student}
    store = Store(folder, fingerprint(models, ids.flatten()[:tokens].cpu().numpy(), {**RECIPE, "key": key}))
    with float32_by_onednn(), Walk(models, device=device, workers=workers) as walk:
        work = _Polish(walk, student, store, trained, held_out)
        work.run(progress)
    report = PolishReport(
        tokens=(len(trained) + len(held_out)) * trained.shape[1],
        trained_sequences=len(trained),
        held_out_sequences=len(held_out),
        length=trained.shape[1],
        curve=tuple(work.curve),
        best_step=work.best,
    )
    names = [name for mine in work.trained.values() for name in mine] if work.best else []
    return {name: store.recipe(f"{BEST}-{name}", "weight", student.plan[name], "polished") for name in names}, report


@dataclass(frozen=True, slots=True)
class Cost:
    """What a polish takes, before anything is computed."""

    steps: int
    read: int
    """Bytes that a step reads."""
    written: int
    """Bytes that a step writes; twice as many stand beside the output."""
    operations: float
    """Of a step."""

    @property
    def cpu_seconds(self) -> float:
        """Of a step."""
        return self.operations / OPERATIONS_PER_CPU_SECOND

    @property
    def sentence(self) -> str:
        """For the terminal."""
        return (
            f"{self.steps} steps, each of which reads {self.read / 1e9:.3g} GB, writes {self.written / 1e9:.3g} GB and"
            f" takes some {self.cpu_seconds:.0f} CPU seconds: {max(1.0, self.steps * self.cpu_seconds / 60):.0f} CPU"
            f" minutes in all; {2 * self.written / 1e9:.3g} GB of disk until it is done"
        )


def cost(student: Model, trained: Tensor) -> Cost:
    """Of a polish on these sequences (count, T)."""
    rows, steps = min(BATCH, len(trained)), steps_of(len(trained))
    layers = {name: recipe for name, recipe in student.plan.items() if layer_index(name) is not None}
    mine = {name: recipe for name, recipe in layers.items() if is_attention(name) and name.endswith(WEIGHTS)}
    experts = student.config.experts
    share = experts.num_experts_per_tok / experts.num_experts if experts else 1.0
    numel = sum(recipe.numel * (share if is_expert(name) else 1.0) for name, recipe in layers.items())
    mixers = sum(recipe.numel for recipe in mine.values())
    frozen = sum(recipe.nbytes for name, recipe in layers.items() if name not in mine)
    head = student.plan[EMBEDDING if student.config.tie_word_embeddings else HEAD]
    # Forward, forward again and the gradient of the input; for projections that of the weights, and their directions.
    operations = rows * trained.shape[1] * (6.0 * numel + 2.0 * mixers + 6.0 * head.numel)
    operations += 20.0 * student.config.head_dim * mixers
    # Weights of two passes, the head of both models and once more; weights and momenta are float32.
    return Cost(steps, 2 * frozen + 12 * mixers + 3 * rows * head.nbytes, 8 * mixers, operations)


@dataclass
class _Sequence:
    """One sequence in a step."""

    number: int
    """Among all, those held out last."""
    ids: Tensor
    """(1, T)."""
    inputs: list[Tensor] = field(default_factory=list)
    """The residual stream before each layer, and after the last."""
    first: First = (None, None)
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    """Of the loss with respect to the stream where the backward pass stands."""
    first_gradient: First = (None, None)


@dataclass(frozen=True, slots=True)
class _Graph:
    """A mixer's forward with what its gradient is taken of."""

    sequence: _Sequence
    x: Tensor
    first: list[Tensor | None]
    """v_first and k_first as they came in; None in the layer that makes them."""
    mixed: Tensor
    """The stream after it."""
    firsts: First


class _Polish:
    """The loop over the steps.

    Files: `polish-0-NAME` and `polish-1-NAME` hold a weight and its momentum after the last two steps, so that one that
    is cut short leaves the other; `polish-best-NAME` the weight of the best step; `polish-teacher-I` what the teacher's
    head sees of a sequence, (T, C); `polish-state` where the loop stands.
    """

    def __init__(self, walk: Walk, student: Model, store: Store, trained: Tensor, held_out: Tensor) -> None:
        self.walk, self.store, self.student, self.config = walk, store, student, student.student
        self.rows, self.count = torch.cat([trained, held_out]), len(trained)
        self.steps = steps_of(self.count)
        self.looks = {round(self.steps * (i + 1) / LOOKS) for i in range(LOOKS)}
        self.trained: dict[int, list[str]] = {i: [] for i in range(self.config.num_hidden_layers)}
        self.frozen: dict[int, Plan] = {i: {} for i in self.trained}
        for name, recipe in student.plan.items():
            layer = layer_index(name)
            if layer is not None and is_attention(name) and name.endswith(WEIGHTS):
                self.trained[layer].append(name)
            elif layer is not None:
                self.frozen[layer][name] = recipe
        kept = store.facts("polish-state") or {"step": 0, "best": 0, "curve": []}
        self.step: int = kept["step"]
        self.best: int = kept["best"]
        self.curve: list[tuple[int, float]] = [(int(step), kl) for step, kl in kept["curve"]]

    def run(self, progress: Progress | None) -> None:
        """Train until the schedule ends."""
        with bar(progress, "polishing", self.steps) as advance:
            if self.store.facts(f"polish-teacher-{len(self.rows) - 1}") is None:
                for i, hidden in enumerate(self.walk.hidden(TEACHER, self.rows)):
                    self.store.save(f"polish-teacher-{i}", {"hidden": hidden})
            if not self.curve:
                for name in (name for names in self.trained.values() for name in names):
                    weight = tensor(self.student.plan[name], dtype=torch.float32)
                    self._keep(name, weight, torch.zeros_like(weight))
                self._look()
                self._commit()
            advance(self.step, "")
            while self.step < self.steps:
                kl = self._step()
                self.step += 1
                if self.step in self.looks:
                    self._look()
                self._commit()
                advance(1, f"KL {kl:.3g}, held out {self.curve[-1][1]:.3g}")

    def _commit(self) -> None:
        self.store.save("polish-state", {}, {"step": self.step, "best": self.best, "curve": self.curve})

    def _kept(self, name: str, key: str = "weight") -> Tensor:
        """A trained weight, or its momentum, before this step."""
        return self.store.tensor(f"polish-{self.step % 2}-{name}", key).to(self.walk.device)

    def _keep(self, name: str, weight: Tensor, momentum: Tensor, later: int = 0) -> None:
        self.store.save(f"polish-{(self.step + later) % 2}-{name}", {"weight": weight, "momentum": momentum})

    def _step(self) -> float:
        """One step; its KL, before it."""
        picked = [(self.step * BATCH + i) % self.count for i in range(min(BATCH, self.count))]
        some = [_Sequence(i, self.rows[i : i + 1]) for i in picked]
        self._forward(some, keep=True)
        kl = sum(self._head(one) for one in some) / len(some)
        rate = scheduled(RATE * self.config.num_hidden_layers**-0.5, self.step, self.steps)
        for layer in reversed(range(self.config.num_hidden_layers)):
            self._backward(layer, some, rate)
        return kl

    def _look(self) -> None:
        """Validate the weights, as they would be written, on the held-out sequences; keep the best."""
        some = [_Sequence(i, self.rows[i : i + 1]) for i in range(self.count, len(self.rows))]
        self._forward(some, keep=False)
        kl = sum(self._head(one) for one in some) / len(some)
        before = min((found for _, found in self.curve if found == found), default=math.inf)
        self.curve.append((self.step, kl))
        if self.step and kl < before:
            self.best = self.step
            for name in (name for names in self.trained.values() for name in names):
                self.store.save(f"{BEST}-{name}", {"weight": self._kept(name).to(self._dtype(name))})

    def _dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self.student.plan[name].dtype)

    def _forward(self, some: list[_Sequence], *, keep: bool) -> None:
        """Take sequences through all layers, keeping the inputs of each; or else with the weights as they would be
        written."""
        track = self.walk[STUDENT]
        for one in some:
            one.inputs = [track.start(one.ids.to(self.walk.device)).x]
        for layer in range(self.config.num_hidden_layers):
            self.walk.hold({STUDENT: self.frozen[layer]})
            weights = {name: self._kept(name) for name in self.trained[layer]}
            if not keep:
                weights = {name: weight.to(self._dtype(name)).float() for name, weight in weights.items()}

            def move(one: _Sequence, weights: dict[str, Tensor] = weights, layer: int = layer) -> None:
                carry = hxa079.Carry(*one.first)
                x = self._feed_forward(self._mix(one.inputs[-1], weights, layer, carry), layer)
                one.first = carry.v_first, carry.k_first
                one.inputs = [*one.inputs, x] if keep else [x]

            self.walk.pool.map(move, some)

    def _mix(self, x: Tensor, weights: dict[str, Tensor], layer: int, carry: hxa079.Carry) -> Tensor:
        """The stream after a layer's mixer; `weights` are those that are trained."""
        track = self.walk[STUDENT]

        def get(name: str) -> Tensor:
            return weights[name] if name in weights else track.weight(name)

        x = x + hxa079.mixer(track.normed(x, layer), get, self.config, layer, carry, chunked)
        carry.states.clear()
        carry.caches.clear()
        return x

    def _feed_forward(self, x: Tensor, layer: int) -> Tensor:
        return hxa079.feed_forward(x, self.walk[STUDENT].weight, self.config, layer)

    def _head(self, one: _Sequence) -> float:
        """KL of a sequence in nats per token; its gradient with respect to the last stream is left in `gradient`."""
        walk, track, x = self.walk, self.walk[STUDENT], one.inputs[-1].detach()
        wanted = self.store.tensor(f"polish-teacher-{one.number}", "hidden").to(walk.device)
        with torch.enable_grad():
            normed = track.final_norm(x.requires_grad_())
        kl, gradient = kl_and_gradient(walk, STUDENT, normed.detach(), TEACHER, wanted)
        (one.gradient,) = torch.autograd.grad(normed, x, gradient)
        return kl

    def _backward(self, layer: int, some: list[_Sequence], rate: float) -> None:
        """Gradients of one layer, from the sequences' gradients after it to those before it, and its update."""
        self.walk.hold({STUDENT: self.frozen[layer]})
        weights = {name: self._kept(name).detach().requires_grad_() for name in self.trained[layer]}
        beginning = self.config.rwkv_layers[:1] == (layer,)

        def through_feed_forward(one: _Sequence) -> _Graph:
            """The mixer's graph; the sequence's gradient is taken back to where it ends."""
            del one.inputs[layer + 1]
            with torch.enable_grad():
                x = one.inputs[layer].detach().requires_grad_()
                first = [None if beginning or part is None else part.detach().requires_grad_() for part in one.first]
                carry = hxa079.Carry(first[0], first[1])
                mixed = self._mix(x, weights, layer, carry)
                parts = zip(
                    torch.split(mixed.detach(), ROWS, dim=1), torch.split(one.gradient, ROWS, dim=1), strict=True
                )
                gradients = [self._feed_forward_gradient(*part, layer) for part in parts]
            one.gradient = torch.cat(gradients, dim=1)
            return _Graph(one, x, first, mixed, (carry.v_first, carry.k_first))

        def through_mixer(graph: _Graph) -> dict[str, Tensor]:
            """Gradients of the weights by name."""
            one, outputs, gradients = graph.sequence, [graph.mixed], [graph.sequence.gradient]
            if beginning:
                for part, gradient in zip(graph.firsts, one.first_gradient, strict=True):
                    if part is not None and gradient is not None:
                        outputs.append(part)
                        gradients.append(gradient)
            inputs = [*weights.values(), graph.x, *(part for part in graph.first if part is not None)]
            found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
            mine = iter([torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)])
            grown = {name: next(mine) for name in weights}
            one.gradient = next(mine)
            first = [None if part is None else next(mine) for part in graph.first]
            if not beginning:
                one.first_gradient = _sum(one.first_gradient[0], first[0]), _sum(one.first_gradient[1], first[1])
            return grown

        graphs = self.walk.pool.map(through_feed_forward, some)
        self.walk.release()  # graphs hold what they need
        grown = self.walk.pool.map(through_mixer, graphs)
        del graphs
        for name in self.trained[layer]:
            gradient = functools.reduce(Tensor.add_, [one.pop(name) for one in grown]).div_(len(grown))
            weight, momentum = weights.pop(name).detach(), self._kept(name, "momentum")
            after = stepped(weight, gradient, momentum, rate, self.config.head_dim, name.split(".")[-2] in OUTPUTS)
            self._keep(name, *after, later=1)

    def _feed_forward_gradient(self, x: Tensor, gradient: Tensor, layer: int) -> Tensor:
        """Of some tokens of a stream: its gradient before the second half of a layer, from that after it."""
        x.requires_grad_()
        return torch.autograd.grad(self._feed_forward(x, layer), x, gradient)[0]


def scheduled(rate: float, step: int, steps: int) -> float:
    """The rate of a step: after a warm-up, a cosine from it down to LAST_RATE of it."""
    rate *= min(1.0, (step + 1) / WARM_UP)
    return rate * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2)


def stepped(
    weight: Tensor, gradient: Tensor, momentum: Tensor, rate: float, head_dim: int, output: bool
) -> tuple[Tensor, Tensor]:
    """A matrix and its momentum after a step by a share of the matrix's own size; the gradient is used up.

    `output`: heads lie along the columns.
    """
    momentum = momentum.lerp(gradient, 1 - MOMENTUM)
    change = orthogonal(gradient.lerp_(momentum, MOMENTUM), head_dim, output)
    change *= rate * float(weight.square().mean().sqrt())
    return weight - change, momentum


def orthogonal(gradient: Tensor, size: int, output: bool, steps: int = 5) -> Tensor:
    """A step's direction: every head's part (N, C) with all singular values near 1, and elements of mean square 1.

    `output`: heads lie along the columns. By the quintic Newton-Schulz iteration, singular values end in 0.7..1.2.
    """
    rows = gradient.T if output else gradient
    found, (a, b, c) = torch.empty_like(rows), NEWTON_SCHULZ
    for start in range(0, len(rows), HEADS * size):
        x = rows[start : start + HEADS * size].reshape(-1, size, rows.shape[1])
        x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-12)
        # Every iteration multiplies x by a polynomial of x x': all of them are done on (N, N), and x moves once.
        gram = x @ x.mT
        whole = unit = torch.eye(gram.shape[1], dtype=x.dtype, device=x.device)
        for _ in range(steps):
            factor = a * unit + b * gram + c * gram @ gram
            whole, gram = factor @ whole, factor @ gram @ factor
        found[start : start + HEADS * size] = (whole @ x).flatten(0, 1) * rows.shape[1] ** 0.5
    return found.T if output else found


def return_large_blocks() -> None:
    """Have glibc give freed blocks of 4 MiB and more back to the system: by default each thread keeps those of up to
    32 MiB for later, which at Reka Flash 3's shape is a third of the peak."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 4 * 2**20)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other
