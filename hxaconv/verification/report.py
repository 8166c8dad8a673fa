"""What a verification found, as plain data: for JSON, hxaconv.json, tables and plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from hxaconv.errors import CheckFailed, bullet_list, shortened
from hxaconv.formats.json_files import plain_data
from hxaconv.progress import Result


@dataclass(frozen=True, slots=True)
class Check:
    """One statement that was checked; `detail` is what was found, and where."""

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
    """The outcome of a verification; it has passed when every check has, and there was one."""

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
        return f"{self.source}{against}: {self.outcome}, {len(self.checks)} checks"

    @property
    def outcome(self) -> str:
        """`passed` or `FAILED`; `only reported` where nothing was asked of a comparison but values that are finite."""
        asked = self.other is None or self.expect != "report" or any(c.name in MEASURED for c in self.checks)
        return ("passed" if asked else "only reported") if self.passed else "FAILED"

    @property
    def passed(self) -> bool:
        """Whether something was checked, and nothing failed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

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

    def problems(self, name: str, found: Collection[str], good: str, bad: str = "") -> None:
        """Record a check that fails on what was found; `good` says what there is where nothing was.

        `found` are sentences, or names of which `bad` holds: `3 are missing: a, b, c`.
        """
        wrong = f"{len(found)} {bad}: {shortened(found)}" if bad else shortened(found, "; ")
        self.check(name, not found, wrong if found else good)

    def tensor_counts(self) -> dict[str, int]:
        """Status -> number of tensors."""
        return dict(Counter(result.status for result in self.tensors))

    def to_dict(self) -> dict[str, Any]:
        """Everything; numbers that are not finite become strings, which JSON can carry."""
        content = {key: getattr(self, key) for key in ("passed", "outcome", "reason", "first_difference")}
        plain: dict[str, Any] = plain_data(content | asdict(self))
        return plain

    def verdict(self) -> dict[str, Any]:
        """What hxaconv.json records of it: checks and settings, without a line per tensor and layer."""
        kept = ("passed", "reason", "expect", "settings", "checks", *(["logits"] if self.logits else []))
        return {key: value for key, value in self.to_dict().items() if key in kept}

    def raise_if_failed(self) -> None:
        """Turn failed checks into the error that ends a command with exit code 1.

        Raises:
            CheckFailed: naming every failed check.
        """
        if not self.passed:
            against = f" against {self.other}" if self.other else ""
            raise CheckFailed(f"{self.source} was verified{against} and failed:\n{bullet_list(self._failed())}")

    def _failed(self) -> list[str]:
        if not self.checks:
            return ["nothing was checked"]
        return [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]


MEASURED = ("logits", "layers", "KL")
"""Checks of figures, each against the limit that was given for it."""
