"""Mixtures of experts in place of a layer's MLP: a router and E small MLPs, of which a token passes k.

As in transformers' Qwen3Moe: softmax over all experts, the k largest, divided by their sum with norm_topk_prob.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hxaconv.model.variants.base import Shapes

SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
KEYS = (*SIZES, "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step")
"""Experts in config.json."""

FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""All experts of a layer in two tensors, as transformers 5 holds them in memory and some files store them."""

PTH_REASON = (
    "a .pth cannot carry experts: RWKV-Infer reads num_experts and num_experts_per_tok from a config.json,"
    " and looks for none beside a .pth"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture of experts of a model, in the words of config.json."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = False
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1

    def in_layer(self, layer: int) -> bool:
        """Whether this layer has experts, not one MLP."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def tensors(self, hidden_size: int) -> Shapes:
        """Name behind `mlp.` -> shape of one layer's router and experts."""
        c, f = hidden_size, self.moe_intermediate_size
        shapes: Shapes = {"gate.weight": (self.num_experts, c)}
        for expert in range(self.num_experts):
            for name, shape in (("gate_proj", (f, c)), ("up_proj", (f, c)), ("down_proj", (c, f))):
                shapes[f"experts.{expert}.{name}.weight"] = shape
        return shapes

    def to_config(self) -> dict[str, Any]:
        """As keys of config.json."""
        return {key: getattr(self, key) for key in KEYS} | {"mlp_only_layers": list(self.mlp_only_layers)}


def expert_facts(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of experts in a config.json; nothing where it has none."""
    count = raw.get("num_experts") or raw.get("num_local_experts")  # the second as transformers 5 writes it
    if not count:
        return {}
    facts = {key: raw[key] for key in KEYS if raw.get(key) is not None} | {"num_experts": count}
    if "mlp_only_layers" in facts:
        facts["mlp_only_layers"] = tuple(facts["mlp_only_layers"])
    return facts


def expert_problems(facts: Mapping[str, Any]) -> list[str]:
    """What is missing or cannot be, a line each."""
    if not facts:
        return []
    values = {"decoder_sparse_step": 1} | dict(facts)
    found = {key: values.get(key) for key in (*SIZES, "decoder_sparse_step")}
    problems = [
        f"{key} is {value!r}, expected a positive whole number" for key, value in found.items() if not positive(value)
    ]
    if not problems and facts["num_experts_per_tok"] > facts["num_experts"]:
        problems.append(f"num_experts_per_tok {facts['num_experts_per_tok']} of num_experts {facts['num_experts']}")
    return problems


def positive(value: Any) -> bool:
    """Whether a setting is a whole number above 0, of a size that tensors have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
