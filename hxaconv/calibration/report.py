"""What a calibration is told and what it tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hxaconv.errors import raise_all

REFIT_OUTPUT = ("auto", "never", "always")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How layers are fitted.

    Raises:
        HxaconvError: listing every value that makes no sense.
    """

    chunk: int = 2048
    """Tokens of one sequence. No fitted decay can know of lags beyond it."""
    refine_steps: int = 100
    """Gradient steps on the few parameters of each head, after the closed-form fit; 0 leaves them out."""
    refit_output: str = "auto"
    """Whether `output.weight` is fitted as well: `auto` does so with at least 8 tokens per column."""
    fold_rope: bool = False
    """Fit the layers that stay attention to losing RoPE: their q_proj and o_proj change."""
    device: str = "cpu"
    workers: int = 2
    """Threads on a CPU; the result does not depend on them."""

    def __post_init__(self) -> None:
        problems = []
        if self.chunk < 2:
            problems.append(f"a chunk of {self.chunk} tokens: at least 2 are needed")
        if self.refine_steps < 0:
            problems.append(f"{self.refine_steps} refining steps: 0 or more are needed")
        if self.refit_output not in REFIT_OUTPUT:
            problems.append(f"refit_output {self.refit_output!r} is not one of {', '.join(REFIT_OUTPUT)}")
        if self.workers < 1:
            problems.append(f"{self.workers} workers: at least 1 is needed")
        raise_all("these calibration settings are not usable:", problems)

    def of_result(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        return {name: value for name, value in asdict(self).items() if name != "workers"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One layer. Errors are |teacher's output - mixer's|^2 / |teacher's output|^2 on the tokens not fitted."""

    layer: int
    kind: str
    """`rwkv` or `gqa`."""
    error_before: float
    error_after: float
    kept_plain: bool = False
    """The fit was no better on held-out tokens, so that nothing was changed."""
    decay: tuple[float, ...] = ()
    """Mean over the channels of each head."""
    iclr: tuple[float, ...] = ()
    clamped: float = 0.0
    """Share of the bonus values that stand at their limit."""
    output_refitted: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """A whole calibration."""

    tokens: int
    fitted_tokens: int
    settings: Mapping[str, Any]
    layers: tuple[LayerReport, ...]
    warnings: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """For hxaconv.json: numbers to four digits, since more would only be noise."""
        return {
            "tokens": self.tokens,
            "fitted_tokens": self.fitted_tokens,
            "settings": dict(self.settings),
            "warnings": list(self.warnings),
            "layers": [_rounded(asdict(layer)) for layer in self.layers],
        }


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        return [short(v) for v in value] if isinstance(value, tuple | list) else value

    return {name: short(value) for name, value in values.items()}
