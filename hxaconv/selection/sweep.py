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
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hxaconv.forward import hxa079, llama
from hxaconv.forward.hxa079 import Carry, Get
from hxaconv.forward.logits import LOGITS_AT_ONCE, Divergence
from hxaconv.forward.state import State, StateFile
from hxaconv.forward.walk import First, Walk, time_mix
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.plan import layer_bytes
from hxaconv.progress import Progress, bar
from hxaconv.selection.attention import entropy_and_distance
from hxaconv.selection.strategies import STRATEGIES

STREAMED = (*(name for name, strategy in STRATEGIES.items() if strategy.score), "kl")
"""Strategies that a sweep computes, any number of them in one pass."""

FIRSTS = ("base", "fork 0", "teacher")
"""Whose v_first and k_first are kept: those of base and of all forks after layer 0; those of fork 0, whose first RWKV
layer is layer 1; what layer 0 of the student makes of the teacher's stream."""

Step = Callable[[int, str], None]
"""Called between two steps with the bytes of weights that the last one applied: moves the bar, saves, stops."""


@dataclass(slots=True)
class Streams:
    """A sweep between two layers."""

    layer: int
    """The next one."""
    teacher: Tensor
    base: Tensor | None = None
    forks: Tensor | None = None
    """(L, B, T, C), taken at once: streams that live long among short-lived tensors split the heap."""
    firsts: dict[str, First] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    moved: int = 0
    """Forks that have passed the next layer already: a sweep may stop between any two of them."""
    normed: bool = False
    """Whether the streams have passed the final norm."""

    def fork(self, values: Tensor, num_layers: int) -> None:
        """The next fork."""
        if self.forks is None:
            self.forks = values.new_empty(num_layers, *values.shape)
        self.forks[self.layer].copy_(values)

    def state(self) -> State:
        """For a file."""
        tensors = {"teacher": self.teacher}
        if self.base is not None:
            tensors["base"] = self.base
        if self.forks is not None:
            tensors["forks"] = self.forks[: self.layer]
        for name, pair in self.firsts.items():
            if pair is not None:
                tensors |= {f"v_first {name}": pair[0], f"k_first {name}": pair[1]}
        return tensors, {"layer": self.layer, "scores": self.scores, "moved": self.moved, "normed": self.normed}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], facts: dict[str, Any], num_layers: int) -> Streams:
        """The inverse of `state`."""
        firsts: dict[str, First] = {
            name: (tensors[f"v_first {name}"], tensors[f"k_first {name}"])
            for name in FIRSTS
            if f"v_first {name}" in tensors
        }
        streams = cls(teacher=tensors["teacher"], base=tensors.get("base"), firsts=firsts, **facts)
        done = tensors.get("forks")
        if done is not None:
            streams.forks = done.new_empty(num_layers, *done.shape[1:])
            streams.forks[: len(done)].copy_(done)
        return streams


@dataclass(eq=False)
class Layer:
    """What strategies see of a layer: the teacher's, and the student's mixer on its input; (B, T, C) each."""

    walk: Walk
    index: int
    x: Tensor
    streams: Streams

    @property
    def config(self) -> ModelConfig:
        """The teacher's."""
        return self.walk["teacher"].config

    @property
    def get(self) -> Get:
        """The teacher's weights."""
        return self.walk["teacher"].weight

    @cached_property
    def normed(self) -> Tensor:
        """What the attention sees."""
        return llama.input_norm(self.x, self.get, self.config, self.index)

    @cached_property
    def attended(self) -> Tensor:
        """What the attention adds."""
        return self.walk.each(lambda s: llama.attention(s, self.get, self.config, self.index), self.normed)

    @cached_property
    def after(self) -> Tensor:
        """The residual stream behind the block."""
        inside = self.x + self.attended
        return self.walk.each(lambda s: llama.feed_forward(s, self.get, self.config, self.index), inside)

    @cached_property
    def entropy_and_distance(self) -> tuple[float, float]:
        """Of the attention, see there."""
        return entropy_and_distance(self.normed, self.get, self.config, self.index)

    @cached_property
    def mixed(self) -> Tensor:
        """What the student's RWKV mixer adds on the teacher's input."""
        student = self.walk["student"]
        first = self.streams.firsts.get("teacher")
        config = student.model.student
        found, self.streams.firsts["teacher"] = time_mix(
            self.normed, student.weight, config, self.index, first, self.walk.pool.map
        )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is computed in one pass; `student` has every layer RWKV."""

    teacher: Model
    student: Model | None
    strategies: frozenset[str]
    kl_mode: str = "restore"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        assert self.strategies <= set(STREAMED)
        assert self.kl_mode in ("restore", "convert")
        if any("student" in STRATEGIES[name].needs for name in self.strategies):
            assert self.student is not None
            assert self.student.student.gqa_layers == ()

    def run(
        self, ids: Tensor, kept: StateFile | None = None, progress: Progress | None = None
    ) -> dict[str, list[float]]:
        """Token ids (B, T) -> strategy -> one number per layer.

        With kl also `kl total`: one number, the KL of the all-RWKV student (restore).
        """
        kept = kept or StateFile(None)
        saved = kept.load(self.device)
        if saved and "teacher" not in saved[0]:
            scores: dict[str, list[float]] = saved[1]["scores"]
            return scores
        models = {"teacher": self.teacher} | ({"student": self.student} if self.student is not None else {})
        with torch.no_grad(), Walk(models, dtype=self.dtype, device=self.device) as walk:
            resumes = bool(saved)
            streams = Streams.restored(*saved, self.num_layers) if saved else self._start(walk, ids)
            saved = None
            with bar(progress, "scoring layers", self._work(self.num_layers) + self._head_work) as advance:
                moved = layer_bytes(self.teacher.plan, streams.layer) * streams.moved if streams.moved else 0
                advance(self._work(streams.layer) + moved, "resumed" if resumes else "")

                def step(done: int, what: str) -> None:
                    advance(done, what)
                    kept.pause(streams.state)

                for _ in walk.layers(range(streams.layer, self.num_layers)):
                    self._layer(walk, streams, step)
                if "kl" in self.strategies:
                    self._divergences(walk, streams, step)
        kept.save({}, {"scores": streams.scores})
        return streams.scores

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
        size = self.teacher.config.vocab_size * self.teacher.config.hidden_size * 2
        return size * (self.num_layers + 1 + self._restores) if "kl" in self.strategies else 0

    @property
    def _restores(self) -> bool:
        return "kl" in self.strategies and self.kl_mode == "restore"

    def _start(self, walk: Walk, ids: Tensor) -> Streams:
        return Streams(0, walk["teacher"].start(ids).x, walk["student"].start(ids).x if self._restores else None)

    def _layer(self, walk: Walk, streams: Streams, step: Step) -> None:
        """One layer further, every stream in its place."""
        index = streams.layer
        at = Layer(walk, index, streams.teacher, streams)
        found = {name: score(at) for name in self.strategies if (score := STRATEGIES[name].score)}
        if "kl" in self.strategies:
            self._restore(at, step) if self._restores else self._convert(at, step)
        for name, value in found.items():
            streams.scores.setdefault(name, []).append(value)
        rest = self._work(index + 1) - self._work(index) - streams.moved * layer_bytes(self.teacher.plan, index)
        streams.teacher, streams.layer, streams.moved = at.after, index + 1, 0
        step(rest, f"layer {index}")

    def _move(self, streams: Streams, step: Step, forward: Callable[[int, Tensor], Tensor]) -> None:
        """All forks pass the layer, but for those that have before an interruption."""
        size = layer_bytes(self.teacher.plan, streams.layer)
        for i in range(streams.moved, streams.layer):
            assert streams.forks is not None
            streams.forks[i].copy_(forward(i, streams.forks[i]))
            streams.moved += 1
            step(size, f"layer {streams.layer}, candidate {i}")

    def _convert(self, at: Layer, step: Step) -> None:
        walk, index, config, get = at.walk, at.index, at.config, at.get
        self._move(at.streams, step, lambda _, x: walk.each(lambda s: llama.layer(s, get, config, index), x))
        alone = tuple(i for i in range(self.num_layers) if i != index)
        student = walk["student"]
        settings = replace(student.model.student, gqa_layers=alone)
        mixed, _ = time_mix(at.normed, student.weight, settings, index, None, walk.pool.map)
        after = walk.each(lambda s: llama.feed_forward(s, get, config, index), at.x + mixed)
        at.streams.fork(after, self.num_layers)

    def _restore(self, at: Layer, step: Step) -> None:
        walk, index, streams = at.walk, at.index, at.streams
        student = walk["student"]
        config, get, firsts = student.model.student, student.weight, streams.firsts
        assert streams.base is not None

        def finish(x: Tensor) -> Tensor:
            return walk.each(lambda s: hxa079.feed_forward(s, get, config, index), x)

        def mix(x: Tensor, settings: StudentConfig, whose: str | None, first: First) -> Tensor:
            normed = hxa079.input_norm(x, get, config, index)
            mixed, first = time_mix(normed, get, settings, index, first, walk.pool.map)
            if whose is not None:
                firsts[whose] = first
            return mixed

        def passed(i: int, x: Tensor) -> Tensor:
            if i == 0:
                return finish(x + mix(x, replace(config, gqa_layers=(0,)), "fork 0", firsts.get("fork 0")))
            return finish(x + mix(x, config, None, firsts["base"]))

        self._move(streams, step, passed)
        normed = hxa079.input_norm(streams.base, get, config, index)
        mixed = walk.each(lambda s: hxa079.attention(s, at.get, config, index, Carry()), normed)
        streams.fork(finish(streams.base + mixed), self.num_layers)
        first = None if index == 0 else firsts["base"]
        streams.base = finish(streams.base + mix(streams.base, config, "base", first))

    def _divergences(self, walk: Walk, streams: Streams, step: Step) -> None:
        """The KLs, from the final streams; these are normed in their place and not streams afterwards."""
        assert self.student is not None and streams.forks is not None
        role = "student" if self._restores else "teacher"
        others = list(streams.forks) + ([streams.base] if streams.base is not None else [])
        if not streams.normed:
            for owner, x in [("teacher", streams.teacher), *((role, stream) for stream in others)]:
                for sequence in x:
                    sequence.copy_(walk[owner].final_norm(sequence[None]))
            streams.normed = True
        target = streams.teacher.flatten(0, 1)
        recipes = {"teacher": walk["teacher"].head, role: walk[role].head}
        divergence, step_rows = Divergence(), max(1, LOGITS_AT_ONCE // len(target))
        for start, stop in walk.slices(recipes, "head"):
            heads = [walk.held(name)["head"].values for name in ("teacher", role)]
            for low in range(0, stop - start, step_rows):
                mine, theirs = (head[low : low + step_rows] for head in heads)

                def logits(i: int, rows: Tensor = theirs) -> Tensor:
                    return walk.product(others[i].flatten(0, 1), rows)

                divergence.add(walk.product(target, mine), len(others), logits, walk.pool.map)
                step(int(len(mine) / self.teacher.config.vocab_size * self._head_work), "head")
        values = [float(kl.mean()) for kl in divergence.result()]
        if self._restores:
            total = values.pop()
            streams.scores["kl total"] = [total]
            values = [total - value for value in values]
        streams.scores["kl"] = values
