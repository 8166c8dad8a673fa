"""One pass over the layers of a model, alone or beside another: tensors, each layer on equal input, and logits."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hxaconv.forward import llama
from hxaconv.forward.hxa079 import Carry
from hxaconv.forward.logits import LOGITS_AT_ONCE, Divergence, Dump
from hxaconv.forward.pool import BLOCK_BYTES
from hxaconv.forward.walk import Held, Stream, Track, Walk
from hxaconv.model.config import ModelConfig, StudentConfig, TeacherConfig
from hxaconv.model.names import EMBEDDING, HEAD, is_attention
from hxaconv.model.plan import Recipe, layer_bytes, total_bytes
from hxaconv.progress import Progress, bar
from hxaconv.verification.claims import MADE, ORIGIN, Claim, States, same_bits, with_head
from hxaconv.verification.report import LayerResult, LogitResult, Report, TensorResult

SOURCE, OTHER = MADE, ORIGIN
NOISE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Relative error below which two layers count as the same: rounding in another order of summation."""


@dataclass
class _Streams:
    """All residual streams of a pass."""

    source: Stream
    other: Stream | None = None
    zeroed: Stream | None = None
    """The other with every attention output 0."""
    fed: Carry = field(default_factory=Carry)
    """What the source's layers hand on when each is fed the other's residual stream."""


class Pass:
    """The loop over the layers; `right` is None where a model is alone."""

    def __init__(
        self, report: Report, walk: Walk, dump: Dump | None, claims: Collection[Claim | States], each_layer: bool
    ) -> None:
        self.report, self.walk, self.dump, self.claims, self.each_layer = report, walk, dump, claims, each_layer
        self.left = walk[SOURCE]
        self.right = walk[OTHER] if OTHER in walk.roles else None
        self.broken: dict[str, None] = {}
        """Tensors with NaN or infinite values."""
        self.lost: int | None = None
        """The first layer after which a residual stream is not finite."""

    def run(self, ids: Tensor | None, progress: Progress | None) -> None:
        """Look at all tensors; on token ids (B, T) run all layers and the logits too."""
        models = {track.role: track.model for track in (self.left, self.right) if track is not None}
        # Alone, a tied embedding is looked at where it is multiplied.
        end = EMBEDDING if self.right is None and self.left.config.tie_word_embeddings else HEAD
        streams = None if ids is None else self._start(ids)
        with bar(progress, "verifying", sum(total_bytes(model.plan) for model in models.values())) as advance:
            for name in dict.fromkeys(name for role in models for name in self.walk.outside(role)):
                if name != end:
                    self._matrix(name, {role: m.plan[name] for role, m in models.items() if name in m.plan})
            for index in self.walk.layers():
                self.report.tensors += self._look()
                if streams is not None:
                    self._layer(streams, index)
                for _ in self.walk.experts(index):
                    self.report.tensors += self._look()
                advance(sum(layer_bytes(model.plan, index) for model in models.values()), f"layer {index}")
            heads = {role: plan[end] for role, model in models.items() if end in (plan := with_head(model))}
            highest = self._head(end, heads, streams)
        good = f"{len(self.left.model.plan)} tensors without NaN or infinity"
        self.report.problems("finite weights", self.broken, good)
        if ids is not None:
            where = "" if self.lost is None else f"; the residual stream is lost in layer {self.lost}"
            finite = f"{ids.numel()} tokens, largest |logit| {highest:.3g}"
            fine = math.isfinite(highest)
            self.report.check("finite logits", fine, finite if fine else f"NaN or infinite{where}")

    def _start(self, ids: Tensor) -> _Streams:
        streams = _Streams(self.left.start(ids))
        if self.right is not None:
            streams.other = self.right.start(ids)
            if isinstance(self.left.config, StudentConfig) and isinstance(self.right.config, TeacherConfig):
                streams.zeroed = Stream(streams.other.x)
        return streams

    def _look(self) -> list[TensorResult]:
        """Put claims to the test on what is at hand, and compare it name by name."""
        for claim in self.claims:
            claim.look(self.walk)
        one, two = self.walk.held(SOURCE), self.walk.held(OTHER)
        self.broken |= {name: None for name, held in one.items() if held.nonfinite}
        self.broken |= {f"{n} of the other": None for n, h in two.items() if h.nonfinite and one.get(n) is not h}
        names = dict.fromkeys([*one, *two]) if self.right is not None else ()
        return [_compare(self.walk, name, one.get(name), two.get(name)) for name in names]

    def _matrix(self, name: str, recipes: Mapping[str, Recipe]) -> None:
        """Look at a large tensor, some rows at a time."""
        self._add(name, recipes, [found for _ in self._slices(name, recipes) for found in self._look()])

    def _slices(self, name: str, recipes: Mapping[str, Recipe]) -> Iterator[tuple[int, int]]:
        """The rows of a tensor, with those of the models beside, where they have it in that shape."""
        shapes = {recipe.shape for recipe in recipes.values()}
        plans = {role: with_head(self.walk[role].model) for role in self.walk.roles if role not in (SOURCE, OTHER)}
        beside = {role: plan[name] for role, plan in plans.items() if name in plan and plan[name].shape in shapes}
        return self.walk.slices({**recipes, **beside}, name)

    def _add(self, name: str, recipes: Mapping[str, Recipe], found: list[TensorResult]) -> None:
        """Add the result of a tensor that was compared some rows at a time."""
        if self.right is None:
            return
        one, two = recipes.get(SOURCE), recipes.get(OTHER)
        if one is None or two is None or one.shape != two.shape:
            self.report.tensors.append(_unlike(name, one, two))
            return
        worst = min(found, key=lambda result: ORDER.index(result.status))
        differences = [result.max_difference or 0.0 for result in found]
        largest = math.nan if any(map(math.isnan, differences)) else max(differences)
        self.report.tensors.append(replace(worst, max_difference=largest))

    def _layer(self, streams: _Streams, index: int) -> None:
        """Move all streams through a layer, and the other's input through the source's layer too."""
        if self.right is None or streams.other is None:
            self.left.layer(streams.source, index)
        else:
            self._both(streams, streams.other, self.right, index)
        ends = [stream.x for stream in (streams.source, streams.other) if stream is not None]
        if self.lost is None and not all(bool(x.isfinite().all()) for x in ends):
            self.lost = index
        if self.dump:
            self.dump.append(f"hidden.{index}", streams.source.x)

    def _both(self, streams: _Streams, theirs: Stream, right: Track, index: int) -> None:
        left, kinds = self.left, (layer_kind(self.left.config, index), layer_kind(right.config, index))
        rest = [] if streams.zeroed is None else [streams.zeroed]
        if not self.each_layer and kinds == ("rwkv", "attention"):
            left.mix([streams.source], index)
            right.mix([theirs], index)
            self._feed([streams.source], [theirs, *rest], right, index)
            return
        students = isinstance(left.config, StudentConfig) and isinstance(right.config, StudentConfig)
        both = students and left.config.key_value_size == right.config.key_value_size
        # v_first and k_first are part of the input: a fault there is the fault of the layer that handed them on.
        before = theirs.carry if both and theirs.carry.v_first is not None else streams.fed
        fed = Stream(theirs.x, Carry(before.v_first, before.k_first))
        nowhere = _without_rope(right, theirs.x, index) if kinds == ("gqa", "attention") else None
        one_input = _same_place(fed, streams.source)
        one_layer = self._same(right, index) and _same_place(fed, theirs)
        mine = [fed] if one_input else [fed, streams.source]
        others = [] if one_layer else [theirs]
        left.mix(mine, index)
        right.mix(others, index)
        self._feed(mine, [*others, *rest], right, index)
        if one_input:
            streams.source = _copy(fed)
        if one_layer:
            theirs = streams.other = _copy(fed)
        streams.fed = fed.carry
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
                cosine=mean_cosine(streams.source.x, theirs.x),
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
            {name: held for name, held in self.walk.held(role).items() if not (mlp and is_attention(name))}
            for role in (SOURCE, OTHER)
        )
        # Experts are not held: are they read from the same places?
        mine, theirs = (
            {name: recipe.make for plan in self.walk.experts_of(role, index).values() for name, recipe in plan.items()}
            for role in (SOURCE, OTHER)
        )
        a, b = self.left.config, right.config
        settings = a == b and self.left.reference is right.reference
        if mlp:
            settings = (a.rms_norm_eps, a.mlp_bias, a.experts) == (b.rms_norm_eps, b.mlp_bias, b.experts)
        return settings and one == two and mine == theirs

    def _head(self, name: str, recipes: Mapping[str, Recipe], streams: _Streams | None) -> float:
        """The heads, and what comes out of them end to end, some of the vocabulary at a time: the largest |logit|."""
        if streams is None:
            if recipes:
                self._matrix(name, recipes)
            return 0.0
        end = _End(self.walk, streams, min(recipe.shape[0] for recipe in recipes.values()))
        found: list[TensorResult] = []
        for start, stop in self._slices(name, recipes):
            found += self._look()
            end.slice(name, start, stop, self.dump)
        self._add(name, recipes, found)
        self.report.logits = end.result() if self.right is not None else None
        return end.highest


class _End:
    """What is measured of the logits."""

    def __init__(self, walk: Walk, streams: _Streams, size: int) -> None:
        self.walk, self.size = walk, size
        left, right = walk[SOURCE], walk[OTHER] if streams.other is not None else None
        self.mine = left.final_norm(streams.source.x)
        self.theirs = None if right is None or streams.other is None else right.final_norm(streams.other.x)
        self.zeroed = None if right is None or streams.zeroed is None else right.final_norm(streams.zeroed.x)
        alike = right is not None and left.config.vocab_size == right.config.vocab_size
        self.same = alike and self.theirs is not None and self.mine.equal(self.theirs)
        self.from_other, self.from_source = Divergence(), Divergence()
        self.highest, self.largest, self.total = 0.0, 0.0, 0.0
        self.best = {role: Best(len(self.mine)) for role in (SOURCE, OTHER)}

    def slice(self, name: str, start: int, stop: int, dump: Dump | None) -> None:
        """The logits of the rows [start, stop) of both heads, which are held under this name."""
        one, two = (self.walk.held(role).get(name) for role in (SOURCE, OTHER))
        step = max(1, LOGITS_AT_ONCE // len(self.mine))
        for low in range(0, stop - start, step):
            high = min(stop - start, low + step)
            a = None if one is None else self.walk.product(self.mine, one.values[low:high])
            if a is not None and a.shape[1]:
                self.highest = _max(self.highest, a.abs().max().item())
                if dump:
                    dump.place("logits", start + low, a)
            kept = max(0, min(high, self.size - start) - low)
            if a is None or two is None or self.theirs is None or not kept:
                continue
            a = a[:, :kept]
            same = self.same and one is two
            b = a if same else self.walk.product(self.theirs, two.values[low : low + kept])
            zeroed = None if self.zeroed is None else self.walk.product(self.zeroed, two.values[low : low + kept])
            self._add(start + low, a, b, zeroed)

    def _add(self, start: int, a: Tensor, b: Tensor, zeroed: Tensor | None) -> None:
        difference = (a - b).abs()
        self.highest = _max(self.highest, b.abs().max().item())
        self.largest = _max(self.largest, difference.max().item())
        self.total += float(difference.double().sum())
        self.best[SOURCE].add(start, a)
        self.best[OTHER].add(start, b)
        others = [a] if zeroed is None else [a, zeroed]
        self.from_other.add(b, len(others), others.__getitem__)
        self.from_source.add(a, 1, [b].__getitem__)

    def result(self) -> LogitResult:
        """The figures, over all tokens."""
        tokens = len(self.mine)
        forward, *zeroed = (float(kl.mean()) for kl in self.from_other.result())
        agree = (self.best[SOURCE].index == self.best[OTHER].index).double().mean()
        return LogitResult(
            tokens=tokens,
            vocabulary=self.size,
            max_difference=self.largest,
            mean_difference=self.total / (tokens * self.size),
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


def _copy(stream: Stream) -> Stream:
    return Stream(stream.x, Carry(stream.carry.v_first, stream.carry.k_first), stream.mixed)


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


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Between (B, T, C) and (B, T, C), averaged over tokens; in float64, where 1 - cosine has digits."""
    return cosine_similarity(a.double(), b.double(), dim=-1).mean().item()


def _firsts_error(fed: Carry, other: Carry) -> float | None:
    if fed.v_first is None or other.v_first is None or fed.k_first is None or other.k_first is None:
        return None
    return max(relative_error(fed.v_first, other.v_first), relative_error(fed.k_first, other.k_first))


def _max(a: float, b: float) -> float:
    """NaN wins: a comparison with it must not look like a small difference."""
    return b if math.isnan(b) else max(a, b)


# --- One tensor of both ----------------------------------------------------------------------------------------------

ORDER = ("only in source", "only in other", "misshapen", "different", "equal values", "equal")
"""What a tensor can be found to be, the worst first."""


def _compare(walk: Walk, name: str, one: Held | None, two: Held | None) -> TensorResult:
    if one is None or two is None or one.recipe.shape != two.recipe.shape:
        return _unlike(name, one.recipe if one else None, two.recipe if two else None)
    if one is two:
        return TensorResult(name, "equal", 0.0)
    dtypes = "" if one.recipe.dtype == two.recipe.dtype else f"{one.recipe.dtype} against {two.recipe.dtype}"
    step = BLOCK_BYTES // 8
    pairs = list(zip(torch.split(one.values.reshape(-1), step), torch.split(two.values.reshape(-1), step), strict=True))
    found = walk.pool.map(lambda pair: _difference(*pair), pairs)
    largest = math.nan if any(map(math.isnan, found)) else max(found, default=0.0)
    return TensorResult(name, "equal values" if dtypes and largest == 0.0 else "different", largest, dtypes)


def _unlike(name: str, one: Recipe | None, two: Recipe | None) -> TensorResult:
    """A tensor that only one side has, or that has another shape on the other side."""
    found = one or two
    assert found is not None
    if one is not None and two is not None:
        return TensorResult(name, "misshapen", None, f"{one.shape} against {two.shape}")
    return TensorResult(name, f"only in {'source' if two is None else 'other'}", None, f"{found.dtype} {found.shape}")


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest |a - b|; NaN where either has one, with other bits."""
    if a.dtype == b.dtype and same_bits(a, b):
        return 0.0
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return (a.to(wide) - b.to(wide)).abs().max().item()
