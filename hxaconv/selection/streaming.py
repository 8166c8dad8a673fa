"""Scores from one pass over the layers of a teacher (and its all-RWKV student), one layer's weights at a time.

Residual streams of a sweep, each (B, T, C):

    teacher      the teacher as it is
    base         the student with every layer RWKV                                   (kl, restore)
    fork i       as base, but with layer i as GQA without RoPE, the teacher's weights  (kl, restore)
                 as teacher, but with layer i replaced by the student's RWKV mixer     (kl, convert)

A fork leaves its parent at layer i, so that all candidates together cost L(L+1)/2 layer-forwards beside
the teacher's and the base's L each, and (L+2) streams of tokens * C * 4 bytes are the whole memory
beside one layer's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hxaconv.forward import hxa079, llama
from hxaconv.forward.batches import First, time_mix
from hxaconv.forward.hxa079 import Get
from hxaconv.forward.layer_weights import Compute, embed, layer_names
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD
from hxaconv.model.plan import layer_bytes, same_ranges
from hxaconv.progress import Progress, bar
from hxaconv.selection.attention import entropy_and_distance
from hxaconv.selection.cache import Cache
from hxaconv.selection.divergences import Head, divergences
from hxaconv.selection.state import State, score_arrays, scores_of

NEEDS_STUDENT = frozenset({"mse", "kl"})
STREAMED = ("mse", "influence", "entropy", "distance", "kl")
"""Strategies that a sweep computes, any number of them in one pass."""

Step = Callable[[int, str], None]
"""Called between two steps with the bytes of weights that the last one applied: moves the bar, saves, stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is computed in one pass; `student` has every layer RWKV."""

    teacher: Model
    student: Model | None
    strategies: frozenset[str]
    kl_mode: str = "restore"
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        assert self.strategies <= set(STREAMED)
        assert self.kl_mode in ("restore", "convert")
        if self.strategies & NEEDS_STUDENT:
            assert self.student is not None
            assert self.student.student.gqa_layers == ()

    def run(self, ids: Tensor, cache: Cache | None = None, progress: Progress | None = None) -> dict[str, list[float]]:
        """Token ids (B, T) -> strategy -> one number per layer. With kl also `kl total`: one number, the KL
        of the all-RWKV student (restore)."""
        cache = cache or Cache(None, "")
        saved = cache.load()
        if saved and "teacher" not in saved:
            return scores_of(saved)
        state = State.of_arrays(saved, self.compute.device) if saved else self._start(ids)
        resumes, saved = bool(saved), None
        total = self._work(self.num_layers) + self._head_work
        with torch.inference_mode(), bar(progress, "scoring layers", total) as advance:
            moved = layer_bytes(self.teacher.plan, state.layer) * state.moved if state.moved else 0
            advance(self._work(state.layer) + moved, "resumed" if resumes else "")

            def step(done: int, what: str) -> None:
                advance(done, what)
                cache.pause(state.arrays)

            while state.layer < self.num_layers:
                self._layer(state, step)
            self.compute.release()
            if "kl" in self.strategies:
                self._divergences(state, step)
        cache.save(score_arrays(state.scores))
        return state.scores

    @property
    def num_layers(self) -> int:
        """L."""
        return self.teacher.config.num_hidden_layers

    def _work(self, layers: int) -> int:
        # In bytes of weights applied: what time goes with, whatever the strategies.
        streams = [1 + (self._restores + i + 1 if "kl" in self.strategies else 0) for i in range(layers)]
        return sum(layer_bytes(self.teacher.plan, i) * streams[i] for i in range(layers))

    @property
    def _head_work(self) -> int:
        plan = self.teacher.plan
        head = plan.get(HEAD, plan[EMBEDDING])
        return head.nbytes * (self.num_layers + 1 + self._restores) if "kl" in self.strategies else 0

    @property
    def _restores(self) -> bool:
        return "kl" in self.strategies and self.kl_mode == "restore"

    def _start(self, ids: Tensor) -> State:
        x = embed(self.teacher, ids, self.compute)
        base = None
        if self._restores:
            assert self.student is not None
            base = embed(self.student, ids, self.compute)
        return State(0, x, base)

    def _layer(self, state: State, step: Step) -> None:
        """One layer further, every stream in its place."""
        layer, x, config = state.layer, state.teacher, self.teacher.config
        weights = self.compute.load(self.teacher, layer_names(self.teacher, layer))
        get = weights.__getitem__
        normed = llama.input_norm(x, get, config, layer)
        attended = _each(lambda s: llama.attention(s, get, config, layer), normed)
        after = _each(lambda s: llama.feed_forward(s, get, config, layer), x + attended)
        found: dict[str, float] = {}
        if "influence" in self.strategies:
            cosine = torch.nn.functional.cosine_similarity(x.double(), after.double(), dim=-1)
            found["influence"] = 1.0 - float(cosine.mean())
        if self.strategies & {"entropy", "distance"}:
            found["entropy"], found["distance"] = entropy_and_distance(normed, get, config, layer)
        if self._converts:
            self._move(state, step, lambda _, x: _each(lambda s: llama.layer(s, get, config, layer), x))
        if self.strategies & NEEDS_STUDENT:
            found |= self._student_layer(state, step, weights, normed, attended)
        for name in self.strategies & found.keys():
            state.scores.setdefault(name, []).append(found[name])
        rest = self._work(layer + 1) - self._work(layer) - state.moved * layer_bytes(self.teacher.plan, layer)
        state.teacher, state.layer, state.moved = after, layer + 1, 0
        step(rest, f"layer {layer}")

    def _move(self, state: State, step: Step, forward: Callable[[int, Tensor], Tensor]) -> None:
        """All forks pass the layer, but for those that have before an interruption."""
        size = layer_bytes(self.teacher.plan, state.layer)
        for i in sorted(state.forks)[state.moved :]:
            state.forks[i].copy_(forward(i, state.forks[i]))
            state.moved += 1
            step(size, f"layer {state.layer}, candidate {i}")

    @property
    def _converts(self) -> bool:
        return "kl" in self.strategies and self.kl_mode == "convert"

    def _student_layer(
        self, state: State, step: Step, teacher: dict[str, Tensor], normed: Tensor, attended: Tensor
    ) -> dict[str, float]:
        assert self.student is not None
        layer, config, found = state.layer, self.student.student, {}
        mixer = self.compute.load(self.student, layer_names(self.student, layer, mixer=True))
        if self._converts:
            alone = replace(config, gqa_layers=tuple(i for i in range(self.num_layers) if i != layer))
            mixed, _ = time_mix(normed, mixer.__getitem__, alone, layer, None)
            fork = state.teacher + mixed
            after = _each(lambda s: llama.feed_forward(s, teacher.__getitem__, self.teacher.config, layer), fork)
            state.fork(layer, after, self.num_layers)
        if "mse" in self.strategies:
            mixed, first = time_mix(normed, mixer.__getitem__, config, layer, state.first_of_teacher)
            state.first_of_teacher = first
            missed, energy = (part.double().square().sum().item() for part in (mixed - attended, attended))
            # Nobody misses an attention that says nothing.
            found["mse"] = missed / energy if energy else 0.0
        if self._restores:
            rest = layer_names(self.student, layer, mixer=False)
            # Where they are not the same, the student's MLP takes the memory of the teacher's.
            attention = {name: teacher[name] for name in layer_names(self.teacher, layer, mixer=True)}
            plans = self.teacher.plan, self.student.plan
            shared = {name: teacher[name] for name in rest if same_ranges(plans[0][name], plans[1][name])}
            others = self.compute.load(self.student, rest, shared)
            self._restore(state, step, {**others, **mixer}.__getitem__, {**others, **attention}.__getitem__)
        return found

    def _restore(self, state: State, step: Step, rwkv: Get, gqa: Get) -> None:
        assert self.student is not None and state.base is not None
        layer, config = state.layer, self.student.student

        def finish(x: Tensor) -> Tensor:
            return _each(lambda s: hxa079.feed_forward(s, rwkv, config, layer), x)

        def mix(x: Tensor, settings: StudentConfig, first: First) -> tuple[Tensor, First]:
            return time_mix(hxa079.input_norm(x, rwkv, config, layer), rwkv, settings, layer, first)

        def passed(i: int, stream: Tensor) -> Tensor:
            if i == 0:
                mixed, state.first_of_fork_0 = mix(stream, replace(config, gqa_layers=(0,)), state.first_of_fork_0)
            else:
                mixed, _ = mix(stream, config, state.first)
            return finish(stream + mixed)

        self._move(state, step, passed)
        normed = hxa079.input_norm(state.base, gqa, config, layer)
        mixed = _each(lambda s: hxa079.attention(s, gqa, config, layer, hxa079.Carry()), normed)
        state.fork(layer, finish(state.base + mixed), self.num_layers)
        mixed, state.first = mix(state.base, config, None if layer == 0 else state.first)
        state.base.copy_(finish(state.base + mixed))

    def _divergences(self, state: State, step: Step) -> None:
        """The KLs, from the final streams; these are normed in their place and not streams afterwards."""
        assert self.student is not None
        model = self.student if self._restores else self.teacher
        streams = [state.forks[i] for i in range(self.num_layers)]
        if state.base is not None:
            streams.append(state.base)
        for owner, x in [(self.teacher, state.teacher), *((model, stream) for stream in streams)]:
            weight = self.compute.make(owner.plan["model.norm.weight"])
            for sequence in x if not state.normed else ():
                sequence.copy_(llama.rmsnorm(sequence, weight, owner.config.rms_norm_eps))
        state.normed = True
        heads = Head(self.teacher, self.compute), Head(model, self.compute)
        values = divergences(
            state.teacher.flatten(0, 1),
            heads[0],
            [x.flatten(0, 1) for x in streams],
            heads[1],
            lambda share: step(int(share * self._head_work), "head"),
        )
        if self._restores:
            total = values.pop()
            state.scores["kl total"] = [total]
            values = [total - value for value in values]
        state.scores["kl"] = values


def _each(function: Any, x: Tensor) -> Tensor:
    # A sequence at a time: what attention and MLP need in between does not grow with the batch.
    return torch.cat([function(x[i : i + 1]) for i in range(x.shape[0])])
