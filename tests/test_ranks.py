"""Several processes write one output: as torchrun and srun start them, one of them killed, one without space."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from writing import output, plan_over, source

from hxaconv import ranks
from hxaconv.errors import HxaconvError
from hxaconv.save.writer import share


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).parent / "rank_rounds.py")
    done = subprocess.run([sys.executable, script, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_two_ranks_give_the_bytes_of_one_process(found: dict[str, Any]) -> None:
    assert found["alone"]["codes"] == [0]
    assert found["two"]["codes"] == [0, 0]
    assert found["two"]["same"]
    assert found["two"]["said"][1] == ""


def test_a_rank_that_is_killed_ends_the_others_and_the_same_command_resumes(found: dict[str, Any]) -> None:
    for name, again in (("killed", "resumed"), ("taken-over", "resumed alone")):
        assert found[name]["codes"] == [2, -signal.SIGKILL]
        assert "rank 0 of 2 has lost the others" in found[name]["said"][0]
        assert "with --resume continues" in found[name]["said"][0]
        assert not found[name]["published"]
        assert set(found[again]["codes"]) == {0}
        assert found[name]["same"]
    # Of a work folder that somebody else resumes nothing is left, nor a lock.
    assert found["killed"]["left"] == found["taken-over"]["left"] == []


def test_a_rank_that_is_interrupted_ends_all_of_them(found: dict[str, Any]) -> None:
    assert found["stopped"]["codes"] == [2, 128 + signal.SIGTERM]
    assert "rank 1 was interrupted" in found["stopped"]["said"][0]
    assert "with --resume continues" in found["stopped"]["said"][0]
    assert not found["stopped"]["published"]


def test_what_one_rank_cannot_write_all_refuse_and_one_says(found: dict[str, Any]) -> None:
    assert found["full"]["codes"] == [2, 2]
    assert not found["full"]["published"]
    said = found["full"]["said"]
    assert "rank 1: " in said[0]
    assert "No space left on device" in said[0]
    assert said[1] == ""


@pytest.mark.slow
def test_what_is_computed_before_the_writing_is_the_same_by_several(tmp_path: Path) -> None:
    script = str(Path(__file__).parent / "rank_rounds.py")
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), "--commands"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"fit": True, "pick": True, "fit resumed": True}


def test_ranks_divide_all_tensors_by_bytes(tmp_path: Path) -> None:
    files = output(tmp_path / "out", plan_over(source(tmp_path))).files
    whole = [fill.name for layout in files for fill in layout.fills]
    largest = max(fill.recipe.nbytes for layout in files for fill in layout.fills)
    total = sum(fill.recipe.nbytes for layout in files for fill in layout.fills)
    for world in (1, 2, 3, 24, 50):
        shares = [[f for _, fills in share(files, rank, world) for f in fills] for rank in range(world)]
        assert [fill.name for fills in shares for fill in fills] == whole
        assert all(abs(sum(f.recipe.nbytes for f in fills) - total / world) <= largest for fills in shares)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_place", (0, 1))
    monkeypatch.setattr(ranks, "_host", {})


@pytest.mark.usefixtures("nobody")
def test_the_place_comes_from_torchrun_or_from_a_step_of_slurm() -> None:
    def place(**environment: str) -> tuple[int, int]:
        ranks.join(environment)
        return ranks.rank(), ranks.world()

    assert place() == (0, 1)
    assert place(RANK="1", WORLD_SIZE="4", SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1") == (1, 4)
    assert place(SLURM_PROCID="2", SLURM_STEP_NUM_TASKS="3", SLURM_NTASKS="3") == (2, 3)
    assert place(SLURM_PROCID="0", SLURM_NTASKS="3") == (0, 1)  # the batch script, no task of a step
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "", "WORLD_SIZE": ""}, {"RANK": "-1", "WORLD_SIZE": "x"}):
        with pytest.raises(HxaconvError, match="expected a rank and a larger world size"):
            ranks.join(wrong)


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[03-07,12]", "gpu03"), ("n1,n2", "n1"), ("a-b-[9]", "a-b-9"), ("node", "node")]
)
def test_the_first_node_of_a_step_is_where_ranks_meet(nodes: str, first: str) -> None:
    ranks.join({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "41"})
    assert (ranks._first_node(), ranks._port()) == (first, 20_041)
