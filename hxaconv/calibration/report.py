"""The figures of a calibration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from hxaconv.formats.json_files import plain_data
from hxaconv.forward.state import computed_with
from hxaconv.options import Fit, Tokens, options_of

RECALL_NOISE = 0.1
"""Nats: differences of recall that mean nothing."""


def settings_of(fit: Fit) -> dict[str, Any]:
    """The settings that the result depends on, beside the tokens."""
    without = (*options_of(Tokens), "random_tokens", "plot")
    return {name: getattr(fit, name) for name in (*(n for n in options_of(Fit) if n not in without), "device")}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One layer. Errors are |teacher's output - mixer's|^2 / |teacher's output|^2 on the validation tokens."""

    layer: int
    kind: str
    """`rwkv` or `gqa`."""
    error_before: float
    error_after: float
    fell_back: bool = False
    """The fit was no better on validation tokens, so that nothing was changed."""
    decay: tuple[float, ...] = ()
    """Mean over the channels of each head."""
    iclr: tuple[float, ...] = ()
    clamped: float = 0.0
    """Share of the bonus values that stand at their limit."""
    output_refitted: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recall:
    """NLL per token of random tokens repeated after `distance` others: 0 where the first time is copied."""

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
        """Whether the calibrated student is nearer to its teacher than the baseline, or was not measured."""
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
        """For the terminal: perplexity does not measure retrieval."""
        found = (
            f"{one.calibrated:.3g} after {one.distance} (plain {one.plain:.3g}, teacher {one.teacher:.3g})"
            for one in self.recall
        )
        return f"Recall, as NLL of repeated random tokens: {', '.join(found)}"

    @property
    def recall_falls(self) -> bool:
        """Whether the calibrated student copies worse than the plain one."""
        return any(one.calibrated > one.plain + RECALL_NOISE for one in self.recall)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolishReport:
    """How a polish went. KL in nats per token on sequences that nothing was fitted to."""

    tokens: int
    """All of them, with those held out."""
    trained_sequences: int
    held_out_sequences: int
    length: int
    curve: tuple[tuple[int, float], ...]
    """(steps, KL on held-out sequences), beginning with 0 steps."""
    best_step: int
    """The weights of this step are taken; 0 where none was better than the start."""

    @property
    def sentence(self) -> str:
        """For the terminal."""
        kl = dict(self.curve)
        steps = ", ".join(f"{value:.3g} after {step}" for step, value in self.curve if step)
        taken = (
            f"those of step {self.best_step} are taken" if self.best_step else "nothing is taken: no step was better"
        )
        return f"Polish: KL on the held-out sequences {kl[0]:.3g} before, {steps} steps; {taken}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """A whole calibration."""

    tokens: int
    fitted_tokens: int
    settings: Mapping[str, Any]
    layers: tuple[LayerReport, ...] = ()
    warnings: tuple[str, ...] = ()
    distances: Distances | None = None
    """None until they are measured."""
    polish: PolishReport | None = None
    taken: bool = True
    """Whether the fitted layers are used; False where the student as a whole is no nearer with them."""

    @property
    def notes(self) -> list[str]:
        """For the terminal: how near the student is."""
        found = [self.polish.sentence] if self.polish else []
        if self.distances is not None:
            found += [self.distances.sentence, *([self.distances.recall_sentence] if self.distances.recall else [])]
        return found

    @property
    def all_warnings(self) -> list[str]:
        """Those of the whole run, those of layers with how many have it, and how many layers kept the plain values."""
        count, kl = len(self.layers), self.distances
        each = Counter(text for layer in self.layers for text in layer.warnings)
        found = [*self.warnings, *(f"{number} of {count} layers: {text}" for text, number in each.items())]
        if kl is not None and self.taken and kl.recall_falls:
            found.append(f"recall is worse than with the plain initialisation. {kl.recall_sentence}")
        if kl is not None and not self.taken:
            found.append(
                f"the calibration is NOT USED, every layer keeps its plain values: on the {kl.tokens} held-out tokens,"
                f" KL(teacher || student) is {kl.calibrated:.3g} calibrated and {kl.plain:.3g} plain. Give it more"
                " tokens of real text (--tokens), or try --refit-output never"
            )
        elif kept := sum(layer.fell_back for layer in self.layers):
            found.append(f"{kept} of {count} layers keep the plain values: no fit was better on held-out tokens")
        return found

    def not_taken(self) -> CalibrationReport:
        """The report where every layer is left plain in the end: of the fit, only the distances remain."""
        layers = tuple(
            LayerReport(
                layer=layer.layer,
                kind=layer.kind,
                error_before=layer.error_before,
                error_after=layer.error_before,
                fell_back=True,
                warnings=layer.warnings,
            )
            for layer in self.layers
        )
        polish = None if self.polish is None else replace(self.polish, best_step=0)
        return replace(self, layers=layers, polish=polish, taken=False)

    def json(self) -> dict[str, Any]:
        """For hxaconv.json: numbers to four digits, KL to three, since more would only be noise."""
        figures = {name: value for name, value in asdict(self).items() if name != "distances"}
        distances = asdict(self.distances) if self.distances else None
        machine = computed_with(str(self.settings.get("device", "cpu")))
        return {**plain_data(figures, 4), "kl_teacher_student": plain_data(distances, 3), "computed_with": machine}
