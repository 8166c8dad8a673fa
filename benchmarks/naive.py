"""What people run without this package, one way per call: measured beside it by throughput.py.

python benchmarks/naive.py load-save-pth SOURCE_FOLDER OUT.pth
python benchmarks/naive.py load-save-shards SOURCE_FOLDER OUT_FOLDER
python benchmarks/naive.py pth-save-file SOURCE.pth OUT_FOLDER
python benchmarks/naive.py transformers TEACHER_FOLDER OUT_FOLDER
python benchmarks/naive.py mergekit TEACHER_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CONFIG = "config.json"


def load_save_pth(source: Path, target: Path) -> None:
    """`load_file` of every shard, one `torch.save`."""
    import torch
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        state |= load_file(shard)
    torch.save(state, target)


def load_save_shards(source: Path, target: Path) -> None:
    """`load_file` and `save_file`, a shard at a time."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for shard in sorted(source.glob("*.safetensors")):
        save_file(load_file(shard), target / shard.name, {"format": "pt"})


def pth_save_file(source: Path, target: Path) -> None:
    """`torch.load` (mapped where the format allows it), one `save_file`."""
    import torch
    from safetensors.torch import save_file

    try:
        state = torch.load(source, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError:
        state = torch.load(source, map_location="cpu", weights_only=True)
    target.mkdir()
    save_file(state, target / "model.safetensors", {"format": "pt"})


def transformers(source: Path, target: Path) -> None:
    """`from_pretrained` and `save_pretrained`."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(target, max_shard_size="5GB")


def mergekit(source: Path, target: Path) -> None:
    """A passthrough merge of all layers of one model."""
    layers = json.loads((source / CONFIG).read_text())["num_hidden_layers"]
    recipe = target.with_suffix(".yml")
    slices = [{"sources": [{"model": str(source), "layer_range": [0, layers]}]}]
    recipe.write_text(json.dumps({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}))
    subprocess.run(["mergekit-yaml", str(recipe), str(target), "--lazy-unpickle"], check=True)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "load-save-pth": load_save_pth,
    "load-save-shards": load_save_shards,
    "pth-save-file": pth_save_file,
    "transformers": transformers,
    "mergekit": mergekit,
}


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[1] not in WAYS:
        sys.exit(__doc__)
    way, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    WAYS[way](source, target)
    for path in target.iterdir() if target.is_dir() else [target]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


if __name__ == "__main__":
    main()
