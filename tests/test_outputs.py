"""What the commands write stays what it was: digests of outputs, recorded on the golden cases and a small teacher.

safetensors files are compared byte by byte, `.pth` files tensor by tensor, config.json and sidecars value by value.
`python tests/test_outputs.py` records them anew, which only a change that is meant to alter outputs justifies.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
RECORDED = HERE / "outputs.json"
TINY = HERE.parent / "hxaconv" / "commands" / "embedded" / "teacher"
CASES = ("reka_tiny", "reka_tiny_init", "qwen3_tiny")

NOT_MODEL = ("rwkv_infer_loadmodel", "hxaconv")
"""Keys of a sidecar that are advice and provenance, not the model."""


def runs() -> Iterator[tuple[str, list[str]]]:
    """(name, words) of every command that writes; OUT is the last word before the options."""
    for case in CASES:
        g = str(HERE / "golden" / case)
        teacher = ["--teacher", f"{g}/teacher"]
        bare = [*teacher, "--variant", "hxa079"]
        gqa = ["--gqa-layers", "1,3" if case == "qwen3_tiny" else "-1"]
        yield f"{case} init", ["init-from-teacher", f"{g}/teacher", "out", *gqa]
        yield f"{case} init shards", ["init-from-teacher", f"{g}/teacher", "out", *gqa, "--max-shard-size", "150KB"]
        yield f"{case} init pth", ["init-from-teacher", f"{g}/teacher", "out.pth", *gqa, "--format", "pth"]
        yield f"{case} init training", ["init-from-teacher", f"{g}/teacher", "out.pth", *gqa, "--format", "training"]
        other = ["--preset", "openmose-stage2", "--scale", "value=0.7", "--seed", "3", "--dtype", "float32"]
        yield f"{case} init other values", ["init-from-teacher", f"{g}/teacher", "out", *gqa, *other]
        yield f"{case} to-hf", ["to-hf", f"{g}/student.pth", "out", *bare]
        yield f"{case} to-hf trained", ["to-hf", f"{g}/trained_attention.pth", "out", *teacher]
        yield f"{case} to-hf cast", ["to-hf", f"{g}/student.pth", "out", *bare, "--dtype", "float16"]
        yield f"{case} to-hf padded", ["to-hf", f"{g}/student.pth", "out", *bare, "--pad-ffn", "256"]
        yield f"{case} to-pth", ["to-pth", f"{g}/student_hf", "out.pth", *bare]
        yield f"{case} to-pth trained", ["to-pth", f"{g}/trained_attention.pth", "out.pth", *teacher]
        yield f"{case} to-training", ["to-training", f"{g}/student_hf", "out.pth", *bare]
        yield f"{case} to-training all", ["to-training", f"{g}/student.pth", "out.pth", *bare, "--all"]
        yield f"{case} pick", ["pick-gqa-layers", f"{g}/student.pth", "out", "--layers", "2", *bare]
        yield f"{case} pick pth", ["pick-gqa-layers", f"{g}/student.pth", "out.pth", "--layers", "1,2", *bare]
    yield "tiny init", ["init-from-teacher", str(TINY), "out", "--gqa-layers", "2,5"]
    yield "tiny init default layers", ["init-from-teacher", str(TINY), "out"]


def digest(path: Path) -> Any:
    """What must not change of one file; None for files that tell of the program rather than the model."""
    if path.suffix == ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".pth":
        state = torch.load(path, weights_only=True)
        whole = hashlib.sha256()
        for name, tensor in state.items():
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            whole.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()
    if path.name in ("config.json", "out.json"):
        values = {key: value for key, value in json.loads(path.read_text()).items() if key not in NOT_MODEL}
        return {key: values[key] for key in sorted(values)}
    if path.name.endswith(".index.json"):
        return hashlib.sha256(json.dumps(json.loads(path.read_text()), sort_keys=True).encode()).hexdigest()
    return None


def digests(folder: Path) -> dict[str, Any]:
    """Digests of what a command left in `folder`."""
    found = {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(("name", "words"), list(runs()), ids=[name for name, _ in runs()])
def test_outputs_are_what_they_were(cli, tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    assert cli(*words, "--no-verify", "--quiet") == 0
    assert digests(tmp_path) == json.loads(RECORDED.read_text())[name]


def test_a_changed_bit_would_be_seen(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, words = next(iter(runs()))
    assert cli(*words, "--no-verify", "--quiet", "--seed", "1") == 0
    assert digests(tmp_path) != json.loads(RECORDED.read_text())[name]


def record() -> None:
    """Write outputs.json from the program as it is."""
    import os
    import subprocess
    import tempfile

    found = {}
    for name, words in runs():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "hxaconv", *words, "--no-verify", "--quiet"]
            subprocess.run(command, cwd=folder, check=True, env=os.environ)
            found[name] = digests(Path(folder))
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record()
