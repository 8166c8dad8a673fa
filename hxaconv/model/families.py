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


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of teacher."""

    title: str
    biases: Callable[[Raw], Biases] = _no_biases
    qk_norm: bool = False
    """Norms on q and k over head_dim."""
    window_switch: bool = False
    """Whether `sliding_window` counts only where `use_sliding_window` is true, and from `max_window_layers` on."""
    default_window: int | None = None
    """What transformers reads into a config.json without the key `sliding_window`."""


FAMILIES: dict[str, Family] = {
    "llama": Family(title="Llama, Reka Flash 3 and 3.1", biases=_all_biases),
    "mistral": Family(title="Mistral, Devstral, Magistral (text)", default_window=4096),
    "qwen2": Family(title="Qwen2 and Qwen2.5 (biases on q, k, v)", biases=_input_biases, window_switch=True),
    "qwen3": Family(title="Qwen3 (norms on q and k)", biases=_all_biases, qk_norm=True, window_switch=True),
    "phi3": Family(title="Phi-3 and Phi-4 (fused projections)"),
}


def window_in_force(raw: Raw) -> str | None:
    """Why attention does not see everything, or None."""
    family, kinds = FAMILIES.get(str(raw.get("model_type")), Family(title="")), raw.get("layer_types") or []
    if any(kind != "full_attention" for kind in kinds):
        return f"layer_types names {sorted(set(kinds) - {'full_attention'})}"
    implied = "sliding_window" not in raw and family.default_window is not None
    window = family.default_window if implied else raw.get("sliding_window")
    if not isinstance(window, int) or kinds or not raw.get("use_sliding_window", not family.window_switch):
        return None
    # In Qwen's configs the window begins at this layer.
    begins, layers = raw.get("max_window_layers"), raw.get("num_hidden_layers")
    if isinstance(begins, int) and isinstance(layers, int) and begins >= layers:
        return None
    context = raw.get("max_position_embeddings")
    if context is not None and window >= context:
        return None
    default = f", the default of {raw['model_type']}'s where config.json has no such key" if implied else ""
    return f"sliding_window is {window}{default}"
