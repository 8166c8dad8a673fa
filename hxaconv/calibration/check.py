"""What a calibration promises: it changes what it says it changes, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from hxaconv.calibration.report import Distances
from hxaconv.model.model import Model
from hxaconv.model.names import layer_index
from hxaconv.verification.claims import Claim, Copied, listing
from hxaconv.verification.compare import compare_models
from hxaconv.verification.contracts import against_teacher, completed, copied, initial_claims
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
    claims: list[Claim] = [
        Copied(
            check="kept tensors",
            good=f"are the plain student's, {len(replaced)} are fitted",
            bad="differ from the plain student's",
            wanted=lambda name: name in output.plan and name not in replaced,
            role="plain",
            exact=True,
        )
    ]
    if factors is not None:
        claims.append(copied(output.student, without=replaced))
        claims += initial_claims(output.student, factors, without=replaced)
    changed = {layer_index(name) for name in replaced}
    report = against_teacher(
        output,
        teacher,
        claims,
        beside={"plain": plain},
        without_gqa=changed,
        ids=ids,
        device=device,
        progress=progress,
    )
    lost = [name for name in replaced if name not in output.plan]
    if replaced:
        report.check("fitted tensors", not lost, listing(lost, "are missing") or f"{len(replaced)} are there")
    return report
