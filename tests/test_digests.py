"""Recorded digests against the bytes on disk."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hxaconv.errors import CheckFailed, HxaconvError
from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.verification.written import check_digests, digest


@pytest.mark.parametrize("algorithm", ["crc32", "sha256"])
def test_digests_find_a_changed_byte(algorithm: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((Path(__file__).parent / "golden/reka_tiny/student_hf/model.safetensors").read_bytes())
    checkpoint = open_checkpoint(path)
    names = checkpoint.stored_names
    record = {"tensors": {names[n]: {"digest": digest(r, algorithm)} for n, r in checkpoint.plan.items()}}
    assert check_digests(checkpoint, record).passed
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    report = check_digests(open_checkpoint(path), record)
    assert len(report.problems) == 1
    with pytest.raises(CheckFailed):
        report.raise_if_failed()
    with pytest.raises(HxaconvError, match="no recorded digests"):
        check_digests(checkpoint, {})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda w: w, None),
        (lambda w: w.view(torch.float16), r"w0 is F16 \[1, 1, 48\], recorded is BF16 \[1, 1, 48\]"),
        (lambda w: w.reshape(48), r"w0 is BF16 \[48\], recorded is BF16 \[1, 1, 48\]"),
    ],
    ids=["rewritten", "relabelled", "reshaped"],
)
def test_the_same_bytes_as_another_tensor_are_found(cli, golden, tmp_path, capsys, change, found) -> None:  # type: ignore[no-untyped-def]
    student = tmp_path / "s"
    assert (
        cli("init-from-teacher", golden / "reka_tiny" / "teacher", student, "--gqa-layers", "1", "-q", "--no-verify")
        == 0
    )
    weights = load_file(student / "model.safetensors")
    name = "model.layers.0.self_attn.w0"
    weights[name] = change(weights[name])
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    assert cli("verify", student, "--digests") == (0 if found is None else 1)
    assert found is None or re.search(found, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(
    "tensors", [[], [1], {"a": 1}, {"a": []}, {"a": {"digest": 5}}, {"a": {"digest": ["crc32:00000000"]}}, 7, "text"]
)
def test_records_of_another_form_are_refused(tensors: object) -> None:
    checkpoint = open_checkpoint(Path(__file__).parent / "golden/reka_tiny/student_hf/model.safetensors")
    with pytest.raises(HxaconvError, match=r"not what hxaconv writes|no recorded digests"):
        check_digests(checkpoint, {"tensors": tensors})


def test_neither_digests_nor_the_lint_need_torch() -> None:
    code = (
        "import sys, hxaconv.verification.written, hxaconv.verification.lint;"
        " sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
