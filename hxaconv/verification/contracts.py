"""What each transformation promises, checked on what it wrote, without asking the code that wrote it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from hxaconv.errors import shortened
from hxaconv.forward.probe import probe_tokens
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import HEAD, is_attention
from hxaconv.model.plan import Plan, Recipe
from hxaconv.verification.compare import compare_models
from hxaconv.verification.expectations import Thresholds
from hxaconv.verification.origins import (
    COPIED,
    SCALED,
    in_rwkv_layer,
    is_initial,
    is_padded,
    is_scaled,
    part_of_mixer,
    teacher_name,
)
from hxaconv.verification.report import Report, TensorResult
from hxaconv.verification.tensors import with_head

if TYPE_CHECKING:
    from hxaconv.progress import Progress

SAME_ATTENTION = 1e-5
"""Relative error of two float32 attentions with the same weights that sum in another order."""
CAST_ATTENTION = 3e-2
"""The same where the weights were rounded to another dtype, bf16 at worst."""
CAST = Thresholds(layer=CAST_ATTENTION, kl=0.1)
"""Each tensor is checked to be rounded once. Weights that were trained in small steps from bf16 round the same way all
together: up to 1.6e-2 in a layer and 1.4e-3 nats were seen; a damaged layer costs much more."""
PADDED = Thresholds(layer=1e-5, kl=1e-9)
"""Zeros that are added change the order of summation, nothing else."""


def check_initialised(
    teacher: Model,
    student: Model,
    *,
    factors: Mapping[str, float],
    progress: Progress | None = None,
) -> Report:
    """Check a freshly initialised student, whole or attention only, against its teacher.

    Copied tensors have equal bits (or are the teacher's, rounded once), projections of RWKV layers are factor times
    the teacher's, each GQA layer fed the teacher's hidden states equals its attention with all positions 0, the
    logits are finite, and KL divergences are reported. `factors`: receptance, key, value, output.
    """
    whole = completed(student, teacher)
    ids = probe_tokens(min(teacher.config.vocab_size, student.config.vocab_size))
    report = compare_models(whole, teacher, ids=ids, progress=progress)
    check_copies(report, whole, teacher)
    check_rwkv_layers(report, student, teacher.plan, factors)
    check_gqa_layers(report)
    return report


def completed(model: Model, base: Model) -> Model:
    """A model of which only the attention is stored, with all else taken from `base`; others as they are."""
    if any(not is_attention(name) for name in model.plan):
        return model
    rest: Plan = {name: recipe for name, recipe in with_head(base).items() if not is_attention(name)}
    if model.config.tie_word_embeddings:
        rest.pop(HEAD, None)
    return replace(model, plan=rest | model.plan)


def check_copies(report: Report, student: Model, teacher: Model, *, without: Collection[str] = ()) -> None:
    """Every tensor that both have, but for some: the same bits, or a cast of them."""
    plans = with_head(student), with_head(teacher)
    shared = [
        result
        for result in report.tensors
        if not result.status.startswith("only in")
        and not in_rwkv_layer(student.student, result.name)
        and result.name not in without
    ]
    wrong = [result.name for result in shared if not _is_copy(result, *plans)]
    text = f"{len(shared)} tensors are the teacher's" + (
        "" if _same_dtypes(shared) else ", rounded to the output's dtype"
    )
    report.check("copied tensors", not wrong, listing(wrong, "differ from the teacher's") or text)
    lacking = [name for name in plans[1] if name not in plans[0] and not in_rwkv_layer(student.student, name)]
    report.check(
        "nothing lost", not lacking, listing(lacking, "are missing") or "every tensor outside RWKV layers is there"
    )


def _same_dtypes(results: list[TensorResult]) -> bool:
    return all(result.status == "equal" for result in results)


def _is_copy(result: TensorResult, made: Plan, origin: Plan) -> bool:
    if result.status == "equal":
        return True
    a, b = made[result.name], origin[result.name]
    return a.dtype != b.dtype and a.shape == b.shape and is_scaled(a, b, 1.0)


def check_rwkv_layers(report: Report, student: Model, teacher: Plan, factors: Mapping[str, float]) -> None:
    """Projections, norms and initial values of every RWKV layer."""
    wrong: dict[str, list[str]] = {"scaled projections": [], "initial values": []}
    counts, seen = dict.fromkeys(wrong, 0), set()
    for name, recipe in student.plan.items():
        if not in_rwkv_layer(student.student, name):
            continue
        kind, kept = _keeps_promise(name, recipe, student.student, teacher, factors)
        counts[kind] += 1
        seen.add(part_of_mixer(name))
        if not kept:
            wrong[kind].append(name)
    shown = "".join(f", {part} x {factor:g}" for part, factor in factors.items() if part in seen)
    good = {"scaled projections": f"the teacher's{shown}", "initial values": "as published, random matrices orthogonal"}
    for kind, names in wrong.items():
        text = f"{counts[kind]} tensors: {good[kind]}"
        report.check(kind, not names, listing(names, "are not what they should be") or text)


def _keeps_promise(
    name: str, recipe: Recipe, config: StudentConfig, teacher: Plan, factors: Mapping[str, float]
) -> tuple[str, bool]:
    """(kind of promise, whether the tensor of an RWKV layer keeps it)."""
    part = part_of_mixer(name)
    if part in SCALED | COPIED:
        origin = teacher.get(teacher_name(name))
        return "scaled projections", origin is not None and is_scaled(recipe, origin, factors.get(part, 1.0))
    return "initial values", is_initial(name, recipe, config)


def check_gqa_layers(report: Report, *, without: Collection[int | None] = ()) -> None:
    """Each GQA layer, but for some, fed the teacher's hidden states is its attention with every position 0."""
    layers = [result for result in report.layers if result.nope_error is not None and result.layer not in without]
    if not layers:
        return
    cast = any(
        result.status != "equal"
        for result in report.tensors
        if ".q_proj." in result.name and "only" not in result.status
    )
    limit = CAST_ATTENTION if cast else SAME_ATTENTION
    wrong = [f"layer {r.layer} ({r.nope_error:.3g})" for r in layers if not (r.nope_error or 0.0) <= limit]
    worst = max(result.nope_error or 0.0 for result in layers)
    text = f"{len(layers)} layers equal the teacher's attention with every position 0, relative error {worst:.2g}"
    report.check("GQA layers", not wrong, listing(wrong, "are not the teacher's attention without RoPE") or text)


def listing(names: list[str], what: str) -> str:
    """`3 differ: a, b, c`, or nothing where no name is given."""
    return f"{len(names)} {what}: {shortened(names)}" if names else ""


def check_converted(source: Model, output: Model, *, progress: Progress | None = None) -> Report:
    """Check that a conversion kept the model: identical tensors and logits.

    Where the dtype was changed each tensor has to be the source's, rounded once, and the logits close; where the MLP
    was padded the new rows and columns have to be zero, and the logits the same but for rounding.
    """
    whole = completed(output, source)
    ids = None
    if any(not is_attention(name) for name in source.plan):
        ids = probe_tokens(min(source.config.vocab_size, output.config.vocab_size))
    cast = any(recipe.dtype != output.plan[name].dtype for name, recipe in source.plan.items() if name in output.plan)
    padded = output.config.intermediate_size > source.config.intermediate_size
    expect = "close" if cast or padded else "identical"
    report = compare_models(
        whole,
        source,
        ids=ids,
        expect=expect,
        thresholds=CAST if cast else PADDED if padded else None,
        progress=progress,
    )
    if expect == "close":
        _check_rounded(report, whole, source)
    return report


def _check_rounded(report: Report, output: Model, source: Model) -> None:
    """Replace the checks on tensors and config by those that fit a cast or a padded MLP."""
    plans = with_head(output), with_head(source)
    wrong = [r.name for r in report.tensors if not (_is_copy(r, *plans) or _is_padded(r, *plans))]
    report.checks = [check for check in report.checks if check.name not in ("tensors", "config")]
    text = f"{len(report.tensors)} tensors are the source's, rounded or padded with zeros"
    report.check("tensors", not wrong, listing(wrong, "are not the source's") or text)
    other = [text for text in report.config_differences if not text.startswith("intermediate_size")]
    report.check("config", not other, "; ".join(other) or "the same settings")


def _is_padded(result: TensorResult, made: Plan, origin: Plan) -> bool:
    """Whether an MLP tensor is the origin's with zeros below and to the right."""
    if result.status != "misshapen" or ".mlp." not in result.name:
        return False
    return is_padded(made[result.name], origin[result.name])
