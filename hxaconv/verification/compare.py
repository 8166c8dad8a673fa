"""Two models side by side: their tensors, each layer on equal input, and their logits."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hxaconv.errors import raise_all
from hxaconv.forward import llama
from hxaconv.forward.dump import Dump, dumping
from hxaconv.forward.hxa079 import Carry
from hxaconv.forward.runner import Runner, Stream, compute_settings
from hxaconv.model.config import ModelConfig, StudentConfig, TeacherConfig
from hxaconv.model.model import Model
from hxaconv.model.names import layer_index
from hxaconv.model.plan import Plan, layer_bytes, total_bytes
from hxaconv.progress import Progress, bar
from hxaconv.verification.expectations import Thresholds, config_differences, judge, usual_expectation
from hxaconv.verification.report import LayerResult, LogitResult, Report, TensorResult
from hxaconv.verification.tensors import compare_tensor, with_head

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
    progress: Progress | None = None,
) -> Report:
    """Compare two complete models on token ids (B, T), holding one layer of each; without ids, their tensors only.

    `expect` is identical, close or report; None: identical for the same architecture, else report.
    `logits_out` receives the source's input_ids, logits and hidden.{i}.

    Raises:
        HxaconvError: when their layers cannot be fed the same input.
    """
    began = time.monotonic()
    expect = expect or usual_expectation(source.config, other.config)
    report = Report(source=source.label, other=other.label, expect=expect)
    report.config_differences = config_differences(source.config, other.config)
    if ids is None:
        report.tensors = compare_all(source, other)
    else:
        _refuse_incomparable(source.config, other.config)
        report.settings = {"tokens": ids.shape[1], "batch": ids.shape[0], "dtype": dtype, "device": device}
        _forward(report, source, other, ids, logits_out, progress)
    if isinstance(source.config, TeacherConfig) and isinstance(other.config, StudentConfig):
        report.notes.append("Name the student first to see how near it is to attention zeroed, and its GQA layers.")
    judge(report, thresholds or Thresholds(), source)
    report.seconds = time.monotonic() - began
    return report


def _forward(
    report: Report, source: Model, other: Model, ids: Tensor, logits_out: Path | None, progress: Progress | None
) -> None:
    dtype, device = report.settings["dtype"], report.settings["device"]
    compute, device = compute_settings(dtype, device)
    left, right = (Runner(model, dtype=compute, device=device) for model in (source, other))
    with dumping(logits_out, source.config, ids, compute) as dump:
        _run(report, left, right, ids.to(device), dump, progress)


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


def _run(
    report: Report, left: Runner, right: Runner, ids: Tensor, dump: Dump | None, progress: Progress | None
) -> None:
    plans = with_head(left.model), with_head(right.model)
    theirs = right.start(ids)
    yardstick = isinstance(left.config, StudentConfig) and isinstance(right.config, TeacherConfig)
    streams = _Streams(left.start(ids), theirs, Stream(theirs.x) if yardstick else None, Carry())
    with bar(progress, "verifying", total_bytes(plans[0]) + total_bytes(plans[1])) as advance:
        report.tensors += compare_group(*plans, None)
        for index in range(left.config.num_hidden_layers):
            # The bytes are compared just before they are converted: the second reading finds them in memory.
            report.tensors += compare_group(*plans, index)
            report.layers.append(_layer(left, right, streams, index))
            if dump:
                dump.append(f"hidden.{index}", streams.source.x)
            advance(sum(layer_bytes(plan, index) for plan in plans), f"layer {index}")
        report.logits = _logits(left, right, streams, dump)


def compare_all(source: Model, other: Model) -> list[TensorResult]:
    """The tensors of both models, without a forward."""
    plans = with_head(source), with_head(other)
    layers = range(max(source.config.num_hidden_layers, other.config.num_hidden_layers))
    return [result for layer in (None, *layers) for result in compare_group(*plans, layer)]


def compare_group(source: Plan, other: Plan, layer: int | None) -> list[TensorResult]:
    """The tensors of one layer of both plans, or (None) those outside the layers."""
    names = [name for name in dict.fromkeys([*source, *other]) if layer_index(name) == layer]
    return [compare_tensor(name, source.get(name), other.get(name)) for name in names]


def _layer(left: Runner, right: Runner, streams: _Streams, index: int) -> LayerResult:
    """Move all streams through a layer, and the other's input through the source's layer too."""
    left.weights.release()
    right.weights.release()
    both = isinstance(left.config, StudentConfig) and isinstance(right.config, StudentConfig)
    both = both and left.config.key_value_size == right.config.key_value_size
    # v_first and k_first are part of the input: a fault there is the fault of the layer that handed them on.
    before = streams.other.carry if both and streams.other.carry.v_first is not None else streams.fed
    fed = Stream(streams.other.x, Carry(before.v_first, before.k_first))
    nope = _nope_error(left, right, streams.other.x, index)
    one_input = _same_place(fed, streams.source)
    left.layer(fed, index)
    if one_input:
        streams.source = Stream(fed.x, Carry(fed.carry.v_first, fed.carry.k_first), fed.mixed)
    else:
        left.layer(streams.source, index)
    right.layer(streams.other, index)
    if streams.zeroed is not None:
        right.layer(streams.zeroed, index, without_mixer=True)
    streams.fed = fed.carry
    assert fed.mixed is not None and streams.other.mixed is not None
    errors = (relative_error(fed.mixed, streams.other.mixed), relative_error(fed.x, streams.other.x))
    handed_on = _handed_on_error(fed.carry, streams.other.carry) if both else None
    return LayerResult(
        layer=index,
        kind=layer_kind(left.config, index),
        other_kind=layer_kind(right.config, index),
        mixer_error=errors[0],
        output_error=errors[1],
        handed_on_error=handed_on,
        nope_error=nope,
        cosine=mean_cosine(streams.source.x, streams.other.x),
        differs=any(not error <= NOISE[left.weights.dtype] for error in (*errors, handed_on or 0.0)),
    )


def _same_place(a: Stream, b: Stream) -> bool:
    """Whether two streams enter a layer with the same bits: one run is enough for both then."""
    pairs = ((a.x, b.x), (a.carry.v_first, b.carry.v_first), (a.carry.k_first, b.carry.k_first))
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def _nope_error(left: Runner, right: Runner, x: Tensor, index: int) -> float | None:
    """A student's GQA layer against the teacher's attention with all tokens at position 0."""
    kinds = layer_kind(left.config, index), layer_kind(right.config, index)
    if kinds != ("gqa", "attention"):
        return None
    found = left.mixer(left.normed(x, index), index, Carry())
    nowhere = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
    expected = llama.attention(right.normed(x, index), right.weights, right.config, index, positions=nowhere)
    return relative_error(found, expected)


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


def _handed_on_error(fed: Carry, other: Carry) -> float | None:
    if fed.v_first is None or other.v_first is None or fed.k_first is None or other.k_first is None:
        return None
    return max(relative_error(fed.v_first, other.v_first), relative_error(fed.k_first, other.k_first))


def _logits(left: Runner, right: Runner, streams: _Streams, dump: Dump | None) -> LogitResult:
    """End to end, some tokens at a time."""
    left.weights.release()
    right.weights.release()
    size = min(left.config.vocab_size, right.config.vocab_size)
    step = min(left.tokens_per_step, right.tokens_per_step)
    their_streams = [streams.other.x] if streams.zeroed is None else [streams.other.x, streams.zeroed.x]
    largest, sums, tokens = 0.0, torch.zeros(5, dtype=torch.float64), 0
    for (mine,), theirs in zip(left.logits([streams.source.x], step), right.logits(their_streams, step), strict=True):
        if dump:
            dump.append("logits", mine)
        a, b, zeroed = (part[:, :size] for part in (mine, theirs[0], theirs[-1]))
        difference = (a - b).abs()
        largest = _max(largest, difference.max().item())
        agree = (a.argmax(dim=-1) == b.argmax(dim=-1)).double()
        parts = (difference.mean(dim=-1), kl(b, a), kl(a, b), agree, kl(b, zeroed))
        sums += torch.stack([part.double().sum().cpu() for part in parts])
        tokens += len(a)
    mean_difference, forward, backward, agreement, attention_zeroed = (sums / tokens).tolist()
    return LogitResult(
        tokens=tokens,
        vocabulary=size,
        max_difference=largest,
        mean_difference=mean_difference,
        kl_other_source=forward,
        kl_source_other=backward,
        top1_agreement=agreement,
        kl_attention_zeroed=None if streams.zeroed is None else attention_zeroed,
    )


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of logits (tokens, V), in nats: (tokens,)."""
    log_a, log_b = a.log_softmax(dim=-1), b.log_softmax(dim=-1)
    return (log_a.exp() * (log_a - log_b)).sum(dim=-1)


def _max(a: float, b: float) -> float:
    """NaN wins: a comparison with it must not look like a small difference."""
    return b if math.isnan(b) else max(a, b)
