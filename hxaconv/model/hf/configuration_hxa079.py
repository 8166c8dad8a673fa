"""Configuration of hxa079: RWKV-7 layers with RoPE, a few grouped-query attention (GQA) layers without.

config.json serves several readers, so `to_dict` keeps `REQUIRED` at top level in every version of
transformers (version 5 would move rope_theta into `rope_parameters`) and names the dtype both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

# What RWKV-Infer's loader of Hugging Face folders reads.
REQUIRED = (
    *("rwkv_architecture", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings"),
)
ARCHITECTURES = ("hxa079", "hxa07a", "hxa07b", "hxa07c", "hxa07d", "hxa07e")
AUTO_MAP = {
    "AutoConfig": "configuration_hxa079.Hxa079Config",
    "AutoModel": "modeling_hxa079.Hxa079Model",
    "AutoModelForCausalLM": "modeling_hxa079.Hxa079ForCausalLM",
}
DEFAULTS: dict[str, Any] = (
    {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": None, "head_dim": None}
    | {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "hidden_act": "silu", "initializer_range": 0.02}
    | {"lora_rank_decay": 256, "lora_rank_iclr": 32, "lora_rank_gate": 256, "lora_rank_own_value": 32}
    | {"lora_rank_value_residual_mix": 32, "lora_rank_key_residual_mix": 32}
    | {"enable_qk_norm": False, "attention_bias": False, "attention_out_bias": False, "mlp_bias": False}
    | {"rwkv_architecture": "hxa079", "nope_in_transformer": True, "nope_in_rwkv": False}
    | {"has_layer_records": True, "use_fla_kernels": True, "use_cache": True}
)
# In config.json only where there are experts.
EXPERT_DEFAULTS: dict[str, Any] = (
    {"num_experts": 0, "num_experts_per_tok": 8}
    | {"moe_intermediate_size": 768, "norm_topk_prob": False}
    | {"mlp_only_layers": (), "decoder_sparse_step": 1}
)

# Kinds of RoPE scaling whose frequencies do not depend on the input's length -> what they cannot do without.
_LENGTH = "original_max_position_embeddings"
ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", _LENGTH, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", _LENGTH),
}


def kind_of(rope: dict[str, Any]) -> str:
    """The kind of scaling that RoPE settings name, in either spelling."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


class Hxa079Config(PretrainedConfig):  # type: ignore[misc]
    """Sizes, layer map and switches of an hxa079 model; names as in config.json.

    Args:
        transformer_layers: the layers that are GQA, the others are RWKV.
        lora_rank_*: inner widths of the low-rank pairs in RWKV layers (nothing to do with LoRA adapters).
        enable_qk_norm: RMSNorm over head_dim on r and k (RWKV) or q and k (GQA).
        attention_bias: biases on q, k, v, in RWKV layers on receptance, key, value.
        attention_out_bias: biases on o_proj, in RWKV layers on output.
        num_experts: experts in place of the MLP in layers that are not in `mlp_only_layers` and whose number, counted
            from 1, is a multiple of decoder_sparse_step; 0 for one MLP everywhere. num_experts_per_tok,
            moe_intermediate_size and norm_topk_prob as in transformers' Qwen3Moe.
        has_layer_records: RWKV layers carry the 0-dim tensors layer_architecture and head_size_record.
        use_fla_kernels: run long inputs on flash-linear-attention's kernel where it is installed, on a GPU,
            in bfloat16 or float16.

    Raises:
        ValueError: for settings that the modelling code does not implement.
    """

    model_type = "hxa079"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers' own declaration)

    def __init__(
        self,
        transformer_layers: Sequence[int] = (),
        rwkv_layers: Sequence[int] | None = None,
        rope_theta: float | None = None,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        for key, value in DEFAULTS.items():
            setattr(self, key, kwargs.pop(key, value))
        experts = {key: kwargs.pop(key, value) for key, value in EXPERT_DEFAULTS.items()}
        if experts["num_experts"]:
            self.__dict__ |= experts | {"mlp_only_layers": list(experts["mlp_only_layers"] or ())}
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.transformer_layers = sorted(transformer_layers)
        self.rwkv_layers = [i for i in range(self.num_hidden_layers) if i not in self.transformer_layers]
        spellings = [settings for settings in (rope_parameters, rope_scaling) if settings]
        rope = next((settings for settings in spellings if kind_of(settings) != "default"), (spellings or [{}])[0])
        # Not named rope_scaling: that is an alias of rope_parameters in transformers 5.
        self.rope_stretch = None
        if kind_of(rope) != "default":
            self.rope_stretch = {key: rope[key] for key in rope if key not in ("type", "rope_theta")}
            self.rope_stretch["rope_type"] = kind_of(rope)
        self.rope_theta = rope_theta if rope_theta is not None else rope.get("rope_theta", 1e6)
        self._refuse(rope, rwkv_layers)
        # `torch_dtype` is understood by every version; two spellings at once only by some.
        dtype = kwargs.pop("dtype", None)
        kwargs["torch_dtype"] = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        # pipeline() of transformers 4.51 loads a tokenizer only if this names a class; tokenizer_config.json wins.
        kwargs["tokenizer_class"] = kwargs.get("tokenizer_class") or "PreTrainedTokenizerFast"
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def _refuse(self, rope: dict[str, Any], rwkv_layers: Sequence[int] | None) -> None:
        layers = range(self.num_hidden_layers)
        fixed = {"hidden_act": "silu", "nope_in_transformer": True, "nope_in_rwkv": False}
        if self.rwkv_architecture not in ARCHITECTURES:
            raise ValueError(
                f"config.json: rwkv_architecture is {self.rwkv_architecture!r}, this code implements {ARCHITECTURES}"
            )
        for key, value in fixed.items():
            if getattr(self, key) != value:
                raise ValueError(f"config.json: {key} is {getattr(self, key)!r}, this code implements {value!r} only")
        if kind_of(rope) not in ROPE_NEEDS or rope.get("rope_theta", self.rope_theta) != self.rope_theta:
            raise ValueError(f"config.json: RoPE settings {rope} are not computed for {self.rope_theta=}")
        if any(not rope.get(key) for key in ROPE_NEEDS[kind_of(rope)]):
            raise ValueError(f"config.json: RoPE settings {rope} lack some of {ROPE_NEEDS[kind_of(rope)]}")
        if any(layer not in layers for layer in self.transformer_layers):
            raise ValueError(f"config.json: transformer_layers {self.transformer_layers} outside 0..{len(layers) - 1}")
        if rwkv_layers is not None and sorted(rwkv_layers) != self.rwkv_layers:
            raise ValueError(f"config.json: rwkv_layers {rwkv_layers} and transformer_layers do not add up")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"config.json: {self.num_attention_heads=} must be a multiple of"
                f" {self.num_key_value_heads=}, and {self.head_dim=} even"
            )

    @property
    def expert_layers(self) -> list[int]:
        """The layers with a mixture of experts in place of the MLP."""
        if not getattr(self, "num_experts", 0):
            return []
        every = range(self.num_hidden_layers)
        return [i for i in every if i not in self.mlp_only_layers and (i + 1) % self.decoder_sparse_step == 0]

    def to_dict(self) -> dict[str, Any]:
        """Everything, with RoPE in both spellings and an auto_map that works offline."""
        content: dict[str, Any] = super().to_dict()
        stretch = content.pop("rope_stretch", None)
        content["rope_parameters"] = {"rope_type": "default", **(stretch or {}), "rope_theta": self.rope_theta}
        content["rope_scaling"] = stretch
        # After loading from the Hub the entries read "org/name--module.Class".
        auto_map = AUTO_MAP | (content.get("auto_map") or {})
        content["auto_map"] = {key: value.rsplit("--", 1)[-1] for key, value in auto_map.items()}
        return content

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: never without the keys of `REQUIRED`, the dtype in both spellings."""
        content: dict[str, Any] = super().to_diff_dict()
        content |= {key: getattr(self, key) for key in REQUIRED}
        dtype = content.get("dtype", content.get("torch_dtype"))
        if dtype is not None:
            content["dtype"] = content["torch_dtype"] = str(dtype).removeprefix("torch.")
        return content


Hxa079Config.register_for_auto_class()
