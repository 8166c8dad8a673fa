"""A student of Qwen3-30B-A3B as it is published: 19,547 tensors, 61,419,204,768 bytes, none of them written.

    python benchmarks/experts_sparse.py [--folder DIR] [--names INDEX.json] [--copy-divisor 4] [--full]

Names and shapes are hxa079's with 128 experts in each of 48 layers; `--names` holds them against a published index. The
files are holes. Measured: `inspect`, the plan of `to-hf`, and a copy: of all 19,547 tensors, with hidden size
and experts divided by `--copy-divisor` (the output is real, so 61 GB of disk are needed for `--full`).
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

from measure import Sample, run

from hxaconv.load.student import SettingsSource, config_settings, resolve
from hxaconv.model.architecture import expected_tensors

HXACONV = [sys.executable, "-m", "hxaconv"]
PLAN = """
import sys
from pathlib import Path
from hxaconv.load import load_student
from hxaconv.calls import Call
from hxaconv.options import Write
from hxaconv.save.output import Record, lay_out
student = load_student(sys.argv[1])
record = Record(call=Call("to-hf"), sources={"source": student.checkpoint})
output = lay_out(student, Path(sys.argv[2]), Write(), format="hf", record=record)
assert len(output.tensors) == 19547
"""
SHARDS = 13
BYTES = 61_419_204_768
GQA = [5, 11, 17, 23, 29, 35, 41, 47]
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "rwkv_architecture": "hxa079",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000_000,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "enable_qk_norm": True,
    "transformer_layers": GQA,
    "lora_rank_decay": 256,
    "lora_rank_iclr": 128,
    "lora_rank_value_residual_mix": 96,
    "lora_rank_key_residual_mix": 96,
    "lora_rank_gate": 256,
    "has_layer_records": True,
    "torch_dtype": "bfloat16",
}


def make(folder: Path, divisor: int = 1) -> dict[str, tuple[int, ...]]:
    """A sparse folder of shards with an index; name -> shape."""
    config = CONFIG | {key: CONFIG[key] // divisor for key in ("hidden_size", "moe_intermediate_size", "vocab_size")}
    student = resolve([SettingsSource("", {}), SettingsSource("config.json", config_settings(config, "it"))], "it")
    shapes = expected_tensors(student)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map = list(shapes), {}
    size = -(-len(names) // SHARDS)
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        weight_map |= dict.fromkeys(names[number * size : (number + 1) * size], file)
        header, place = {}, 0
        for name in names[number * size : (number + 1) * size]:
            nbytes = 2 * _product(shapes[name])
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [place, place + nbytes]}
            place += nbytes
        data = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(data)) + data)
            out.truncate(8 + len(data) + place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return shapes


def _product(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


def row(what: str, sample: Sample, more: str = "") -> None:
    """A line of the table."""
    print(
        f"| {what} | {sample.wall:.2f} | {sample.cpu:.2f} | {sample.rss:.0f} ({sample.anonymous:.0f}) | {more} |",
        flush=True,
    )


def main() -> None:
    """Make, measure, remove."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("experts-sparse"))
    parser.add_argument("--names", type=Path, help="a published index (.json or .json.gz) to hold the names against")
    parser.add_argument("--copy-divisor", type=int, default=4)
    parser.add_argument("--full", action="store_true", help="copy all 61 GB, too")
    options = parser.parse_args()
    root: Path = options.folder
    try:
        shapes = make(root / "student")
        total = 2 * sum(map(_product, shapes.values()))
        assert total == BYTES, total
        if options.names:
            data = options.names.read_bytes()
            data = gzip.decompress(data) if options.names.suffix == ".gz" else data
            assert set(json.loads(data)["weight_map"]) == set(shapes)
        print(f"{len(shapes):,} tensors, {total:,} bytes\n")
        print("| what | s | CPU s | RSS (anon.) MiB | |\n|---|--:|--:|--:|---|")
        source, out = str(root / "student"), root / "out"
        row("inspect", run([*HXACONV, "inspect", source]))
        row("plan of to-hf", run([sys.executable, "-c", PLAN, source, str(out)]), "opened, checked and laid out")
        make(root / "small", options.copy_divisor)
        for name in ("small", *(("student",) if options.full else ())):
            nbytes = sum(file.stat().st_size for file in (root / name).glob("*.safetensors"))
            shard = ("--max-shard-size", str(nbytes // SHARDS))
            sample = run([*HXACONV, "to-hf", str(root / name), str(out), *shard, "--no-verify", "-q"])
            row("copy: to-hf", sample, f"{len(shapes):,} tensors, {nbytes:,} bytes")
            shutil.rmtree(out)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
