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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hxaconv.config import StudentConfig
from hxaconv.console import Progress
from hxaconv.model import Model
from hxaconv.reference import hxa079, llama
from hxaconv.reference.chunked import chunked
from hxaconv.selection.attention import entropy_and_distance
from hxaconv.selection.cache import Cache
from hxaconv.selection.weights import (
    Compute,
    Get,
    Head,
    bytes_of_layer,
    divergences,
    embed,
    layer_names,
    same_bytes,
)

NEEDS_STUDENT = frozenset({"mse", "kl"})
STREAMED = ("mse", "influence", "entropy", "distance", "kl")
"""Strategies that a sweep computes, any number of them in one pass."""

First = tuple[Tensor, Tensor] | None
"""v_first and k_first, (B, T, G, N) each; None before the first RWKV layer."""


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
    scores: dict[str, list[float]] = field(default_factory=dict)
    room: Tensor | None = None
    """Memory of all forks, taken at once: streams that live long among short-lived tensors split the heap."""

    def fork(self, layer: int, values: Tensor, num_layers: int) -> None:
        """A new stream."""
        if self.room is None:
            self.room = values.new_empty(num_layers, *values.shape)
        self.forks[layer] = self.room[layer].copy_(values)

    def arrays(self) -> dict[str, np.ndarray]:
        """The state as plain arrays, for a file."""
        found: dict[str, Tensor | None] = {"teacher": self.teacher, "base": self.base}
        found |= {f"fork {i}": x for i, x in self.forks.items()}
        for name in ("first", "first_of_fork_0"):
            pair = getattr(self, name)
            found |= {f"{name} {i}": x for i, x in enumerate(pair or ())}
        arrays = {name: x.cpu().numpy() for name, x in found.items() if x is not None}
        arrays |= {f"score {name}": np.array(values) for name, values in self.scores.items()}
        return {**arrays, "layer": np.array(self.layer)}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray], device: str) -> State:
        """The inverse of `arrays`."""

        def pair(name: str) -> First:
            return (x[f"{name} 0"], x[f"{name} 1"]) if f"{name} 0" in x else None

        scores = {name[6:]: list(map(float, values)) for name, values in arrays.items() if name.startswith("score ")}
        x = {
            name: torch.from_numpy(values).to(device)
            for name, values in arrays.items()
            if values.dtype.kind == "f" and not name.startswith("score ")
        }
        forks = {int(name[5:]): values for name, values in x.items() if name.startswith("fork ")}
        firsts = pair("first"), pair("first_of_fork_0")
        return cls(int(arrays["layer"]), x["teacher"], x.get("base"), forks, *firsts, scores)


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
        state = State.of_arrays(saved, self.compute.device) if saved else self._start(ids)
        with torch.inference_mode(), _bar(progress, "scoring layers", self._work(0)) as advance:
            advance(self._work(0) - self._work(state.layer), "resumed" if saved else "")
            while state.layer < self.num_layers:
                before = self._work(state.layer)
                self._layer(state)
                advance(before - self._work(state.layer), f"layer {state.layer - 1}")
                if cache.due():
                    cache.save(state.arrays())
            self.compute.release()
            if "kl" in self.strategies:
                self._divergences(state)
        cache.clear()
        return state.scores

    @property
    def num_layers(self) -> int:
        """L."""
        return self.teacher.config.num_hidden_layers

    def _work(self, done: int) -> int:
        # In bytes of weights applied: what time goes with, whatever the strategies.
        streams = [1 + (self._restores + i + 1 if "kl" in self.strategies else 0) for i in range(self.num_layers)]
        return sum(bytes_of_layer(self.teacher, i) * streams[i] for i in range(done, self.num_layers))

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

    def _layer(self, state: State) -> None:
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
            for stream in state.forks.values():
                stream.copy_(_each(lambda s: llama.layer(s, get, config, layer), stream))
        if self.strategies & NEEDS_STUDENT:
            found |= self._student_layer(state, weights, normed, attended)
        for name in self.strategies & found.keys():
            state.scores.setdefault(name, []).append(found[name])
        state.teacher, state.layer = after, layer + 1

    @property
    def _converts(self) -> bool:
        return "kl" in self.strategies and self.kl_mode == "convert"

    def _student_layer(
        self, state: State, teacher: dict[str, Tensor], normed: Tensor, attended: Tensor
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
            mixed, first = time_mix(normed, mixer.__getitem__, config, layer, state.first)
            state.first = first
            found["mse"] = float((mixed - attended).double().square().sum() / attended.double().square().sum())
        if self._restores:
            rest = layer_names(self.student, layer, mixer=False)
            # Where they are not the same, the student's MLP takes the memory of the teacher's.
            attention = {name: teacher[name] for name in layer_names(self.teacher, layer, mixer=True)}
            plans = self.teacher.plan, self.student.plan
            shared = {name: teacher[name] for name in rest if same_bytes(plans[0][name], plans[1][name])}
            others = self.compute.load(self.student, rest, shared)
            self._restore(state, {**others, **mixer}.__getitem__, {**others, **attention}.__getitem__)
        return found

    def _restore(self, state: State, rwkv: Get, gqa: Get) -> None:
        assert self.student is not None and state.base is not None
        layer, config = state.layer, self.student.student

        def finish(x: Tensor) -> Tensor:
            return _each(lambda s: hxa079.feed_forward(s, rwkv, config, layer), x)

        def mix(x: Tensor, settings: StudentConfig, first: First) -> tuple[Tensor, First]:
            return time_mix(hxa079.input_norm(x, rwkv, config, layer), rwkv, settings, layer, first)

        for i, stream in state.forks.items():
            if i == 0:
                mixed, state.first_of_fork_0 = mix(stream, replace(config, gqa_layers=(0,)), state.first_of_fork_0)
            else:
                mixed, _ = mix(stream, config, state.first)
            stream.copy_(finish(stream + mixed))
        normed = hxa079.input_norm(state.base, gqa, config, layer)
        mixed = _each(lambda s: hxa079.attention(s, gqa, config, layer, hxa079.Carry()), normed)
        state.fork(layer, finish(state.base + mixed), self.num_layers)
        mixed, state.first = mix(state.base, config, None if layer == 0 else state.first)
        state.base.copy_(finish(state.base + mixed))

    def _divergences(self, state: State) -> None:
        """The KLs, from the final streams; these are normed in their place and not streams afterwards."""
        assert self.student is not None
        model = self.student if self._restores else self.teacher
        streams = [state.forks[i] for i in range(self.num_layers)]
        if state.base is not None:
            streams.append(state.base)
        for owner, x in [(self.teacher, state.teacher), *((model, stream) for stream in streams)]:
            weight = self.compute.make(owner.plan["model.norm.weight"])
            for sequence in x:
                sequence.copy_(llama.rmsnorm(sequence, weight, owner.config.rms_norm_eps))
        heads = Head(self.teacher, self.compute), Head(model, self.compute)
        values = divergences(state.teacher.flatten(0, 1), heads[0], [x.flatten(0, 1) for x in streams], heads[1])
        if self._restores:
            total = values.pop()
            state.scores["kl total"] = [total]
            values = [total - value for value in values]
        state.scores["kl"] = values


def time_mix(normed: Tensor, get: Get, config: StudentConfig, layer: int, first: First) -> tuple[Tensor, First]:
    """An RWKV mixer on normed inputs (B, T, C), from an empty state: (output, (v_first, k_first) to hand on)."""
    outputs, firsts = [], []
    for i in range(normed.shape[0]):
        carry = hxa079.Carry(first[0][i : i + 1], first[1][i : i + 1]) if first else hxa079.Carry()
        outputs.append(hxa079.time_mix(normed[i : i + 1], get, config, layer, carry, chunked))
        assert carry.v_first is not None and carry.k_first is not None
        firsts.append((carry.v_first, carry.k_first))
    if first is None:
        first = torch.cat([v for v, _ in firsts]), torch.cat([k for _, k in firsts])
    return torch.cat(outputs), first


def _each(function: Any, x: Tensor) -> Tensor:
    # A sequence at a time: what attention and MLP need in between does not grow with the batch.
    return torch.cat([function(x[i : i + 1]) for i in range(x.shape[0])])


@contextmanager
def _bar(progress: Progress | None, title: str, total: int) -> Iterator[Any]:
    if progress is None:
        yield lambda n, what="": None
        return
    progress.start(title, total)
    try:
        yield progress.advance
    finally:
        progress.stop()


def untouched_layers(student: Model) -> tuple[int, ...]:
    """RWKV layers that still hold their published initial values, so were never calibrated or trained.

    Initial layers have g1 = 0 and a constant r_k; training moves both at its first step.
    """
    found = []
    for layer in student.student.rwkv_layers:
        name = f"model.layers.{layer}.self_attn"
        gate, bonus = (Compute().make(student.plan[f"{name}.{part}"]) for part in ("g1", "r_k"))
        if not gate.any() and bool((bonus == bonus.flatten()[0]).all()):
            found.append(layer)
    return tuple(found)
