"""One pass over the layers of a teacher (and its all-RWKV student), one layer's weights at a time.

Residual streams, each (B, T, C), for the tokens, and where there are forks for the needles as well:

    teacher      the teacher as it is
    base         the student with every layer RWKV                                     (restore)
    fork i       as base, but with layer i as GQA without RoPE, the teacher's weights  (restore)
                 as teacher, but with layer i replaced by the student's RWKV mixer     (convert)
                 as teacher, but with a sliding window in layer i                      (window)

A fork leaves its parent at layer i, so that all candidates together cost L(L+1)/2 layer-forwards beside
the teacher's and the base's L each, and (L+2) streams of tokens * C * 4 bytes are the whole memory
beside one layer's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from hxaconv.selection.heads import entropy_and_distance, windowed

NEEDLE, NEEDLES = 64, 2
"""Tokens that are repeated, and how often that is tried."""
FIRSTS = ("base", "fork 0", "teacher")
"""Whose v_first and k_first are kept: those of base and of all forks after layer 0; those of fork 0, whose first RWKV
layer is layer 1; what layer 0 of the student makes of the teacher's stream."""

UNLIKELY = -1e30
"""A logit that is as good as minus infinity, and with which one can still calculate."""

Step = Callable[[int, str], None]
"""Called between two steps with the bytes of weights that the last one applied: moves the bar, saves, stops."""


def needles(ids: Tensor, count: int = NEEDLES) -> tuple[Tensor, int]:
    """(random tokens of a text (B, T) said twice, (count, 2D); the first place that counts).

    The first eighth of the second time is not counted: it cannot be recognised as a repetition yet.
    """
    known, random = torch.unique(ids.cpu()), torch.Generator().manual_seed(0)
    length = max(2, min(NEEDLE, ids.shape[1] // 2))
    picked = [torch.randperm(max(length, len(known)), generator=random)[:length] % len(known) for _ in range(count)]
    once = known[torch.stack(picked)]
    return torch.cat([once, once], dim=1), length + max(1, length // 8)


@dataclass(slots=True)
class Streams:
    """Sequences between two layers."""

    ids: Tensor
    teacher: Tensor
    base: Tensor | None = None
    forks: Tensor | None = None
    """(L, B, T, C), taken at once: streams that live long among short-lived tensors split the heap."""
    firsts: dict[str, First] = field(default_factory=dict)

    @property
    def others(self) -> list[Tensor]:
        """All but the teacher's."""
        assert self.forks is not None
        return [*self.forks, *([] if self.base is None else [self.base])]

    def state(self, name: str, layer: int) -> dict[str, Tensor]:
        """For a file."""
        tensors = {"teacher": self.teacher}
        if self.base is not None:
            tensors["base"] = self.base
        if self.forks is not None:
            tensors["forks"] = self.forks[:layer]
        for whose, pair in self.firsts.items():
            if pair is not None:
                tensors |= {f"v_first {whose}": pair[0], f"k_first {whose}": pair[1]}
        return {f"{name} {key}": values for key, values in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """The inverse of `state`."""
        found = {key.removeprefix(f"{name} "): values for key, values in tensors.items() if key.startswith(f"{name} ")}
        self.teacher, self.base = found["teacher"], found.get("base")
        if self.forks is not None:
            self.forks[: len(found["forks"])].copy_(found["forks"])
        self.firsts = {
            whose: (found[f"v_first {whose}"], found[f"k_first {whose}"])
            for whose in FIRSTS
            if f"v_first {whose}" in found
        }


@dataclass(slots=True)
class Progressed:
    """How far a pass is."""

    layer: int = 0
    """The next one."""
    moved: int = 0
    """Forks that have passed the next layer already: a pass may stop between any two of them."""
    scores: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(eq=False)
class Layer:
    """What strategies see of a layer: the teacher's, and the student's mixer on its input; (B, T, C) each."""

    walk: Walk
    index: int
    streams: Streams

    @property
    def ids(self) -> Tensor:
        """(B, T)."""
        return self.streams.ids

    @property
    def x(self) -> Tensor:
        """The residual stream before the block."""
        return self.streams.teacher

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
        return self.fed(self.x + self.attended)

    @cached_property
    def entropy_and_distance(self) -> tuple[float, float]:
        """Of the attention, see there."""
        return entropy_and_distance(self.normed, self.get, self.config, self.index)

    @cached_property
    def mixed(self) -> Tensor:
        """What the student's RWKV mixer adds on the teacher's input."""
        found, self.streams.firsts["teacher"] = self._time_mix(
            self.normed, self.walk["student"].model.student, self.streams.firsts.get("teacher")
        )
        return found

    @property
    def converted(self) -> Tensor:
        """The residual stream behind the block if it alone is the student's: its first RWKV layer."""
        student = self.walk["student"].model.student
        others = tuple(i for i in range(student.num_hidden_layers) if i != self.index)
        return self.fed(self.x + self._time_mix(self.normed, replace(student, gqa_layers=others), None)[0])

    @property
    def windowed(self) -> Tensor:
        """The residual stream behind the block if its attention has a sliding window."""
        return self.fed(
            self.x + self.walk.each(lambda s: windowed(s[0], self.get, self.config, self.index)[None], self.normed)
        )

    def fed(self, x: Tensor) -> Tensor:
        """The teacher's second half of the block."""
        return self.walk.each(lambda s: llama.feed_forward(s, self.get, self.config, self.index), x)

    def restored(self, x: Tensor) -> Tensor:
        """A stream of the student behind the block with attention in it."""
        student, config = self.walk["student"], self.walk["student"].model.student
        normed = student.normed(x, self.index)
        mixed = self.walk.each(lambda s: hxa079.attention(s, self.get, config, self.index, Carry()), normed)
        return self._student_fed(x + mixed)

    def passed(self, x: Tensor, whose: str) -> Tensor:
        """A stream of the student behind the block as it is; `whose` v_first and k_first."""
        config, firsts = self.walk["student"].model.student, self.streams.firsts
        config = replace(config, gqa_layers=(0,)) if whose == "fork 0" else config
        mixed, firsts[whose] = self._time_mix(self.walk["student"].normed(x, self.index), config, firsts.get(whose))
        return self._student_fed(x + mixed)

    def _student_fed(self, x: Tensor) -> Tensor:
        student, config = self.walk["student"], self.walk["student"].model.student
        return self.walk.each(lambda s: hxa079.feed_forward(s, student.weight, config, self.index), x)

    def _time_mix(self, normed: Tensor, config: StudentConfig, first: First) -> tuple[Tensor, First]:
        return time_mix(normed, self.walk["student"].weight, config, self.index, first, self.walk.pool.map)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is computed in one pass; `student` has every layer RWKV."""

    teacher: Model
    student: Model | None
    measures: Mapping[str, Callable[[Layer], Any]]
    """What to note of every layer, plain values."""
    mode: str | None = None
    """Forks: `restore`, `convert`, `window` or none."""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def run(self, ids: Tensor, kept: StateFile | None = None, progress: Progress | None = None) -> dict[str, list[Any]]:
        """Token ids (B, T) -> name -> one value per layer.

        With forks also `kl` and `nll`, which is that of needles, and single figures: `recall of the teacher`, and of
        the all-RWKV student `kl total` and `recall of the student`.
        """
        kept = kept or StateFile(None)
        saved = kept.load(self.device)
        if saved and not saved[0]:
            scores: dict[str, list[Any]] = saved[1]["scores"]
            return scores
        models = {"teacher": self.teacher} | ({"student": self.student} if self.student is not None else {})
        with torch.no_grad(), Walk(models, dtype=self.dtype, device=self.device) as walk:
            rows = {"text": ids} | ({"needles": needles(ids)[0]} if self.mode else {})
            streams = {name: self._start(walk, some) for name, some in rows.items()}
            at = Progressed()
            if saved:
                at = Progressed(**saved[1])
                for name, some in streams.items():
                    some.restore(saved[0], name)
            saved = None

            def state() -> State:
                tensors = {key: x for name, some in streams.items() for key, x in some.state(name, at.layer).items()}
                return tensors, {"layer": at.layer, "moved": at.moved, "scores": at.scores}

            with bar(progress, "scoring layers", self._work(self.num_layers) + self._head_work) as advance:
                moved = layer_bytes(self.teacher.plan, at.layer) * at.moved if at.moved else 0
                advance(self._work(at.layer) + moved, "resumed" if at.layer or at.moved else "")

                def step(done: int, what: str) -> None:
                    advance(done, what)
                    kept.pause(state)

                for _ in walk.layers(range(at.layer, self.num_layers)):
                    self._layer(walk, streams, at, step)
                if self.mode:
                    self._divergences(walk, streams, at, step)
        kept.save({}, {"scores": at.scores})
        return at.scores

    @property
    def num_layers(self) -> int:
        """L."""
        return self.teacher.config.num_hidden_layers

    def _work(self, layers: int) -> int:
        # In bytes of weights applied: what time goes with, whatever is measured.
        streams = [1 + (self._restores + i + 1 if self.mode else 0) for i in range(layers)]
        return sum(layer_bytes(self.teacher.plan, i) * streams[i] for i in range(layers))

    @property
    def _head_work(self) -> int:
        size = self.teacher.config.vocab_size * self.teacher.config.hidden_size * 2
        return size * (self.num_layers + 1 + self._restores) if self.mode else 0

    @property
    def _restores(self) -> bool:
        return self.mode == "restore"

    def _start(self, walk: Walk, ids: Tensor) -> Streams:
        base = walk["student"].start(ids).x if self._restores else None
        streams = Streams(ids, walk["teacher"].start(ids).x, base)
        if self.mode:
            streams.forks = streams.teacher.new_empty(self.num_layers, *streams.teacher.shape)
        return streams

    def _layer(self, walk: Walk, streams: Mapping[str, Streams], at: Progressed, step: Step) -> None:
        """One layer further, every stream in its place."""
        index, size = at.layer, layer_bytes(self.teacher.plan, at.layer)
        layers = [Layer(walk, index, some) for some in streams.values()]
        found = {name: measure(layers[0]) for name, measure in self.measures.items()}
        for i in range(at.moved, index if self.mode else 0):
            for layer in layers:
                self._move(layer, i)
            at.moved += 1
            step(size, f"layer {index}, candidate {i}")
        for layer in layers:
            some = layer.streams
            if some.forks is not None:
                alone = layer.restored(some.base) if some.base is not None else None
                if alone is None:
                    alone = layer.windowed if self.mode == "window" else layer.converted
                some.forks[index].copy_(alone)
            if some.base is not None:
                some.base = layer.passed(some.base, "base")
            some.teacher = layer.after
        for name, value in found.items():
            at.scores.setdefault(name, []).append(value)
        rest = self._work(index + 1) - self._work(index) - at.moved * size
        at.layer, at.moved = index + 1, 0
        step(rest, f"layer {index}")

    def _move(self, layer: Layer, i: int) -> None:
        """Fork i passes the layer."""
        forks = layer.streams.forks
        assert forks is not None
        if self._restores:
            forks[i].copy_(layer.passed(forks[i], "fork 0" if i == 0 else "base"))
        else:
            after = layer.walk.each(lambda s: llama.layer(s, layer.get, layer.config, layer.index), forks[i])
            forks[i].copy_(after)

    def _divergences(self, walk: Walk, streams: Mapping[str, Streams], at: Progressed, step: Step) -> None:
        """The figures, from the final streams."""
        role = "student" if self._restores else "teacher"
        first = needles(streams["text"].ids)[1]
        wanted = streams["needles"].ids[:, first:].flatten().to(self.device)
        others = streams["text"].others
        asked = [walk[role].final_norm(x[:, first - 1 : -1]) for x in streams["needles"].others]
        asked.append(walk["teacher"].final_norm(streams["needles"].teacher[:, first - 1 : -1]))
        target = walk["teacher"].final_norm(streams["text"].teacher)
        recipes = {"teacher": walk["teacher"].head, role: walk[role].head}
        kl, nll, step_rows = Divergence(), Divergence(), max(1, LOGITS_AT_ONCE // len(target))
        for start, stop in walk.slices(recipes, "head"):
            heads = [walk.held(name)["head"].values for name in ("teacher", role)]
            for low in range(0, stop - start, step_rows):
                mine, theirs = (head[low : low + step_rows] for head in heads)

                def logits(i: int, rows: Tensor = theirs) -> Tensor:
                    return walk.product(walk[role].final_norm(others[i]), rows)  # not kept: L streams are large

                def answers(i: int, rows: Tensor = theirs, own: Tensor = mine) -> Tensor:
                    return walk.product(asked[i], own if i == len(asked) - 1 else rows)

                kl.add(walk.product(target, mine), len(others), logits, walk.pool.map)
                # The NLL of a token is the KL from what is certain of it.
                here = torch.arange(start + low, start + low + len(mine), device=wanted.device)
                certain = torch.where(wanted[:, None] == here, 0.0, UNLIKELY).to(target.dtype)
                nll.add(certain, len(asked), answers, walk.pool.map)
                step(int(len(mine) / self.teacher.config.vocab_size * self._head_work), "head")
        kls, (*nlls, teachers) = ([float(x.mean()) for x in each.result()] for each in (kl, nll))
        if self._restores:
            total, students = kls.pop(), nlls.pop()
            kls, nlls = [total - value for value in kls], [students - value for value in nlls]
            at.scores |= {"kl total": [total], "recall of the student": [students]}
        else:
            nlls = [value - teachers for value in nlls]
        at.scores |= {"recall of the teacher": [teachers], "kl": kls, "nll": nlls}
