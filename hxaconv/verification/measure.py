"""One pass over the layers of a model, alone or beside another: tensors, each layer on equal input, and logits."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hxaconv.forward import llama
from hxaconv.forward.hxa079 import Carry
from hxaconv.forward.logits import LOGITS_AT_ONCE, Divergence
from hxaconv.forward.pool import BLOCK_BYTES
from hxaconv.forward.walk import Held, Stream, Track, Walk
from hxaconv.model.config import ModelConfig, StudentConfig, TeacherConfig
from hxaconv.model.names import EMBEDDING, HEAD, is_attention
from hxaconv.model.plan import Recipe, layer_bytes, total_bytes
from hxaconv.progress import Progress, bar
from hxaconv.verification.claims import MADE, ORIGIN, Claim, same_bits, with_head
from hxaconv.verification.dump import Dump
from hxaconv.verification.report import LayerResult, LogitResult, Report, TensorResult

NOISE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Relative error below which two layers count as the same: rounding in another order of summation."""


class Pass:
    """The loop over the layers of what was made, beside the other where there is one.

    Without `each_layer`, RWKV layers are not fed the input of a teacher's attention as well.
    """

    theirs: Stream | None = None
    zeroed: Stream | None = None
    """The teacher's stream with every attention output 0."""

    def __init__(
        self, report: Report, walk: Walk, dump: Dump | None, claims: Collection[Claim], each_layer: bool
    ) -> None:
        self.report, self.walk, self.dump, self.claims, self.each_layer = report, walk, dump, claims, each_layer
        self.left, self.right = walk[MADE], walk.tracks.get(ORIGIN)
        self.plans = {role: with_head(track.model) for role, track in walk.tracks.items()}
        self.tensors: dict[str, TensorResult] = {}
        self.broken: dict[str, None] = {}
        """Tensors with NaN or infinite values."""
        self.lost: int | None = None
        """The first layer after which a residual stream is not finite."""
        self.fed = Carry()
        """What the layers hand on when each is fed the other's residual stream."""

    def run(self, ids: Tensor | None, progress: Progress | None) -> None:
        """Look at all tensors; on token ids (B, T) run all layers and the logits too."""
        walk, tracks = self.walk, [track for track in (self.left, self.right) if track is not None]
        # Alone, a tied embedding is looked at where it is multiplied.
        end = EMBEDDING if self.right is None and self.left.config.tie_word_embeddings else HEAD
        if ids is not None:
            self._start(ids)
        with bar(progress, "verifying", sum(total_bytes(track.model.plan) for track in tracks)) as advance:
            for name in dict.fromkeys(name for track in tracks for name in track.plans.get(None, {})):
                if name != end:
                    for _ in self._slices(name):
                        self._look()
            for index in walk.layers():
                self._look()
                if ids is not None:
                    self._layer(index)
                for _ in walk.experts(index):
                    self._look()
                advance(sum(layer_bytes(track.model.plan, index) for track in tracks), f"layer {index}")
            logits = _Logits(self, end) if ids is not None else None
            for start, _ in self._slices(end):
                self._look()
                if logits is not None:
                    logits.add(end, start)
        self.report.tensors = list(self.tensors.values())
        good = f"{len(self.left.model.plan)} tensors without NaN or infinity"
        self.report.problems("finite weights", self.broken, good)
        if logits is not None:
            self.report.logits = logits.result()
            where = "" if self.lost is None else f"; the residual stream is lost in layer {self.lost}"
            fine = f"{len(logits.mine)} tokens, largest |logit| {logits.highest:.3g}"
            finite = math.isfinite(logits.highest)
            self.report.check("finite logits", finite, fine if finite else f"NaN or infinite{where}")

    def _start(self, ids: Tensor) -> None:
        self.mine = self.left.start(ids)
        if self.right is not None:
            self.theirs = self.right.start(ids)
            if isinstance(self.left.config, StudentConfig) and isinstance(self.right.config, TeacherConfig):
                self.zeroed = Stream(self.theirs.x)

    def _slices(self, name: str) -> Iterator[tuple[int, int]]:
        """The rows of a large tensor, with those of the models beside, where they have it in that shape."""
        shapes = {plan[name].shape for role, plan in self.plans.items() if role in (MADE, ORIGIN) and name in plan}
        recipes = {role: plan[name] for role, plan in self.plans.items() if name in plan and plan[name].shape in shapes}
        return self.walk.slices(recipes, name) if recipes else iter(())

    def _look(self) -> None:
        """Put claims to the test on what is at hand, and compare it name by name."""
        for claim in self.claims:
            claim.look(self.walk)
        one, two = self.walk.held(MADE), self.walk.held(ORIGIN)
        self.broken |= {name: None for name, held in one.items() if held.nonfinite}
        self.broken |= {f"{n} of the other": None for n, h in two.items() if h.nonfinite and one.get(n) is not h}
        for name in dict.fromkeys([*one, *two]) if self.right is not None else ():
            recipes = self.plans[MADE].get(name), self.plans[ORIGIN].get(name)
            found = _unlike(name, *recipes) or _compared(self.walk, name, one[name], two[name])
            self.tensors[name] = _worse(self.tensors.get(name, found), found)

    def _layer(self, index: int) -> None:
        """Move all streams through a layer, and the other's input through this model's layer too."""
        if self.right is None:
            self.left.layer(self.mine, index)
        else:
            self._both(self.right, index)
        ends = [stream.x for stream in (self.mine, self.theirs) if stream is not None]
        if self.lost is None and not all(bool(x.isfinite().all()) for x in ends):
            self.lost = index
        if self.dump:
            self.dump.append(f"hidden.{index}", self.mine.x)

    def _both(self, right: Track, index: int) -> None:
        left, theirs = self.left, self.theirs
        assert theirs is not None
        kinds = (layer_kind(left.config, index), layer_kind(right.config, index))
        rest = [] if self.zeroed is None else [self.zeroed]
        if not self.each_layer and kinds == ("rwkv", "attention"):
            left.mix([self.mine], index)
            right.mix([theirs], index)
            self._feed([self.mine], [theirs, *rest], right, index)
            return
        students = isinstance(left.config, StudentConfig) and isinstance(right.config, StudentConfig)
        both = students and left.config.key_value_size == right.config.key_value_size
        # v_first and k_first are part of the input: a fault there is the fault of the layer that handed them on.
        fed = Stream(theirs.x, theirs.carry if both and theirs.carry.v_first is not None else self.fed)
        nowhere = _without_rope(right, theirs.x, index) if kinds == ("gqa", "attention") else None
        one_input = _same_place(fed, self.mine)
        one_layer = self._same(right, index) and _same_place(fed, theirs)
        mine = [fed] if one_input else [fed, self.mine]
        others = [] if one_layer else [theirs]
        left.mix(mine, index)
        right.mix(others, index)
        self._feed(mine, [*others, *rest], right, index)
        if one_input:
            self.mine = replace(fed)
        if one_layer:
            theirs = self.theirs = replace(fed)
        self.fed = fed.carry
        assert fed.mixed is not None and theirs.mixed is not None
        errors = (relative_error(fed.mixed, theirs.mixed), relative_error(fed.x, theirs.x))
        firsts = _firsts_error(fed.carry, theirs.carry) if both else None
        self.report.layers.append(
            LayerResult(
                layer=index,
                kind=kinds[0],
                other_kind=kinds[1],
                mixer_error=errors[0],
                output_error=errors[1],
                firsts_error=firsts,
                nope_error=None if nowhere is None else relative_error(fed.mixed, nowhere),
                # Of both streams, in float64, where 1 - cosine has digits.
                cosine=cosine_similarity(self.mine.x.double(), theirs.x.double(), dim=-1).mean().item(),
                differs=any(not error <= NOISE[self.walk.dtype] for error in (*errors, firsts or 0.0)),
            )
        )

    def _feed(self, mine: list[Stream], theirs: list[Stream], right: Track, index: int) -> None:
        """The second half of a layer, at once where both models have the same MLP."""
        if self._same(right, index, mlp=True):
            self.left.feed([*mine, *theirs], index)
        else:
            self.left.feed(mine, index)
            right.feed(theirs, index)

    def _same(self, right: Track, index: int, mlp: bool = False) -> bool:
        """Whether the layer at hand, or its MLP, is one and the same of both models."""
        one, two = (
            {name: held for name, held in track.held.items() if not (mlp and is_attention(name))}
            for track in (self.left, right)
        )
        # Experts are not held: are they read from the same places?
        mine, theirs = (
            {name: recipe.make for plan in track.experts.get(index, {}).values() for name, recipe in plan.items()}
            for track in (self.left, right)
        )
        a, b = self.left.config, right.config
        settings = a == b and self.left.reference is right.reference
        if mlp:
            settings = (a.rms_norm_eps, a.mlp_bias, a.experts) == (b.rms_norm_eps, b.mlp_bias, b.experts)
        return settings and one == two and mine == theirs


class _Logits:
    """What comes out end to end, some of the vocabulary at a time."""

    def __init__(self, at: Pass, end: str) -> None:
        self.walk, self.dump = at.walk, at.dump
        self.mine = at.left.final_norm(at.mine.x)
        self.theirs, self.zeroed = (
            None if at.right is None or stream is None else at.right.final_norm(stream.x)
            for stream in (at.theirs, at.zeroed)
        )
        alike = at.right is not None and at.left.config.vocab_size == at.right.config.vocab_size
        self.same = alike and self.theirs is not None and self.mine.equal(self.theirs)
        self.size = min(at.plans[role][end].shape[0] for role in (MADE, ORIGIN) if role in at.plans)
        """Of the vocabulary that both have."""
        self.from_other, self.from_source = Divergence(), Divergence()
        self.highest, self.largest, self.total = 0.0, 0.0, 0.0
        self.best = {role: Best(len(self.mine)) for role in (MADE, ORIGIN)}

    def add(self, name: str, start: int) -> None:
        """The logits of the rows of both heads from `start` on, which are held under this name."""
        one, two = (self.walk.held(role).get(name) for role in (MADE, ORIGIN))
        step = max(1, LOGITS_AT_ONCE // len(self.mine))
        for low in range(start, start + len(one.values) if one else 0, step):
            assert one is not None
            rows = slice(low - start, low - start + step)
            a = self.walk.product(self.mine, one.values[rows])
            self.highest = _max(self.highest, a.abs())
            if self.dump:
                self.dump.place("logits", low, a)
            a = a[:, : max(0, self.size - low)]
            if two is None or self.theirs is None or not a.shape[1]:
                continue
            rows = slice(rows.start, rows.start + a.shape[1])
            b = a if self.same and one is two else self.walk.product(self.theirs, two.values[rows])
            difference = (a - b).abs()
            self.highest, self.largest = _max(self.highest, b.abs()), _max(self.largest, difference)
            self.total += float(difference.double().sum())
            self.best[MADE].add(low, a)
            self.best[ORIGIN].add(low, b)
            others = [a] if self.zeroed is None else [a, self.walk.product(self.zeroed, two.values[rows])]
            self.from_other.add(b, len(others), others.__getitem__)
            self.from_source.add(a, 1, [b].__getitem__)

    def result(self) -> LogitResult | None:
        """The figures, over all tokens; None where there is nothing beside."""
        if self.theirs is None:
            return None
        forward, *zeroed = (float(kl.mean()) for kl in self.from_other.result())
        agree = (self.best[MADE].index == self.best[ORIGIN].index).double().mean()
        return LogitResult(
            tokens=len(self.mine),
            vocabulary=self.size,
            max_difference=self.largest,
            mean_difference=self.total / (len(self.mine) * self.size),
            kl_other_source=forward,
            kl_source_other=float(self.from_source.result()[0].mean()),
            top1_agreement=float(agree),
            kl_attention_zeroed=zeroed[0] if zeroed else None,
        )


class Best:
    """The most likely token of each row of logits that come in blocks."""

    def __init__(self, tokens: int) -> None:
        self.index = torch.full((tokens,), -1)
        self._value = torch.full((tokens,), -math.inf)

    def add(self, start: int, logits: Tensor) -> None:
        """The logits (tokens, block) of the vocabulary from `start` on."""
        value, index = (found.cpu() for found in logits.max(dim=-1))
        better = ~(value <= self._value)  # NaN is the largest, as it is for argmax
        self.index = torch.where(better, index + start, self.index)
        self._value = torch.where(better, value, self._value.to(value.dtype))


def _without_rope(right: Track, x: Tensor, index: int) -> Tensor:
    """The teacher's attention with all tokens at position 0, which a student's GQA layer has to be."""
    nowhere = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
    # Without scaling: YaRN multiplies q and k at position 0 too.
    config = replace(right.config, rope_scaling=None)
    return llama.attention(right.normed(x, index), right.weight, config, index, positions=nowhere)


def _same_place(a: Stream, b: Stream) -> bool:
    """Whether two streams enter a layer with the same bits: one run is enough for both then."""
    pairs = ((a.x, b.x), (a.carry.v_first, b.carry.v_first), (a.carry.k_first, b.carry.k_first))
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def layer_kind(config: ModelConfig, layer: int) -> str:
    """`rwkv`, `gqa`, or `attention` for a teacher's layer."""
    return config.layer_kind(layer) if isinstance(config, StudentConfig) else "attention"


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    difference, norm = (found - expected).norm().item(), expected.norm().item()
    return difference / norm if norm else (0.0 if difference == 0 else math.inf)


def _firsts_error(fed: Carry, other: Carry) -> float | None:
    if fed.v_first is None or other.v_first is None or fed.k_first is None or other.k_first is None:
        return None
    return max(relative_error(fed.v_first, other.v_first), relative_error(fed.k_first, other.k_first))


def _max(a: float, b: Tensor) -> float:
    """With the largest value of b. NaN wins: a comparison with it must not look like a small difference."""
    return float(np.maximum(a, b.max().item()))


# --- One tensor of both ----------------------------------------------------------------------------------------------

ORDER = ("only in source", "only in other", "misshapen", "different", "equal values", "equal")
"""What a tensor can be found to be, the worst first."""


def _worse(a: TensorResult, b: TensorResult) -> TensorResult:
    """Of two parts of a tensor: the worse one, with the larger difference."""
    if a is b or a.max_difference is None or b.max_difference is None:
        return b
    worst = min(a, b, key=lambda result: ORDER.index(result.status))
    return replace(worst, max_difference=float(np.maximum(a.max_difference, b.max_difference)))


def _unlike(name: str, one: Recipe | None, two: Recipe | None) -> TensorResult | None:
    """A tensor that only one side has, or that has another shape on the other side."""
    if one is not None and two is not None:
        shapes = f"{one.shape} against {two.shape}"
        return None if one.shape == two.shape else TensorResult(name, "misshapen", None, shapes)
    found, side = (one, "source") if one is not None else (two, "other")
    assert found is not None
    return TensorResult(name, f"only in {side}", None, f"{found.dtype} {found.shape}")


def _compared(walk: Walk, name: str, one: Held, two: Held) -> TensorResult:
    """A tensor of both, or some rows of it: they have one shape."""
    if one is two:
        return TensorResult(name, "equal", 0.0)
    dtypes = "" if one.recipe.dtype == two.recipe.dtype else f"{one.recipe.dtype} against {two.recipe.dtype}"
    step = BLOCK_BYTES // 8
    pairs = list(zip(torch.split(one.values.reshape(-1), step), torch.split(two.values.reshape(-1), step), strict=True))
    largest = float(np.max(walk.pool.map(lambda pair: _difference(*pair), pairs), initial=0.0))
    return TensorResult(name, "equal values" if dtypes and largest == 0.0 else "different", largest, dtypes)


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest |a - b|; NaN where either has one, with other bits."""
    if a.dtype == b.dtype and same_bits(a, b):
        return 0.0
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return (a.to(wide) - b.to(wide)).abs().max().item()
