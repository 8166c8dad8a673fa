"""Checks the readers of trainers' folders and merged adapters against the libraries that write them, bit by bit.

    pip install deepspeed peft transformers && python benchmarks/trainer_formats.py

Runs on the CPU, in a few minutes and some hundred megabytes. It trains the attention of a golden case for three steps
with DeepSpeed ZeRO 1, 2 and 3 and with FSDP2, each on several gloo ranks, and compares what hxaconv reads from the
folders with zero_to_fp32 and dcp_to_torch_save; merges adapters of PEFT and compares with merge_and_unload; and
converts both to Hugging Face folders. Prints a table; exits with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CASE = ROOT / "tests" / "golden" / "reka_tiny"


def module_of(tensors: Mapping[str, Any], frozen: str = "") -> Any:
    """A module whose parameters have these names; its forward is a sum over all of them, module by module.

    Parameters whose name holds `frozen` get no gradient.
    """
    import torch
    from torch import nn

    class Node(nn.Module):
        def forward(self) -> torch.Tensor:
            own = [(p.float() ** 2).sum() * (1 + i % 3) for i, p in enumerate(self._parameters.values())]
            total = sum([*own, *(child() for child in self.children())], torch.zeros(()))
            assert isinstance(total, torch.Tensor)
            return total

    root = Node()
    for name, x in tensors.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, Node())
            node = node.get_submodule(part)
        trained = not (frozen and frozen in name)
        node.register_parameter(last, nn.Parameter(x.detach().clone().float(), requires_grad=trained))
    rotary = Node()
    rotary.register_buffer("inv_freq", torch.arange(3).float())
    root.get_submodule("model.model").add_module("rotary_emb", rotary)
    return root


def trained_attention() -> dict[str, Any]:
    """The tensors of the golden training checkpoint."""
    import torch

    found: dict[str, Any] = torch.load(CASE / "trained_attention.pth", weights_only=True)
    return {name: x for name, x in found.items() if x.dim()}


def deepspeed_worker(out: Path, stage: int, dtype: str) -> None:
    """One rank: three steps, two parameter groups, some frozen parameters, and a checkpoint."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    model = module_of(trained_attention(), frozen="layers.1.")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for i, (_, p) in enumerate(named) if i % 3 == k]} for k in range(3)]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 20_000},
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    for _ in range(3):
        engine.backward(engine())
        engine.step()
    engine.save_checkpoint(str(out))


def fsdp_worker(out: Path, axis: int) -> None:
    """One rank: a sharded model, a step of its optimizer, and a checkpoint."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = module_of(trained_attention())
    if axis == 0:
        for layer in model.get_submodule("model.model.layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model().backward()
        optimizer.step()
        weights, states = get_state_dict(model, optimizer)
    else:  # as tensor parallelism leaves it
        weights = {
            name: distribute_tensor(p.detach() * 1.001, mesh, [Shard(min(axis, p.dim() - 1))])
            for name, p in model.named_parameters()
        }
        states = {}
    dcp.save({"model": weights, "optimizer": states, "step": 3}, checkpoint_id=out)
    files = out.with_name(f"{out.name}-files")
    files.mkdir(exist_ok=True)
    torch.save(weights, files / f"model_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads abort a process now and then that ends in order


def launch(ranks: int, *arguments: object) -> None:
    """Run this file on several ranks."""
    port = str(29500 + os.getpid() % 1000)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, __file__, *map(str, arguments)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stdout[-2000:]}{done.stderr[-3000:]}")


def differences(folder: Path, expected: Mapping[str, Any]) -> list[str]:
    """Tensors that hxaconv reads otherwise from a folder."""
    import torch

    from hxaconv.load.checkpoint import find_trained
    from hxaconv.surgery.arithmetic import tensor

    trained = find_trained(folder, str(folder))
    assert trained is not None
    plan = trained.read(None)[1].tensors
    problems = [f"{name} is missing" for name in expected if name not in plan]
    return problems + [
        name
        for name, x in expected.items()
        if name in plan and not (plan[name].shape == x.shape and torch.equal(tensor(plan[name]).to(x.dtype), x))
    ]


def same_folders(source: Path, expected: Mapping[str, Any], work: Path) -> bool:
    """Whether to-hf of the folder and of the expected tensors in one file write the same bytes."""
    import torch

    from hxaconv.__main__ import main

    names = {name: x for name, x in expected.items() if ".self_attn." in name}
    torch.save(names, work / "expected.pth")
    made = []
    for number, spec in enumerate((source, work / "expected.pth")):
        out = work / f"{source.name}-{number}"
        teacher = ("--teacher", str(CASE / "teacher"))
        sys.argv = ["hxaconv", "to-hf", str(spec), str(out), *teacher, "--no-verify", "--quiet"]
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                return False
        made.append((out / "model.safetensors").read_bytes())
    return made[0] == made[1]


def zero_rows(work: Path) -> Iterator[tuple[str, str]]:
    """DeepSpeed against zero_to_fp32."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for stage, ranks, dtype in ((1, 2, "bf16"), (2, 2, "bf16"), (2, 3, "fp32"), (3, 2, "bf16"), (3, 4, "fp32")):
        folder = work / f"zero{stage}-{ranks}-{dtype}"
        launch(ranks, "--zero", stage, "--dtype", dtype, "--out", folder)
        expected = {n: x.clone() for n, x in get_fp32_state_dict_from_zero_checkpoint(str(folder)).items()}
        found = differences(folder, expected)
        against = "zero_to_fp32"
        if stage > 1:  # of stage 1, zero_to_fp32 leaves out the frozen parameters: to-hf would write other tensors
            against += ", to-hf"
            if not found and not same_folders(folder, expected, work):
                found = ["to-hf of the folder differs from to-hf of one file"]
        yield f"ZeRO-{stage}, {ranks} ranks, {dtype}: {len(expected)} tensors against {against}", "; ".join(found)


def fsdp_rows(work: Path) -> Iterator[tuple[str, str]]:
    """torch.distributed.checkpoint against dcp_to_torch_save."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    for ranks, axis in ((2, 0), (4, 0), (2, 1), (4, 1)):
        folder = work / f"dcp-{ranks}-{axis}"
        launch(ranks, "--fsdp", axis, "--out", folder)
        dcp_to_torch_save(folder, work / "one.pt")
        expected = torch.load(work / "one.pt", weights_only=False)["model"]
        how = "FSDP2" if axis == 0 else "columns sharded"
        for place, what in ((folder, "DCP"), (folder.with_name(f"{folder.name}-files"), "a state dict per rank")):
            found = differences(place, expected)
            if not found and not same_folders(place, expected, work):
                found = ["to-hf of the folder differs from to-hf of one file"]
            tensors = f"{len(expected)} tensors against dcp_to_torch_save, to-hf"
            yield f"{what}, {ranks} ranks, {how}: {tensors}", "; ".join(found)


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 12},
    "LoRA, rank and alpha patterns, rslora": {
        "target_modules": "all-linear",
        "r": 4,
        "rank_pattern": {"layers.1.self_attn.q_proj": 6, "up_proj": 2},
        "alpha_pattern": {"o_proj": 5},
        "use_rslora": True,
    },
    "DoRA": {"target_modules": ["q_proj", "k_proj", "gate_proj"], "r": 3, "use_dora": True},
    "LoRA, modules_to_save": {"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["lm_head", "norm"]},
    "LoRA, fan_in_fan_out": {"target_modules": ["q_proj", "up_proj"], "r": 4, "fan_in_fan_out": True},
    "LoRA of the embedding": {"target_modules": ["embed_tokens", "o_proj"], "r": 4},
}


def peft_rows(work: Path) -> Iterator[tuple[str, str]]:
    """Adapters of PEFT against merge_and_unload, in float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from hxaconv.load import load_teacher
    from hxaconv.options import Settings
    from hxaconv.surgery.arithmetic import tensor

    for name, options in ADAPTERS.items():
        base = AutoModelForCausalLM.from_pretrained(CASE / "teacher", dtype=torch.float32)
        base.save_pretrained(work / "base")
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    scale = 0.1 * (0.1 if "magnitude" in parameter_name else 1)
                    parameter += scale * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(work / "adapter")
        merged = model.merge_and_unload().state_dict()
        plan = load_teacher(work / "base", Settings(adapter=str(work / "adapter"))).plan
        plain = load_teacher(work / "base").plan
        found = [n for n, recipe in plan.items() if not torch.equal(tensor(recipe), merged[n])]
        largest = max((float((tensor(plan[n]) - merged[n]).abs().max()) for n in found), default=0.0)
        changed = sum(not torch.equal(tensor(plain[n]), merged[n]) for n in plan)
        what = f"{len(found)} of {changed} differ, by up to {largest:.1e}" if found else ""
        yield (
            f"PEFT {name}: {changed} tensors changed, against merge_and_unload",
            what if changed else "nothing changed",
        )


def main() -> int:
    """Compare everything; 0 when all is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("zero", "dcp", "peft"))
    parser.add_argument("--zero", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fsdp", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bf16", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.zero is not None:
        deepspeed_worker(options.out, options.zero, options.dtype)
        return 0
    if options.fsdp is not None:
        fsdp_worker(options.out, options.fsdp)
        return 0
    sys.path.insert(0, str(ROOT))
    failed = 0
    packages = {"zero": "deepspeed", "dcp": "torch", "peft": "peft"}
    print(json.dumps({name: version(name) for name in packages.values()}))
    with tempfile.TemporaryDirectory() as folder:
        for part, rows in (("zero", zero_rows), ("dcp", fsdp_rows), ("peft", peft_rows)):
            if options.only not in (None, part):
                continue
            for what, problem in rows(Path(folder)):
                failed += bool(problem)
                print(f"{'FAILED' if problem else 'equal '}  {what}{': ' + problem if problem else ''}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
