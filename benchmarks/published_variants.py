"""Run the published code of every variant on random weights, and write vectors for tests/variants/.

    python benchmarks/published_variants.py --trainer RWKVInside --llama-cpp llama.cpp --out tests/variants

`--trainer` is a checkout of OpenMOSE/RWKVInside (d03af49), `--llama-cpp` one of OpenMOSE/llama.cpp that holds
src/models/rwkv07d.cpp (2230605) and rwkv07e.cpp (7033bf6), or a folder with these two files. Nothing of their text is
kept: the trainer's classes are executed with their CUDA kernel replaced by a loop over tokens and every cast widened
to float64; the C++ that builds the graph of an RWKV layer is read statement by statement and evaluated with torch in
float64.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hxaconv.model.variants import VARIANTS
from hxaconv.model.variants.base import RANK_KEYS

C, H, G, N, T, THETA, EPS = 20, 4, 2, 6, 9, 1e4, 1e-6
A, K, LAYERS = H * N, G * N, 3
RANKS = dict.fromkeys(RANK_KEYS, 0) | {"decay": 5, "iclr": 4, "value": 3, "key": 4, "gate": 7, "own_value": 3}
CLASSES = {"hxa079": "cxa079", "hxa07a": "cxa07A", "hxa07b": "cxa07B", "hxa07c": "cxa07C"}
WIDTHS = (48, 1024, 4096, 6144)
"""A for which the published ranks are recorded."""


def wkv(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The recurrence with w the decay, all (B, T, H, N)."""
    state, out = r.new_zeros(r.shape[0], H, N, N), []
    for t in range(r.shape[1]):
        removed = (state @ a[:, t, :, :, None]) @ b[:, t, :, None, :]
        state = state * w[:, t, :, None, :] + removed + v[:, t, :, :, None] @ k[:, t, :, None, :]
        out.append((state @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(out, dim=1)


def weights_of(variant: str, layer: int) -> dict[str, Tensor]:
    """Random float32 weights of one layer, biases and norms included, none of them zero."""
    sizes = RANKS | {"C": C, "A": A, "K": K, "H": H, "N": N}
    shapes = {
        parameter.name: tuple(sizes.get(str(size), size) for size in parameter.shape)
        for parameter in VARIANTS[variant].parameters
        if not parameter.optional
    }
    for name, out, into in (("receptance", A, C), ("key", K, C), ("value", K, C), ("output", C, A)):
        shapes |= {f"{name}.weight": (out, into)} | ({} if name == "output" else {f"{name}.bias": (out,)})
    shapes |= {"r_norm.weight": (N,), "k_norm.weight": (N,)}
    generator = torch.Generator().manual_seed(1000 * layer + sum(map(ord, variant)))
    return {
        name: (torch.randn(shape, generator=generator) * (0.5 if len(shape) == 2 else 1.0)).contiguous()  # type: ignore[arg-type]
        for name, shape in shapes.items()
    }


# The trainer's modules.


def trainer_module(folder: Path) -> types.ModuleType:
    """rwkv_inside/TimeMixer.py with casts widened, no compilation, and the kernel replaced."""
    text = (folder / "rwkv_inside" / "TimeMixer.py").read_text()
    for old, new in (("@torch.compile", ""), ("torch.bfloat16", "torch.float64"), (".float()", ".double()")):
        text = text.replace(old, new)
    text = text.replace("torch.float32", "torch.float64").replace("torch.float)", "torch.float64)")
    stubs = {"backstepping_longhead": {"RUN_CUDA_RWKV7g": trainer_kernel}, "loralinear": {"LoraLinear": linear}}
    for name, content in stubs.items():
        stub = types.ModuleType(name)
        vars(stub).update(content)
        sys.modules[name] = stub
    os.environ["architecture"] = "hxa079"  # noqa: SIM112 (the trainer's spelling)
    module = types.ModuleType("published")
    vars(module)["__file__"] = str(folder / "rwkv_inside" / "TimeMixer.py")
    exec(compile(text, "TimeMixer.py", "exec"), vars(module))
    return module


def trainer_kernel(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, size: int, mask: Any) -> Tensor:
    """Stands in for the CUDA kernel, which takes log(-log decay)."""
    r, w, k, v, a, b = (x.reshape(*x.shape[:2], -1, size) for x in (r, w, k, v, a, b))
    return wkv(r, (-w.exp()).exp(), k, v, a, b).flatten(2)


def linear(into: int, out: int, bias: bool, peftmode: str) -> torch.nn.Linear:
    """Stands in for the trainer's own layer, without an adapter."""
    return torch.nn.Linear(into, out, bias=bias)


def trainer_layer(module: types.ModuleType, variant: str, layer: int, heads: int = H, size: int = N) -> Any:
    """One published time-mix layer, as its own code initialises it."""
    args = types.SimpleNamespace(
        head_size_a=size,
        dim_att=heads * size,
        num_attention_heads=heads,
        num_key_value_heads=G,
        rms_norm_eps=EPS,
        disable_qk_norm=False,
        n_embd=C,
        n_layer=LAYERS,
        freeze_attention=False,
        peftmode="full",
        is_attention_bias=True,
        is_attention_output_bias=False,
        max_seq_length=T,
        DeviceID="cpu",
        config=types.SimpleNamespace(max_position_embeddings=T, rope_theta=THETA),
    )
    return getattr(module, f"RWKV_Tmix_x070_Mose_{CLASSES[variant]}")(args, layer)


def run_trainer(module: types.ModuleType, variant: str, rounded_angles: bool = False) -> dict[str, Tensor]:
    """Weights, inputs and outputs of all layers; `rounded_angles` keeps the bf16 of hxa07a's cos and sin."""
    cos, sin, _ = module.compute_qwen3_rope_cache(T, N, "cpu", torch.float64, THETA)
    result: dict[str, Tensor] = {}
    v_first = k_first = None
    for layer in range(LAYERS):
        mixer, weights = trainer_layer(module, variant, layer), weights_of(variant, layer)
        initial = {name: parameter.detach().clone() for name, parameter in mixer.named_parameters()}
        result |= {f"initial.{layer}.{name}": initial[name].float() for name in ("w0", "a0")}
        for name, value in weights.items():
            owner, _, last = name.rpartition(".")
            setattr(mixer.get_submodule(owner), last, torch.nn.Parameter(value.double()))
            result[f"layers.{layer}.{name}"] = value
        if rounded_angles:
            mixer.cos, mixer.sin = cos.bfloat16().double(), sin.bfloat16().double()
        x = inputs(layer)
        with torch.no_grad():
            y, v_first, k_first = mixer.forward(x, v_first, k_first, None, (cos, sin), None, None)
        result |= {f"x.{layer}": x, f"y.{layer}": y}
    return result


def inputs(layer: int) -> Tensor:
    """(2, T, C) in float64."""
    return torch.randn(2, T, C, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)


def published_sizes(module: types.ModuleType, variant: str) -> dict[str, dict[str, int]]:
    """A -> the ranks that the published code picks."""
    letters = {"decay": "w1", "iclr": "a1", "value": "v1", "key": "k1", "gate": "g1"}
    found = {}
    for width in WIDTHS:
        mixer = trainer_layer(module, variant, 1, heads=width // 16, size=16)
        parameters = dict(mixer.named_parameters())
        found[str(width)] = {rank: parameters[name].shape[1] for rank, name in letters.items() if name in parameters}
    return found


# The graphs of llama.cpp. ggml names dimensions from the fastest on, torch from the slowest.


def python_of(cpp: str) -> str:
    """The statements that build an RWKV layer, as Python; states and memory left out."""
    body = cpp[cpp.index("cur = att_norm;") : cpp.index("cur = build_lora_mm(layer.time_mix_output, cur);")]
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"ggml_build_forward_expand\(.*?\)\s*;", "", body, flags=re.DOTALL)
    body = re.sub(r"(?:wkv_state|ggml_tensor \* wkv_state) = [^;]*;", "", body)
    body = re.sub(r"GGML_ASSERT\([^;]*;", "", body)
    body = body.replace("n_head / n_head_kv", "n_head // n_head_kv").replace("->", ".").replace("&&", "and")
    body = re.sub(r"\b(\d+\.\d*)f\b", r"\1", body)
    kinds = r"(?:const\s+)?(?:struct\s+)?\b(?:ggml_tensor|auto|float|llm_graph_input_rs)\b"
    body = re.sub(kinds + r"\s*[*&]?\s*(\w+)\s*=", r"\1 =", body)
    lines, indent = [], 0
    for statement in re.findall(r"if\s*\(.*?\)\s*\{|else\s*\{|\}|[^;{}]+;", body, flags=re.DOTALL):
        text = " ".join(statement.split())
        if text == "}":
            indent -= 1
        elif text.startswith("if"):
            lines.append("    " * indent + f"if true({text[text.index('(') + 1 : text.rindex(')')]}):")
            indent += 1
        elif text.startswith("else"):
            lines.append("    " * indent + "else:")
            indent += 1
        else:
            lines.append("    " * indent + text.rstrip(";"))
    return "\n".join(lines)


class Ops(dict[str, Any]):
    """The names that the graph uses; what is not known and only concerns memory is None."""

    def __missing__(self, name: str) -> Any:
        known = ("ctx0", "gf", "GGML_TYPE_F32", "LLM_NORM_RMS", "rope_type", "NULL", "nullptr", "wkv_state")
        if name in known or name.startswith(("n_rot", "n_ctx", "freq", "ext", "attn_factor", "beta", "mctx", "inp")):
            return None
        raise KeyError(name)


def ggml() -> dict[str, Any]:
    """ggml's operations in torch, by what its headers say of them."""

    def reshape(_: Any, x: Tensor, *sizes: int) -> Tensor:
        return x.reshape(*reversed(sizes))

    def rope(_: Any, x: Tensor, *rest: Any) -> Tensor:
        angles = torch.arange(T, dtype=x.dtype)[:, None] * THETA ** -(torch.arange(0, N, 2, dtype=x.dtype) / N)
        cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
        a, b = x[..., : N // 2], x[..., N // 2 :]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def norm(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight

    def recurrence(_: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Any) -> Tensor:
        return wkv(*(x[None] for x in (r, w, k, v, a, b)))[0]

    return {
        "ggml_reshape_2d": reshape,
        "ggml_reshape_3d": reshape,
        "ggml_reshape_4d": reshape,
        "build_lora_mm": lambda weight, x: x @ weight.T,
        "ggml_mul_mat": lambda _, weight, x: x @ weight.T,
        "ggml_add": lambda _, x, y: x + y,
        "ggml_sub": lambda _, x, y: x - y,
        "ggml_mul": lambda _, x, y: x * y,
        "ggml_neg": lambda _, x: -x,
        "ggml_neg_inplace": lambda _, x: -x,
        "ggml_exp": lambda _, x: x.exp(),
        "ggml_log_inplace": lambda _, x: x.log(),
        "ggml_tanh": lambda _, x: x.tanh(),
        "ggml_sigmoid": lambda _, x: x.sigmoid(),
        "ggml_sigmoid_inplace": lambda _, x: x.sigmoid(),
        "ggml_scale": lambda _, x, factor: x * factor,
        "ggml_scale_inplace": lambda _, x, factor: x * factor,
        "ggml_cast": lambda _, x, kind: x,
        "ggml_new_tensor_4d": lambda _, kind, *sizes: tuple(reversed(sizes)),
        "ggml_repeat": lambda _, x, shape: x.expand(shape),
        "ggml_l2_norm": lambda _, x, eps: x / x.norm(dim=-1, keepdim=True).clamp_min(eps),
        "ggml_sum_rows": lambda _, x: x.sum(-1, keepdim=True),
        "ggml_view_1d": lambda _, x, size, offset: x.reshape(-1)[:size],
        "ggml_rwkv_wkv7": recurrence,
        "ggml_rope_ext": rope,
        "build_norm": norm,
        "sqrtf": math.sqrt,
        "float": float,
        "true": lambda value: value is not None if not isinstance(value, bool) else value,
        "false": False,
    }


def run_graph(cpp: str, variant: str) -> dict[str, Tensor]:
    """As `run_trainer`, of a graph."""
    code = compile(python_of(cpp).replace("== true", "== True").replace("== false", "== False"), variant, "exec")
    result: dict[str, Tensor] = {}
    first: list[dict[str, Any]] = [{}, {}]
    for index in range(LAYERS):
        weights, x = weights_of(variant, index), inputs(index)
        result |= {f"layers.{index}.{name}": value for name, value in weights.items()}
        layer = types.SimpleNamespace()
        for name, value in weights.items():
            wide = value.double()
            short = name.replace(".weight", "").replace(".bias", "_b")
            low_rank = re.fullmatch(r"(w|a|v|k|g|dv)[12]", name)
            key = f"attn_{short}" if "norm" in name else f"time_mix_{short}"
            setattr(layer, key, wide.T if low_rank else wide.flatten() if wide.dim() == 3 else wide)
        rows = []
        for row in range(x.shape[0]):
            names = Ops(ggml())
            names |= {"att_norm": x[row], "il": index, "n_layer": LAYERS, "n_head": H, "n_head_kv": G, "n_head_att": H}
            names |= {"v_first": None, "k_first": None} | first[row]
            names["ubatch"] = types.SimpleNamespace(n_tokens=T, n_seqs=1, n_seq_tokens=T)
            hparams = types.SimpleNamespace(n_embd=C, wkv_head_size=N, enable_qk_norm=True, nope_in_rwkv=False)
            names["hparams"], names["inp_pos"] = hparams, None
            names["model"] = types.SimpleNamespace(layers={index: layer})
            names["inp_hybrid"] = types.SimpleNamespace(get_recr=lambda: types.SimpleNamespace(mctx=memory))
            exec(code, {}, names)
            if index == 0:
                first[row] = {name: names[name] for name in ("v_first", "k_first")}
            rows.append(names["cur"] @ layer.time_mix_output.T)
        result |= {f"x.{index}": x, f"y.{index}": torch.stack(rows)}
    return result


memory = types.SimpleNamespace(get_head=lambda: 0)


def main() -> None:
    """Write one file per variant, and sizes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", type=Path)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.trainer:
        module = trainer_module(arguments.trainer)
        for variant in CLASSES:
            save_file(run_trainer(module, variant), arguments.out / f"{variant}.safetensors")
        sizes = {variant: published_sizes(module, variant) for variant in CLASSES}
        (arguments.out / "ranks.json").write_text(json.dumps(sizes, indent=1) + "\n")
        plain, rounded = run_trainer(module, "hxa07a"), run_trainer(module, "hxa07a", rounded_angles=True)
        errors = [float((rounded[f"y.{i}"] - plain[f"y.{i}"]).norm() / plain[f"y.{i}"].norm()) for i in range(LAYERS)]
        print(f"hxa07a with the bf16 cos and sin of its training code: relative difference {max(errors):.2g}")
    for variant in ("hxa07d", "hxa07e") if arguments.llama_cpp else ():
        found = next(arguments.llama_cpp.rglob(f"rwkv{variant.removeprefix('hxa')}.cpp"))
        save_file(run_graph(found.read_text(), variant), arguments.out / f"{variant}.safetensors")


if __name__ == "__main__":
    main()
