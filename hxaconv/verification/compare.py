"""Two models side by side: their tensors, each layer on equal input, and their logits."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hxaconv.errors import raise_all
from hxaconv.forward import llama
from hxaconv.forward.hxa079 import Carry
from hxaconv.forward.logits import LOGITS_AT_ONCE, Divergence, Dump, dumping
from hxaconv.forward.pool import BLOCK_BYTES
from hxaconv.forward.walk import Held, Stream, Walk, compute_settings
from hxaconv.model.config import ModelConfig, StudentConfig, TeacherConfig
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD
from hxaconv.model.plan import Recipe, layer_bytes, same_ranges, total_bytes
from hxaconv.progress import Progress, bar
from hxaconv.verification.claims import MADE, ORIGIN, Claim, States
from hxaconv.verification.report import (
    LayerResult,
    LogitResult,
    Report,
    TensorResult,
    Thresholds,
    config_differences,
    judge,
    usual_expectation,
)
from hxaconv.verification.values import same_bits, with_head

SOURCE, OTHER = MADE, ORIGIN
NOISE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Relative error below which two layers count as the same: rounding in another order of summation."""


def compare_models(
    source: Model,
    other: Model,
    *,
    ids: Tensor | None,
    expect: str | None = None,
    thresholds: Thresholds | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    logits_out: Path | None = None,
    beside: Mapping[str, Model] | None = None,
    claims: Collection[Claim | States] = (),
    each_layer: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Compare two complete models on token ids (B, T), holding one layer of each; without ids, their tensors only.

    `expect` is identical, close or report; None: identical for the same architecture, else report.
    `claims` are about the source, the other, and models `beside` them by role; each becomes a check.
    Without `each_layer`, a student's RWKV layers are not fed the teacher's input as well, which tells nothing of
    untrained ones. `logits_out` receives the source's input_ids, logits and hidden.{i}.

    Raises:
        HxaconvError: when their layers cannot be fed the same input.
    """
    began = time.monotonic()
    expect = expect or usual_expectation(source.config, other.config)
    report = Report(source=source.label, other=other.label, expect=expect)
    report.config_differences = config_differences(source.config, other.config)
    if ids is not None:
        _refuse_incomparable(source.config, other.config)
        report.settings = {"tokens": ids.shape[1], "batch": ids.shape[0], "dtype": dtype, "device": device}
    compute, device = compute_settings(dtype, device)
    with (
        dumping(logits_out, source.config, ids, compute) as dump,
        Walk({SOURCE: source, OTHER: other, **(beside or {})}, dtype=compute, device=device) as walk,
    ):
        _Comparison(report, walk, dump, claims, each_layer=each_layer).run(
            None if ids is None else ids.to(device), progress
        )
    if isinstance(source.config, TeacherConfig) and isinstance(other.config, StudentConfig):
        report.notes.append("Name the student first to see how near it is to attention zeroed, and its GQA layers.")
    judge(report, thresholds or Thresholds(), source)
    for claim in claims:
        claim.conclude(report)
    report.seconds = time.monotonic() - began
    return report


def _refuse_incomparable(source: ModelConfig, other: ModelConfig) -> None:
    names = ("num_hidden_layers", "hidden_size")
    pairs = [(name, getattr(source, name), getattr(other, name)) for name in names]
    problems = [f"{name} is {a} here, {b} there" for name, a, b in pairs if a != b]
    raise_all("these two models cannot be fed the same input:", problems, hint="Is it the right teacher?")


@dataclass
class _Streams:
    """All residual streams of a comparison."""

    source: Stream
    other: Stream
    zeroed: Stream | None
    """The other with every attention output 0."""
    fed: Carry
    """What the source's layers hand on when each is fed the other's residual stream."""


class _Comparison:
    """The loop of a comparison over the layers."""

    def __init__(
        self, report: Report, walk: Walk, dump: Dump | None, claims: Collection[Claim | States], *, each_layer: bool
    ) -> None:
        self.report, self.walk, self.dump, self.claims, self.each_layer = report, walk, dump, claims, each_layer
        self.left, self.right = walk[SOURCE], walk[OTHER]
        self.students = isinstance(self.left.config, StudentConfig) and isinstance(self.right.config, StudentConfig)

    def run(self, ids: Tensor | None, progress: Progress | None) -> None:
        """Compare all tensors, and on token ids (B, T) all layers and the logits."""
        plans = [track.model.plan for track in (self.left, self.right)]
        streams = None if ids is None else self._start(ids)
        with bar(progress, "verifying", sum(map(total_bytes, plans))) as advance:
            self._outside()
            for index in self.walk.layers():
                self.report.tensors += self._compared()
                if streams is not None:
                    self._layer(streams, index)
                    if self.dump:
                        self.dump.append(f"hidden.{index}", streams.source.x)
                for _ in self.walk.experts(index):
                    self.report.tensors += compare_held(self.walk, SOURCE, OTHER)
                advance(sum(layer_bytes(plan, index) for plan in plans), f"layer {index}")
            self._head(streams)

    def _start(self, ids: Tensor) -> _Streams:
        theirs = self.right.start(ids)
        zeroed = isinstance(self.left.config, StudentConfig) and isinstance(self.right.config, TeacherConfig)
        return _Streams(self.left.start(ids), theirs, Stream(theirs.x) if zeroed else None, Carry())

    def _outside(self) -> None:
        """What stands outside the layers, but for the heads."""
        one, two = self.walk.outside(SOURCE), self.walk.outside(OTHER)
        for name in dict.fromkeys([*one, *two]):
            if name != HEAD:
                self._matrix(name, one.get(name), two.get(name))

    def _matrix(self, name: str, one: Recipe | None, two: Recipe | None) -> None:
        if one is None or two is None or one.shape != two.shape:
            result = unpaired(name, one, two) if one is None or two is None else misshapen(name, one, two)
            self.report.tensors.append(result)
            return
        parts = self.walk.slices({SOURCE: one, OTHER: two, **self._beside(name, one)}, name)
        self.report.tensors.append(joined(result for _ in parts for result in self._compared()))

    def _beside(self, name: str, like: Recipe) -> dict[str, Recipe]:
        """The same tensor of the models beside, where they have one of that shape."""
        plans = {role: with_head(self.walk[role].model) for role in self.walk.roles if role not in (SOURCE, OTHER)}
        return {role: plan[name] for role, plan in plans.items() if name in plan and plan[name].shape == like.shape}

    def _compared(self) -> list[TensorResult]:
        """Results for what is at hand, which claims are put to the test on as well."""
        if self.claims:
            at_hand = self.walk.at_hand()
            for claim in self.claims:
                claim.look(at_hand, self.walk.pool)
        return list(compare_held(self.walk, SOURCE, OTHER))

    def _layer(self, streams: _Streams, index: int) -> None:
        """Move all streams through a layer, and the other's input through the source's layer too."""
        left, right, theirs = self.left, self.right, streams.other
        if not self.each_layer and self._kinds(index) == ("rwkv", "attention"):
            left.mix([streams.source], index)
            right.mix([theirs], index)
            self._feed([streams.source], [theirs, *([] if streams.zeroed is None else [streams.zeroed])], index)
            return
        both = self.students and left.config.key_value_size == right.config.key_value_size
        # v_first and k_first are part of the input: a fault there is the fault of the layer that handed them on.
        before = theirs.carry if both and theirs.carry.v_first is not None else streams.fed
        fed = Stream(theirs.x, Carry(before.v_first, before.k_first))
        nowhere = self._without_rope(theirs.x, index)
        one_input, one_layer = _same_place(fed, streams.source), self._same_layer(index) and _same_place(fed, theirs)
        mine = [fed] if one_input else [fed, streams.source]
        rest = [] if one_layer else [theirs]
        left.mix(mine, index)
        right.mix(rest, index)
        if streams.zeroed is not None:
            rest.append(streams.zeroed)
        self._feed(mine, rest, index)
        if one_input:
            streams.source = _copy(fed)
        if one_layer:
            streams.other = _copy(fed)
        streams.fed = fed.carry
        self.report.layers.append(self._result(fed, nowhere, streams, index, both=both))

    def _feed(self, mine: list[Stream], theirs: list[Stream], index: int) -> None:
        """The second half of a layer, at once where both models have the same MLP."""
        if self._same_mlp(index):
            self.left.feed([*mine, *theirs], index)
        else:
            self.left.feed(mine, index)
            self.right.feed(theirs, index)

    def _kinds(self, index: int) -> tuple[str, str]:
        return layer_kind(self.left.config, index), layer_kind(self.right.config, index)

    def _result(self, fed: Stream, nowhere: Tensor | None, streams: _Streams, index: int, *, both: bool) -> LayerResult:
        assert fed.mixed is not None and streams.other.mixed is not None
        errors = (relative_error(fed.mixed, streams.other.mixed), relative_error(fed.x, streams.other.x))
        firsts = _firsts_error(fed.carry, streams.other.carry) if both else None
        return LayerResult(
            layer=index,
            kind=layer_kind(self.left.config, index),
            other_kind=layer_kind(self.right.config, index),
            mixer_error=errors[0],
            output_error=errors[1],
            firsts_error=firsts,
            nope_error=None if nowhere is None else relative_error(fed.mixed, nowhere),
            cosine=mean_cosine(streams.source.x, streams.other.x),
            differs=any(not error <= NOISE[self.walk.dtype] for error in (*errors, firsts or 0.0)),
        )

    def _without_rope(self, x: Tensor, index: int) -> Tensor | None:
        """For a student's GQA layer, the teacher's attention with all tokens at position 0."""
        if self._kinds(index) != ("gqa", "attention"):
            return None
        nowhere = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
        # Without scaling: YaRN multiplies q and k at position 0 too.
        right, config = self.right, replace(self.right.config, rope_scaling=None)
        return llama.attention(right.normed(x, index), right.weight, config, index, positions=nowhere)

    def _same_layer(self, index: int) -> bool:
        """Whether the layer at hand is one and the same of both models."""
        one, two = self.walk.held(SOURCE), self.walk.held(OTHER)
        alike = self.left.config == self.right.config and self.left.reference is self.right.reference
        return alike and one == two and self._same_experts(index)

    def _same_mlp(self, index: int) -> bool:
        one, two = ({n: h for n, h in self.walk.held(r).items() if ".self_attn." not in n} for r in (SOURCE, OTHER))
        configs = [(c.rms_norm_eps, c.mlp_bias, c.experts) for c in (self.left.config, self.right.config)]
        return one == two and configs[0] == configs[1] and self._same_experts(index)

    def _same_experts(self, index: int) -> bool:
        """Whether the layer's experts, which are not held, are read from the same places."""
        one, two = (self.walk.experts_of(role, index) for role in (SOURCE, OTHER))
        return one.keys() == two.keys() and all(one[name].make == two[name].make for name in one)

    def _head(self, streams: _Streams | None) -> None:
        """The heads, and what comes out of them end to end, some of the vocabulary at a time."""
        plans = [with_head(track.model) for track in (self.left, self.right)]
        one, two = (plan.get(HEAD) for plan in plans)
        if one is None or two is None:
            if one is not None or two is not None:
                self.report.tensors.append(unpaired(HEAD, one, two))
            return
        tied = next((r for r in self.report.tensors if r.name == EMBEDDING), None)
        embeddings = [plan.get(EMBEDDING) for plan in plans]
        if streams is None:
            known = all(e is not None and same_ranges(e, head) for e, head in zip(embeddings, (one, two), strict=True))
            if known and tied is not None:
                self.report.tensors.append(replace(tied, name=HEAD))
            else:
                self._matrix(HEAD, one, two)
            return
        end = _End(self.walk, streams, min(one.shape[0], two.shape[0]))
        found: list[TensorResult] = []
        for start, stop in self.walk.slices({SOURCE: one, OTHER: two, **self._beside(HEAD, one)}, HEAD):
            if one.shape == two.shape:
                found += self._compared()
            end.slice(start, stop, self.dump)
        self.report.tensors.append(joined(found) if found else misshapen(HEAD, one, two))
        self.report.logits = end.result()


class _End:
    """What is measured of the logits."""

    def __init__(self, walk: Walk, streams: _Streams, size: int) -> None:
        self.walk, self.size = walk, size
        left, right = walk[SOURCE], walk[OTHER]
        self.mine, self.theirs = left.final_norm(streams.source.x), right.final_norm(streams.other.x)
        self.zeroed = None if streams.zeroed is None else right.final_norm(streams.zeroed.x)
        self.same = self.mine.equal(self.theirs) and left.config.vocab_size == right.config.vocab_size
        self.from_other, self.from_source = Divergence(), Divergence()
        self.largest, self.total = 0.0, 0.0
        self.best = {role: Best(len(self.mine)) for role in (SOURCE, OTHER)}

    def slice(self, start: int, stop: int, dump: Dump | None) -> None:
        """The logits of the rows [start, stop) of both heads, which are held."""
        one, two = (self.walk.held(role).get(HEAD) for role in (SOURCE, OTHER))
        step = max(1, LOGITS_AT_ONCE // len(self.mine))
        for low in range(0, stop - start, step):
            high = min(stop - start, low + step)
            a = None if one is None else self.walk.product(self.mine, one.values[low:high])
            if dump and a is not None and a.shape[1]:
                dump.place("logits", start + low, a)
            kept = max(0, min(high, self.size - start) - low)
            if a is None or two is None or not kept:
                continue
            a = a[:, :kept]
            same = self.same and one is two
            b = a if same else self.walk.product(self.theirs, two.values[low : low + kept])
            zeroed = None if self.zeroed is None else self.walk.product(self.zeroed, two.values[low : low + kept])
            self._add(start + low, a, b, zeroed)

    def _add(self, start: int, a: Tensor, b: Tensor, zeroed: Tensor | None) -> None:
        difference = (a - b).abs()
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


def compare_held(walk: Walk, source: str, other: str) -> Iterator[TensorResult]:
    """What two models of a walk hold now, name by name."""
    one, two = walk.held(source), walk.held(other)
    for name in dict.fromkeys([*one, *two]):
        yield _compare(walk, name, one.get(name), two.get(name))


def joined(results: Iterable[TensorResult]) -> TensorResult:
    """The result for a tensor that was compared some rows at a time."""
    found = list(results)
    worst = min(found, key=lambda result: ORDER.index(result.status))
    differences = [result.max_difference or 0.0 for result in found]
    largest = math.nan if any(map(math.isnan, differences)) else max(differences)
    return TensorResult(worst.name, worst.status, largest, worst.detail)


ORDER = ("only in source", "only in other", "misshapen", "different", "equal values", "equal")
"""What a tensor can be found to be, the worst first."""


def _compare(walk: Walk, name: str, one: Held | None, two: Held | None) -> TensorResult:
    if one is None or two is None:
        return unpaired(name, one.recipe if one else None, two.recipe if two else None)
    if one is two:
        return TensorResult(name, "equal", 0.0)
    if one.recipe.shape != two.recipe.shape:
        return misshapen(name, one.recipe, two.recipe)
    dtypes = "" if one.recipe.dtype == two.recipe.dtype else f"{one.recipe.dtype} against {two.recipe.dtype}"
    step = BLOCK_BYTES // 8
    pairs = list(zip(torch.split(one.values.reshape(-1), step), torch.split(two.values.reshape(-1), step), strict=True))
    found = walk.pool.map(lambda pair: _difference(*pair), pairs)
    largest = math.nan if any(map(math.isnan, found)) else max(found, default=0.0)
    return TensorResult(name, "equal values" if dtypes and largest == 0.0 else "different", largest, dtypes)


def unpaired(name: str, source: Recipe | None, other: Recipe | None) -> TensorResult:
    """A tensor that only one side has."""
    found = source or other
    assert found is not None
    return TensorResult(name, f"only in {'source' if other is None else 'other'}", None, f"{found.dtype} {found.shape}")


def misshapen(name: str, source: Recipe, other: Recipe) -> TensorResult:
    """A tensor of another shape on the other side."""
    return TensorResult(name, "misshapen", None, f"{source.shape} against {other.shape}")


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest |a - b|; NaN where either has one, with other bits."""
    if a.dtype == b.dtype and same_bits(a, b):
        return 0.0
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return (a.to(wide) - b.to(wide)).abs().max().item()
