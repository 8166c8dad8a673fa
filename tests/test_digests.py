"""Recorded digests against the bytes on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
