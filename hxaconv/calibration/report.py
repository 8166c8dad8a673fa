"""What a calibration is told and what it tells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from hxaconv.calibration.polish import PolishReport
from hxaconv.formats.json_files import plain_data
from hxaconv.forward.state import computed_with
from hxaconv.options import Fit, Tokens, option, options_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Fit):
    """How layers are fitted."""

    workers: int = option(2, "Threads on a CPU; the result does not depend on them.", least=1)

    def of_result(self) -> dict[str, Any]:
        """The settings that the result depends on, beside the tokens."""
        return {name: getattr(self, name) for name in (*OF_FIT, "device")}


OF_FIT = tuple(name for name in options_of(Fit) if name not in (*options_of(Tokens), "random_tokens", "plot"))
"""The options that say how layers are fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One layer. Errors are |teacher's output - mixer's|^2 / |teacher's output|^2 on the tokens not fitted."""

    layer: int
    kind: str
    """`rwkv` or `gqa`."""
    error_before: float
    error_after: float
    fell_back: bool = False
    """The fit was no better on held-out tokens, so that nothing was changed."""
    decay: tuple[float, ...] = ()
    """Mean over the channels of each head."""
    iclr: tuple[float, ...] = ()
    clamped: float = 0.0
    """Share of the bonus values that stand at their limit."""
    output_refitted: bool = False
    warnings: tuple[str, ...] = ()


RECALL_NOISE = 0.1
"""Nats: differences of recall that say nothing."""


@dataclass(frozen=True, slots=True)
class Recall:
    """NLL per token of random tokens said a second time, after `distance` others: 0 where the first time is copied."""

    distance: int
    calibrated: float
    plain: float
    teacher: float


@dataclass(frozen=True, slots=True)
class Distances:
    """KL(teacher || student) in nats per token, on tokens that nothing was fitted to."""

    tokens: int
    calibrated: float
    plain: float
    attention_zeroed: float
    recall: tuple[Recall, ...] = ()

    @property
    def nearer(self) -> bool:
        """Whether the calibrated student is nearer to its teacher than the plain one, or nobody can tell."""
        return self.calibrated < self.plain or math.isnan(self.plain)

    @property
    def sentence(self) -> str:
        """For the terminal."""
        return (
            f"KL(teacher || student) on {self.tokens} held-out tokens: {self.calibrated:.3g} calibrated,"
            f" {self.plain:.3g} with the plain initialisation, {self.attention_zeroed:.3g} with attention zeroed"
        )

    @property
    def recall_sentence(self) -> str:
        """For the terminal: perplexity says nothing of needles."""
        found = (
            f"{one.calibrated:.3g} after {one.distance} (plain {one.plain:.3g}, teacher {one.teacher:.3g})"
            for one in self.recall
        )
        return f"Recall, as NLL of random tokens said again: {', '.join(found)}"

    @property
    def recall_falls(self) -> bool:
        """Whether the calibrated student copies worse than the plain one."""
        return any(one.calibrated > one.plain + RECALL_NOISE for one in self.recall)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """A whole calibration."""

    tokens: int
    fitted_tokens: int
    settings: Mapping[str, Any]
    layers: tuple[LayerReport, ...]
    warnings: tuple[str, ...] = ()
    distances: Distances | None = None
    """None as long as nobody has measured them."""
    polish: PolishReport | None = None
    taken: bool = True
    """Whether the fitted layers are used; False where the student as a whole is no nearer with them."""

    def not_taken(self) -> CalibrationReport:
        """The report where every layer is left plain in the end; only what was measured tells of the fit."""
        layers = tuple(
            replace(
                layer,
                error_after=layer.error_before,
                fell_back=True,
                decay=(),
                iclr=(),
                clamped=0.0,
                output_refitted=False,
            )
            for layer in self.layers
        )
        polish = None if self.polish is None else replace(self.polish, best_step=0)
        return replace(self, layers=layers, polish=polish, taken=False)

    def json(self) -> dict[str, Any]:
        """For hxaconv.json: numbers to four digits, KL to three, since more would only be noise."""
        told = {name: value for name, value in asdict(self).items() if name != "distances"}
        distances = asdict(self.distances) if self.distances else None
        machine = computed_with(str(self.settings.get("device", "cpu")))
        return {**plain_data(told, 4), "kl_teacher_student": plain_data(distances, 3), "computed_with": machine}
