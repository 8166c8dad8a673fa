"""Several processes, one model: parts from options, torchrun and Slurm, restarted and finished."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hxaconv.commands.parts import no_parts, resolve_part
from hxaconv.errors import HxaconvError

Cli = Callable[..., int]
OPTIONS = ["--max-shard-size", "1MB", "--quiet", "--no-verify"]


def command(teacher: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "hxaconv", "init-from-teacher", str(teacher), str(out), *OPTIONS, *more]


def same_folders(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in other.iterdir()) == names
    return filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def test_parts_in_any_order_give_the_bytes_of_one_run(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "whole", *OPTIONS) == 0
    for part in ("3/3", "1/3"):
        assert cli("init-from-teacher", tiny_teacher, tmp_path / "parts", *OPTIONS, "--part", part) == 0
        assert not (tmp_path / "parts").exists()
    assert cli("finish", tmp_path / "parts", "--quiet") == 2
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "parts", *OPTIONS, "--part", "2/3") == 0
    assert same_folders(tmp_path / "whole", tmp_path / "parts")
    assert [path.name for path in tmp_path.glob("*partial*")] == []


def test_parts_at_once_one_of_them_killed(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "whole", *OPTIONS) == 0
    out = tmp_path / "parts"
    environments = [{**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"} for rank in range(3)]
    processes = [subprocess.Popen(command(tiny_teacher, out), env=e, stderr=subprocess.PIPE) for e in environments]
    time.sleep(0.5)
    processes[1].send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    assert processes[0].returncode == processes[2].returncode == 0
    if processes[1].returncode != 0:  # on a fast machine it may have ended, and published
        assert not out.exists()
        subprocess.run(command(tiny_teacher, out), env=environments[1], check=True)
    assert same_folders(tmp_path / "whole", out)


def test_finish_publishes_what_nobody_did(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "parts"
    options = [*OPTIONS, "--digest", "sha256"]

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tiny_teacher.parent)
    assert cli("init-from-teacher", tiny_teacher.name, out, *options, "--part", "1/2") == 0
    with monkeypatch.context() as patch:
        patch.setattr("hxaconv.save.writer.publish", die)
        assert cli("init-from-teacher", tiny_teacher.name, out, *options, "--part", "2/2") == 130
    assert not out.exists()
    monkeypatch.chdir(tmp_path)
    assert cli("finish", out.name, "--quiet") == 0
    assert (out / "model.safetensors.index.json").exists()
    assert '"digest": "sha256:' in (out / "hxaconv.json").read_text()
    assert cli("verify", out, "--digests", "--quiet") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": "to-onnx"}, "of another version of hxaconv"),
        ({"options": {"bits": 4}}, "of another version of hxaconv"),
        ({"beside": ["../../elsewhere.json"]}, "no conversion is unfinished"),
        ({"beside": [".."]}, "no conversion is unfinished"),
        ({"options": []}, "no conversion is unfinished"),
        ({"plan": {}}, "no conversion is unfinished"),
    ],
)
def test_records_of_strangers_are_not_followed(
    change: dict[str, Any],
    message: str,
    cli: Cli,
    tiny_teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert cli("init-from-teacher", tiny_teacher, out, *OPTIONS, "--part", "1/2") == 0
    (record,) = tmp_path.glob("out.partial-*/plan.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    (record.parent / "publishing").touch()
    assert cli("finish", out, "--quiet") == 2
    assert message in capsys.readouterr().err
    assert cli("init-from-teacher", tiny_teacher, out, *OPTIONS, "--seed", "1") == 0


def test_commands_say_what_is_still_to_do_and_what_lies_about(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "out", ["--max-shard-size", "1MB", "--no-verify"]
    assert cli("init-from-teacher", tiny_teacher, out, *options, "--part", "1/2") == 0
    assert f"Part 1 of 2 is complete; {out} appears once all parts are." in capsys.readouterr().err
    assert cli("init-from-teacher", tiny_teacher, out, *options, "--part", "2/2", "--seed", "2") == 0
    said = capsys.readouterr().err
    (mine,) = [path for path in tmp_path.glob("out.partial-*") if f"{path} was begun with other options" in said]
    (other,) = {*tmp_path.glob("out.partial-*")} - {mine}
    shutil.rmtree(other)
    assert cli("init-from-teacher", tiny_teacher, out, *options, "--seed", "1") == 0
    (partial,) = tmp_path.glob("out.partial-*")
    assert f"{partial} is left from an interrupted run with other options" in capsys.readouterr().err
    partial.rename(tmp_path / "elsewhere")
    assert cli("init-from-teacher", tiny_teacher, out, *options, "--seed", "1", "--overwrite") == 0
    assert "is left from" not in capsys.readouterr().err


def test_where_parts_come_from() -> None:
    assert resolve_part(None, {}) is None
    assert resolve_part("2/4", {"RANK": "0", "WORLD_SIZE": "2"}) == (1, 4)
    assert resolve_part(None, {"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2)
    assert resolve_part(None, {"RANK": "0", "WORLD_SIZE": "1"}) is None
    slurm = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "4"}
    assert resolve_part(None, slurm) == (1, 4)
    for wrong in ("0/2", "3/2", "x", "1/0"):
        with pytest.raises(HxaconvError):
            resolve_part(wrong, {})


def test_a_slurm_array_may_have_steps_but_no_gaps() -> None:
    def task(number: int, **more: str) -> dict[str, str]:
        return {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "2"} | {
            f"SLURM_ARRAY_TASK_{name}": value for name, value in more.items()
        }

    found = [resolve_part(None, task(number, MAX="8", STEP="2")) for number in (2, 4, 6, 8)]
    assert found == [(0, 4), (1, 4), (2, 4), (3, 4)]
    with pytest.raises(HxaconvError, match="with gaps"):
        resolve_part(None, task(4, MAX="9", STEP="1"))
    for broken in (
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "x"},
        task(3) | {"SLURM_ARRAY_TASK_ID": "?"},
    ):
        with pytest.raises(HxaconvError, match="expected a whole number"):
            resolve_part(None, broken)


def test_a_task_that_is_no_part_of_one_job_is_told_how_to_write_all(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "s", "--no-verify", "--quiet") == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for command in ("to-pth", "to-training"):
        words = (command, tmp_path / "s", tmp_path / f"{command}.pth", "--no-verify")
        capsys.readouterr()
        assert cli(*words) == 0
        told = " ".join(capsys.readouterr().err.split())
        assert "This is part 2 of 3, by RANK and WORLD_SIZE; --part 1/1 writes the whole." in told
        assert "Warning: nothing was written" in told
        assert not words[2].exists()
        assert cli(*words, "--part", "1/1", "--quiet") == 0
        assert words[2].is_file()


def test_what_runs_without_parts_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with no_parts():
        assert resolve_part(None) is None
    assert resolve_part(None) == (1, 2)
