"""Rotary position embeddings as config.json describes them: theta, and what stretches the frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

DEFAULT_KINDS = (None, "default", "mrope")
"""Kinds without scaling; `mrope` has three positions per token, which are one for text."""

STATIC_KINDS = ("linear", "llama3", "yarn")
"""Kinds whose frequencies do not depend on the length of the input."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RopeScaling:
    """`rope_scaling` of one of the static kinds; fields as config.json has them."""

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __repr__(self) -> str:
        return repr(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def cos_sin_factor(self) -> float:
        """What cos and sin are multiplied by."""
        if self.rope_type != "yarn":
            return 1.0
        up, down = (self.mscale, self.mscale_all_dim) if self.mscale and self.mscale_all_dim else (1.0, 0.0)
        grown = math.log(max(self.factor, 1.0))
        return self.attention_factor or (0.1 * up * grown + 1.0) / (0.1 * down * grown + 1.0)

    def stretched(self, frequency: float, pair: int, pairs: int, theta: float) -> float:
        """The frequency of channel pair `pair` of `pairs`, radians per token."""
        if self.rope_type == "linear":
            return frequency / self.factor
        context = self.original_max_position_embeddings
        assert context
        if self.rope_type == "llama3":
            # Kept where the original context holds a wavelength often enough, divided where it is long.
            assert self.low_freq_factor and self.high_freq_factor
            turns = context * frequency / (2 * math.pi)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        else:
            # Kept up to the pair that turns beta_fast times within the original context, divided from beta_slow on.
            low, high = (
                pairs * math.log(context / (turns * 2 * math.pi)) / math.log(theta)
                for turns in (self.beta_fast or 32, self.beta_slow or 1)
            )
            if self.truncate is not False:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, 2 * pairs - 1)
            kept = 1 - min(1.0, max(0.0, (pair - low) / (high - low if high != low else 0.001)))
        kept = min(1.0, max(0.0, kept))
        return (1 - kept) * frequency / self.factor + kept * frequency


@dataclass(frozen=True, slots=True)
class Rope:
    """What turns a position into angles: theta**(-i / pairs) for pair i, stretched."""

    theta: float
    scaling: RopeScaling | None = None


def rope_of(raw: Mapping[str, Any]) -> tuple[float | None, RopeScaling | None, str | None]:
    """(rope_theta, scaling, why it cannot be computed) from any spelling: top level, `rope_parameters`, `rope_scaling`.

    Where one spelling scales and the other does not, some reader scales: so does this one. Two that scale otherwise
    are followed by one reader each.
    """
    theta = next(iter(_thetas(raw).values()), None)
    spellings = [raw.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    found = [_scaling(one, raw) for one in spellings if kind_of(one) not in DEFAULT_KINDS]
    scaling, problem = found[0] if found else (None, None)
    if len(found) == 2 and found[0] != found[1]:
        differ = f"rope_scaling is {found[0][0]}, rope_parameters {found[1][0]}"
        scaling, problem = None, found[0][1] or found[1][1] or differ
    return (None if theta is None else float(theta)), scaling, problem


def _thetas(raw: Mapping[str, Any]) -> dict[str, float]:
    """Place -> rope_theta, of every place that names one."""
    places = {"at top level": raw, "in rope_parameters": raw.get("rope_parameters") or {}}
    places["in rope_scaling"] = raw.get("rope_scaling") or {}
    return {place: found["rope_theta"] for place, found in places.items() if found.get("rope_theta") is not None}


def rope_contradiction(raw: Mapping[str, Any]) -> str | None:
    """The values of rope_theta, where a config.json gives several; readers disagree about which one counts."""
    found = _thetas(raw)
    if len(set(found.values())) < 2:
        return None
    return f"rope_theta is {', '.join(f'{value!r} {place}' for place, value in found.items())}"


def kind_of(settings: Mapping[str, Any]) -> str | None:
    """`rope_type` or, in older files, `type`; a factor without either is linear, and one of 1 is none."""
    kind, factor = settings.get("rope_type") or settings.get("type"), settings.get("factor")
    if kind in DEFAULT_KINDS:
        return kind if factor in (None, 1) else "linear"
    return None if kind == "linear" and factor == 1 else str(kind)


def scaling_kind(raw: Mapping[str, Any]) -> str | None:
    """The kind of scaling that either spelling names, None where there is none."""
    kinds = (kind_of(raw.get(key) or {}) for key in ("rope_scaling", "rope_parameters"))
    return next((kind for kind in kinds if kind not in DEFAULT_KINDS), None)


def _scaling(found: Mapping[str, Any], raw: Mapping[str, Any]) -> tuple[RopeScaling | None, str | None]:
    kind = str(kind_of(found))
    if kind not in STATIC_KINDS:
        return None, f"its frequencies change with the length of the input, or are not known here ({kind})"
    values = {key: found[key] for key in RopeScaling.__dataclass_fields__ if found.get(key) is not None}
    values["rope_type"] = kind
    context = raw.get("max_position_embeddings")
    if kind != "linear":
        values.setdefault("original_max_position_embeddings", raw.get("original_max_position_embeddings", context))
    needed = ["factor"] if kind == "linear" else ["factor", "original_max_position_embeddings"]
    needed += ["low_freq_factor", "high_freq_factor"] if kind == "llama3" else []
    wrong = [
        f"{key} is {values.get(key)!r}"
        for key in needed
        if isinstance(values.get(key), bool) or not isinstance(values.get(key), int | float) or not values[key] > 0
    ]
    if kind == "llama3" and not wrong and values["low_freq_factor"] == values["high_freq_factor"]:
        wrong = ["low_freq_factor is high_freq_factor"]
    return (None, ", ".join(wrong)) if wrong else (RopeScaling(**values), None)
