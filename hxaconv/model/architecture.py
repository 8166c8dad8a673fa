"""Every tensor a model must have, in order, with its shape: computed from the config alone.

Nothing here depends on how tensors are made, so that it can contradict the recipes.
"""

from __future__ import annotations

from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.variants.base import Shapes


def expected_tensors(config: ModelConfig) -> Shapes:
    """Canonical name -> shape, in layer order; for a StudentConfig its layer kinds decide."""
    c, v = config.hidden_size, config.vocab_size
    shapes: Shapes = {"model.embed_tokens.weight": (v, c)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (c,)
        for name, shape in mixer_tensors(config, layer).items():
            shapes[f"{prefix}.self_attn.{name}"] = shape
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (c,)
        for name, shape in _mlp(config, layer).items():
            shapes[f"{prefix}.mlp.{name}"] = shape
    shapes["model.norm.weight"] = (c,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (v, c)
    return shapes


def mixer_tensors(config: ModelConfig, layer: int) -> Shapes:
    """The mixer's tensors of one layer, without the `self_attn.` prefix."""
    rwkv = isinstance(config, StudentConfig) and config.layer_kind(layer) == "rwkv"
    shapes = dict(config.variant.shapes(config)) if isinstance(config, StudentConfig) and rwkv else {}
    c, a, kv = config.hidden_size, config.attention_size, config.key_value_size
    names = ("receptance", "key", "value", "output") if rwkv else ("q_proj", "k_proj", "v_proj", "o_proj")
    for name, out_size, in_size in zip(names, (a, kv, kv, c), (c, c, c, a), strict=True):
        shapes[f"{name}.weight"] = (out_size, in_size)
        if config.output_bias if name == names[3] else config.attention_bias:
            shapes[f"{name}.bias"] = (out_size,)
    if config.qk_norm:
        shapes |= dict.fromkeys(("r_norm.weight" if rwkv else "q_norm.weight", "k_norm.weight"), (config.head_dim,))
    return shapes


def _mlp(config: ModelConfig, layer: int) -> Shapes:
    c, f = config.hidden_size, config.intermediate_size
    if config.experts is not None and config.has_experts(layer):
        return config.experts.tensors(c)
    shapes: Shapes = {}
    for name, out_size, in_size in (("gate_proj", f, c), ("up_proj", f, c), ("down_proj", c, f)):
        shapes[f"{name}.weight"] = (out_size, in_size)
        if config.mlp_bias:
            shapes[f"{name}.bias"] = (out_size,)
    return shapes
