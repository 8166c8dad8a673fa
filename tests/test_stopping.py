"""Two runs at once, signals and kills."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_rounds import CI_KILLS
from writing import leftovers, output, partials, plan_over, reference, source, tree, verified, write

from hxaconv.formats import diskio
from hxaconv.options import Write
from hxaconv.save.interruption import Interrupted
from hxaconv.save.staging import read_journals

HERE = Path(__file__).parent


def job(folder, target, *options, slow=0.002):
    """The command that writes `target` from the source in `folder`."""
    return [sys.executable, str(HERE / "write_job.py"), str(folder), str(target), "--slow", str(slow), *options]


def run(command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


# Two runs at once

SLOW_COMMAND = """
import os, sys, time
sync = os.fdatasync
os.fdatasync = lambda fd: (time.sleep(0.5), sync(fd))
from hxaconv.__main__ import main
sys.exit(main())
"""


def wait_until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited a minute in vain")


def test_a_second_command_on_a_target_names_the_first_one_and_takes_over_when_it_is_dead(
    tmp_path, tiny_teacher, cli, capsys
):
    out = tmp_path / "out"
    words = ["init-from-teacher", str(tiny_teacher), str(out), "--no-verify", "--quiet"]
    first = subprocess.Popen([sys.executable, "-c", SLOW_COMMAND, *words])
    try:
        wait_until(lambda: partials(tmp_path))
        assert cli(*words) == 2
        said = capsys.readouterr().err
        assert f"process {first.pid} on host" in said
        assert f"{out}: process" in said
        assert "is writing the same target" in said
        assert cli(*words, "--resume") == cli(*words, "--overwrite") == 2
        assert not out.exists()
    finally:
        first.kill()
        first.wait()
    lock = tmp_path / ".out.hxaconv-lock"
    assert lock.read_text().startswith(f"process {first.pid} on host")  # stale: its file remains, nobody holds it
    assert cli(*words, "--resume") == 0
    assert leftovers(out) == []


def test_a_file_system_without_locks_holds_nobody_up(tmp_path, monkeypatch):
    def flock(fd, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    path = tmp_path / "lock"
    path.write_text("another's")
    with diskio.held(path, path), diskio.held(path, path):
        assert path.read_text().startswith(f"process {os.getpid()} on")
    assert not path.exists()


# Signals and kills


def finished_tensors(folder):
    return [name for partial in partials(folder) for name in read_journals(partial)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", [partials, finished_tensors])
def test_a_signal_leaves_a_resumable_state_and_says_so(tmp_path, number, moment):
    # A fifth of a second for every write and sync: seconds for all of them, so the signal finds the writer at work.
    command = job(tmp_path, tmp_path / "out", slow=0.2)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    wait_until(lambda: moment(tmp_path))
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert message.startswith("Interrupted. ")
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    if moment is finished_tensors:
        assert "--resume" in message
    assert bool(partials(tmp_path)) == ("--resume" in message)
    assert run(job(tmp_path, tmp_path / "out", "--resume", slow=0)).returncode == 0
    assert tree(tmp_path / "out") == reference(tmp_path, "out")


def test_a_signal_while_verifying_keeps_everything(tmp_path):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))

    def interrupt(path):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with pytest.raises(Interrupted) as caught:
        write(out, Write(), verify=interrupt)
    assert caught.value.exit_code == 143
    assert "24 finished tensors are kept" in caught.value.message
    verified(out, resume=True)


def test_every_command_killed_at_random_moments_and_resumed():
    command = [sys.executable, str(HERE / "kill_rounds.py"), "--kills", str(CI_KILLS), "--seed", str(CI_KILLS)]
    place = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **place})
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout.splitlines()[-1].split("|")[2])
    assert kills >= CI_KILLS
