"""What RWKV-Infer's own Python makes of a folder and a `.pth`, on a CPU: it loads, and its logits are ours, or not.

    git clone https://github.com/OpenMOSE/RWKV-Infer
    python benchmarks/rwkv_infer.py RWKV-Infer [COMMIT ...]     # commits: those of hxaconv/model/rwkv_infer.py

Nothing of RWKV-Infer is in this repository: its `rwkvengine/*.py` are taken from the clone, commit by commit, and run
in processes of their own. Its kernels (Triton, int8 products, flash attention) are replaced by a few lines of torch of
the same contract, "cuda" means the CPU, and compilers do nothing. So this shows what its loader and its formulas do
with a file, not how its kernels behave. Needs: torch, safetensors, numpy, einops, tokenizers, transformers, jinja2.

Each model is a tiny student with weights away from their initial values. The two figures are the largest difference of
its logits from those of the modelling code in the folder, as a share of the largest logit: all tokens at once, and the
last one after the others. bf16 costs about 0.02, int8 0.05. Products of a tensor that its code moved to the GPU with
one that it left on the CPU are refused, as torch refuses them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

STRATEGIES = {"bf16": "", "int8": "int8"}
"""model_strategy of /loadmodel, and what the server makes of it."""

ABSENT = (
    "triton",
    "gemlite",
    "hqq",
    "torchao",
    "bitsandbytes",
    "flash_attn",
    "fla",
    "flash_attn_2_cuda",
    "tensorboard",
)


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that need a GPU: every name in them is a stand-in."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in ABSENT or name.startswith("rwkvengine.fla"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module

    def exec_module(self, module: Any) -> None:
        if module.__name__ == "rwkvengine.fla.ops.rwkv7":
            module.fused_recurrent_rwkv7 = module.chunk_rwkv7 = recurrence


def recurrence(
    r: Any, w: Any = None, k: Any = None, v: Any = None, a: Any = None, b: Any = None, **how: Any
) -> tuple[Any, Any]:
    """fla's kernel as a loop: `w` is the log of the decay, or `log_w` is; the state is [key, value]."""
    w = how.get("log_w") if w is None else w
    if how.get("head_first"):
        r, w, k, v, a, b = (x.transpose(1, 2) for x in (r, w, k, v, a, b))
    r, w, k, v, a, b = (x.float() for x in (r, w, k, v, a, b))
    state = how["initial_state"]
    state = r.new_zeros(r.shape[0], r.shape[2], r.shape[3], v.shape[3]) if state is None else state.float()
    out = []
    for t in range(r.shape[1]):
        removed = torch.einsum("bhk,bhkv->bhv", a[:, t], state)
        state = state * w[:, t].exp()[..., None] + b[:, t, :, :, None] * removed[:, :, None]
        state = state + k[:, t, :, :, None] * v[:, t, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", r[:, t] * how.get("scale", 1.0), state))
    y = torch.stack(out, 1)
    return (y.transpose(1, 2) if how.get("head_first") else y), state


def recurrence_of_one(r: Any, k: Any, v: Any, a: Any, b: Any, w: Any, **how: Any) -> tuple[Any, Any]:
    """Its own kernel for one token."""
    y, state = recurrence(r, w, k, v, a, b, initial_state=how["initial_state"])
    return y.to(v.dtype), state


def attention(q: Any, k: Any, v: Any, out: Any, starts_q: Any, starts_k: Any, *rest: Any) -> tuple[Any, None]:
    """Its flash attention over sequences laid end to end: causal, aligned at the end."""
    result = torch.empty_like(q)
    bounds = zip(starts_q.tolist(), starts_q.tolist()[1:], starts_k.tolist(), starts_k.tolist()[1:], strict=False)
    for q0, q1, k0, k1 in bounds:
        repeats = q.shape[1] // k.shape[1]
        one = q[q0:q1].transpose(0, 1).float()
        keys, values = (x[k0:k1].repeat_interleave(repeats, 1).transpose(0, 1).float() for x in (k, v))
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        result[q0:q1] = F.scaled_dot_product_attention(one, keys, values, attn_mask=seen).transpose(0, 1).to(q.dtype)
    return result, None


def int8_product(x: Any, weight: Any, scale: Any, *rest: Any, **more: Any) -> Any:
    """x (B, T, K) times an int8 weight (K, N) with a scale per row."""
    return (x.float() @ (weight.float() * scale.float()[:, None])).to(x.dtype)


MATH = {"matmul", "__matmul__", "linear", "add", "sub", "mul", "__add__", "__sub__", "__mul__", "cat", "einsum"}
"""Operations that refuse tensors of two devices."""


def gpu(x: Any) -> bool:
    """Whether this tensor would be on the GPU: it was moved there, or computed from what is there."""
    return isinstance(x, torch.Tensor) and "gpu" in x.__dict__


def is_cuda(x: Any) -> bool:
    """Whether this argument names a GPU."""
    return (isinstance(x, str) and x.startswith("cuda")) or (isinstance(x, torch.device) and x.type == "cuda")


def on_the_cpu() -> None:
    """What its modules find of torch: no GPU, no compilers."""
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            given = [y for x in (*args, *kwargs.values()) for y in (x if isinstance(x, list | tuple) else (x,))]
            on_gpu = any(gpu(x) for x in given)
            if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
                return torch.device("cuda" if gpu(args[0]) else "cpu")
            if on_gpu and name in MATH and any(isinstance(x, torch.Tensor) and x.dim() and not gpu(x) for x in given):
                raise RuntimeError("Expected all tensors to be on the same device, but found cuda and cpu")
            asked = any(is_cuda(x) for x in given)
            to_cpu = name == "cpu" or any(str(x) == "cpu" for x in given if isinstance(x, str | torch.device))
            result = func(
                *(torch.device("cpu") if is_cuda(x) else x for x in args),
                **{key: "cpu" if is_cuda(x) else x for key, x in kwargs.items()},
            )
            if isinstance(result, torch.Tensor) and (asked or to_cpu) and any(result is x for x in given):
                result = result.clone()
            for x in result if isinstance(result, list | tuple) else (result,):
                if isinstance(x, torch.Tensor) and (asked or on_gpu) and not to_cpu:
                    x.gpu = True  # type: ignore[attr-defined]
            return result

    def untouched(*args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else lambda function: function

    torch.compile = torch.jit.script = torch.jit.script_method = untouched  # type: ignore[assignment]
    torch.compiler.disable = torch._dynamo.disable = untouched  # type: ignore[assignment]
    torch.compiler.reset = lambda: None  # type: ignore[assignment]
    torch.cuda.empty_cache = torch.cuda.synchronize = lambda *args: None  # type: ignore[assignment]
    torch.cuda.Stream = torch.cuda.Event = torch.cuda.stream = MagicMock()  # type: ignore[assignment,misc]
    torch.cuda.current_stream = MagicMock()
    importlib.import_module("torch.utils.cpp_extension").load = MagicMock()  # type: ignore[attr-defined]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self.to("cuda")  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[assignment,method-assign]
    sys.meta_path.insert(0, Absent())
    Mode().__enter__()


@functools.cache
def engine() -> Any:
    """Its module that loads models, with the kernels replaced."""
    on_the_cpu()
    core = importlib.import_module("rwkvengine.rwkvcore")
    importlib.import_module("rwkvengine.hrwkv7")
    modules = [m for name, m in sys.modules.items() if name.startswith("rwkvengine.") and not isinstance(m, MagicMock)]
    for module in modules:
        for name, own in REPLACED.items():
            if hasattr(module, name):
                setattr(module, name, own)
    return core


def run(path: str, strategy: str, theta: float, eps: float, tokens: list[int]) -> list[Any]:
    """Logits (T, V) of all tokens at once, and of the last one after the others."""
    core = engine()
    model = core.RWKV_x(path, STRATEGIES[strategy], rope_theta=theta, rms_norm_eps=eps, max_ctxlen=256)
    results = []
    for pieces in ([tokens], [tokens[:-1], tokens[-1:]]):
        state, out = model.new_state(1, 256), []
        shift, wkv, kv, position = state.shift_states, state.wkv_states, state.kv_cache, state.pos_cache
        for piece in pieces:
            y, shift, wkv, kv, position = model.forward(
                torch.tensor([piece]), shift, wkv, kv, position, full_output=True
            )
            out.append(y.cpu().float().reshape(len(piece), -1))
        results.append(torch.cat(out))
    return results


REPLACED = {
    "fused_recurrent_rwkv7": recurrence,
    "chunk_rwkv7": recurrence,
    "fused_recurrent_dplr_delta_rule_decode_t1": recurrence_of_one,
    "triton_attention": attention,
    "fused_dequant_gemm": int8_product,
}


def child(jobs: list[dict[str, Any]]) -> None:
    """Models under one release, a line of JSON for each."""
    from safetensors.torch import load_file

    expected = {job["expected"]: load_file(job["expected"]) for job in jobs}
    for job in jobs:
        want = expected[job["expected"]]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = run(job["path"], job["strategy"], job["theta"], job["eps"], want["tokens"].tolist())
            logits = want["logits"]
            far = [float((x[:, : logits.shape[1]] - logits).abs().max() / logits.abs().max()) for x in found]
            answer = {"far": far}
        except BaseException as error:
            frames = [x for x in traceback.extract_tb(error.__traceback__) if x.filename != __file__]
            where = [x for x in frames if "rwkvengine" in x.filename][-1:] or frames[-1:]
            what = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            answer = {"error": what, "where": "".join(f"{Path(x.filename).name}:{x.lineno}" for x in where)}
        print("\n" + json.dumps(job | answer), flush=True)


SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "torch_dtype": "bfloat16",
}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 8e6}
SIZES |= {"tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 4096}
LLAMA = SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
QWEN2 = SIZES | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = SIZES | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False}
EXPERTS = QWEN3 | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4}
EXPERTS |= {"num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True, "mlp_only_layers": []}
MODELS = {
    "plain": (LLAMA, (1, 3)),
    "biases, attention last": (QWEN2, (2, 3)),
    "biases, attention between": (QWEN2, (1, 3)),
    "q/k norm": (QWEN3, (1, 3)),
    "heads x head_dim != hidden_size": (QWEN3 | {"head_dim": 128}, (1, 3)),
    "tied head": (LLAMA | {"tie_word_embeddings": True}, (1, 3)),
    "layer 0 is attention": (LLAMA, (0, 3)),
    "experts": (EXPERTS, (1, 3)),
    "experts, one layer without": (EXPERTS | {"mlp_only_layers": [2]}, (1, 3)),
    "hxa07a": (LLAMA, (1, 3)),
}
"""Name -> (the teacher's config, layers that stay attention). The name of a variant makes a student of that variant."""


def make_models(root: Path) -> list[dict[str, Any]]:
    """Every model as a folder and as a `.pth`, with the logits to expect."""
    from safetensors.torch import load_file, save_file

    import hxaconv

    jobs = []
    for number, (name, (config, gqa)) in enumerate(MODELS.items()):
        teacher, student = root / f"teacher{number}", root / f"student{number}"
        write_teacher(teacher, config)
        hxaconv.init_from_teacher(
            str(teacher),
            str(student),
            gqa_layers=",".join(map(str, gqa)),
            allow_gqa_layer_0=True,
            **({"variant": name} if name.startswith("hxa0") else {}),
        )
        tensors = load_file(student / "model.safetensors")
        draw = torch.Generator().manual_seed(number)
        for key, x in tensors.items():
            if key.rsplit(".", 1)[-1] in ("w1", "a1", "v1", "k1", "g1", "w0", "a0", "v0", "k0", "r_k"):
                x += (torch.randn(x.shape, generator=draw) * 0.1).to(x.dtype)
        save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
        kinds = [("folder", student)]
        with contextlib.suppress(hxaconv.HxaconvError):  # experts are in no .pth
            hxaconv.to_pth(str(student), str(root / f"student{number}.pth"))
            kinds.append((".pth", root / f"student{number}.pth"))
        tokens = torch.randint(0, 512, (1, 24), generator=draw)
        expected = root / f"expected{number}.safetensors"
        save_file({"tokens": tokens[0], "logits": logits(student, tokens)}, expected)
        settings = {"theta": config["rope_theta"], "eps": config["rms_norm_eps"], "expected": str(expected)}
        for kind, path in kinds:
            jobs += [settings | {"model": name, "kind": kind, "path": str(path), "strategy": way} for way in STRATEGIES]
    return jobs


def write_teacher(folder: Path, config: dict[str, Any]) -> None:
    """A random teacher."""
    from safetensors.torch import save_file

    from hxaconv.model.architecture import expected_tensors
    from hxaconv.model.config import teacher_config

    draw = torch.Generator().manual_seed(0)

    def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        x = torch.randn(shape, generator=draw)
        x = 1 + 0.1 * x if "norm" in name else x * 0.5 if name.endswith("bias") else x * shape[-1] ** -0.5
        return x.bfloat16()

    shapes = expected_tensors(teacher_config(config, where="random"))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value(name, shape) for name, shape in shapes.items()}, folder / "model.safetensors")


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """By the modelling code that is in the folder, in float32."""
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits[0].contiguous()


def release(clone: Path, commit: str, folder: Path) -> None:
    """The engine's Python files at a commit."""
    git = ["git", "-C", str(clone)]
    listed = subprocess.run([*git, "ls-tree", "-r", commit, "rwkvengine"], check=True, capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        facts, name = line.split("\t")
        if name.endswith(".py") and "/fla/" not in name:
            blob = subprocess.run([*git, "cat-file", "blob", facts.split()[2]], check=True, capture_output=True).stdout
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(blob)


def main(clone: Path, commits: list[str]) -> None:
    """A table per release."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        jobs = make_models(root)
        (root / "jobs.json").write_text(json.dumps(jobs))
        for commit in commits:
            day = subprocess.run(
                ["git", "-C", str(clone), "log", "-1", "--format=%as %h", commit],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.strip()
            release(clone, commit, root / commit)
            done = subprocess.run(
                [sys.executable, str(Path(__file__).resolve()), "--child", str(root / "jobs.json")],
                cwd=root / commit,
                capture_output=True,
                text=True,
                env=os.environ | {"PYTHONPATH": str(root / commit)},
            )
            answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            print(f"\n{day}: {len(answers)} of {len(jobs)} tried")
            if len(answers) < len(jobs):
                print(done.stderr[-2000:])
            for answer in answers:
                came = answer.get("error", "") and f"{answer['error']} ({answer['where']})"
                if "far" in answer:
                    came = "  ".join(f"{x:.3f}" for x in answer["far"])
                print(f"{answer['model']:32} {answer['kind']:7} {answer['strategy']:5} {came}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        sys.path.insert(0, os.getcwd())
        child(json.loads(Path(sys.argv[2]).read_text()))
    else:
        main(Path(sys.argv[1]), sys.argv[2:] or ["HEAD"])
