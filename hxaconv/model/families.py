"""Families of teachers: one entry per `model_type`, with what transformers' class makes of its config.json.

A family that is not here, but in `REFUSED`, is no Llama with other settings: the error gives its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Raw = Mapping[Any, Any]


def _smollm3_layers(raw: Raw) -> tuple[int, ...]:
    with_rope, layers = raw.get("no_rope_layers"), range(raw["num_hidden_layers"])
    if with_rope is None:
        interval = raw.get("no_rope_layer_interval", 4)
        with_rope = [(layer + 1) % interval != 0 for layer in layers]
    return tuple(layer for layer, rotated in zip(layers, with_rope, strict=False) if not rotated)


def _smollm3_problems(raw: Raw) -> list[str]:
    listed, count = raw.get("no_rope_layers"), raw.get("num_hidden_layers") or 0
    if listed is None or len(listed) >= count:
        return []
    return [f"no_rope_layers has {len(listed)} entries for {count} layers"]


def _granite_problems(raw: Raw) -> list[str]:
    """Multipliers that are not those of Llama. Folded into bf16 weights, all but powers of two would round them."""
    heads, hidden = raw.get("num_attention_heads") or 1, raw.get("hidden_size") or 1
    head_dim = raw.get("head_dim") or hidden // heads
    neutral = {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": head_dim**-0.5,
        "logits_scaling": 1.0,
    }
    return [
        f"{key} is {raw.get(key, 1.0):g}: students have none, and folded into bf16 weights it would round them"
        for key, value in neutral.items()
        if raw.get(key, 1.0) != value
    ]


def _window(default: int | None) -> Callable[[Raw], str | None]:
    """`sliding_window` counts whatever other keys are; `default` where there is no such key."""

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
    if odd and window is None:
        return f"layer_types names {odd} and use_sliding_window is not true: one is wrong, transformers runs neither"
    return f"layer_types names {odd}" if odd else f"sliding_window is {window}, and use_sliding_window true"


def _smollm3_window(raw: Raw) -> str | None:
    """`sliding_window` counts where `use_sliding_window` is true, in layers without RoPE or those of `layer_types`."""
    kinds, window = raw.get("layer_types") or [], raw.get("sliding_window")
    odd = sorted(set(kinds) - {"full_attention"})
    if odd:
        return f"layer_types names {odd}"
    limited = not kinds and raw.get("use_sliding_window") and window is not None and _smollm3_layers(raw)
    if not limited or _reaches(window, raw):
        return None
    return f"sliding_window is {window}, and use_sliding_window true"


def _plainly_switched_window(raw: Raw) -> str | None:
    """`sliding_window` counts in every layer where `use_sliding_window` is true."""
    return _window(4096)(raw) if raw.get("use_sliding_window") else None


def _reaches(window: Any, raw: Raw) -> bool:
    """Whether the window spans the whole context."""
    context = raw.get("max_position_embeddings")
    return context is not None and window >= context


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of teacher."""

    title: str
    input_bias: str | None = "attention_bias"
    """The key that says whether q, k and v have biases; None where no key does."""
    biased: bool = False
    """Whether they have, without that key."""
    output_bias: str = ""
    """The key that says whether the attention output has a bias, which it has not without it."""
    qk_norm: bool = False
    """Norms on q and k over head_dim."""
    nope_layers: Callable[[Raw], tuple[int, ...]] = lambda raw: ()
    """Layers whose attention has no RoPE."""
    window: Callable[[Raw], str | None] = lambda raw: None
    """Why attention does not see everything, or None: what transformers' class makes of `sliding_window`,
    `use_sliding_window`, `max_window_layers` and `layer_types`. Without a rule the class reads none of them."""
    activation: str = "silu"
    """What transformers reads into a config.json without `hidden_act`."""
    problems: Callable[[Raw], list[str]] = lambda raw: []
    """What else a student could not compute, a line each."""
    experts: bool = False
    """Whether MLPs are mixtures of experts, where config.json names any."""
    ties: bool = False
    """Whether the head is the embedding where config.json has no `tie_word_embeddings`, as transformers' class reads
    it (the same in 4.51 and 5)."""

    def biases(self, raw: Raw) -> tuple[bool, bool]:
        """Whether q, k and v have biases, and whether the attention output has one."""
        return bool(raw.get(self.input_bias, self.biased)), bool(raw.get(self.output_bias))


FAMILIES: dict[str, Family] = {
    "llama": Family(title="Llama, Reka Flash 3 and 3.1", output_bias="attention_bias"),
    "mistral": Family(title="Mistral, Devstral, Magistral (text)", window=_window(4096)),
    "qwen2": Family(
        title="Qwen2 and Qwen2.5 (biases on q, k, v)",
        input_bias=None,
        biased=True,
        window=_switched_window,
    ),
    "qwen3": Family(
        title="Qwen3 (norms on q and k)",
        output_bias="attention_bias",
        qk_norm=True,
        window=_switched_window,
    ),
    "qwen3_moe": Family(
        title="Qwen3-MoE (norms on q and k, experts)",
        output_bias="attention_bias",
        qk_norm=True,
        window=_plainly_switched_window,
        experts=True,
    ),
    "phi3": Family(title="Phi-3 and Phi-4 (fused projections)", window=_window(None)),
    "seed_oss": Family(title="Seed-OSS (biases on q, k, v)", biased=True, output_bias="attention_out_bias"),
    "smollm3": Family(
        title="SmolLM3 (layers without RoPE)",
        output_bias="attention_bias",
        nope_layers=_smollm3_layers,
        problems=_smollm3_problems,
        window=_smollm3_window,
        ties=True,
    ),
    "granite": Family(
        title="Granite, where all its multipliers are Llama's", output_bias="attention_bias", problems=_granite_problems
    ),
}

REFUSED = {
    "olmo": "its norms have no weights",
    "olmo2": "it norms what attention and MLP give, not what they get, and q and k over all heads at once",
    "olmo3": "it norms what attention and MLP give, not what they get, and q and k over all heads at once",
    "gemma": "its norms multiply by 1 + weight, its embedding is scaled, its MLP has GELU",
    "gemma2": "its norms multiply by 1 + weight and stand on both sides, its logits are capped, its MLP has GELU",
    "gemma3_text": "its norms multiply by 1 + weight and stand on both sides, its MLP has GELU",
    "cohere": "attention and MLP read the same norm side by side",
    "cohere2": "attention and MLP read the same norm side by side, and most layers see a window",
    "gpt_oss": "its attention has sinks, and its experts are not SwiGLU",
    "phi": "attention and MLP read the same norm side by side, and its MLP is no SwiGLU",
    "deepseek_v2": "its attention is MLA: keys and values come from one narrow projection",
    "deepseek_v3": "its attention is MLA: keys and values come from one narrow projection",
}
"""Families that cannot be students' teachers: `model_type` -> why."""
