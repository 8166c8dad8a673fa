"""Two runs at once, signals, kills, and parts of one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from kill_rounds import CI_KILLS
from writing import leftovers, output, partials, plan_over, reference, source, tree, verified

from hxaconv.errors import HxaconvError
from hxaconv.save import locks, writer
from hxaconv.save.interruption import Interrupted
from hxaconv.save.journal import read_journals
from hxaconv.save.target import WriteSettings, files_of_part, layouts
from hxaconv.save.writer import write

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
    assert json.loads(lock.read_text())["pid"] == first.pid  # stale: its file remains, nobody holds it
    assert cli(*words, "--resume") == 0
    assert leftovers(out) == []


def test_a_second_run_on_a_target_stops_and_says_who_holds_it(tmp_path):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    process = subprocess.Popen(job(tmp_path, out.target, slow=0.05), stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        deadline = time.monotonic() + 20
        while not partials(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(HxaconvError, match=f"process {process.pid} on host"):
            verified(replace(out, provenance={"another": "plan"}))
    finally:
        process.kill()
        process.communicate()
    # Its lock file is still there, but nobody holds it.
    assert verified(replace(out, provenance={"another": "plan"})).published


def test_locks_without_help_of_the_system(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_flock", lambda fd, *, shared: None)
    path = tmp_path / "lock"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = {"pid": os.getppid(), "host": locks.socket.gethostname(), "started": locks._started(os.getppid())}
    for holder, held in (
        ({**alive, "pid": dead.pid, "started": "1"}, False),
        ({**alive, "started": "another time"}, False),
        (alive, True),
        ({**alive, "host": "elsewhere"}, True),
        ({**alive, "pid": "4711"}, False),
    ):
        path.write_text(json.dumps(holder))
        lock = locks.acquire(path, "test")
        assert (not isinstance(lock, locks.Lock)) == held
        if isinstance(lock, locks.Lock):
            lock.release()
            assert not path.exists()
    path.write_text(json.dumps({**alive, "host": "elsewhere"}))
    with pytest.raises(HxaconvError, match=r"on host elsewhere .* is writing") as caught, locks.held(path, path, None):
        pass
    assert f"delete {path}" in caught.value.hint


# Signals and kills


def finished_tensors(folder):
    return [name for partial in partials(folder) for name in read_journals(partial).tensors]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", [partials, finished_tensors])
def test_a_signal_leaves_a_resumable_state_and_says_so(tmp_path, number, moment):
    # Half a second for every write and sync: many seconds for all of them, so the signal finds the writer at work.
    command = job(tmp_path, tmp_path / "out", slow=0.5)
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
        write(out, WriteSettings(), verify=interrupt)
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


# Parts


def test_parts_share_the_files_and_balance_their_bytes(tmp_path):
    files = layouts(output(tmp_path / "out", plan_over(source(tmp_path))))
    shares = [files_of_part(files, (i, 3)) for i in range(3)]
    assert sorted(f.name for share in shares for f in share) == sorted(f.name for f in files)
    sizes = [sum(f.size for f in share) for share in shares]
    assert max(sizes) - min(sizes) <= max(f.size for f in files)
    assert files_of_part(files, (0, 1)) == list(files)


def test_parts_one_of_them_killed_give_the_bytes_of_one_run(tmp_path):
    target = tmp_path / "out"
    commands = [job(tmp_path, target, "--part", f"{i}/3", slow=0.004) for i in range(3)]
    source(tmp_path)
    # A second for each call: its share takes a minute, so that the kill finds it unfinished on any machine.
    slowly = job(tmp_path, target, "--part", "0/3", slow=1)
    killed = subprocess.Popen(slowly, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands[1:]]
    killed.stdout.readline()
    time.sleep(2.5)
    killed.kill()
    killed.communicate()
    said = [process.communicate(timeout=60)[0].split() for process in others]
    assert all(process.returncode == 0 for process in others)
    assert {words[-1] for words in said} == {"unpublished"}
    unfinished = run(job(tmp_path, target, "--finish", slow=0))
    assert unfinished.returncode == 2
    assert "files are not complete" in unfinished.stderr
    again = run(commands[0])
    assert again.stdout.split() == ["ready", "published"]
    assert tree(target) == reference(tmp_path, "out")
    assert leftovers(target) == []


def test_the_last_part_publishes_and_the_same_part_twice_is_refused(tmp_path):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    assert not verified(out, part=(0, 2)).published
    assert not out.target.exists()
    with pytest.raises(HxaconvError, match="files are not complete"):
        verified(out, finish_only=True)
    (partial,) = partials(tmp_path)
    lock = locks.acquire(partial / "journal-2-of-2.lock", "part 2 of 2")
    with pytest.raises(HxaconvError, match=r"process \d+ on host"):
        verified(out, part=(1, 2))
    lock.release()
    assert verified(out, part=(1, 2)).published
    assert tree(out.target) == reference(tmp_path, "out")


def test_finish_publishes_what_complete_parts_left(tmp_path, monkeypatch):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    verified(out, part=(0, 2))
    with monkeypatch.context() as patched:
        patched.setattr(writer._Run, "_finish", lambda self, signals, verify: writer._unpublished(self.staging))
        verified(out, part=(1, 2))
    assert verified(out, finish_only=True).published
    assert tree(out.target) == reference(tmp_path, "out")
    other = replace(out, target=tmp_path / "fresh")
    with pytest.raises(HxaconvError, match="no parts to finish"):
        verified(other, finish_only=True)


def test_an_interrupted_finish_continues_by_itself(tmp_path, monkeypatch):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    verified(out, part=(0, 2))
    with monkeypatch.context() as patched:
        patched.setattr(writer._Run, "_finish", lambda self, signals, verify: writer._unpublished(self.staging))
        verified(out, part=(1, 2))

    def interrupt(path):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"24 finished tensors are in .*; the same command continues\.$"):
        write(out, WriteSettings(finish_only=True), verify=interrupt)
    assert verified(out, finish_only=True).published


def test_a_part_without_files_has_nothing_to_do(tmp_path):
    out = output(tmp_path / "out.pth", plan_over(source(tmp_path)))
    assert not verified(out, part=(1, 2)).published
    assert partials(tmp_path) == []
    assert verified(out, part=(0, 2)).published
