"""What a checkpoint is that is no teacher and no student: its format in words, and the way out.

Four tables: the kinds of adapters, and, asked in this order, the files of a folder, config.json, and the names and
dtypes of tensors. Files and config.json answer before weights are opened.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hxaconv.errors import NotConverted, bullet_list
from hxaconv.formats.files import show
from hxaconv.model import shells
from hxaconv.model.families import FAMILIES


@dataclass(frozen=True, slots=True)
class Kind:
    """A format that is recognised and not converted."""

    what: str
    """As in: NAME is ..., with its article."""
    way_out: str
    examples: tuple[str, ...] = ()
    """Names that show it."""

    def error(self, label: str) -> NotConverted:
        """The refusal."""
        shown = f":\n{bullet_list(self.examples)}" if self.examples else ""
        return NotConverted(f"{label} is {self.what}{shown}", hint=self.way_out)


# --- adapters ---------------------------------------------------------------------------------------

PEFT = {
    "ADALORA": ("AdaLoRA", "lora_E"), "LORA": ("LoRA", "lora_"), "IA3": ("IA3", "ia3_"), "LOHA": ("LoHa", "hada_"),
    "LOKR": ("LoKr", "lokr_"), "VERA": ("VeRA", "vera_"), "OFT": ("OFT", "oft_"), "BOFT": ("BOFT", "boft_"),
    "HRA": ("HRA", "hra_"), "FOURIERFT": ("FourierFT", "fourierft_"), "VBLORA": ("VB-LoRA", "vblora_"),
    "RANDLORA": ("RandLoRA", "randlora_"), "BONE": ("Bone", "bone_"), "MISS": ("MiSS", "miss_"),
    "ROAD": ("RoAd", "road_"), "SHIRA": ("SHiRA", "shira_"), "C3A": ("C3A", "c3a_"), "WAVEFT": ("WaveFT", "waveft_"),
    "DELORA": ("DeLoRA", "delora_"), "GRALORA": ("GraLoRA", "gralora_"),
    "LN_TUNING": ("LayerNorm tuning", "ln_tuning_"),
}  # fmt: skip
"""Of `peft_type` in adapter_config.json: what it is called, and what the names of its tensors begin with after the
module's. Of these, LORA is merged here."""
_PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE",
            "ADAPTION_PROMPT"}  # fmt: skip
_ON_ITS_MODEL = "Name {base} as SOURCE, and this as --adapter, which merges it."
WITH_PEFT = (
    "Merge it into its model with peft, and convert the result:"
    " peft.AutoPeftModelForCausalLM.from_pretrained(THIS).merge_and_unload().save_pretrained(OUT)."
)
_BASE = "the model that it was trained on"
_WITH_ITS_LIBRARY = f"Merge it into {_BASE} with the library that trained it, and convert the result."
_PROMPT = f"Convert {_BASE}; a prompt is no part of its weights."


def kind_of_adapter(raw: Mapping[str, Any]) -> Kind:
    """What adapter_config.json holds, and how the adapter gets into its model."""
    name, base = str(raw.get("peft_type") or ""), raw.get("base_model_name_or_path")
    if name in _PROMPTS:
        return Kind(f"a soft prompt of PEFT ({name})", _PROMPT)
    title, _ = PEFT.get(name, (name, ""))
    base = f"{_BASE} ({show(base)})" if isinstance(base, str) and base else _BASE
    way_out = _ON_ITS_MODEL.format(base=base) if name in ("LORA", "") else WITH_PEFT
    return Kind(f"an adapter of PEFT{f' of the kind {title}' if title else ''}, not a model", way_out)


ORIGINAL = "Take the bf16 original of the model (its model card links it as the base model)."
_DEQUANTIZED = " If its weights have been dequantized since, delete quantization_config from config.json."
_OF_TRANSFORMERS = (
    "Take the files of the transformers format (model.safetensors, config.json) from the same page of the Hub, or"
    " convert it with convert_llama_weights_to_hf.py or convert_mistral_weights_to_hf.py, which stand in the repository"
    " of transformers and not in its package."
)

# --- files ------------------------------------------------------------------------------------------

_PYTORCH = "Take the safetensors or PyTorch files of the model."
_FILES: tuple[tuple[str, str, str], ...] = (
    (r"adapter_model\.(safetensors|bin)", "an adapter of PEFT without its adapter_config.json", "Copy that as well."),
    (r"__\d+_\d+\.distcp|\.metadata", "a folder of torch.distributed.checkpoint (FSDP) without its .metadata or shards",
     "Copy the whole folder again: it is read here. `accelerate merge-weights FOLDER OUT` makes one file of it."),
    (r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt|zero_to_fp32\.py|latest",
     "a checkpoint of DeepSpeed ZeRO without the folder of its step",
     "Copy its global_step* folder as well, all ranks of it, and give this folder again."),
    (r"params\.json|consolidated[.\d]*\.(pth|safetensors)", "in the original layout of Meta or Mistral",
     _OF_TRANSFORMERS),
    (r".*\.gguf", "a GGUF model", "Convert from the original safetensors instead."),
    (r"tf_model\.h5|.*\.ckpt\.index|saved_model\.pb", "a TensorFlow model", _PYTORCH),
    (r"flax_model.*\.msgpack", "a Flax model", _PYTORCH),
    (r".*\.onnx", "an ONNX model", _PYTORCH),
    (r"model-rank-\d+-part-\d+\.safetensors", "the slices of a model that vLLM saved for each of its ranks",
     "Take the folder that vLLM loaded; slices are not put together here."),
    (r"latest_checkpointed_iteration\.txt", "a checkpoint of Megatron-LM",
     "Convert it to the transformers format with Megatron's own tools/checkpoint first."),
    (r".*\.nemo", "a model of NeMo", "Export it to the transformers format with NeMo first."),
    (r".*\.npz", "NumPy arrays (an older MLX model)", "Take the safetensors files of the model."),
    (r"model_index\.json", "a pipeline of diffusers", "Give the folder of its language model."),
)  # fmt: skip


def kind_of_files(names: Iterable[str]) -> Kind | None:
    """What a folder without weights is, by the names of its files; None where none is characteristic."""
    names = list(names)
    found = (row for row in _FILES if any(re.fullmatch(row[0], name) for name in names))
    return next((Kind(what, way_out) for _, what, way_out in found), None)


# --- config.json ------------------------------------------------------------------------------------

_METHODS = {
    "fp8": "FP8 with scales per block", "fbgemm_fp8": "FP8 (FBGEMM)", "gptq": "GPTQ", "awq": "AWQ",
    "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors", "hqq": "HQQ", "quanto": "quanto",
    "torchao": "torchao", "mxfp4": "MXFP4", "modelopt": "ModelOpt", "aqlm": "AQLM", "eetq": "EETQ", "exl2": "EXL2",
    "bitnet": "BitNet", "auto-round": "AutoRound", "vptq": "VPTQ", "spqr": "SpQR", "higgs": "HIGGS",
    "quark": "Quark", "fp_quant": "FP-Quant",
}  # fmt: skip
_WAYS_BACK = {
    "fp8": "Or let transformers (5 or newer) dequantize it: AutoModelForCausalLM.from_pretrained(THIS,"
    " dtype='bfloat16', quantization_config=FineGrainedFP8Config(dequantize=True))"
    ".save_pretrained(OUT, save_original_format=False).",
    "bitsandbytes": "Transformers has model.dequantize() for it, where bitsandbytes is installed.",
    "compressed-tensors": "The library compressed-tensors decompresses it.",
}
_SHELLS = ("text_config", "llm_config", "language_config", "thinker_config")
_OWN_CODE = "It runs with its own code; there is nothing to convert."
_OTHER_RWKV = {
    "RWKV7Qwen2ForCausalLM": "QRWKV7 (RWKV-7 inside Qwen2, with its own names)",
    "RWKV6Qwen2ForCausalLM": "QRWKV6 (RWKV-6 inside Qwen2)",
    "RwkvHybridForCausalLM": "ARWKV (RWKV-7 inside Qwen2)",
    "RWKV07BMoEForCausalLM": "a shell of text and vision around an RWKV mixture of experts",
}


def kind_of_config(raw: Mapping[str, Any]) -> Kind | None:
    """What config.json alone shows to be neither teacher nor student; None where it does not."""
    quantized = _quantized(raw)
    if quantized is not None or raw.get("rwkv_architecture"):
        return quantized
    classes = [_OTHER_RWKV[name] for name in raw.get("architectures") or [] if name in _OTHER_RWKV]
    if not classes and not re.fullmatch(r"(hf_)?rwkv[\w-]*", str(raw.get("model_type") or ""), re.IGNORECASE):
        return None
    what = classes[0] if classes else f"an RWKV model of its own ({raw['model_type']})"
    return Kind(f"{what}, no hybrid of the family of hxa079", _OWN_CODE)


def _quantized(raw: Mapping[str, Any]) -> Kind | None:
    found = next(
        (raw[key] for key in ("quantization_config", "quantization", "compression_config") if raw.get(key)), None
    )
    if not isinstance(found, Mapping):
        return None
    method = found.get("quant_method")
    if method is None and "group_size" in found and "bits" in found:
        named, back = "MLX", "MLX's own converter, mlx_lm.convert, dequantizes it with its option -d."
    else:
        named, back = _METHODS.get(str(method), str(method or "an unknown method")), _WAYS_BACK.get(str(method), "")
    details = [named, *([f"{found['bits']} bits"] if isinstance(found.get("bits"), int) else [])]
    if method == "bitsandbytes":
        details = [named, str(found.get("bnb_4bit_quant_type", "4 bits")) if found.get("load_in_4bit") else "8 bits"]
    if isinstance(found.get("format"), str):
        details.append(found["format"])
    way_out = f"{ORIGINAL} {back}{_DEQUANTIZED}".replace("  ", " ")
    return Kind(f"quantized ({', '.join(details)}), by its config.json", way_out)


def kind_of_shell(raw: Mapping[str, Any]) -> Kind | None:
    """What wraps a language model beside others, where that cannot be taken out of it; None where nothing does."""
    inner = next((raw[key] for key in _SHELLS if isinstance(raw.get(key), Mapping)), None)
    if inner is None or raw.get("model_type") in FAMILIES:
        return None
    if "text_config" in raw and shells.text_config(raw)["model_type"] in FAMILIES:
        return None  # its text model is taken
    return Kind(
        f"a shell of several modalities ({raw.get('model_type')}) around a language model"
        f" ({inner.get('model_type') or 'of a kind it does not name'})",
        "Text models of these families are taken out of a shell: " + ", ".join(FAMILIES) + ".",
    )


# --- names and dtypes -------------------------------------------------------------------------------

_NAMES: tuple[tuple[str, str, str], ...] = (
    # adapters
    (r"\.init_lora_[AB]\b", "the initial matrices of a PiSSA or LoRA run of RWKV-PEFT, without what was trained",
     "Name the model that the run began with as SOURCE, and the folder of both files as --adapter."),
    (r"\.disha\b", "an adapter of RWKV-PEFT (DiSHA)", _ON_ITS_MODEL.format(base=_BASE)),
    (r"\.bone\b", "an adapter of RWKV-PEFT (Bone)", _ON_ITS_MODEL.format(base=_BASE)),
    *((rf"\.{start}", f"an adapter ({title})", _ON_ITS_MODEL.format(base=_BASE) if name == "LORA" else WITH_PEFT)
      for name, (title, start) in PEFT.items()),
    (r"prompt_embeddings", "a soft prompt", _PROMPT),
    (r"\.time_state\b", "the initial states of RWKV state tuning",
     "hxa079 begins with states of zero: convert the model that it was tuned on."),
    (r"\.base_layer\.|\.modules_to_save\.|\.original_module\.", "a model with an adapter that is not merged",
     _WITH_ITS_LIBRARY),
    # quantized
    (r"\.quant_state\.bitsandbytes__(nf4|fp4)|\.absmax$|\.quant_map$", "quantized (bitsandbytes, 4 bits)", ORIGINAL),
    (r"\.SCB$", "quantized (bitsandbytes, 8 bits)", ORIGINAL),
    (r"\.g_idx$", "quantized (GPTQ)", ORIGINAL),
    (r"\.qweight$|\.qzeros$", "quantized (AWQ or GPTQ)", ORIGINAL),
    (r"\.weight_packed$", "quantized (compressed-tensors)", ORIGINAL),
    (r"\.weight_scale_inv$", "quantized (FP8 with scales per block)", ORIGINAL),
    (r"\.weight_scale_2$", "quantized (ModelOpt, FP4)", ORIGINAL),
    (r"\.(weight|input|k|v)_scale$", "quantized (scales beside the weights)", ORIGINAL),
    (r"_blocks$", "quantized (MXFP4)", ORIGINAL),
    (r"\.q_scale(_max)?$|\.q_weight$", "quantized (EXL2)", ORIGINAL),
    (r"\.W_q$", "quantized (HQQ)", ORIGINAL),
    (r"\.codebooks$", "quantized (AQLM)", ORIGINAL),
    (r"\.scales$", "quantized (MLX, or another method with scales)", ORIGINAL),
    # other models
    (r"\.tiny_[qkvo]\b|\.tiny_", "hxa07i, a hybrid with a second, tiny attention", "hxa07i is not converted."),
    (r"\.self_attn\.(k_k|k_a|x_[rwkvag])\b", "QRWKV7 or ARWKV (RWKV-7 inside Qwen2, with its own names)",
     _OWN_CODE),
    (r"\.att\.(x_[rwkvag]|k_k|k_a)$|\.att\.ln_x\.|\.ffn\.x_k$", "a plain RWKV-7 model",
     "It has no attention to convert."),
    (r"\.att\.time_(mix|maa|decay|first|faaaa)", "a plain RWKV model (before RWKV-7)",
     "It has no attention to convert."),
    (r"(^|\.)(tok_embeddings\.weight|layers\.\d+\.attention\.w[qkvo]\.)", "in the original layout of Meta or Mistral",
     _OF_TRANSFORMERS),
    (r"^(model\.)?(visual|vision_tower|vision_model|multi_modal_projector|mm_projector|audio_tower|language_model)\.",
     "a model of several modalities", "Save its language model alone first, under the names of a text model."),
    (r"(^|\.)transformer\.h\.\d+\.attn\.(attn|qkv)\.", "a model of LitGPT",
     "LitGPT has a command for it, convert_from_litgpt; the tensors must have the names of transformers then."),
    (r"(^|\.)(transformer\.h|gpt_neox\.layers|h)\.\d+\.", "a transformer of the GPT-2, GPT-J or GPT-NeoX kind", ""),
    (r"(^|\.)(decoder\.layers|language_model\.encoder\.layers)\.\d+\.", "a model with the names of Megatron-LM",
     "Convert it to the transformers format with Megatron's own tools first."),
    (r"\.kv_a_proj_with_mqa\b|\.kv_b_proj\b", "a model with multi-head latent attention",
     "hxa079 is made of grouped-query attention: another teacher is needed."),
    (r"\.mlp\.(experts|gate|shared_expert)\b|\.block_sparse_moe\.", "a mixture of experts of another kind", ""),
    (r"^(score|v_head|classifier|reward_head)\.", "a classifier or reward model, without a language head",
     "Take the language model that it was made of."),
)  # fmt: skip
_PLAIN = {"F16", "BF16", "F32", "F64"}
_OTHER_DTYPES: dict[str, tuple[str, str]] = {
    "F8_E4M3": ("quantized (FP8 without scales)", ORIGINAL),
    "F8_E5M2": ("quantized (FP8 without scales)", ORIGINAL),
    "U16": ("saved as 16-bit integers that hold the bits of bfloat16",
            "Save it again with the real dtype: {name: x.view(torch.bfloat16)} of its torch.uint16 tensors."),
    "I16": ("saved as 16-bit integers", "If these are the bits of bfloat16, save x.view(torch.bfloat16)."),
}  # fmt: skip


def kind_of_tensors(dtypes: Mapping[str, str], unknown: Collection[str]) -> Kind | None:
    """What tensors (name -> dtype) are by names that are not known, or by weights that are no floats."""
    for pattern, what, way_out in _NAMES:
        hits = tuple(name for name in unknown if re.search(pattern, name))
        if hits:
            return Kind(what, way_out or _known(), (*hits[:2], *([f"... {len(hits)} in all"] if len(hits) > 2 else ())))
    weights = {name: dtype for name, dtype in dtypes.items() if name.endswith(".weight") and dtype not in _PLAIN}
    if len(weights) * 2 < sum(name.endswith("proj.weight") for name in dtypes) or not weights:
        return None
    name, dtype = next(iter(weights.items()))
    what, way_out = _OTHER_DTYPES.get(dtype, (f"quantized (weights of dtype {dtype})", ORIGINAL))
    return Kind(
        what, way_out, (f"{name} has dtype {dtype}", *([f"... {len(weights)} in all"] if len(weights) > 1 else ()))
    )


def _known() -> str:
    return f"A teacher is one of {', '.join(FAMILIES)}; `hxaconv maps --names` prints the names."
