"""Every kind of checkpoint that people were found to have: how to rebuild it, and the right outcome.

`docs/checkpoints.md` is made of this table.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.field import builder
from tests.field.builder import config, folder, halves, mixers, noise, shards, tensors

INIT = ("init-from-teacher", "{in}", "{out}", "--gqa-layers", "1")
TO_HF = ("to-hf", "{in}", "{out}", "--teacher", "{teacher}")
READ, WARNED, REFUSED = "read", "read, with a warning", "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One situation. `what` and `do` are for the documentation, `words` must be in the message."""

    name: str
    what: str
    outcome: str
    do: str = "nothing"
    met: str = ""
    build: Callable[[Path], object]
    command: tuple[str, ...] = INIT
    words: tuple[str, ...] = ()
    expected: Callable[[Path], Mapping[str, Tensor]] | None = None
    """What the output must hold, read by transformers or torch: input folder -> name -> value."""
    kind: str = ""
    """What `inspect` says of it."""
    inside: str = ""
    """The path of the input, in what was built."""


CASES: list[Case] = []


def case(**values: Any) -> None:
    """Add one."""
    CASES.append(Case(**values))


def by_transformers(path: Path) -> Mapping[str, Tensor]:
    """The weights as transformers loads them, but for the mixers of layers 0 and 2, which become RWKV."""
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
    return {name: value for name, value in found.items() if "s.0.self_attn" not in name and "s.2.self_attn" not in name}


def by_torch(*keys: str) -> Callable[[Path], Mapping[str, Tensor]]:
    """The mixers as torch.load(weights_only=True) reads them, in a dictionary of dictionaries."""

    def read(path: Path) -> Mapping[str, Tensor]:
        found = torch.load(path, weights_only=True)
        for key in keys:
            found = found[key]
        return {
            name.replace("model.model.", "model.", 1).replace(".student_attn", "").removeprefix("module."): value
            for name, value in found.items()
        }

    return read


def save(value: object, name: str = "x.pth", **options: Any) -> Callable[[Path], object]:
    """Build one file of torch.save."""

    def build(path: Path) -> None:
        path.mkdir(parents=True)
        torch.save(value, path / name, **options)

    return build


# fmt: off
# --- index and shards -------------------------------------------------------------------------------

TIED = tensors(head=False)
NEEDLESS = "an index that lists a tied head, or rotary buffers, that no shard holds"
MORE = "shards that hold a head, buffers or mtp.* layers that the index does not list"
PARTS, INDEX = halves(TIED)
case(name="index_lists_absent_tied_head", what=NEEDLESS,
     outcome=READ, met="huggingface_hub#4725",
     build=lambda p: shards(p, config(tie_word_embeddings=True), PARTS, INDEX | {"lm_head.weight": 2}),
     expected=by_transformers)
case(name="index_lists_absent_buffer", what=NEEDLESS,
     outcome=READ, build=lambda p: shards(p, config(tie_word_embeddings=True), PARTS,
                                          INDEX | {"model.layers.0.self_attn.rotary_emb.inv_freq": 1}),
     expected=by_transformers)
case(name="shards_hold_more", what=MORE,
     outcome=READ, met="vllm#54230", build=lambda p: shards(
         p, config(tie_word_embeddings=True),
         [PARTS[0], PARTS[1] | {"lm_head.weight": TIED["model.embed_tokens.weight"].clone()}], INDEX),
     expected=by_transformers)
case(name="mtp_layers", what=MORE,
     outcome=READ, build=lambda p: shards(
         p, config(tie_word_embeddings=True), [PARTS[0], PARTS[1] | {"mtp.norm.weight": noise(32)}], INDEX))
case(name="index_lists_a_needed_tensor", what="an index that lists a weight that no shard holds", outcome=REFUSED,
     do="download the shard again", build=lambda p: shards(
         p, config(tie_word_embeddings=True),
         [PARTS[0], {name: value for name, value in PARTS[1].items() if name != "model.norm.weight"}], INDEX),
     words=("model.norm.weight: not in model-00002-of-00002", "Download"))
case(name="stale_index", what="an index of other shards than those in the folder", outcome=REFUSED,
     do="delete the index, if the shards in the folder are the model", build=lambda p: (
         folder(p, config(), tensors()), (p / "model.safetensors").rename(p / "weights.safetensors"),
         (p / "model.safetensors.index.json").write_text(
             json.dumps({"weight_map": dict.fromkeys(tensors(), "model-00001-of-00001.safetensors")}))),
     words=("stale", "delete model.safetensors.index.json"))
TWICE = [PARTS[0], PARTS[1] | {"model.embed_tokens.weight": TIED["model.embed_tokens.weight"].clone()}]
case(name="one_tensor_in_two_shards", what="a tensor in two shards, the same in both", outcome=READ, met="vllm#54230",
     build=lambda p: shards(p, config(tie_word_embeddings=True), TWICE, INDEX), expected=by_transformers)
case(name="one_tensor_in_two_shards_no_index", what="a tensor in two shards, the same in both", outcome=READ,
     build=lambda p: shards(p, config(tie_word_embeddings=True), TWICE, None))
case(name="two_values_of_one_tensor", what="a tensor in two shards, with different values", outcome=REFUSED,
     do="take the stale copy out, or download again (transformers takes the last shard's, whatever the index says)",
     build=lambda p: shards(p, config(tie_word_embeddings=True),
                            [PARTS[0], PARTS[1] | {"model.embed_tokens.weight": noise(64, 32, seed=5)}], INDEX),
     words=("model.embed_tokens.weight", "stale"))
case(name="single_file_beside_shards", what="model.safetensors beside indexed shards of another model", outcome=WARNED,
     words=("move model.safetensors away",),
     do="delete the others, if model.safetensors is the model: it wins, as in transformers", met="Blaizzy/mlx-vlm#1464",
     build=lambda p: (shards(p, config(), halves({n: v * 2 for n, v in tensors().items()})[0], halves(tensors())[1]),
                      save_file(tensors(), p / "model.safetensors", {"format": "pt"})),
     expected=by_transformers)
SHORT = "a model.safetensors that is cut off, beside whole shards and their index"


def short_file_beside_shards(path: Path) -> None:
    """A single file that ends early, where shards hold the model."""
    shards(path, config(tie_word_embeddings=True), PARTS, INDEX)
    data = (path / "model-00001-of-00002.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


case(name="short_file_beside_shards", what=SHORT, outcome=REFUSED, do="delete model.safetensors",
     build=short_file_beside_shards, words=("delete model.safetensors",))
BESIDE = "fine-tuned weights of another name beside the model's own (torchtune's hf_model_0001_0.pt)"
case(name="torchtune_beside_the_base", what=BESIDE, outcome=WARNED, met="torchtune#1388, torchtune#1744",
     do="move the model's own weights away", words=("not of hf_model_0001_0.pt", "move model.safetensors"),
     build=lambda p: (
         builder.teacher(p), torch.save({n: v * 2 for n, v in tensors().items()}, p / "hf_model_0001_0.pt")),
     expected=by_transformers)
case(name="torchtune_alone", what="weights of any name ending (torchtune's hf_model_0001_0.pt), alone", outcome=READ,
     met="torchtune#1388", build=lambda p: (
         folder(p, config(), {}), *(torch.save(part, p / f"hf_model_000{number}_0.pt")
                                    for number, part in enumerate(halves(tensors())[0], 1))),
     expected=lambda p: {n: v for n, v in tensors().items() if "self_attn" not in n})
case(name="pickle_named_safetensors", what="a pickle under the name model.safetensors", outcome=READ,
     met="safetensors#414", build=lambda p: (folder(p, config(), {}), torch.save(tensors(), p / "model.safetensors")),
     expected=lambda p: {n: v for n, v in tensors().items() if "self_attn" not in n})
case(name="slices_of_vllm", what="model-rank-0-part-0.safetensors, the slices that vLLM saves for each rank",
     outcome=REFUSED, do="take the folder that vLLM loaded", met="vllm#7304", words=("slices", "vLLM"), kind="vLLM",
     build=lambda p: (folder(p, config(), {}), *(save_file(
         {n: v[:16].clone() for n, v in tensors().items()}, p / f"model-rank-{rank}-part-0.safetensors")
         for rank in (0, 1))))
FOLDER_OF_BIN = "a folder named pytorch_model.bin, as DeepSpeed's zero_to_fp32.py makes it since 0.15.3"


def folder_named_bin(path: Path) -> None:
    """What the old command line makes of the new script."""
    folder(path, config(), {})
    (path / "pytorch_model.bin").mkdir()
    torch.save(tensors(), path / "pytorch_model.bin" / "pytorch_model.bin")


case(name="folder_named_bin", what=FOLDER_OF_BIN, outcome=REFUSED, do="move its files beside config.json",
     met="JIA-Lab-research/LISA#155", words=("pytorch_model.bin is a folder", "move its files beside config.json"),
     build=folder_named_bin)
case(name="appledouble", what="macOS's ._ files beside the weights", outcome=READ, met="SceneWorks#1333",
     build=lambda p: (shards(p, config(tie_word_embeddings=True), PARTS, None),
                      (p / "._model-00001-of-00002.safetensors").write_bytes(b"\x00\x05\x16\x07" + bytes(60)),
                      (p / "._config.json").write_bytes(b"\x00\x05\x16\x07")))

# --- names ------------------------------------------------------------------------------------------

case(name="flat_keys", what="names of a base model, without `model.`", outcome=READ, met="sgl-project/sglang#6917",
     build=lambda p: folder(p, config("qwen3", tie_word_embeddings=True),
                            {n.removeprefix("model."): v for n, v in tensors("qwen3", head=False).items()}),
     expected=by_transformers)
BUFFERS = ("model.layers.0.self_attn.rotary_emb.cos_cached", "model.layers.1.self_attn.rotary_emb.sin_cached",
           "model.rotary_emb.inv_freq", "model.layers.2.self_attn.rotary_emb.original_inv_freq",
           "model.rotary_emb_local.inv_freq", "rotary_emb.inv_freq")
case(name="rotary_buffers", what="buffers of rotary embeddings, in any place", outcome=READ,
     build=lambda p: folder(p, config(), tensors() | {name: noise(4) for name in BUFFERS}))
case(name="only_the_head", what="a tied model that stores only its head, only its embedding, or both", outcome=READ,
     met="safetensors' save_model", build=lambda p: folder(
         p, config(tie_word_embeddings=True), {("lm_head.weight" if "embed" in n else n): v for n, v in TIED.items()}),
     expected=lambda p: {"model.embed_tokens.weight": load_file(p / "model.safetensors")["lm_head.weight"]})
case(name="both_equal", what="a tied model that stores only its head, only its embedding, or both", outcome=READ,
     build=lambda p: folder(p, config(tie_word_embeddings=True),
                            TIED | {"lm_head.weight": TIED["model.embed_tokens.weight"].clone()}),
     expected=by_transformers)
case(name="both_different", what="a tied model whose stored head is not the embedding", outcome=REFUSED,
     do="--no-tie-word-embeddings, if the stored head is right",
     build=lambda p: folder(p, config(tie_word_embeddings=True), tensors()),
     words=("differs from", "--no-tie-word-embeddings"))
case(name="untied_no_head", what="a model whose config does not tie the head, and that stores none", outcome=REFUSED,
     do="--tie-word-embeddings, if the head is the embedding", met="QwenLM/Qwen3-VL-Embedding#89",
     build=lambda p: folder(p, config(), TIED), words=("--tie-word-embeddings",))
case(name="tie_unsaid", what="a model whose config does not tie the head, and that stores none", outcome=REFUSED,
     build=lambda p: folder(p, config(tie_word_embeddings=...), TIED),
     words=("config.json has no tie_word_embeddings", "--tie-word-embeddings"))
case(name="tie_unsaid_with_head", what="a config.json without tie_word_embeddings: what the family's class takes",
     outcome=READ, build=lambda p: folder(p, config(tie_word_embeddings=...), tensors()), expected=by_transformers)
case(name="tie_unsaid_smollm3", what="a config.json without tie_word_embeddings: what the family's class takes",
     outcome=READ, build=lambda p: folder(
         p, config("smollm3", tie_word_embeddings=..., pad_token_id=0, no_rope_layers=[1, 1, 1]), TIED),
     expected=by_transformers)
case(name="tied_in_text_config", what="a shell whose text_config alone ties the head (Ministral 3)", outcome=READ,
     met="transformers#43429", build=lambda p: folder(
         p, {"model_type": "mistral3", "vision_config": {}, "text_config": config(
             "mistral", tie_word_embeddings=True, sliding_window=None)},
         {n.replace("model.", "model.language_model.", 1): v for n, v in TIED.items()}),
     expected=lambda p: {n.replace("language_model.", ""): v for n, v in load_file(p / "model.safetensors").items()
                         if "s.0.self_attn" not in n and "s.2.self_attn" not in n})
case(name="vocab_size", what="a config.json of other sizes than the tensors", outcome=REFUSED, met="llama.cpp#8445",
     do="take the config.json of this model", build=lambda p: folder(p, config(vocab_size=60), tensors()),
     words=("has shape (64, 32), the config implies (60, 32)",))
case(name="original_layout", what="the original layout of Meta or Mistral (params.json, consolidated.*)",
     outcome=REFUSED, do="take the files of the transformers format, or convert with transformers' scripts",
     build=lambda p: folder(p, None, {}, params__json="{}", consolidated__00__pth=b"x"),
     words=("original layout of Meta or Mistral",), kind="original layout of Meta or Mistral")
case(name="unknown_family", what="a family that is not known", outcome=REFUSED, do="take another teacher",
     build=lambda p: folder(p, config("gpt_neox"), {"gpt_neox.layers.0.attention.query_key_value.weight": noise(9, 3)}),
     words=("gpt_neox",), kind="cannot become")

# --- quantized --------------------------------------------------------------------------------------

BF16 = "take the bf16 original, or let the named tool dequantize it"


def quantized(suffixes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], extra: Mapping[str, Any]) -> Any:
    """A teacher whose projections are replaced by tensors with these suffixes."""

    def build(path: Path) -> None:
        weights = {}
        for name, value in tensors().items():
            if "proj" not in name:
                weights[name] = value
                continue
            for suffix, (dtype, shape) in suffixes.items():
                weights[name.removesuffix("weight") + suffix] = torch.zeros(shape).to(dtype)
        folder(path, config(**extra), weights)

    return build


FP8 = {"weight": (torch.float8_e4m3fn, (32, 32))}
for method, suffixes, extra, word in (
    ("fp8_block", FP8 | {"weight_scale_inv": (torch.float32, (1, 1))},
     {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "FP8 with scales per block"),
    ("fp8_block_no_config", FP8 | {"weight_scale_inv": (torch.float32, (1, 1))}, {}, "FP8 with scales per block"),
    ("fp8_per_tensor", FP8 | {"weight_scale": (torch.float32, (1,)), "input_scale": (torch.float32, (1,))},
     {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
     "compressed-tensors, float-quantized"),
    ("fp8_cast", FP8, {}, "FP8 without scales"),
    ("awq", {"qweight": (torch.int32, (32, 4)), "qzeros": (torch.int32, (1, 4)), "scales": (torch.float16, (1, 32))},
     {"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ, 4 bits"),
    ("gptq", {"qweight": (torch.int32, (4, 32)), "g_idx": (torch.int32, (32,)), "scales": (torch.float16, (1, 32))},
     {"quantization_config": {"quant_method": "gptq", "bits": 8}}, "GPTQ, 8 bits"),
    ("gptq_no_config", {"qweight": (torch.int32, (4, 32)), "g_idx": (torch.int32, (32,))}, {}, "GPTQ"),
    ("nf4", {"weight": (torch.uint8, (512, 1)), "weight.absmax": (torch.uint8, (16,)),
             "weight.quant_state.bitsandbytes__nf4": (torch.uint8, (90,))},
     {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
     "bitsandbytes, nf4"),
    ("compressed", {"weight_packed": (torch.int32, (32, 4)), "weight_shape": (torch.int32, (2,))},
     {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
     "compressed-tensors, pack-quantized"),
    ("mlx", {"weight": (torch.uint32, (32, 4)), "scales": (torch.float16, (32, 1)), "biases": (torch.float16, (32, 1))},
     {"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
    ("mlx_no_config", {"weight": (torch.uint32, (32, 4)), "scales": (torch.float16, (32, 1))}, {}, "MLX"),
):
    case(name=f"quantized_{method}", outcome=REFUSED, do=BF16, words=(word, "bf16 original"), kind=word,
         what="quantized weights: FP8, GPTQ, AWQ, bitsandbytes, compressed-tensors, MLX ...", met="mlx-examples#1380",
         build=quantized(suffixes, extra))
case(name="bits_as_uint16", what="bfloat16 saved as 16-bit integers", outcome=REFUSED,
     do="save it again as x.view(torch.bfloat16)", words=("16-bit integers", "view(torch.bfloat16)"),
     build=lambda p: folder(p, config(), {n: v.view(torch.uint16) for n, v in tensors().items()}))
case(name="zero3_empty", what="tensors of shape [0], as ZeRO-3 leaves them where they were not gathered",
     outcome=REFUSED, do="give the folder with its global_step*", met="transformers#20082",
     build=lambda p: folder(p, config(), {n: (torch.empty(0) if "proj" in n else v) for n, v in tensors().items()}),
     words=("ZeRO-3",))

# --- adapters and other models ----------------------------------------------------------------------

for method, leaf, word in (
    ("lora", "lora_A", "LoRA"), ("init_lora", "init_lora_A", "PiSSA or LoRA"), ("disha", "disha", "DiSHA"),
    ("bone", "bone", "Bone"), ("state", "time_state", "state tuning"),
):
    case(name=f"rwkv_peft_{method}", what="adapters that are not merged: LoRA, DoRA, PiSSA, Bone, DiSHA, IA3, LoHa ...",
         outcome=REFUSED, do="name the model as SOURCE and this as --adapter, or merge it first",
         met="Joluck/RWKV-PEFT#54", command=TO_HF, inside="x.pth", words=(word,), kind=word,
         build=save({f"blocks.0.att.receptance.{leaf}": noise(4, 4)}))
OTHER_ADAPTERS = "adapters of PEFT of other kinds: IA3, LoHa, LoKr, VeRA, OFT, AdaLoRA ..."


def adapter(leaf: str, **settings: Any) -> Callable[[Path], object]:
    """An adapter's folder as PEFT saves it."""

    def build(path: Path) -> None:
        folder(path, None, {}, adapter_config__json=json.dumps(settings))
        name = f"base_model.model.model.layers.0.self_attn.q_proj.{leaf}"
        save_file({name: noise(4, 4)}, path / "adapter_model.safetensors")

    return build


case(name="peft_folder", outcome=REFUSED, kind="adapter of PEFT",
     what="adapters that are not merged: LoRA, DoRA, PiSSA, Bone, DiSHA, IA3, LoHa ...",
     words=("an adapter of PEFT", "--adapter"), build=adapter("lora_A.weight"))
case(name="peft_folder_lora", outcome=REFUSED, kind="of the kind LoRA",
     what="adapters that are not merged: LoRA, DoRA, PiSSA, Bone, DiSHA, IA3, LoHa ...",
     words=("an adapter of PEFT of the kind LoRA", "(own/base) as SOURCE", "--adapter"),
     build=adapter("lora_A.weight", peft_type="LORA", base_model_name_or_path="own/base"))
for method, leaf, word in (
    ("IA3", "ia3_l", "IA3"), ("LOHA", "hada_w1_a", "LoHa"), ("LOKR", "lokr_w1", "LoKr"), ("BOFT", "boft_R", "BOFT"),
    ("VERA", "vera_lambda_b", "VeRA"), ("ADALORA", "lora_E", "AdaLoRA"), ("NEXT_YEARS", "next_years_x", "NEXT_YEARS"),
):
    case(name=f"peft_{method}", outcome=REFUSED, kind=f"an adapter of PEFT of the kind {word}", what=OTHER_ADAPTERS,
         do="merge it with peft (merge_and_unload), convert the result", words=(word, "merge_and_unload()"),
         build=adapter(leaf, peft_type=method))
    case(name=f"peft_{method}_as_adapter", outcome=REFUSED, what=OTHER_ADAPTERS, words=(word, "merge_and_unload()"),
         command=(*INIT, "--adapter", "{in}/adapter"), inside="..", build=lambda p, leaf=leaf, method=method: (
             builder.teacher(p.parent), adapter(leaf, peft_type=method)(p.parent / "adapter"), p.mkdir()))
case(name="peft_weights_alone", outcome=REFUSED, what=OTHER_ADAPTERS, words=("an adapter (IA3)", "merge_and_unload()"),
     inside="adapter_model.safetensors", command=TO_HF, build=adapter("ia3_l"))
case(name="adalora_weights_alone", outcome=REFUSED, what=OTHER_ADAPTERS, words=("AdaLoRA", "merge_and_unload()"),
     inside="adapter_model.safetensors", command=TO_HF, build=adapter("lora_E"))
case(name="peft_weights_alone_in_a_folder", outcome=REFUSED, what=OTHER_ADAPTERS, kind="an adapter (LoHa)",
     met="peft#420", words=("an adapter (LoHa)", "merge_and_unload()"), build=lambda p: (
         adapter("hada_w1_a")(p), (p / "adapter_config.json").unlink()))
case(name="soft_prompt", outcome=REFUSED, what="a soft prompt of PEFT", do="convert the model that it was trained on",
     words=("soft prompt", "Convert the model"), kind="soft prompt", build=adapter("prompt", peft_type="P_TUNING"))
case(name="adapter_beside_the_model", outcome=WARNED, what="an adapter beside a whole model", met="transformers#43746",
     do="--adapter merges it; without, the model alone is converted", words=("of the kind LoRA", "--adapter"),
     build=lambda p: (builder.teacher(p), adapter("lora_A.weight", peft_type="LORA")(p)),
     expected=lambda p: load_file(p / "model.safetensors"), kind="a teacher")
case(name="shell", what="a shell of several modalities around a language model", outcome=REFUSED,
     do="take a language model of a known family",
     words=("several modalities", "llava", "around a language model (vicuna)"),
     kind="several modalities", build=lambda p: folder(
         p, {"model_type": "llava", "text_config": {"model_type": "vicuna"}, "vision_config": {}},
         {"vision_tower.patch_embed.proj.weight": noise(4, 4)}))
case(name="qrwkv7", what="other RWKV hybrids: QRWKV7, ARWKV, fla's rwkv7", outcome=REFUSED,
     do="they run with their own code",
     words=("QRWKV7",), kind="QRWKV7", build=lambda p: folder(
         p, config("rwkv07", architectures=["RWKV7Qwen2ForCausalLM"]),
         {"model.layers.0.self_attn.w0": noise(4), "model.layers.0.self_attn.k_k": noise(4)}))

# --- what trainers leave ----------------------------------------------------------------------------

FULL = mixers("RGR")
STAGE_1 = mixers("R-R")
case(name="lightning_file", what="a Lightning .ckpt, the file or its folder", outcome=READ, met="litgpt#1847",
     command=TO_HF, inside="last.ckpt", build=save({"epoch": 1, "state_dict": FULL, "loops": {}}, "last.ckpt"),
     expected=by_torch("state_dict"))
case(name="lightning_folder", what="a Lightning .ckpt, the file or its folder", outcome=READ, command=TO_HF,
     build=save({"epoch": 1, "state_dict": FULL}, "last.ckpt"),
     expected=lambda p: by_torch("state_dict")(p / "last.ckpt"))
case(name="deepspeed_file", what="mp_rank_00_model_states.pt of DeepSpeed", outcome=READ, met="accelerate#3210",
     command=TO_HF, inside="mp_rank_00_model_states.pt", build=save(
         {"module": FULL, "param_shapes": [OrderedDict(a=torch.Size([3]))], "dtype": torch.bfloat16,
          "frozen": {1, 2}, "device": torch.device("cpu")}, "mp_rank_00_model_states.pt"),
     expected=by_torch("module"))
case(name="one_pth", what="a trainer's folder with one .pth", outcome=READ, command=TO_HF, met="RWKV-LM",
     build=save(FULL, "rwkv-final.pth"), expected=lambda p: by_torch()(p / "rwkv-final.pth"))
case(name="many_pth", what="a trainer's folder with several .pth of the same tensors", outcome=REFUSED,
     do="name the one to convert", command=TO_HF, words=("Give one of these files",),
     kind="2 files that share names of tensors",
     build=lambda p: (save(FULL, "rwkv-0.pth")(p), torch.save(FULL, p / "rwkv-1.pth")))
AVERAGE = mixers("RGR", seed=30)
EMA = "a .pth with several state dicts: the model's and its moving average's (ema)"
for name, inside, words in (
    ("ema", {"model": FULL, "ema": AVERAGE, "optimizer": {"state": {0: {"exp_avg": noise(3)}}}}, ("'ema'",)),
    ("ema_nested", {"state_dict": FULL, "model_ema": {"module": AVERAGE}, "step": 3}, ("'model_ema'",)),
):
    case(name=name, what=EMA, outcome=WARNED, do="nothing for the model's; --weights ema for the other", command=TO_HF,
         met="zhuyu-cs/MeanFlow#12", inside="x.pth", build=save(inside), words=(*words, "--weights"),
         expected=by_torch(next(iter(inside))))
case(name="ema_chosen", what=EMA, outcome=WARNED, command=(*TO_HF, "--weights", "ema"), inside="x.pth",
     build=save({"model": FULL, "ema": AVERAGE}), expected=by_torch("ema"))
SEVERAL = "a .pth with several state dicts, none of which is the usual one"
case(name="student_and_teacher", what=SEVERAL, outcome=REFUSED, do="--weights takes the one that it names",
     command=TO_HF, inside="x.pth", build=save({"student": FULL, "teacher": tensors()}),
     words=("student, teacher", "--weights student"), kind="state dicts under keys of its own")
case(name="model_and_state_dict", what=SEVERAL, outcome=REFUSED, command=TO_HF, inside="x.pth",
     build=save({"model": FULL, "state_dict": FULL}), words=("state_dict, model", "--weights"),
     kind="several state dicts")
case(name="no_such_weights", what=SEVERAL, outcome=REFUSED, command=(*TO_HF, "--weights", "average"), inside="x.pth",
     build=save({"student": FULL, "teacher": tensors()}), words=("under average", "It has student, teacher"))
case(name="fsdp_metadata", what="FSDP's shards whose .metadata cannot be read", outcome=REFUSED, command=TO_HF,
     do="copy the whole folder again", words=("a sharded checkpoint of FSDP", "accelerate merge-weights"),
     kind="a sharded checkpoint of FSDP", met="accelerate#2848, verl#533", build=lambda p: (
         save({"a": 1}, ".metadata", _use_new_zipfile_serialization=False)(p / "pytorch_model_fsdp_0"),
         (p / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"x")))
case(name="stage_1_rwkv_layers_only", what="stage 1's trainable_only_weights.pth, with the RWKV layers alone",
     outcome=READ, do="--teacher; --layer-map or --gqa-layers confirms", command=TO_HF, inside="x.pth",
     build=save(STAGE_1), expected=by_torch())
case(name="stage_1_confirmed", what="stage 1's trainable_only_weights.pth, with the RWKV layers alone", outcome=READ,
     command=(*TO_HF, "--layer-map", "{map}"), inside="x.pth", build=save(STAGE_1), expected=by_torch())
case(name="stage_1_contradicted", what="a training file whose layers are not those of the layer map", outcome=REFUSED,
     do="give the map of that run", command=(*TO_HF, "--layer-map", "{wrong_map}"), inside="x.pth", build=save(STAGE_1),
     words=("layer 0 is RWKV by its tensors, GQA by layer map wrong_map",))
case(name="only_gqa_layers", what="a continued run's file, with attention layers alone, or some RWKV layers",
     outcome=REFUSED, do="name the student that the run began with as --teacher", command=TO_HF, inside="x.pth",
     build=save(mixers("-G-")), words=("no RWKV layer", "--teacher"))
case(name="some_rwkv_layers", what="a continued run's file, with attention layers alone, or some RWKV layers",
     outcome=REFUSED, command=(*TO_HF, "--layer-map", "{map}"), inside="x.pth", build=save(mixers("RG-")),
     words=("nothing of layer 2, RWKV by layer map map", "--teacher"))
case(name="first_layer_without_value_mix", what="RWKV layers that lack tensors of their own (v0, v1, v2)",
     outcome=REFUSED, do="loaders want them in every layer: take the whole file", met="RWKV-LM#301", command=TO_HF,
     inside="x.pth", build=save({n: v for n, v in FULL.items() if ".0.self_attn.student_attn.v" not in n or "al" in n}),
     words=("model.layers.0.self_attn.v1 is missing",))
case(name="first_layer_without_value_mix_rwkv", what="RWKV layers that lack tensors of their own (v0, v1, v2)",
     outcome=REFUSED, command=("to-hf", "{in}", "{out}"), inside="x.pth", build=save(
         {n: v for n, v in mixers("RGR", key_format="rwkv").items() if ".0.att.v" not in n or "al" in n}),
     words=("lacks tensors of its RWKV layers", "model.layers.0.self_attn.v1", "incomplete"))

# --- pickles ----------------------------------------------------------------------------------------

WIDE = torch.zeros(3, 64, dtype=torch.bfloat16)
R_K = [name for name in FULL if name.endswith("r_k")]
for name, changes in (
    ("slice_of_padded", {R_K[0]: noise(8, 8)[:4]}),
    ("transposed", {R_K[0]: noise(8, 4).T}),
    ("expanded", {R_K[0]: noise(1, 8).expand(4, 8)}),
    ("overlapping", dict(zip(R_K, (WIDE.view(-1)[:32].view(4, 8), WIDE.view(-1)[16:48].view(4, 8)), strict=True))),
):
    case(name=f"views_{name}", what="tensors that are views: slices, transposed, expanded, overlapping", outcome=READ,
         met="safetensors#17", command=TO_HF, inside="x.pth", build=save(FULL | changes), expected=by_torch())


WITH_ATTRIBUTES: OrderedDict[str, Any] = OrderedDict(FULL)
WITH_ATTRIBUTES._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
PARAMETER = torch.nn.Parameter(FULL[R_K[0]])
PARAMETER.tag = "x"  # type: ignore[attr-defined]
case(name="weights_only_list", what="a .pth with anything that torch.load(weights_only=True) lets through",
     outcome=READ, command=TO_HF, inside="x.pth", build=save(
         {"model": OrderedDict(WITH_ATTRIBUTES | {R_K[0]: PARAMETER}), "size": torch.Size([2]), "when": {"a", "b"},
          "dtype": torch.float16, "bytes": b"x", "z": 1j, "sparse": torch.eye(2).to_sparse()}),
     expected=by_torch("model"))
case(name="namespace", what="a .pth with other objects beside the weights (argparse.Namespace, numpy numbers)",
     outcome=REFUSED, do="the command that the message shows saves the weights alone", command=TO_HF, inside="x.pth",
     met="mlperf-automations#465", build=save({"model": FULL, "args": argparse.Namespace(lr=1)}),
     words=("argparse.Namespace", "weights_only=True) refuses it as well", "python -c"), kind="argparse.Namespace")
case(name="numpy_scalar", what="a .pth with other objects beside the weights (argparse.Namespace, numpy numbers)",
     outcome=REFUSED, command=TO_HF, inside="x.pth", met="deepmd-kit#4147",
     build=save({"model": FULL, "loss": np.float64(2.5)}), words=("numpy", "python -c"))

# --- safetensors ------------------------------------------------------------------------------------


def _header(change: Callable[[dict[str, Any]], None], trailing: bytes = b"") -> Callable[[Path], object]:
    """A teacher whose safetensors header is changed."""

    def build(path: Path) -> None:
        file = builder.teacher(path) / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        raw = json.dumps(header).encode()
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :] + trailing)

    return build


case(name="null_metadata", what="a safetensors header with `__metadata__: null`, or without", outcome=READ,
     build=_header(lambda header: header.update(__metadata__=None)))
case(name="no_metadata", what="a safetensors header with `__metadata__: null`, or without", outcome=READ,
     build=_header(lambda header: header.pop("__metadata__")))
case(name="trailing_bytes", what="a safetensors file longer or shorter than its header says", outcome=REFUSED,
     do="download it again", met="ComfyUI#15602", build=_header(lambda header: None, bytes(8)),
     words=("longer than its header implies",))

# --- config.json ------------------------------------------------------------------------------------

for name, changes, words in (
    ("false_window", {"sliding_window": False}, ()),
    ("no_act", {"hidden_act": ...}, ()),
    ("linear_factor_1", {"rope_scaling": {"type": "linear", "factor": 1.0}}, ()),
    ("theta_in_scaling", {"rope_theta": ..., "rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}}, ()),
    ("float_context", {"max_position_embeddings": 512.0}, ("max_position_embeddings is 512.0",)),
    ("int_flag", {"tie_word_embeddings": 0}, ("tie_word_embeddings is 0",)),
    ("text_theta", {"rope_theta": "10000.0"}, ("rope_theta is '10000.0'",)),
):
    case(name=f"config_{name}", outcome=REFUSED if words else READ, words=words,
         what=f"config {'types that transformers refuses' if words else 'spellings that transformers accepts'}",
         do="compare with the original model's file" if words else "nothing", met="transformers#43766",
         build=lambda p, changes=changes: folder(p, config(**changes), tensors()))
case(name="duplicate_keys", what="a JSON file with one key twice", outcome=REFUSED, do="delete the wrong one",
     build=lambda p: (builder.teacher(p), (p / "config.json").write_text(
         (p / "config.json").read_text().replace("{", '{"rope_theta": 5e5, ', 1))), words=("occurs twice",))
case(name="byte_order_mark", what="a config.json with a byte order mark, as editors of Windows save it",
     outcome=REFUSED, do="save it as UTF-8 without", met="simpletransformers#1169",
     words=("not valid JSON", "without a byte order mark"),
     build=lambda p: (builder.teacher(p), (p / "config.json").write_text(json.dumps(config()), encoding="utf-8-sig")))
case(name="endless_number", what="a JSON file with a number of thousands of digits", outcome=REFUSED,
     do="download it again", build=lambda p: (builder.teacher(p), (p / "config.json").write_text(
         json.dumps(config())[:-1] + ', "x": ' + "9" * 5000 + "}")), words=("not valid JSON",))
for family, changes in (
    ("mistral", {"use_sliding_window": False}), ("mistral", {"max_window_layers": 28}), ("mistral", {}),
    ("phi3", {"use_sliding_window": False}), ("phi3", {"layer_types": ["full_attention"] * 3}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
):
    case(name=f"window_{family}_{len(CASES)}", outcome=REFUSED, words=("sliding_window is 16",),
         what="a window that is in force in this family (Mistral and Phi-3 know no switch)",
         do="take a teacher with full attention", met="transformers#38201",
         build=lambda p, family=family, changes=changes: folder(
             p, config(family, sliding_window=16, **changes), tensors(family if family == "qwen3" else "llama")))
for family in ("qwen2", "qwen3"):
    case(name=f"window_named_without_size_{family}", outcome=REFUSED, do="take a config.json whose keys agree",
         what="Qwen's layer_types with sliding_attention, and no use_sliding_window", words=(
             "layer_types names ['sliding_attention']", "use_sliding_window is not true"),
         build=lambda p, family=family: folder(
             p, config(family, sliding_window=16, layer_types=["full_attention"] * 2 + ["sliding_attention"]),
             tensors(family)))
for family, changes in (("llama", {"use_sliding_window": True}), ("qwen3", {"use_sliding_window": False})):
    case(name=f"window_unused_{family}", outcome=READ, what="a window that the family ignores, or that is switched off",
         build=lambda p, family=family, changes=changes: folder(
             p, config(family, sliding_window=16, **changes), tensors(family)))

# --- companions -------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
case(name="tekken", what="a tokenizer of any name: tekken.json, spiece.model, vocab.txt, *.tiktoken ...", outcome=READ,
     do="nothing: it travels along", met="unslothai/unsloth#2652", build=lambda p: folder(
         p, config(), tensors(), tekken__json="{}", spiece__model=b"x", vocab__txt="x", qwen__tiktoken="x",
         tokenizer__model__v3=b"x", SYSTEM_PROMPT__txt="x"))
for name, content, word in (
    ("lfs", POINTER, "Git LFS pointer"), ("html", "<!DOCTYPE html><html>", "web page"), ("empty", "", "empty")
):
    case(name=f"tokenizer_{name}", what="an LFS pointer, a web page or an empty file in place of a tokenizer",
         outcome=REFUSED, do="git lfs pull, or download it again", met="mlc-ai/mlc-llm#1954", words=(word,),
         build=lambda p, content=content: folder(p, config(), tensors(), tokenizer__json=content))
case(name="config_is_a_pointer", what="an LFS pointer, a web page or an empty file in place of a config or weights",
     outcome=REFUSED, do="git lfs pull, or download it again", words=("git lfs pull",),
     build=lambda p: folder(p, None, tensors(), config__json=POINTER))
case(name="weights_are_a_pointer", what="an LFS pointer, a web page or an empty file in place of a config or weights",
     outcome=REFUSED, words=("Git LFS pointer",),
     build=lambda p: folder(p, config(), {}, model__safetensors=POINTER))

# --- the Hub's cache --------------------------------------------------------------------------------

COMMIT = "ab" * 20


def cached(path: Path, *, local: bool = False) -> None:
    """A model as the Hub's cache keeps it, or a folder of links into such a cache."""
    source = builder.teacher(path / "source")
    blobs = path / "models--own--tiny" / "blobs"
    snapshot = path / "models--own--tiny" / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (path / "models--own--tiny" / "refs").mkdir()
    (path / "models--own--tiny" / "refs" / "main").write_text(COMMIT)
    (path / "local").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        blob = blobs / (f"{number}" * 64)
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
        (path / "local" / file.name).symlink_to(blob)


case(name="cache_folder", what="a model's folder in the Hub's cache, a snapshot in it, or links to it", outcome=READ,
     do="nothing: the snapshot of its main branch is taken", met="HuggingFaceModelDownloader#83", build=cached,
     inside="models--own--tiny", expected=lambda p: by_transformers(p / "snapshots" / COMMIT))
case(name="cache_snapshot", what="a model's folder in the Hub's cache, a snapshot in it, or links to it", outcome=READ,
     build=cached, inside=f"models--own--tiny/snapshots/{COMMIT}", expected=by_transformers)
case(name="links_into_the_cache", what="a model's folder in the Hub's cache, a snapshot in it, or links to it",
     outcome=READ, build=cached, inside="local", expected=by_transformers)
case(name="links_written_as_text", what="links of the Hub's cache, written out as text files", outcome=REFUSED,
     do="copy the cache with its links, or download again", words=("link of the Hub's cache written out as text",),
     build=lambda p: folder(p, None, tensors(), config__json=f"../../blobs/{'0' * 40}"))

# --- ten more, each from a public report --------------------------------------------------------------


def without_a_shard(path: Path) -> None:
    """An interrupted download: the index names two shards, one of them is there."""
    shards(path, config(tie_word_embeddings=True), PARTS, INDEX)
    (path / "model-00002-of-00002.safetensors").unlink()


case(name="missing_shard", what="a shard that the index names is missing", outcome=REFUSED, do="download it",
     met="sgl-project/sglang#32279", build=without_a_shard,
     words=("model-00002-of-00002.safetensors is missing", "Download"))
case(name="empty_shard", what="a shard of 0 bytes", outcome=REFUSED, met="oobabooga/textgen#3640",
     do="download it again",
     build=lambda p: (shards(p, config(tie_word_embeddings=True), PARTS, INDEX),
                      (p / "model-00002-of-00002.safetensors").write_bytes(b"")), words=("the file is empty",))
case(name="index_of_another_sharding", what="an index of other shards than those in the folder", outcome=REFUSED,
     met="jundot/omlx#2432, Neph0s/CoSER#3", build=lambda p: (
         shards(p, config(tie_word_embeddings=True), PARTS, INDEX),
         (p / "model.safetensors.index.json").write_text(
             json.dumps({"weight_map": dict.fromkeys(INDEX, "model-00001-of-00004.safetensors")}))),
     words=("stale", "delete model.safetensors.index.json"))
case(name="compiled_and_ddp", what="names of torch.compile, DDP and FSDP wrappers", outcome=READ,
     met="karpathy/nanoGPT#325",
     command=TO_HF, inside="x.pth", build=save({f"_orig_mod.module.{name}": value for name, value in FULL.items()}),
     expected=lambda p: {name.removeprefix("_orig_mod.module.").replace("model.model.", "model.", 1)
                         .replace(".student_attn", ""): value
                         for name, value in torch.load(p, weights_only=True).items()})
case(name="llama_2_buffers", what="buffers of rotary embeddings, in any place", outcome=READ, met="transformers#35255",
     build=lambda p: folder(p, config(), tensors() | {
         f"model.layers.{i}.self_attn.rotary_emb.inv_freq": noise(4, dtype=torch.float32) for i in range(3)}),
     expected=by_transformers)
case(name="tied_and_stored", what="a tied model that stores only its head, only its embedding, or both", outcome=READ,
     met="vllm#6758, mlx-lm#1298", build=lambda p: shards(
         p, config(tie_word_embeddings=True),
         [PARTS[0], PARTS[1] | {"lm_head.weight": TIED["model.embed_tokens.weight"].clone()}],
         INDEX | {"lm_head.weight": 2}),
     expected=by_transformers)
case(name="sequential_head", what="a head inside a Sequential (lm_head.0.weight), as trainers cast it to float32",
     outcome=READ,
     met="shibing624/MedicalGPT#213", build=lambda p: folder(
         p, config(), {name.replace("lm_head.", "lm_head.0."): value for name, value in tensors().items()}),
     expected=lambda p: {"lm_head.weight": load_file(p / "model.safetensors")["lm_head.0.weight"]})
case(name="meta_file", what="the original layout of Meta or Mistral (params.json, consolidated.*)", outcome=REFUSED,
     met="meta-pytorch/gpt-fast#42", command=TO_HF, inside="consolidated.00.pth", kind="original layout",
     build=save({"layers.0.attention.wq.weight": noise(4, 4), "rope.freqs": noise(4)}, "consolidated.00.pth"),
     words=("original layout of Meta or Mistral",))
case(name="consolidated_beside_shards", what="consolidated.safetensors beside the files of the transformers format",
     outcome=READ, met="TensorRT-LLM#1732", build=lambda p: (
         shards(p, config(tie_word_embeddings=True), PARTS, INDEX),
         save_file({"layers.0.attention.wq.weight": noise(4, 4)}, p / "consolidated.safetensors"),
         (p / "params.json").write_text("{}")), expected=by_transformers)
case(name="reward_model", what="a classifier or reward model (score.weight)", outcome=REFUSED, met="transformers#22209",
     do="take the language model that it was made of", kind="classifier",
     build=lambda p: folder(p, config(), TIED | {"score.weight": noise(1, 32)}),
     words=("without a language head", "score.weight"))
