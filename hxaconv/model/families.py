"""Families of teachers: one entry per `model_type`, with what transformers' class makes of its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Raw = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Biases:
    """Which projections of the attention have a bias."""

    inputs: bool
    """q, k and v."""
    output: bool


def _no_biases(raw: Raw) -> Biases:
    return Biases(inputs=bool(raw.get("attention_bias")), output=False)


def _all_biases(raw: Raw) -> Biases:
    return Biases(inputs=bool(raw.get("attention_bias")), output=bool(raw.get("attention_bias")))


def _input_biases(raw: Raw) -> Biases:
    return Biases(inputs=True, output=False)


def _no_window(raw: Raw) -> str | None:
    return None


def _window(default: int | None) -> Callable[[Raw], str | None]:
    """`sliding_window` counts whatever other keys say; `default` where there is no such key."""

    def rule(raw: Raw) -> str | None:
        window = raw.get("sliding_window", default)
        if window is None or _reaches(window, raw):
            return None
        implied = "" if "sliding_window" in raw else ", the default of this family where config.json has no such key"
        return f"sliding_window is {window}{implied}"

    return rule


def _switched_window(raw: Raw) -> str | None:
    """`sliding_window` counts where `use_sliding_window` is true, in layers that `layer_types` or, without it,
    `max_window_layers` (28) says."""
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    kinds = raw.get("layer_types")
    if kinds is None:
        count, begins = raw.get("num_hidden_layers") or 0, raw.get("max_window_layers", 28)
        windowed = window is not None and (begins or 0) < count
    else:
        windowed = any(kind != "full_attention" for kind in kinds)
    if not windowed or (window is not None and _reaches(window, raw)):
        return None
    odd = sorted(set(kinds or ()) - {"full_attention"})
    return f"layer_types names {odd}" if odd else f"sliding_window is {window}, and use_sliding_window true"


def _reaches(window: int, raw: Raw) -> bool:
    """Whether the window spans the whole context."""
    context = raw.get("max_position_embeddings")
    return context is not None and window >= context


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of teacher."""

    title: str
    biases: Callable[[Raw], Biases] = _no_biases
    qk_norm: bool = False
    """Norms on q and k over head_dim."""
    window: Callable[[Raw], str | None] = _no_window
    """Why attention does not see everything, or None: what transformers' class makes of `sliding_window`,
    `use_sliding_window`, `max_window_layers` and `layer_types`. Without a rule the class reads none of them."""
    activation: str = "silu"
    """What transformers reads into a config.json without `hidden_act`."""


FAMILIES: dict[str, Family] = {
    "llama": Family(title="Llama, Reka Flash 3 and 3.1", biases=_all_biases),
    "mistral": Family(title="Mistral, Devstral, Magistral (text)", window=_window(4096)),
    "qwen2": Family(title="Qwen2 and Qwen2.5 (biases on q, k, v)", biases=_input_biases, window=_switched_window),
    "qwen3": Family(title="Qwen3 (norms on q and k)", biases=_all_biases, qk_norm=True, window=_switched_window),
    "phi3": Family(title="Phi-3 and Phi-4 (fused projections)", window=_window(None)),
}


def window_in_force(raw: Raw) -> str | None:
    """Why attention does not see everything, or None."""
    return FAMILIES.get(str(raw.get("model_type")), Family(title="")).window(raw)
