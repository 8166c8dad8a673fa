"""`pick-gqa-layers` with Hub ids, against a stand-in of the Hub on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer

FINGERPRINT = """
import numpy as np
from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.load.models import download
from hxaconv.forward.state import fingerprint
from hxaconv.load import load_teacher
checkpoint = open_checkpoint("org/teacher")
download([checkpoint], checkpoint.files)
print(fingerprint({"teacher": load_teacher(checkpoint)}, np.zeros((1, 2), dtype=np.int64), {}))
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def run(hub: HubServer, home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **hub.environment(home, None)}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, check=False
    )


def test_advice_on_a_hub_id(hub: HubServer, golden: Path, tmp_path: Path) -> None:
    hub.add_folder("org/teacher", golden / "reka_tiny" / "teacher")
    home, path = tmp_path / "home", tmp_path / "map.toml"
    words = ["-m", "hxaconv", "pick-gqa-layers", "org/teacher", "--count", 2, "--save", path, "--quiet"]
    uniform = run(hub, home, *words)
    assert uniform.returncode == 0, uniform.stderr
    assert all(ranged is not None for ranged in hub.downloaded(".safetensors"))  # headers are enough
    done = run(hub, home, *words, "--strategy", "influence", "--tokens", 16, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert any(ranged is None for ranged in hub.downloaded(".safetensors"))
    saved = tomllib.loads(path.read_text())
    assert saved["model_ids"] == ["org/teacher"]
    assert saved["title"].startswith("org/teacher, 2 of ")


def test_scores_of_a_hub_id_are_good_for_the_next_run(hub: HubServer, golden: Path, tmp_path: Path) -> None:
    """The first run downloads the weights, the next one finds them: the same files, whatever their times."""
    hub.add_folder("org/teacher", golden / "reka_tiny" / "teacher")
    first, second = (run(hub, tmp_path / "home", "-c", FINGERPRINT) for _ in range(2))
    assert len(first.stdout.strip()) == 64, first.stderr
    assert first.stdout == second.stdout
    hub.add_folder("org/teacher", golden / "qwen3_tiny" / "teacher")
    assert run(hub, tmp_path / "new", "-c", FINGERPRINT).stdout != first.stdout
