"""The config.json of a student: one file for RWKV-Infer, transformers 4 and 5, and llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hxaconv.formats.dtypes import BY_NAME
from hxaconv.model.config import StudentConfig
from hxaconv.model.variants.base import MODEL_TYPE, RANK_KEYS

AUTO_MAP = {
    "AutoConfig": "configuration_hxa079.Hxa079Config",
    "AutoModel": "modeling_hxa079.Hxa079Model",
    "AutoModelForCausalLM": "modeling_hxa079.Hxa079ForCausalLM",
}

CARRIED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
    "initializer_range",
    "attention_dropout",
)
"""Keys of the teacher's config.json that keep their meaning in the student's."""


def student_json(config: StudentConfig, raw: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config as a dict in a stable order; `raw` is the config.json that the model came from.

    rope_theta and the dtype stand in both spellings: RWKV-Infer and transformers 4 read the first,
    transformers 5 the second.
    """
    scaling = config.rope_scaling.to_dict() if config.rope_scaling else None
    torch_name = BY_NAME[dtype].torch_name
    return {
        "architectures": ["Hxa079ForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": AUTO_MAP,
        "rwkv_architecture": config.rwkv_architecture,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_word_embeddings,
        "transformer_layers": list(config.gqa_layers),
        "rwkv_layers": list(config.rwkv_layers),
        "nope_in_transformer": True,
        "nope_in_rwkv": False,
        "enable_qk_norm": config.qk_norm,
        "attention_bias": config.attention_bias,
        "attention_out_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        **(config.experts.to_config() if config.experts is not None else {}),
        "has_layer_records": config.layer_records,
        **{RANK_KEYS[name]: getattr(config.ranks, name) for name in config.variant.rank_names},
        **{key: raw[key] for key in CARRIED if key in raw},
        "use_cache": True,
        "torch_dtype": torch_name,
        "dtype": torch_name,
    }
