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
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hxaconv.forward import hxa079, llama
from hxaconv.forward.hxa079 import Carry
from hxaconv.forward.logits import LOGITS_AT_ONCE, Divergence, Likelihood
from hxaconv.forward.state import State, StateFile
from hxaconv.forward.tokens import first_counted, said_twice
from hxaconv.forward.walk import Walk, time_mix
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.plan import layer_bytes
from hxaconv.progress import Progress, bar
from hxaconv.selection.heads import entropy_and_distance, windowed

NEEDLE, NEEDLES = 64, 2
"""Tokens that are repeated, and how often that is tried."""

Step = Callable[[int, str], None]
"""Called between two steps with the bytes of weights that the last one applied: moves the bar, saves, stops."""


def needles(ids: Tensor, count: int = NEEDLES) -> Tensor:
    """Random tokens of a text (B, T) said twice, (count, 2D)."""
    known, random = torch.unique(ids.cpu()), torch.Generator().manual_seed(0)
    length = max(2, min(NEEDLE, ids.shape[1] // 2))
    picked = [torch.randperm(max(length, len(known)), generator=random)[:length] % len(known) for _ in range(count)]
    return said_twice(known[torch.stack(picked)])


@dataclass(slots=True)
class Streams:
    """Sequences between two layers."""

    ids: Tensor
    kept: dict[str, Tensor]
    """(B, T, C) each: `teacher`, `base`. (L, B, T, C): `forks`, taken at once, since streams that live long among
    short-lived tensors split the heap. `v_first X` and `k_first X`, where X is `base` (and all forks after layer 0),
    `fork 0`, whose first RWKV layer is layer 1, or `teacher`: what layer 0 of the student makes of its stream."""

    @property
    def others(self) -> list[Tensor]:
        """All but the teacher's."""
        return [*self.kept["forks"], *(x for name, x in self.kept.items() if name == "base")]


@dataclass(slots=True)
class Progressed:
    """How far a pass is."""

    layer: int = 0
    """The next one."""
    moved: int = 0
    """Forks that have passed the next layer already: a pass may stop between any two of them."""
    scores: dict[str, list[Any]] = field(default_factory=dict)


class Layer:
    """What strategies see of a layer: the teacher's, and the student's mixer on its input; (B, T, C) each."""

    def __init__(self, walk: Walk, index: int, streams: Streams) -> None:
        self.walk, self.index, self.streams, self.ids = walk, index, streams, streams.ids
        self.x = streams.kept["teacher"]
        """The residual stream before the block."""
        self.config, self.get = walk["teacher"].config, walk["teacher"].weight

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
        return self._time_mix(self.normed, self.walk["student"].model.student, "teacher")

    @property
    def converted(self) -> Tensor:
        """The residual stream behind the block if it alone is the student's: its first RWKV layer."""
        student = self.walk["student"].model.student
        others = tuple(i for i in range(student.num_hidden_layers) if i != self.index)
        return self.fed(self.x + self._time_mix(self.normed, replace(student, gqa_layers=others)))

    def block(self, x: Tensor) -> Tensor:
        """Another stream of the teacher behind the block."""
        return self.walk.each(lambda s: llama.layer(s, self.get, self.config, self.index), x)

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
        config = self.walk["student"].model.student
        config = replace(config, gqa_layers=(0,)) if whose == "fork 0" else config
        return self._student_fed(x + self._time_mix(self.walk["student"].normed(x, self.index), config, whose))

    def _student_fed(self, x: Tensor) -> Tensor:
        student, config = self.walk["student"], self.walk["student"].model.student
        return self.walk.each(lambda s: hxa079.feed_forward(s, student.weight, config, self.index), x)

    def _time_mix(self, normed: Tensor, config: StudentConfig, whose: str = "") -> Tensor:
        kept, names = self.streams.kept, (f"v_first {whose}", f"k_first {whose}")
        first = (kept[names[0]], kept[names[1]]) if names[0] in kept else None
        mixed, first = time_mix(normed, self.walk["student"].weight, config, self.index, first, self.walk.pool.map)
        if whose and first is not None:
            kept |= zip(names, first, strict=True)
        return mixed


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
            rows = {"text": ids} | ({"needles": needles(ids)} if self.mode else {})
            streams, at = {name: self._start(walk, some) for name, some in rows.items()}, Progressed()
            if saved:
                at = Progressed(**saved[1])
                for (name, _, key), x in ((name.partition(" "), x) for name, x in saved[0].items()):
                    if key == "forks":
                        streams[name].kept[key][: len(x)].copy_(x)
                    else:
                        streams[name].kept[key] = x
            saved = None

            def state() -> State:
                found = [(f"{name} {key}", x) for name, some in streams.items() for key, x in some.kept.items()]
                tensors = {name: x[: at.layer] if name.endswith(" forks") else x for name, x in found}
                return tensors, asdict(at)

            layers = self.teacher.config.num_hidden_layers
            head = 2 * self.teacher.config.vocab_size * self.teacher.config.hidden_size * (layers + 1 + self._restores)
            work, done = sum(map(self._work, range(layers))), sum(map(self._work, range(at.layer)))
            done += layer_bytes(self.teacher.plan, at.layer) * at.moved if at.moved else 0
            with bar(progress, "scoring layers", work + (head if self.mode else 0)) as advance:
                advance(done, "resumed" if done else "")

                def step(done: int, what: str) -> None:
                    advance(done, what)
                    kept.pause(state)

                for _ in walk.layers(range(at.layer, layers)):
                    self._layer(walk, streams, at, step)
                if self.mode:
                    at.scores |= self._divergences(walk, **streams, step=lambda share: step(int(share * head), "head"))
        kept.save({}, {"scores": at.scores})
        return at.scores

    @property
    def _restores(self) -> bool:
        return self.mode == "restore"

    def _work(self, layer: int) -> int:
        # In bytes of weights applied: what time goes with, whatever is measured.
        return layer_bytes(self.teacher.plan, layer) * (1 + (self._restores + layer + 1 if self.mode else 0))

    def _start(self, walk: Walk, ids: Tensor) -> Streams:
        kept = {"teacher": walk["teacher"].start(ids).x}
        if self._restores:
            kept["base"] = walk["student"].start(ids).x
        if self.mode:
            kept["forks"] = kept["teacher"].new_empty(self.teacher.config.num_hidden_layers, *kept["teacher"].shape)
        return Streams(ids, kept)

    def _layer(self, walk: Walk, streams: Mapping[str, Streams], at: Progressed, step: Step) -> None:
        """One layer further, every stream in its place."""
        index, size = at.layer, layer_bytes(self.teacher.plan, at.layer)
        layers = [Layer(walk, index, some) for some in streams.values()]
        found = {name: measure(layers[0]) for name, measure in self.measures.items()}
        for i in range(at.moved, index if self.mode else 0):
            for layer in layers:
                fork = layer.streams.kept["forks"][i]
                fork.copy_(layer.passed(fork, "base" if i else "fork 0") if self._restores else layer.block(fork))
            at.moved += 1
            step(size, f"layer {index}, candidate {i}")
        for layer in layers:
            kept = layer.streams.kept
            if self.mode:
                windowed = self.mode == "window"
                alone = (
                    layer.restored(kept["base"]) if self._restores else layer.windowed if windowed else layer.converted
                )
                kept["forks"][index].copy_(alone)
            if self._restores:
                kept["base"] = layer.passed(kept["base"], "base")
            kept["teacher"] = layer.after
        for name, value in found.items():
            at.scores.setdefault(name, []).append(value)
        rest = self._work(index) - at.moved * size
        at.layer, at.moved = index + 1, 0
        step(rest, f"layer {index}")

    def _divergences(
        self, walk: Walk, text: Streams, needles: Streams, step: Callable[[float], None]
    ) -> dict[str, list[float]]:
        """The figures, from the final streams; `step` is told what share of the head is done."""
        role = "student" if self._restores else "teacher"
        first = first_counted(needles.ids)
        wanted = needles.ids[:, first:].flatten().to(self.device)
        others, target = text.others, walk["teacher"].final_norm(text.kept["teacher"])
        asked = [walk[role].final_norm(x[:, first - 1 : -1]) for x in needles.others]
        asked.append(walk["teacher"].final_norm(needles.kept["teacher"][:, first - 1 : -1]))
        recipes = {"teacher": walk["teacher"].head, role: walk[role].head}
        kl, step_rows = Divergence(), max(1, LOGITS_AT_ONCE // len(target))
        nll = [Likelihood(wanted) for _ in asked]
        for start, stop in walk.slices(recipes, "head"):
            heads = [walk.held(name)["head"].values for name in ("teacher", role)]
            for low in range(0, stop - start, step_rows):
                mine, theirs = (head[low : low + step_rows] for head in heads)

                def logits(i: int, rows: Tensor = theirs) -> Tensor:
                    return walk.product(walk[role].final_norm(others[i]), rows)  # not kept: L streams are large

                def answer(i: int, at: int = start + low, rows: Tensor = theirs, own: Tensor = mine) -> None:
                    nll[i].add(at, walk.product(asked[i], own if i == len(asked) - 1 else rows))

                kl.add(walk.product(target, mine), len(others), logits, walk.pool.map)
                walk.pool.map(answer, range(len(asked)))
                step(len(mine) / self.teacher.config.vocab_size)
        kls = [float(x.mean()) for x in kl.result()]
        *nlls, teachers = [float(x.result().mean()) for x in nll]
        found = {"recall of the teacher": [teachers]}
        if not self._restores:
            return found | {"kl": kls, "nll": [value - teachers for value in nlls]}
        total, students = kls.pop(), nlls.pop()
        found |= {"kl total": [total], "recall of the student": [students]}
        return found | {"kl": [total - value for value in kls], "nll": [students - value for value in nlls]}
