"""What a calibration guarantees: it changes what its record names, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hxaconv.calibration.report import Distances, Recall
from hxaconv.forward.walk import Walk
from hxaconv.model.model import Model
from hxaconv.model.names import layer_index
from hxaconv.verification.claims import Claim, Copied, listing
from hxaconv.verification.compare import Compute, compare_models
from hxaconv.verification.invariants import against_teacher, completed, copied, initial_claims
from hxaconv.verification.report import Report

if TYPE_CHECKING:
    from hxaconv.progress import Progress

RECALL = {64: 2, 256: 1}
"""Distance -> sequences."""


def measure(
    teacher: Model,
    plain: Model,
    calibrated: Model,
    ids: Tensor,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Distances:
    """Run teacher, plain and calibrated student over held-out token ids (B, T)."""
    how = Compute(device=device)
    after, before = (
        compare_models(completed(student, teacher), teacher, ids=ids, how=how, progress=progress).logits
        for student in (calibrated, plain)
    )
    assert after is not None
    assert before is not None
    zeroed = after.kl_attention_zeroed
    assert zeroed is not None
    roles = {"teacher": teacher, "plain": completed(plain, teacher), "calibrated": completed(calibrated, teacher)}
    found = tuple(Recall(distance, **nll) for distance, nll in recall(roles, ids, device).items())
    return Distances(after.tokens, after.kl_other_source, before.kl_other_source, zeroed, found)


def recall(models: Mapping[str, Model], ids: Tensor, device: str = "cpu") -> dict[int, dict[str, float]]:
    """Distance -> role -> NLL of random tokens of a text (B, T) at their repetition.

    The first eighth of the second time is not counted: it cannot be recognised as a repetition yet.
    """
    random, known = torch.Generator().manual_seed(0), torch.unique(ids.cpu())
    found: dict[int, dict[str, float]] = {}
    with torch.no_grad(), Walk(models, device=device) as walk:
        rows = {}
        for distance, count in RECALL.items():
            once = known[torch.randint(len(known), (count, distance), generator=random)]
            rows[distance] = torch.cat([once, once], dim=1).to(device)
        streams = {(role, at): walk[role].start(row) for role in models for at, row in rows.items()}
        for layer in walk.layers():
            for (role, _), stream in streams.items():
                walk[role].layer(stream, layer)
        for (role, at), stream in streams.items():
            first = at + at // 8
            nll = _nll(walk, role, stream.x[:, first - 1 : -1], rows[at][:, first:])
            found.setdefault(at, {})[role] = nll
    return found


def _nll(walk: Walk, role: str, x: Tensor, wanted: Tensor) -> float:
    normed, tokens = walk[role].final_norm(x), wanted.flatten()
    total = torch.full(tokens.shape, -torch.inf, device=x.device, dtype=torch.float64)
    target = torch.zeros_like(total)
    for start, stop in walk.slices({role: walk[role].head}, "head"):
        logits = walk.product(normed, walk.held(role)["head"].values).double()
        total = torch.logaddexp(total, logits.logsumexp(dim=-1))
        mine = (tokens >= start) & (tokens < stop)
        target[mine] = logits[mine, tokens[mine] - start]
    return float((total - target).mean())


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
        claims.append(copied(output.student, without=replaced.__contains__))
        claims += initial_claims(output.student, factors, without=replaced.__contains__)
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
