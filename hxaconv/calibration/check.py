"""What a calibration promises: it changes what it says it changes, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from hxaconv.calibration.report import Distances
from hxaconv.model.model import Model
from hxaconv.model.names import layer_index
from hxaconv.model.plan import same_bytes
from hxaconv.verification.compare import compare_models
from hxaconv.verification.contracts import check_copies, check_gqa_layers, check_rwkv_layers, completed, listing
from hxaconv.verification.report import Report

if TYPE_CHECKING:
    from hxaconv.progress import Progress


def measure(
    teacher: Model,
    plain: Model,
    calibrated: Model,
    ids: Tensor,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Distances:
    """Run teacher, plain and calibrated student over held-out token ids (B, T)."""
    after, before = (
        compare_models(completed(student, teacher), teacher, ids=ids, device=device, progress=progress).logits
        for student in (calibrated, plain)
    )
    assert after is not None
    assert before is not None
    zeroed = after.kl_attention_zeroed
    assert zeroed is not None
    return Distances(after.tokens, after.kl_other_source, before.kl_other_source, zeroed)


def check_calibrated(
    teacher: Model,
    plain: Model,
    output: Model,
    *,
    replaced: Collection[str],
    ids: Tensor,
    factors: Mapping[str, float] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Check the written student: tensors not in `replaced` are the plain student's, logits finite, KL reported.

    GQA layers that were not replaced equal the teacher's attention with all positions 0. With `factors`, what was
    copied and the projections that were not replaced are checked against the teacher's as well.
    """
    whole = completed(output, teacher)
    report = compare_models(whole, teacher, ids=ids, device=device, progress=progress)
    kept = [name for name in output.plan if name not in replaced]
    wrong = [n for n in kept if n not in plain.plan or not same_bytes(output.plan[n], plain.plan[n])]
    text = f"{len(kept)} tensors are the plain student's, {len(replaced)} are fitted"
    report.check("kept tensors", not wrong, listing(wrong, "differ from the plain student's") or text)
    lost = [name for name in replaced if name not in output.plan]
    if replaced:
        report.check("fitted tensors", not lost, listing(lost, "are missing") or f"{len(replaced)} are there")
    changed = {layer_index(name) for name in replaced}
    check_gqa_layers(report, without=changed)
    if factors is not None:
        check_copies(report, whole, teacher, without=replaced)
        rest = replace(output, plan={name: output.plan[name] for name in kept})
        check_rwkv_layers(report, rest, teacher.plan, factors)
    return report
