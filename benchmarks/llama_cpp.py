"""Logits of random students by OpenMOSE's fork of llama.cpp, held against the reference forward.

    python benchmarks/llama_cpp.py libllama.so [--dense]

`libllama.so` is the fork's library with its CPU backend, built from eab6e78 (the C structures below are those of that
commit). As it stands, it has one graph of this family, with experts: `hrwkv7moe`. `--dense` is for a build in which
the graphs of rwkv07d.cpp (2230605) and rwkv07e.cpp (7033bf6) stand beside it, for models without experts; the library
picks one by the environment variable HXA, 07d or 07e. The fork computes in float32; gguf-py of PyPI writes the files.

Every student is decoded in three calls (11, 1 and 36 tokens), so that states and caches are in the comparison. Each
formula is also altered to a neighbour's in one place: that has to give other logits. Exit code 1 where a row fails.
"""

from __future__ import annotations

import argparse
import ctypes
import inspect
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hxaconv.forward import hxa079
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import StudentConfig
from hxaconv.model.experts import Experts
from hxaconv.model.variants import VARIANTS
from hxaconv.model.variants.base import Ranks

TOKENS, CALLS, BATCH = 48, (11, 1, 36), 512
TOLERANCE = 5e-5
"""Of a token's logits: float32 on both sides, where the reference itself is up to 4e-6 from its float64."""
BY_W = ("(1 - (-w.exp()).exp() + a)", "(1 - w + a)")
CONTROLS = {"hxa07d": {"k (1 - w + a)": BY_W}, "hxa07e": {"k (1 - w + a)": BY_W, "0.2 for 0.5": ("VALUE_SCALE", "0.2")}}
"""Variant -> what a neighbour's formula is called -> the text that is exchanged in this one's."""
PLAIN = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.r_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def config_of(variant: str, experts: bool, bias: bool = False) -> StudentConfig:
    """6 layers, attention in two; heads of 128 channels, the only size that the fork takes."""
    return StudentConfig(
        num_hidden_layers=6,
        hidden_size=96,
        intermediate_size=160,
        vocab_size=257,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=False,
        qk_norm=True,
        attention_bias=bias,
        rwkv_architecture=variant,
        gqa_layers=(2, 5),
        ranks=Ranks(decay=32, iclr=16, value=16, key=24, gate=48, own_value=16),
        layer_records=False,
        experts=Experts(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=True)
        if experts
        else None,
    )


def weights_of(config: StudentConfig) -> dict[str, Tensor]:
    """Random float32 weights, none of them zero but the biases of kept layers, which stop the fork."""
    draw = torch.Generator().manual_seed(5)
    found = {}
    for name, shape in expected_tensors(config).items():
        x = torch.randn(shape, generator=draw)
        if "norm" in name:
            x = 1 + 0.2 * x
        elif name.endswith("_proj.bias"):
            x = torch.zeros(shape)
        elif len(shape) == 2 and "embed" not in name:
            x = x * (1.5 if ".gate." in name else 1.0) * shape[name.endswith("weight")] ** -0.5
        found[name] = x.contiguous()
    return found


def gguf_name(name: str) -> str:
    """The fork's name for one of ours."""
    stem, kind = (name, "weight") if not name.endswith((".weight", ".bias")) else name.rsplit(".", 1)
    block = ""
    if stem.startswith("model.layers."):
        _, _, index, stem = stem.split(".", 3)
        block = f"blk.{index}."
    return f"{block}{PLAIN.get(stem) or stem.replace('self_attn.', 'time_mix_')}.{kind}"


def write_gguf(config: StudentConfig, weights: Mapping[str, Tensor], path: Path) -> None:
    """The student as the fork's converter lays it out."""
    import gguf

    arch, c = "hrwkv7moe", config
    writer = gguf.GGUFWriter(path, arch)
    attention, ranks = f"{arch}.attention", c.ranks
    writer.add_string("tokenizer.ggml.model", "none")
    sizes = {
        f"{arch}.vocab_size": c.vocab_size,
        f"{arch}.context_length": 4096,
        f"{arch}.embedding_length": c.hidden_size,
        f"{arch}.block_count": c.num_hidden_layers,
        f"{arch}.feed_forward_length": c.intermediate_size,
        f"{arch}.wkv.head_size": c.head_dim,
        f"{attention}.head_count": c.num_attention_heads,
        f"{attention}.head_count_kv_recurrent": c.num_key_value_heads,
        f"{attention}.key_length": c.head_dim,
        f"{attention}.value_length": c.head_dim,
        f"{attention}.decay_lora_rank": ranks.decay,
        f"{attention}.iclr_lora_rank": ranks.iclr,
        f"{attention}.value_residual_mix_lora_rank": ranks.value,
        f"{attention}.key_residual_mix_lora_rank": ranks.key,
        f"{attention}.gate_lora_rank": ranks.gate,
    }
    if c.experts:
        sizes[f"{arch}.expert_count"] = c.experts.num_experts
        sizes[f"{arch}.expert_used_count"] = c.experts.num_experts_per_tok
        sizes[f"{arch}.expert_feed_forward_length"] = c.experts.moe_intermediate_size
    for key, size in sizes.items():
        writer.add_uint32(key, size)
    writer.add_float32(f"{attention}.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", c.rope_theta)
    layers = range(c.num_hidden_layers)
    writer.add_array(f"{attention}.head_count_kv", [c.num_key_value_heads * (i in c.gqa_layers) for i in layers])
    writer.add_array(f"{attention}.rwkv_layer_pattern", [int(i not in c.gqa_layers) for i in layers])

    experts: dict[str, list[Tensor]] = {}
    for name, x in weights.items():
        if ".experts." in name:
            block, expert = name.split(".mlp.experts.")
            part = expert.split(".")[1].removesuffix("_proj")
            experts.setdefault(f"blk.{block.rsplit('.', 1)[1]}.ffn_{part}_exps.weight", []).append(x)
            continue
        if name.endswith("_proj.bias"):
            continue
        pair = x.dim() == 2 and not name.endswith(("weight", "r_k"))
        x = x.T if pair else x.flatten() if name.endswith("r_k") or x.dim() == 3 else x
        writer.add_tensor(gguf_name(name), x.contiguous().numpy())
    for name, matrices in experts.items():
        writer.add_tensor(name, torch.stack(matrices).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# The fork's C interface.


class ContextParams(ctypes.Structure):
    """`llama_context_params` at eab6e78."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch", "rope", "pooling", "attention")),
        *((name, ctypes.c_float) for name in ("base", "scale", "ext", "attn", "fast", "slow")),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, ctypes.c_int32) for name in ("type_k", "type_v")),
        *((name, ctypes.c_void_p) for name in ("abort_callback", "abort_callback_data")),
        *((name, ctypes.c_bool) for name in ("embeddings", "offload_kqv", "flash_attn", "no_perf", "op", "swa", "kv")),
    )


class Opaque(ctypes.Structure):
    """`llama_model_params`, or longer: passed on as it comes."""

    _fields_ = (("words", ctypes.c_uint64 * 32),)


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def child(library: str, model: str, vocab_size: int, out: str) -> None:
    """In a process of its own, since the library ends the process where an assertion of its own fails."""
    llama = ctypes.CDLL(library)
    llama.llama_model_default_params.restype = Opaque
    llama.llama_context_default_params.restype = ContextParams
    llama.llama_batch_init.restype = Batch
    for name in ("llama_model_load_from_file", "llama_init_from_model"):
        getattr(llama, name).restype = ctypes.c_void_p
    llama.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    llama.llama_backend_init()
    loaded = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
    assert loaded, "the model was not loaded"
    params = llama.llama_context_default_params()
    assert (params.n_ctx, params.n_ubatch, params.type_k, params.type_v) == (512, BATCH, 1, 1), "of another commit"
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0  # keys and values in float32
    context = ctypes.c_void_p(llama.llama_init_from_model(ctypes.c_void_p(loaded), params))
    assert context, "no context was made"
    ids, rows = tokens(vocab_size)[0].tolist(), []
    batch, first = llama.llama_batch_init(BATCH, 0, 1), 0
    for count in CALLS:
        batch.n_tokens = count
        for i in range(count):
            batch.token[i], batch.pos[i], batch.logits[i] = ids[first + i], first + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama.llama_decode(context, batch) == 0
        for i in range(count):
            rows.append(torch.tensor(llama.llama_get_logits_ith(context, i)[:vocab_size]))
        first += count
    torch.save(torch.stack(rows), out)


def tokens(vocab_size: int) -> Tensor:
    """(1, TOKENS)."""
    return torch.randint(vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def reference(config: StudentConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """(TOKENS, V)."""
    found, _ = hxa079.forward(tokens(config.vocab_size), lambda name: weights[name].to(dtype), config)
    return found[0].double()


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest error of a token, of the norm of its logits."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def altered(variant: str, old: str, new: str) -> Callable[..., Tensor]:
    """The variant's formula with a piece of its text exchanged."""
    formula = VARIANTS[variant].time_mix
    text = textwrap.dedent(inspect.getsource(formula))
    assert text.count(old) == 1
    names = dict(vars(inspect.getmodule(formula)))
    exec("from __future__ import annotations\n" + text.replace(old, new), names)
    found: Callable[..., Tensor] = names["time_mix"]
    return found


def compare(library: str, what: str, config: StudentConfig, graph: str = "") -> bool:
    """One row: the fork, float32 and float64 of the reference, and neighbours' formulas on the same weights."""
    weights, variant = weights_of(config), config.rwkv_architecture
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "student.gguf", Path(folder) / "logits.pt"
        write_gguf(config, weights, path)
        here = [sys.executable, __file__, "--child", library, str(path), str(config.vocab_size), str(out)]
        done = subprocess.run(here, env=os.environ | {"HXA": graph}, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "ASSERT" in line or "rror" in line]
            print(f"| {what} | failed: {' '.join(said) or done.stderr[-300:]} |")
            return False
        found = torch.load(out).double()
    wide = reference(config, weights, torch.float64)
    error, own = relative(found, wide), relative(reference(config, weights, torch.float32), wide)
    known, others = VARIANTS[variant], {}
    for name, (old, new) in CONTROLS[variant].items():
        VARIANTS[variant] = replace(known, time_mix=altered(variant, old, new))
        others[name] = relative(found, reference(config, weights, torch.float64))
        VARIANTS[variant] = known
    controls = ", ".join(f"{name}: {other:.2f}" for name, other in others.items())
    print(f"| {what} | {error:.1e} | {own:.1e} | {controls} |", flush=True)
    return error <= TOLERANCE and min(others.values()) > 1e-3


def main() -> int:
    """A table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--dense", action="store_true")
    options = parser.parse_args()
    library = str(options.library.resolve())
    print("| student | fork | reference in float32 | neighbours' formulas |\n|---|--:|--:|---|")
    good = [compare(library, "hxa07d with experts, by hrwkv7moe", config_of("hxa07d", experts=True))]
    for variant in ("hxa07d", "hxa07e") if options.dense else ():
        for bias in (False, True):
            config = config_of(variant, experts=False, bias=bias)
            graph = variant.removeprefix("hxa")
            good.append(compare(library, f"{variant}{', with biases' * bias}, by rwkv{graph}", config, graph))
    return 0 if all(good) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    else:
        sys.exit(main())
