"""Peak memory of restore-one KL on a synthetic 12-layer teacher of 1 GB: one layer's weights, and the streams.

    python benchmarks/selection_memory.py [--folder DIR] [--tokens 1024] [--device cpu]

Writes the teacher (random bf16 weights) once, scores all layers, and prints peak anonymous memory (Linux)
beside what the streams and one layer need by the formula, and what the whole teacher would need.
"""

from __future__ import annotations

import argparse
import json
import struct
import threading
import time
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 12,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 96,
    "vocab_size": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MEGABYTE = 1e6


def write_teacher(folder: Path) -> None:
    """config.json and one safetensors file; weights of standard deviation 0.02, norms of one."""
    import torch

    from hxaconv.model.architecture import expected_tensors
    from hxaconv.model.config import teacher_config

    config = teacher_config(CONFIG, where="benchmark")
    header, offset = {}, 0
    shapes = expected_tensors(config)
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            values = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
            file.write(values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))


class PeakAnonymous(threading.Thread):
    """Samples RssAnon of this process every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0, False

    def run(self) -> None:
        """Until `done`."""
        while not self.done:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.005)


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not tell anonymous memory")


def main() -> None:
    """Write the teacher where it is missing, score, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/data/selection-teacher"))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    import numpy as np
    import torch

    from hxaconv.load import load_teacher
    from hxaconv.model.config import student_of
    from hxaconv.model.model import Model
    from hxaconv.options import Choice
    from hxaconv.selection.advice import advise
    from hxaconv.selection.strategies import Given
    from hxaconv.surgery.init import PRESETS, InitSettings, init_from_teacher

    if not (arguments.folder / "config.json").is_file():
        write_teacher(arguments.folder)
    teacher = load_teacher(arguments.folder)
    config = student_of(teacher.config, ())
    settings = InitSettings(PRESETS["openmose-stage1"], 0, "BF16")
    student = Model(config, init_from_teacher(teacher.plan, config, settings), "student")
    size, num_layers = teacher.config.vocab_size, teacher.config.num_hidden_layers
    ids = np.random.default_rng(0).integers(0, size, (arguments.tokens // arguments.length, arguments.length))

    streams = (num_layers + 2) * arguments.tokens * config.hidden_size * 4
    layer = sum(4 * r.numel for n, r in teacher.plan.items() if n.startswith("model.layers.0."))
    mixer = sum(4 * r.numel for n, r in student.plan.items() if n.startswith("model.layers.0.self_attn."))
    whole = sum(4 * r.numel for r in teacher.plan.values())
    on_device = arguments.device != "cpu"
    before = anonymous()
    sampler = PeakAnonymous()
    sampler.start()
    started = time.monotonic()
    given = Given(num_layers=num_layers, teacher=teacher, student=student, ids=ids, device=arguments.device)
    advise(Choice(strategy="kl", count=2), given)
    seconds = time.monotonic() - started
    sampler.done = True
    sampler.join()
    if on_device:
        print(f"peak on {arguments.device}       {torch.cuda.max_memory_allocated() / MEGABYTE:8.0f} MB")
    rows = {
        "peak anonymous memory": sampler.peak,
        "of that, before scoring (Python, torch, plans)": before,
        "scoring itself": sampler.peak - before,
        f"formula: {num_layers + 2} streams of {arguments.tokens} tokens, float32": streams,
        "formula: one layer, float32": layer,
        "formula: the RWKV mixer beside the attention, float32": mixer,
        "the whole teacher in float32 would be": whole,
    }
    for text, count in rows.items():
        print(f"{text:<58}{count / MEGABYTE:8.0f} MB")
    forwards = num_layers * (num_layers + 1) // 2 + 2 * num_layers
    print(f"{forwards} layer-forwards in {seconds:.0f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
