"""What a verification found, as plain data: for JSON, for hxaconv.json, and for whoever draws it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from hxaconv.errors import CheckFailed, bullet_list, shortened
from hxaconv.formats.json_files import plain_data
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.model import Model
from hxaconv.progress import Result


@dataclass(frozen=True, slots=True)
class Check:
    """One statement that was put to the test; `detail` says what was found, and where."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class TensorResult:
    """How a tensor of the source compares with the other's."""

    name: str
    status: str
    """`equal` (bits), `equal values` (another dtype), `different`, `misshapen`, `only in source`, `only in other`."""
    max_difference: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """One layer of both models fed the other's residual stream; errors relative to the other's norm."""

    layer: int
    kind: str
    other_kind: str
    mixer_error: float
    output_error: float
    firsts_error: float | None
    """Of v_first and k_first, where both models have them."""
    nope_error: float | None
    """Of a GQA layer's mixer against the teacher's attention with every position 0."""
    cosine: float
    """Mean over tokens, between the residual streams after this layer when each model runs on its own."""
    differs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitResult:
    """End to end, over all tokens; KL divergences in nats per token."""

    tokens: int
    vocabulary: int
    max_difference: float
    mean_difference: float
    kl_other_source: float
    kl_source_other: float
    top1_agreement: float
    kl_attention_zeroed: float | None = None
    """KL(other || other with every attention output 0): the zero-ablation baseline for an untrained student."""


@dataclass(kw_only=True, repr=False)
class Report(Result):
    """The outcome of a verification; it has passed when every check has."""

    source: str
    other: str | None = None
    expect: str = "report"
    settings: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    config_differences: list[str] = field(default_factory=list)
    tensors: list[TensorResult] = field(default_factory=list)
    layers: list[LayerResult] = field(default_factory=list)
    logits: LogitResult | None = None
    attention: dict[int, str] = field(default_factory=dict)
    """Layer -> what has happened to its attention since it was the teacher's, where that was looked at."""
    notes: list[str] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    """Verdicts of the loader lint, as plain data."""
    seconds: float = 0.0

    @property
    def headline(self) -> str:
        """The verdict, on what."""
        against = f" against {self.other}" if self.other else ""
        return f"{self.source}{against}: {'passed' if self.passed else 'FAILED'}, {len(self.checks)} checks"

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """What failed, in one line; empty where nothing did."""
        return "; ".join(self._failed())

    @property
    def first_difference(self) -> int | None:
        """The first layer that differs on equal input."""
        return next((result.layer for result in self.layers if result.differs), None)

    def check(self, name: str, passed: bool, detail: str) -> None:
        """Record the outcome of a check."""
        self.checks.append(Check(name, passed, detail))

    def tensor_counts(self) -> dict[str, int]:
        """Status -> number of tensors."""
        counts: dict[str, int] = {}
        for result in self.tensors:
            counts[result.status] = counts.get(result.status, 0) + 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Everything; numbers that are not finite become strings, which JSON can carry."""
        content = {"passed": self.passed, "reason": self.reason, "first_difference": self.first_difference}
        content |= asdict(self)
        plain: dict[str, Any] = plain_data(content)
        return plain

    def verdict(self) -> dict[str, Any]:
        """What hxaconv.json records of it: checks and settings, without a line per tensor and layer."""
        content: dict[str, Any] = {
            "passed": self.passed,
            "reason": self.reason,
            "expect": self.expect,
            "settings": self.settings,
            "checks": [asdict(check) for check in self.checks],
        }
        if self.logits is not None:
            content["logits"] = asdict(self.logits)
        plain: dict[str, Any] = plain_data(content)
        return plain

    def raise_if_failed(self) -> None:
        """Turn failed checks into the error that ends a command with exit code 1.

        Raises:
            CheckFailed: naming every failed check.
        """
        if not self.passed:
            against = f" against {self.other}" if self.other else ""
            raise CheckFailed(f"{self.source} was verified{against} and failed:\n{bullet_list(self._failed())}")

    def _failed(self) -> list[str]:
        return [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]


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
    """The zero-ablation baseline in words, so that an untrained student does not look like a failure."""
    logits = report.logits
    if logits is None or logits.kl_attention_zeroed is None:
        return
    near = logits.kl_other_source > 0.5 * logits.kl_attention_zeroed
    explanation = (
        " On text, a plain initialisation is expected near that zero-ablation baseline (random tokens show less): its"
        " RWKV layers have learned nothing yet, which says nothing against the conversion. Training brings the number"
        " down."
    )
    report.notes.append(
        f"KL(teacher || student) is {logits.kl_other_source:.3g} nats per token;"
        f" the teacher with every attention output zeroed has {logits.kl_attention_zeroed:.3g}."
        + (explanation if near and _is_plain(student) else "")
    )


def _is_plain(student: Model) -> bool:
    """Whether there are RWKV layers, and none of them has learned anything."""
    from hxaconv.verification.values import untouched_layers

    layers = student.student.rwkv_layers
    return bool(layers) and untouched_layers(student) == tuple(layers)
