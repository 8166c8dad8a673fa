"""A 1 GB student there and back: HF -> pth -> HF and pth -> HF -> pth, the same files byte for byte."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_gigabyte_goes_round_without_losing_a_bit(cli: Callable[..., int], tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "synthetic.py"
    first = tmp_path / "first"
    subprocess.run([sys.executable, str(script), str(first), "--kind", "student", "--bytes", "1GB"], check=True)
    options = ["--max-shard-size", "400MB", "--no-verify", "--quiet"]
    assert cli("to-hf", first, tmp_path / "a", *options) == 0
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    assert cli("to-pth", tmp_path / "a", tmp_path / "one" / "s.pth", "--no-verify", "--quiet") == 0
    assert cli("to-hf", tmp_path / "one" / "s.pth", tmp_path / "b", *options) == 0
    assert cli("to-pth", tmp_path / "b", tmp_path / "two" / "s.pth", "--no-verify", "--quiet") == 0
    shards = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 2
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", shards, shallow=False) == (shards, [], [])
    assert filecmp.cmp(tmp_path / "one" / "s.pth", tmp_path / "two" / "s.pth", shallow=False)
    assert cli("verify", tmp_path / "two" / "s.pth", "--digests", "--quiet") == 0
