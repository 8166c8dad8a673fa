"""What a comparison is expected to find, and whether it did."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace

from hxaconv.errors import shortened
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.model import Model
from hxaconv.verification.report import Report
from hxaconv.verification.values import untouched_layers


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What lets a comparison pass; what is None is judged only where the expectation says so."""

    logits: float | None = None
    """Largest difference of a logit."""
    layer: float | None = None
    """Relative error of a layer on equal input."""
    kl: float | None = None
    """KL divergence in nats per token, in either direction."""


USUAL = {
    # The same bits take the same path through the same code.
    "identical": Thresholds(logits=0.0),
    # Rounding all weights of a layer to bf16 costs up to 4e-3.
    "close": Thresholds(layer=1e-2, kl=1e-3),
}
"""What each expectation allows where nothing is given."""


def usual_expectation(source: ModelConfig, other: ModelConfig) -> str:
    """`identical` for two models of the same architecture, `report` for a student and a teacher."""
    same = isinstance(source, StudentConfig) == isinstance(other, StudentConfig)
    return "identical" if same else "report"


def config_differences(source: ModelConfig, other: ModelConfig) -> list[str]:
    """Settings that both have and that differ, as sentences."""
    both_students = isinstance(source, StudentConfig) and isinstance(other, StudentConfig)
    # Whether the head is tied shows in the tensors, where an explicit copy counts as the same.
    names = [f.name for f in fields(StudentConfig if both_students else ModelConfig)]
    pairs = [(name, getattr(source, name), getattr(other, name)) for name in names if name != "tie_word_embeddings"]
    return [f"{name} is {a!r}, the other's is {b!r}" for name, a, b in pairs if a != b]


def judge(report: Report, thresholds: Thresholds, source: Model) -> None:
    """Add the checks that the report's expectation asks for; those of a forward only where one was run."""
    ran = report.logits is not None
    if ran:
        _finite(report)
    alike = report.expect in ("identical", "close")
    if alike:
        _same_tensors(report, exactly=report.expect == "identical")
        _same_config(report)
    else:
        _explain(report, source)
    if ran:
        _within(report, thresholds, USUAL.get(report.expect, Thresholds()))
    elif alike:
        report.notes.append("Only tensors were compared: no forward was run.")


def _finite(report: Report) -> None:
    logits = report.logits
    assert logits is not None
    values = (logits.max_difference, logits.kl_other_source, logits.kl_source_other)
    finite = all(math.isfinite(value) for value in values)
    where = next((f", first in layer {r.layer}" for r in report.layers if not math.isfinite(r.output_error)), "")
    report.check("finite", finite, "all logits are finite" if finite else f"NaN or infinite values{where}")


def _same_tensors(report: Report, *, exactly: bool) -> None:
    fine = {"equal"} if exactly else {"equal", "equal values", "different"}
    wrong = [result for result in report.tensors if result.status not in fine]
    if not wrong:
        text = f"{len(report.tensors)} tensors " + ("equal bits" if exactly else "on both sides, of the same shapes")
        report.check("tensors", True, text)
        return
    shown = [f"{r.name} {r.status}{_amount(r.max_difference)} {r.detail}".rstrip() for r in wrong]
    report.check("tensors", False, f"{len(wrong)} of {len(report.tensors)}: {shortened(shown, '; ')}")


def _amount(difference: float | None) -> str:
    return f" by {difference:.3g}" if difference else ""


def _same_config(report: Report) -> None:
    found = report.config_differences
    report.check("config", not found, "; ".join(found) if found else "the same settings")


def _within(report: Report, given: Thresholds, usual: Thresholds) -> None:
    """Judge what was measured by the limits that were given, and by those that the expectation has."""
    assert report.logits is not None
    limits = replace(usual, **{name: limit for name, limit in asdict(given).items() if limit is not None})
    if limits.logits is not None:
        found = report.logits.max_difference
        text = f"max |d| {found:.3g}, allowed {limits.logits:.3g}{_first(report)}"
        report.check("logits", found <= limits.logits, text)
    if limits.layer is not None:
        worst = max(report.layers, key=lambda result: _nan_is_worst(result.output_error))
        text = f"relative error at most {worst.output_error:.3g} (layer {worst.layer}), allowed {limits.layer:.3g}"
        report.check("layers", worst.output_error <= limits.layer, text + _first(report))
    if limits.kl is not None:
        kl = max(report.logits.kl_other_source, report.logits.kl_source_other, key=_nan_is_worst)
        report.check("KL", kl <= limits.kl, f"{kl:.3g} nats per token, allowed {limits.kl:.3g}")


def _nan_is_worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _first(report: Report) -> str:
    layer = report.first_difference
    return "" if layer is None else f"; the first layer that differs on equal input is {layer}"


def _explain(report: Report, student: Model) -> None:
    """The yardstick in words, so that an untrained student does not look like a failure."""
    logits = report.logits
    if logits is None or logits.kl_attention_zeroed is None:
        return
    near = logits.kl_other_source > 0.5 * logits.kl_attention_zeroed
    explanation = (
        " On text, a plain initialisation is expected near that yardstick (random tokens tell less): its RWKV layers"
        " have learned nothing yet, which says nothing against the conversion. Training brings the number down."
    )
    report.notes.append(
        f"KL(teacher || student) is {logits.kl_other_source:.3g} nats per token;"
        f" the teacher with every attention output zeroed has {logits.kl_attention_zeroed:.3g}."
        + (explanation if near and _is_plain(student) else "")
    )


def _is_plain(student: Model) -> bool:
    """Whether there are RWKV layers, and none of them has learned anything."""
    layers = student.student.rwkv_layers
    return bool(layers) and untouched_layers(student) == tuple(layers)
