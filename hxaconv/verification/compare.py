"""A model checked by itself, or two held against each other: claims, expectations and their limits."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from hxaconv.errors import Inconsistent, raise_all, shortened
from hxaconv.forward.walk import Walk, compute_dtype
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD
from hxaconv.model.plan import check, same_bytes
from hxaconv.progress import Progress
from hxaconv.verification.claims import MADE, ORIGIN, Claim
from hxaconv.verification.dump import dumping
from hxaconv.verification.measure import Pass
from hxaconv.verification.report import LogitResult, Report


@dataclass(frozen=True, slots=True)
class Compute:
    """What a forward computes in, where, and what is kept of it."""

    dtype: str = "float32"
    device: str = "cpu"
    logits_out: Path | None = None
    """A file for the source's input_ids, logits and hidden.{i}."""

    def settings(self, ids: Tensor) -> dict[str, object]:
        """What the report has of it."""
        return {"tokens": ids.shape[1], "batch": ids.shape[0], "dtype": self.dtype, "device": self.device}


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What lets a comparison pass; what is None is checked only where the expectation has a limit."""

    logits: float | None = None
    """Largest difference of a logit."""
    layer: float | None = None
    """Relative error of a layer on equal input."""
    kl: float | None = None
    """KL divergence in nats per token, in either direction."""
    may_differ: tuple[str, ...] = ()
    """Names of settings."""


USUAL = {
    # The same bits take the same path through the same code.
    "identical": Thresholds(logits=0.0),
    # Rounding all weights of a layer to bf16 costs up to 4e-3.
    "close": Thresholds(layer=1e-2, kl=1e-3),
}
"""What each expectation allows where nothing is given."""


def verify_model(
    model: Model,
    *,
    ids: Tensor,
    how: Compute = Compute(),
    beside: Mapping[str, Model] | None = None,
    claims: Collection[Claim] = (),
    progress: Progress | None = None,
) -> Report:
    """Check a complete model against its own config, and run it on token ids (B, T).

    The forward is left out where names or shapes are wrong already. `claims` are about it and models `beside` it.
    """
    report = Report(source=model.label, settings=how.settings(ids))
    _check_tensors(report, model)
    _check_config(report, model.config)
    if report.passed:
        _run(report, {MADE: model, **(beside or {})}, ids, claims, how, progress)
    return report


def compare_models(
    source: Model,
    other: Model,
    *,
    ids: Tensor | None,
    expect: str | None = None,
    thresholds: Thresholds = Thresholds(),
    how: Compute = Compute(),
    beside: Mapping[str, Model] | None = None,
    claims: Collection[Claim] = (),
    each_layer: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Compare two complete models on token ids (B, T), holding one layer of each; without ids, their tensors only.

    `expect` is identical, close or report; None: identical for the same architecture, else report.
    `claims` are about the source, the other, and models `beside` them by role; each becomes a check.
    Without `each_layer`, a student's RWKV layers are not fed the teacher's input as well, which shows nothing of
    untrained ones.

    Raises:
        HxaconvError: when their layers cannot be fed the same input.
    """
    same_kind = isinstance(source.config, StudentConfig) == isinstance(other.config, StudentConfig)
    report = Report(source=source.label, other=other.label, expect=expect or ("identical" if same_kind else "report"))
    # Whether the head is tied shows in the tensors, where an explicit copy counts as the same.
    both_students = same_kind and isinstance(source.config, StudentConfig)
    names = {f.name for f in fields(StudentConfig if both_students else ModelConfig)} - {"tie_word_embeddings"}
    report.config_differences = [
        f"{name} is {getattr(source.config, name)!r}, the other's is {getattr(other.config, name)!r}"
        for name in sorted(names - set(thresholds.may_differ))
        if getattr(source.config, name) != getattr(other.config, name)
    ]
    if ids is not None:
        sizes = [(n, getattr(source.config, n), getattr(other.config, n)) for n in ("num_hidden_layers", "hidden_size")]
        problems = [f"{name} is {a} here, {b} there" for name, a, b in sizes if a != b]
        raise_all("these two models cannot be fed the same input:", problems, hint="Is it the right teacher?")
        report.settings = how.settings(ids)
    _run(report, {MADE: source, ORIGIN: other, **(beside or {})}, ids, claims, how, progress, each_layer=each_layer)
    if report.expect in USUAL:
        if not any(claim.check == "tensors" for claim in claims):
            _same_tensors(report, exactly=report.expect == "identical")
        if not same_kind and report.expect == "identical":
            report.notes.append(
                "A student and its teacher are never identical: leave --expect out, or take untrained, calibrated or"
                " attention-trained."
            )
        report.problems("config", report.config_differences, "the same settings")
    if report.logits is not None:
        given = {name: limit for name, limit in asdict(thresholds).items() if limit is not None}
        _within(report, report.logits, replace(USUAL.get(report.expect, Thresholds()), **given))
    elif report.expect in USUAL:
        report.notes.append("Only tensors were compared: no forward was run.")
    return report


def _run(
    report: Report,
    models: Mapping[str, Model],
    ids: Tensor | None,
    claims: Collection[Claim],
    how: Compute,
    progress: Progress | None,
    each_layer: bool = True,
) -> None:
    """One pass over all tensors, with a forward where there are ids."""
    began = time.monotonic()
    compute = compute_dtype(how.dtype)
    with (
        dumping(how.logits_out, models[MADE].config, ids, compute) as dump,
        Walk(models, dtype=compute, device=how.device) as walk,
    ):
        Pass(report, walk, dump, claims, each_layer).run(None if ids is None else ids.to(how.device), progress)
    for claim in claims:
        claim.conclude(report)
    report.seconds = time.monotonic() - began


# --- Before a forward: one model and its own config ------------------------------------------------------------------


def _check_tensors(report: Report, model: Model) -> None:
    """Names, shapes and dtypes, against the architecture, independently of any recipe."""
    expected, plan = expected_tensors(model.config), model.plan
    if HEAD in plan and HEAD not in expected:
        same = EMBEDDING in plan and same_bytes(plan[HEAD], plan[EMBEDDING])
        report.check("tied head", same, f"the stored head and the embedding: {'equal' if same else 'different'}")
        plan = {name: recipe for name, recipe in plan.items() if name != HEAD}
    try:
        check(plan, expected, model.label)
        report.check("names and shapes", True, f"{len(expected)} tensors, all as expected")
    except Inconsistent as error:
        report.check("names and shapes", False, str(error))


def _check_config(report: Report, config: ModelConfig) -> None:
    problems = []
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append(f"{config.num_key_value_heads} kv heads do not divide {config.num_attention_heads} heads")
    if config.head_dim % 2:
        problems.append(f"head_dim {config.head_dim} is odd: RoPE rotates pairs")
    if not 0 < config.rms_norm_eps < 1e-2:
        problems.append(f"rms_norm_eps {config.rms_norm_eps} is no small positive number")
    if not config.rope_theta > 1:
        problems.append(f"rope_theta {config.rope_theta} is not above 1")
    if isinstance(config, StudentConfig):
        outside = [layer for layer in config.gqa_layers if not 0 <= layer < config.num_hidden_layers]
        problems += [f"GQA layer {layer} is outside 0..{config.num_hidden_layers - 1}" for layer in outside]
        if 0 in config.gqa_layers and config.rwkv_layers:
            report.notes.append(
                "Layer 0 is GQA: the published trainer mixes a zero v_first into the first RWKV layer, the inference"
                " engine takes that layer's own v and k. The forward here follows the engine."
            )
    report.problems("config", problems, "consistent")


# --- After it: what an expectation and its limits add ----------------------------------------------------------------


def _same_tensors(report: Report, *, exactly: bool) -> None:
    fine = {"equal"} if exactly else {"equal", "equal values", "different"}
    wrong = [result for result in report.tensors if result.status not in fine]
    text = f"{len(report.tensors)} tensors " + ("equal bits" if exactly else "on both sides, of the same shapes")
    if wrong:
        amounts = [f" by {result.max_difference:.3g}" if result.max_difference else "" for result in wrong]
        shown = [f"{r.name} {r.status}{by} {r.detail}".rstrip() for r, by in zip(wrong, amounts, strict=True)]
        most = 3 if len(shown) > 4 else 4  # a fourth name takes no more room than its count
        text = f"{len(wrong)} of {len(report.tensors)}: {shortened(shown, '; ', most=most)}"
    report.check("tensors", not wrong, text)


def _within(report: Report, logits: LogitResult, limits: Thresholds) -> None:
    layer = report.first_difference
    first = "" if layer is None else f"; the first layer that differs on equal input is {layer}"
    if limits.logits is not None:
        found = logits.max_difference
        report.check("logits", found <= limits.logits, f"max |d| {found:.3g}, allowed {limits.logits:.3g}{first}")
    if limits.layer is not None:
        # Of NaN, numpy takes the first.
        worst = report.layers[int(np.argmax([result.output_error for result in report.layers]))]
        text = f"relative error at most {worst.output_error:.3g} (layer {worst.layer}), allowed {limits.layer:.3g}"
        report.check("layers", worst.output_error <= limits.layer, text + first)
    if limits.kl is not None:
        kl = float(np.maximum(logits.kl_other_source, logits.kl_source_other))
        report.check("KL", kl <= limits.kl, f"{kl:.3g} nats per token, allowed {limits.kl:.3g}")
