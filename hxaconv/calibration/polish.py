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

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hxaconv.errors import HxaconvError
from hxaconv.forward import hxa079
from hxaconv.forward.chunked import chunked
from hxaconv.forward.state import StateFile, fingerprint
from hxaconv.forward.walk import Stream, Walk
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention, layer_index
from hxaconv.model.plan import Plan, Recipe
from hxaconv.progress import Progress, bar
from hxaconv.surgery.arithmetic import Computed, tensor, torch_dtype

LENGTH = 512
"""Tokens of a sequence: longer ones cost steps, and the state forgets most of what is farther back."""
BATCH = 2
"""Sequences of a step, one for each worker."""
PASSES = 2
"""Over the sequences: a second one gives as much as twice the tokens would."""
RATE = 0.025
"""Of a matrix's own size, what a step moves it by at most, in one layer: divided by the root of their number."""
MOMENTUM = 0.8
WARM_UP = 3
LAST_RATE = 0.1
"""Of RATE, where the cosine schedule ends."""
HELD_OUT = 16
"""One sequence of so many is held out, at least one."""
LOOKS = 4
"""How often the held-out sequences are looked at on the way."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
TRAINED = ("receptance", "key", "value", "output", "q_proj", "k_proj", "v_proj", "o_proj")
OUTPUTS = ("output", "o_proj")
STUDENT, TEACHER = "student", "teacher"
OPERATIONS_PER_SECOND = 6e10
"""Of two cores, at SmolLM2's shape."""
FORMAT = 1


First = tuple[Tensor | None, Tensor | None]
"""v_first and k_first, or gradients of theirs; None before the first RWKV layer, and where a variant has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolishReport:
    """How a polish went. KL in nats per token on sequences that nothing was fitted to."""

    tokens: int
    """All of them, with those held out."""
    trained_sequences: int
    held_out_sequences: int
    length: int
    curve: tuple[tuple[int, float], ...]
    """(steps, KL on held-out sequences), beginning with 0 steps."""
    best_step: int
    """The weights of this step are taken; 0 where none was better than the start."""

    @property
    def sentence(self) -> str:
        """For people."""
        kl = dict(self.curve)
        steps = ", ".join(f"{value:.3g} after {step}" for step, value in self.curve if step)
        taken = (
            f"those of step {self.best_step} are taken" if self.best_step else "nothing is taken: no step was better"
        )
        return f"Polish: KL on the held-out sequences {kl[0]:.3g} before, {steps} steps; {taken}"


@dataclass(frozen=True, slots=True)
class Polish:
    """The tensors that replace those of the student, and how that went."""

    replaced: Plan
    report: PolishReport


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
) -> Polish:
    """Train the mixers' projections of a complete student on the first `tokens` of token ids (B, T).

    With a `folder` the weights are kept there after every step, an interrupted run goes on after it, and the
    replaced tensors are read from there when they are written. `key` says what they are of, where the student is the
    result of a computation that its files do not tell. The result does not depend on the workers.

    Raises:
        HxaconvError: for too few tokens, and when the folder cannot be written.
    """
    trained, held_out = sequences(ids, tokens)
    settings = {**RECIPE, "key": key}
    key = fingerprint({TEACHER: teacher, STUDENT: student}, ids.flatten()[:tokens].cpu().numpy(), settings)
    store = _Store(folder, key)
    with Walk({TEACHER: teacher, STUDENT: student}, device=device, workers=workers) as walk:
        work = _Work(walk, student, store, trained, held_out)
        work.run(progress)
        state = work.state
    report = PolishReport(
        tokens=(len(trained) + len(held_out)) * trained.shape[1],
        trained_sequences=len(trained),
        held_out_sequences=len(held_out),
        length=trained.shape[1],
        curve=tuple(state.curve),
        best_step=state.best,
    )
    return Polish(store.plan(student, work.trained) if state.best else {}, report)


RECIPE = {"format": FORMAT, "batch": BATCH, "passes": PASSES, "rate": RATE, "momentum": MOMENTUM, "looks": LOOKS}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a polish takes, before anything is computed."""

    steps: int
    nbytes: int
    """Of weights that are read."""
    operations: float

    @property
    def sentence(self) -> str:
        """For people."""
        minutes = self.operations / OPERATIONS_PER_SECOND / 60
        return (
            f"{self.steps} steps, each of which reads the student's weights twice ({self.nbytes / 1e9:.3g} GB in all),"
            f" {self.operations:.2g} operations: some {max(1.0, minutes):.0f} minutes on two cores like those it was"
            " measured on"
        )


def cost(student: Model, trained: Tensor) -> Cost:
    """Of a polish on these sequences (count, T)."""
    tokens, steps = trained.numel() * PASSES, steps_of(len(trained))
    layers = [recipe for name, recipe in student.plan.items() if layer_index(name) is not None]
    mixers = sum(recipe.numel for name, recipe in student.plan.items() if is_attention(name))
    head = student.config.vocab_size * student.config.hidden_size
    # Forward, forward again and the gradient of the input; for projections that of the weights too.
    operations = tokens * (6.0 * sum(recipe.numel for recipe in layers) + 2.0 * mixers + 6.0 * head)
    return Cost(steps, 2 * steps * sum(recipe.nbytes for recipe in layers), operations)


@dataclass(slots=True)
class _State:
    """Between two steps."""

    step: int = 0
    best: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)


class _Store:
    """Weights and momenta of every layer, in files of two generations: a step that is cut short leaves the last one."""

    def __init__(self, folder: Path | None, key: str) -> None:
        self.folder, self.key = folder, key
        self._memory: dict[str, Mapping[str, Tensor]] = {}

    def _file(self, name: str) -> StateFile:
        return StateFile(None if self.folder is None else self.folder / f"polish-{name}.safetensors", self.key)

    def load(self, name: str, device: str = "cpu") -> dict[str, Tensor] | None:
        """Tensors kept under this name, or None."""
        if self.folder is None:
            found = self._memory.get(name)
            return None if found is None else dict(found)
        kept = self._file(name).load(device)
        return None if kept is None else kept[0]

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name."""
        if self.folder is None:
            self._memory[name] = tensors
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file(name).save(tensors, {})

    def state(self) -> _State:
        """Where an interrupted run stopped, or the beginning."""
        kept = self._file("state").load()
        if kept is None:
            return _State()
        facts = kept[1]
        return _State(facts["step"], facts["best"], [(int(step), kl) for step, kl in facts["curve"]])

    def commit(self, state: _State) -> None:
        """The step's weights are complete."""
        if self.folder is not None:
            self._file("state").save({}, asdict(state))

    def plan(self, student: Model, names: Mapping[int, Sequence[str]]) -> Plan:
        """The best weights as recipes."""
        found: Plan = {}
        for layer, mine in names.items():
            for name in mine:
                recipe = student.plan[name]
                make = Computed(functools.partial(self.best, layer, name), recipe.dtype, "polished")
                found[name] = Recipe(recipe.dtype, recipe.shape, make, f"polished from {recipe.origin}")
        return found

    def best(self, layer: int, name: str) -> Tensor:
        """A tensor of the best step."""
        kept = self.load(f"best-{layer:03d}")
        if kept is None:
            raise HxaconvError(
                f"the polished weights of layer {layer} are gone from {self.folder}",
                hint="Run the command again, without another one that writes to the same target.",
            )
        return kept[name]


@dataclass
class _Sequence:
    """One sequence in a step."""

    ids: Tensor
    """(1, T)."""
    wanted: Tensor
    """What the teacher's head sees, (T, C)."""
    inputs: list[Tensor] = field(default_factory=list)
    """The residual stream before each layer, and after the last."""
    first: First = (None, None)
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    """Of the loss with respect to the stream where the backward pass stands."""
    first_gradient: First = (None, None)


class _Work:
    """The loop over the steps."""

    def __init__(self, walk: Walk, student: Model, store: _Store, trained: Tensor, held_out: Tensor) -> None:
        self.walk, self.store, self.student = walk, store, student
        config = student.config
        assert isinstance(config, StudentConfig)
        self.config, self.rows, self.judged = config, trained, held_out
        self.steps = steps_of(len(trained))
        self.looks = {round(self.steps * (i + 1) / LOOKS) for i in range(LOOKS)}
        self.trained = {i: _trained_names(student, i) for i in range(config.num_hidden_layers)}
        mine = {name for names in self.trained.values() for name in names}
        self.frozen: dict[int, Plan] = {i: {} for i in self.trained}
        for name, recipe in student.plan.items():
            layer = layer_index(name)
            if layer is not None and name not in mine:
                self.frozen[layer][name] = recipe
        self.state = store.state()

    def run(self, progress: Progress | None) -> None:
        """Train until the schedule ends."""
        total, config = self.steps, self.config
        with bar(progress, "polishing", total) as advance:
            hidden = self._teacher_hidden()
            if not self.state.curve:
                for layer in range(config.num_hidden_layers):
                    self.store.save(self._name(layer), self._begin(layer))
                self._look(hidden)
                self.store.commit(self.state)
            advance(self.state.step, "")
            while self.state.step < total:
                kl = self._step(hidden)
                self.state.step += 1
                if self.state.step in self.looks:
                    self._look(hidden)
                self.store.commit(self.state)
                advance(1, f"KL {kl:.3g}, held out {self.state.curve[-1][1]:.3g}")

    def _name(self, layer: int, later: int = 0) -> str:
        return f"{layer:03d}-{(self.state.step + later) % 2}"

    def _begin(self, layer: int) -> dict[str, Tensor]:
        weights = {name: tensor(self.student.plan[name], dtype=torch.float32) for name in self.trained[layer]}
        return weights | {f"momentum {name}": torch.zeros_like(values) for name, values in weights.items()}

    def _teacher_hidden(self) -> list[Tensor]:
        """What the teacher's head sees of every sequence, those held out last, (T, C) each."""
        kept, rows = self.store.load("teacher"), torch.cat([self.rows, self.judged])
        if kept is None:
            track, ids = self.walk[TEACHER], rows.to(self.walk.device)
            streams = [track.start(ids[i : i + 1]) for i in range(len(rows))]
            for layer in range(self.config.num_hidden_layers):
                plan = track.model.plan
                self.walk.hold({TEACHER: {name: plan[name] for name in plan if layer_index(name) == layer}})

                def move(stream: Stream, layer: int = layer) -> None:
                    track.layer(stream, layer)

                self.walk.pool.map(move, streams)
            kept = {"hidden": torch.stack([track.final_norm(stream.x) for stream in streams])}
            self.store.save("teacher", kept)
        return list(kept["hidden"])

    def _step(self, hidden: list[Tensor]) -> float:
        """One step; its KL, before it."""
        size, count = BATCH, len(self.rows)
        picked = [(self.state.step * size + i) % count for i in range(min(size, count))]
        some = [_Sequence(self.rows[i : i + 1], hidden[i]) for i in picked]
        self._forward(some, keep=True)
        kl = sum(self._head(one) for one in some) / len(some)
        progress = self.state.step / self.steps
        rate = RATE * self.config.num_hidden_layers**-0.5 * min(1.0, (self.state.step + 1) / WARM_UP)
        rate *= LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2
        for layer in reversed(range(self.config.num_hidden_layers)):
            self._backward(layer, some, rate)
        return kl

    def _weights(self, layer: int) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
        """What is kept of a layer, and all its weights by name."""
        self.walk.hold({STUDENT: self.frozen[layer]})
        held = self.store.load(self._name(layer), self.walk.device)
        if held is None:
            raise HxaconvError(f"the state of the polish is gone from {self.store.folder}", hint="Start it anew.")
        track = self.walk[STUDENT]
        return held, lambda name: held[name] if name in held else track.weight(name)

    def _forward(self, some: list[_Sequence], *, keep: bool, stored: bool = False) -> None:
        """Take sequences through all layers; `stored`: with the weights as they would be written."""
        track = self.walk[STUDENT]
        for one in some:
            one.inputs = [track.start(one.ids.to(self.walk.device)).x]
        for layer in range(self.config.num_hidden_layers):
            held, get = self._weights(layer)
            if stored:
                for name in self.trained[layer]:
                    held[name] = held[name].to(torch_dtype(self.student.plan[name].dtype)).float()

            def move(one: _Sequence, get: Callable[[str], Tensor] = get, layer: int = layer) -> None:
                carry = hxa079.Carry(*one.first)
                x = self._layer(one.inputs[-1], get, layer, carry)
                one.first = carry.v_first, carry.k_first
                one.inputs = [*one.inputs, x] if keep else [x]

            self.walk.pool.map(move, some)

    def _layer(self, x: Tensor, get: Callable[[str], Tensor], layer: int, carry: hxa079.Carry) -> Tensor:
        normed = hxa079.input_norm(x, get, self.config, layer)
        x = x + hxa079.mixer(normed, get, self.config, layer, carry, chunked)
        carry.states.clear()
        carry.caches.clear()
        return hxa079.feed_forward(x, get, self.config, layer)

    def _head(self, one: _Sequence) -> float:
        """KL of a sequence in nats per token; its gradient with respect to the last stream is left in `gradient`."""
        track, x = self.walk[STUDENT], one.inputs[-1].detach()
        with torch.enable_grad():
            normed = track.final_norm(x.requires_grad_())
        asked, wanted = self._logits(normed.detach(), one.wanted.to(self.walk.device))
        q, p = asked.log_softmax(dim=-1), wanted.log_softmax(dim=-1)
        del asked, wanted
        kl = float((p.exp() * (p - q)).sum(dim=-1).double().mean())
        difference = q.exp_().sub_(p.exp_()).div_(len(q))
        found = torch.zeros_like(normed)
        for start, stop in self.walk.slices({STUDENT: track.head}, "head"):
            block = self.walk.held(STUDENT)["head"].values.to(self.walk.device)
            found.addmm_(difference[:, start:stop], block.to(difference.dtype))
        (one.gradient,) = torch.autograd.grad(normed, x, found)
        return kl

    def _logits(self, mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        heads = {STUDENT: self.walk[STUDENT].head, TEACHER: self.walk[TEACHER].head}
        found: dict[str, list[Tensor]] = {STUDENT: [], TEACHER: []}
        for _ in self.walk.slices(heads, "head"):
            for role, x in ((STUDENT, mine), (TEACHER, theirs)):
                found[role].append(self.walk.product(x, self.walk.held(role)["head"].values))
        return torch.cat(found[STUDENT], dim=1), torch.cat(found[TEACHER], dim=1)

    def _backward(self, layer: int, some: list[_Sequence], rate: float) -> None:
        """Gradients of one layer, from the sequences' gradients after it to those before it, and its update."""
        held, get = self._weights(layer)
        names = self.trained[layer]
        weights = [held[name].requires_grad_() for name in names]
        beginning = self.config.rwkv_layers[:1] == (layer,)

        def grow(one: _Sequence) -> list[Tensor]:
            with torch.enable_grad():
                x = one.inputs[layer].detach().requires_grad_()
                handed = [None if beginning or part is None else part.detach().requires_grad_() for part in one.first]
                carry = hxa079.Carry(handed[0], handed[1])
                outputs, gradients = [self._layer(x, get, layer, carry)], [one.gradient]
                if beginning:
                    for part, gradient in zip((carry.v_first, carry.k_first), one.first_gradient, strict=True):
                        if part is not None and gradient is not None:
                            outputs.append(part)
                            gradients.append(gradient)
                inputs = [*weights, x, *(part for part in handed if part is not None)]
                found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
            mine = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]
            one.gradient, rest = mine[len(weights)], iter(mine[len(weights) + 1 :])
            grown_first = [None if part is None else next(rest) for part in handed]
            if not beginning:
                one.first_gradient = (
                    _sum(one.first_gradient[0], grown_first[0]),
                    _sum(one.first_gradient[1], grown_first[1]),
                )
            return mine[: len(weights)]

        grown = self.walk.pool.map(grow, some)
        fresh: dict[str, Tensor] = {}
        for i, name in enumerate(names):
            gradient = torch.stack([one[i] for one in grown]).mean(dim=0)
            weight, momentum = held[name].detach(), held[f"momentum {name}"].lerp(gradient, 1 - MOMENTUM)
            change = orthogonal(gradient.lerp(momentum, MOMENTUM), self.config.head_dim, _is_output(name))
            size = float(weight.square().mean().sqrt())
            fresh[name] = weight - change * (rate * size)
            fresh[f"momentum {name}"] = momentum
        self.store.save(self._name(layer, later=1), fresh)

    def _look(self, hidden: list[Tensor]) -> None:
        """Judge the weights, as they would be written, on the held-out sequences; keep the best."""
        some = [_Sequence(self.judged[i : i + 1], hidden[len(self.rows) + i]) for i in range(len(self.judged))]
        self._forward(some, keep=False, stored=True)
        kl = sum(self._head(one) for one in some) / len(some)
        before = min((found for _, found in self.state.curve if found == found), default=math.inf)
        self.state.curve.append((self.state.step, kl))
        if self.state.step and kl < before:
            self.state.best = self.state.step
            for layer in self.trained:
                held = self.store.load(self._name(layer)) or {}
                dtypes = {name: torch_dtype(self.student.plan[name].dtype) for name in self.trained[layer]}
                self.store.save(f"best-{layer:03d}", {name: held[name].to(dtype) for name, dtype in dtypes.items()})


def orthogonal(gradient: Tensor, size: int, output: bool, steps: int = 5) -> Tensor:
    """A step's direction: every head's part (N, C) with all singular values near 1, and elements of mean square 1.

    `output`: heads lie along the columns. By the quintic Newton-Schulz iteration, singular values end in 0.7..1.2.
    """
    rows = gradient.T if output else gradient
    columns = rows.shape[1]
    x = rows.reshape(-1, size, columns)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-12)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.flatten(0, 1) * columns**0.5
    return found.T if output else found


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other


def _trained_names(student: Model, layer: int) -> list[str]:
    names = (name for name in student.plan if layer_index(name) == layer and is_attention(name))
    return [name for name in names if _short(name) in {f"{part}.weight" for part in TRAINED}]


def _short(name: str) -> str:
    return name.partition(".self_attn.")[2]


def _is_output(name: str) -> bool:
    return _short(name).partition(".")[0] in OUTPUTS
