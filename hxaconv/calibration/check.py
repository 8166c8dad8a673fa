"""What a calibration guarantees: it changes what its record names, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hxaconv.calibration.report import Distances, Recall
from hxaconv.forward.logits import Likelihood
from hxaconv.forward.tokens import first_counted, said_twice
from hxaconv.forward.walk import Walk
from hxaconv.model.model import Model
from hxaconv.model.names import layer_index
from hxaconv.verification.claims import Claim, bits_taken_over, copied, initial_claims
from hxaconv.verification.compare import Compute, compare_models
from hxaconv.verification.invariants import against_teacher, completed
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
    """Distance -> role -> NLL of random tokens of a text (B, T) at their repetition."""
    random, known = torch.Generator().manual_seed(0), torch.unique(ids.cpu())
    found: dict[int, dict[str, float]] = {}
    with torch.no_grad(), Walk(models, device=device) as walk:
        rows = {}
        for distance, count in RECALL.items():
            once = known[torch.randint(len(known), (count, distance), generator=random)]
            rows[distance] = said_twice(once.to(device))
        streams = {(role, at): walk[role].start(row) for role in models for at, row in rows.items()}
        for layer in walk.layers():
            for (role, _), stream in streams.items():
                walk[role].layer(stream, layer)
        for (role, at), stream in streams.items():
            row, first = rows[at], first_counted(rows[at])
            normed, nll = walk[role].final_norm(stream.x[:, first - 1 : -1]), Likelihood(row[:, first:].flatten())
            for start, _ in walk.slices({role: walk[role].head}, "head"):
                nll.add(start, walk.product(normed, walk.held(role)["head"].values))
            found.setdefault(at, {})[role] = float(nll.result().mean())
    return found


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
    claims = [
        Claim(
            "kept tensors",
            f"are the plain student's, {len(replaced)} are fitted",
            "differ from the plain student's",
            lambda name: name in output.plan and name not in replaced,
            bits_taken_over,
            role="plain",
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
        report.problems("fitted tensors", lost, f"{len(replaced)} are there", "are missing")
    return report
