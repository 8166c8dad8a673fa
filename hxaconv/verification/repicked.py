"""What another choice of GQA layers promises: layers that keep their kind keep their bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from hxaconv.forward.probe import probe_tokens
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention, layer_index
from hxaconv.model.plan import Plan, same_bytes
from hxaconv.verification.contracts import check_rwkv_layers, listing
from hxaconv.verification.origins import is_scaled
from hxaconv.verification.report import Report
from hxaconv.verification.single import verify_model
from hxaconv.verification.tensors import with_head

if TYPE_CHECKING:
    from hxaconv.progress import Progress


def check_repicked(
    source: Model,
    teacher: Model | None,
    output: Model,
    *,
    other: Model | None,
    factors: Mapping[str, float],
    progress: Progress | None = None,
) -> Report:
    """Check `output` against the student it was made of, and its new layers against where they come from."""
    report = verify_model(output, ids=probe_tokens(output.config.vocab_size), progress=progress)
    layers = range(output.config.num_hidden_layers)
    changed = {i for i in layers if source.student.layer_kind(i) != output.student.layer_kind(i)}
    kept = [name for name in output.plan if not (is_attention(name) and layer_index(name) in changed)]
    # A .pth writes out the head that a tied source leaves to its embedding.
    before = with_head(source)
    wrong = [n for n in kept if n not in before or not same_bytes(output.plan[n], before[n])]
    text = f"{len(kept)} tensors have the bits of the source"
    report.check("kept tensors", not wrong, listing(wrong, "differ from the source") or text)
    donated = {i for i in changed if other and other.student.layer_kind(i) == output.student.layer_kind(i)}
    if other is not None and donated:
        mixers = _mixers(output, donated)
        wrong = [n for n in mixers if n not in other.plan or not is_scaled(mixers[n], other.plan[n], 1.0)]
        text = f"{len(donated)} {'layer is' if len(donated) == 1 else 'layers are'} of --from"
        report.check("layers taken over", not wrong, listing(wrong, "differ from the other checkpoint") or text)
    if teacher is not None:
        _check_from_teacher(report, teacher.plan, output, changed - donated, factors)
    return report


def _check_from_teacher(
    report: Report, teacher: Plan, output: Model, layers: set[int], factors: Mapping[str, float]
) -> None:
    attention = _mixers(output, {i for i in layers if output.student.layer_kind(i) == "gqa"})
    if attention:
        wrong = [n for n, recipe in attention.items() if n not in teacher or not is_scaled(recipe, teacher[n], 1.0)]
        text = f"{len(attention)} tensors are the teacher's attention"
        report.check("new GQA layers", not wrong, listing(wrong, "differ from the teacher's") or text)
    time_mix = _mixers(output, {i for i in layers if output.student.layer_kind(i) == "rwkv"})
    if time_mix:
        check_rwkv_layers(report, replace(output, plan=time_mix), teacher, factors)


def _mixers(model: Model, layers: set[int]) -> Plan:
    return {name: recipe for name, recipe in model.plan.items() if is_attention(name) and layer_index(name) in layers}
