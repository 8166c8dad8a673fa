"""One model by itself: its tensors are those of its config, its values finite, its logits finite."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from hxaconv.errors import shortened
from hxaconv.formats.dtypes import FLOATS
from hxaconv.forward.logits import LOGITS_AT_ONCE, Dump, dumping
from hxaconv.forward.walk import Walk, compute_settings
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD
from hxaconv.model.plan import Recipe, layer_bytes, same_bytes, total_bytes
from hxaconv.progress import Progress, bar
from hxaconv.verification.claims import MADE, Claim
from hxaconv.verification.report import Report
from hxaconv.verification.values import with_head

MODEL = MADE


def verify_model(
    model: Model,
    *,
    ids: Tensor,
    dtype: str = "float32",
    device: str = "cpu",
    logits_out: Path | None = None,
    beside: Mapping[str, Model] | None = None,
    claims: Collection[Claim] = (),
    progress: Progress | None = None,
) -> Report:
    """Check a complete model against its own config, and run it on token ids (B, T).

    The forward is left out where names or shapes are wrong already. `claims` are about it and models `beside` it.
    """
    began = time.monotonic()
    report = Report(source=model.label)
    report.settings = {"tokens": ids.shape[1], "batch": ids.shape[0], "dtype": dtype, "device": device}
    _check_tensors(report, model)
    _check_config(report, model.config)
    if report.passed:
        compute, device = compute_settings(dtype, device)
        with (
            dumping(logits_out, model.config, ids, compute) as dump,
            Walk({MODEL: model, **(beside or {})}, dtype=compute, device=device) as walk,
        ):
            _run(report, walk, ids.to(device), dump, claims, progress)
    report.seconds = time.monotonic() - began
    return report


def _check_tensors(report: Report, model: Model) -> None:
    """Names, shapes and dtypes, against what the architecture says independently of any recipe."""
    expected, plan = expected_tensors(model.config), model.plan
    if HEAD in plan and HEAD not in expected:
        same = EMBEDDING in plan and same_bytes(plan[HEAD], plan[EMBEDDING])
        report.check("tied head", same, f"the stored head and the embedding: {'equal' if same else 'different'}")
        plan = {name: recipe for name, recipe in plan.items() if name != HEAD}
    problems = [f"{name} is missing, expected {shape}" for name, shape in expected.items() if name not in plan]
    problems += [f"{name} is not part of the architecture" for name in plan if name not in expected]
    problems += [
        f"{name} has shape {plan[name].shape}, the config implies {shape}"
        for name, shape in expected.items()
        if name in plan and plan[name].shape != shape
    ]
    report.check(
        "names and shapes", not problems, shortened(problems, "; ") or f"{len(expected)} tensors, all as expected"
    )
    odd = [f"{name} is {recipe.dtype}" for name, recipe in plan.items() if recipe.dtype not in FLOATS]
    counts = Counter(recipe.dtype for recipe in plan.values())
    found = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
    report.check("dtypes", not odd, shortened(odd, "; ") or found)


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
    report.check("config", not problems, shortened(problems, "; ") or "consistent")


def _run(
    report: Report, walk: Walk, ids: Tensor, dump: Dump | None, claims: Collection[Claim], progress: Progress | None
) -> None:
    track = walk[MODEL]
    plan = track.model.plan
    with bar(progress, "verifying", total_bytes(plan)) as advance:
        broken = []
        for name, recipe in walk.outside(MODEL).items():
            if recipe is not track.head:
                parts = walk.slices(_with_those_beside(walk, name, recipe), name)
                seen = [_looked(walk, claims) for _ in parts]
                broken += [name] if any(seen) else []
        stream, lost = track.start(ids), None
        for index in walk.layers():
            broken += _looked(walk, claims)
            track.layer(stream, index)
            if lost is None and not stream.x.isfinite().all():
                lost = index
            if dump:
                dump.append(f"hidden.{index}", stream.x)
            for _ in walk.experts(index):
                broken += _looked(walk, claims)
            advance(layer_bytes(plan, index), f"layer {index}")
        worst = _largest_logit(walk, stream.x, dump, broken, claims)
    report.check(
        "finite weights", not broken, shortened(broken, "; ") or f"{len(plan)} tensors without NaN or infinity"
    )
    where = "" if lost is None else f"; the residual stream is lost in layer {lost}"
    text = f"NaN or infinite{where}" if math.isnan(worst) else f"{ids.numel()} tokens, largest |logit| {worst:.3g}"
    report.check("finite logits", not math.isnan(worst), text)
    for claim in claims:
        claim.conclude(report)


def _with_those_beside(walk: Walk, name: str, recipe: Recipe) -> dict[str, Recipe]:
    plans = {role: with_head(walk[role].model) for role in walk.roles if role != MODEL}
    found = {role: plan[name] for role, plan in plans.items() if name in plan and plan[name].shape == recipe.shape}
    return {MODEL: recipe, **found}


def _looked(walk: Walk, claims: Collection[Claim]) -> list[str]:
    """Put claims to the test on what is at hand; the tensors with NaN or infinite values."""
    if claims:
        at_hand = walk.at_hand()
        for claim in claims:
            claim.look(at_hand, walk.pool)
    return [name for name, held in walk.held(MODEL).items() if held.nonfinite]


def _largest_logit(walk: Walk, x: Tensor, dump: Dump | None, broken: list[str], claims: Collection[Claim]) -> float:
    """The largest |logit| at the end of the residual stream; NaN where one is not finite."""
    track, worst, found = walk[MODEL], 0.0, False
    normed = track.final_norm(x)
    name = EMBEDDING if track.config.tie_word_embeddings else HEAD
    step = max(1, LOGITS_AT_ONCE // len(normed))
    for start, stop in walk.slices(_with_those_beside(walk, name, track.head), name):
        held = walk.held(MODEL)[name]
        found = bool(_looked(walk, claims)) or found
        for low in range(0, stop - start, step):
            logits = walk.product(normed, held.values[low : low + step])
            if dump:
                dump.place("logits", start + low, logits)
            highest = logits.abs().max().item()
            worst = highest if math.isnan(highest) else max(worst, highest)
    if found:
        broken.append(name)
    return math.nan if math.isinf(worst) else worst
