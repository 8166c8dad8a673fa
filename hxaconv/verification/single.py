"""One model by itself: its tensors are those of its config, its values finite, its logits finite."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from hxaconv.errors import shortened
from hxaconv.formats.dtypes import FLOATS
from hxaconv.forward.dump import Dump, dumping
from hxaconv.forward.runner import Runner, compute_settings
from hxaconv.forward.weights import Weights
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD, layer_index
from hxaconv.model.plan import Recipe, Scratch, layer_bytes, total_bytes
from hxaconv.progress import Progress, bar
from hxaconv.save.finite import count_nonfinite
from hxaconv.verification.report import Report
from hxaconv.verification.tensors import compare_tensor


def verify_model(
    model: Model,
    *,
    ids: Tensor,
    dtype: str = "float32",
    device: str = "cpu",
    logits_out: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a complete model against its own config, and run it on token ids (B, T).

    The forward is left out where names or shapes are wrong already.
    """
    began = time.monotonic()
    report = Report(source=model.label)
    report.settings = {"tokens": ids.shape[1], "batch": ids.shape[0], "dtype": dtype, "device": device}
    _check_tensors(report, model)
    _check_config(report, model.config)
    if report.passed:
        compute, device = compute_settings(dtype, device)
        runner = Runner(model, dtype=compute, device=device)
        with dumping(logits_out, model.config, ids, compute) as dump:
            _run(report, runner, ids.to(device), dump, progress)
    report.seconds = time.monotonic() - began
    return report


def _check_tensors(report: Report, model: Model) -> None:
    """Names, shapes and dtypes, against what the architecture says independently of any recipe."""
    expected, plan = expected_tensors(model.config), model.plan
    if HEAD in plan and HEAD not in expected:
        result = compare_tensor(HEAD, plan[HEAD], plan.get(EMBEDDING))
        report.check("tied head", result.status == "equal", f"the stored head and the embedding: {result.status}")
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


def _run(report: Report, runner: Runner, ids: Tensor, dump: Dump | None, progress: Progress | None) -> None:
    plan = runner.model.plan
    with bar(progress, "verifying", total_bytes(plan)) as advance:
        broken = [name for name in plan if layer_index(name) is None and not finite_on_disk(plan[name])]
        stream, lost = runner.start(ids), None
        for index in range(runner.config.num_hidden_layers):
            runner.weights.release()
            runner.layer(stream, index)
            broken += _not_finite(runner.weights, index)
            if lost is None and not stream.x.isfinite().all():
                lost = index
            if dump:
                dump.append(f"hidden.{index}", stream.x)
            advance(layer_bytes(plan, index), f"layer {index}")
        runner.weights.release()
        worst = _largest_logit(runner, stream.x, dump)
    report.check(
        "finite weights", not broken, shortened(broken, "; ") or f"{len(plan)} tensors without NaN or infinity"
    )
    where = "" if lost is None else f"; the residual stream is lost in layer {lost}"
    text = f"NaN or infinite{where}" if math.isnan(worst) else f"{ids.numel()} tokens, largest |logit| {worst:.3g}"
    report.check("finite logits", not math.isnan(worst), text)


def _largest_logit(runner: Runner, x: Tensor, dump: Dump | None) -> float:
    """The largest |logit| at the end of the residual stream; NaN at the first that is not finite."""
    worst = 0.0
    for (logits,) in runner.logits([x], runner.tokens_per_step):
        if dump:
            dump.append("logits", logits)
        if not logits.isfinite().all():
            return math.nan
        worst = max(worst, logits.abs().max().item())
    return worst


def _not_finite(weights: Weights, layer: int) -> list[str]:
    """The tensors of a layer with NaN or infinite values; those that its forward has used are in memory."""
    held, names = weights.held(), [name for name in weights.plan if layer_index(name) == layer]
    return [name for name in names if not (finite(held[name]) if name in held else finite_on_disk(weights.plan[name]))]


def finite(values: Tensor) -> bool:
    """Whether every value is finite; without a temporary of its size."""
    low, high = torch.aminmax(values)
    return bool(low.isfinite() and high.isfinite())


def finite_on_disk(recipe: Recipe) -> bool:
    """Whether every value of a tensor is finite, a piece at a time."""
    return not any(count_nonfinite(piece, recipe.dtype) for piece in recipe.pieces(Scratch()))
