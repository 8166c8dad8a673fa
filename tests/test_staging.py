"""A target is absent or complete and right: kills, full disks, failing calls, two runs at once, parts."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from kill_rounds import job, run, writer_rounds
from writing import leftovers, output, plan_over, source, tree

from hxaconv.errors import CheckFailed, HxaconvError
from hxaconv.plan import with_origin
from hxaconv.writing import diskio, fill, locks, staging, writer
from hxaconv.writing.interruption import Interrupted
from hxaconv.writing.journal import read_journals
from hxaconv.writing.target import files_of_part, layouts
from hxaconv.writing.writer import WriteSettings, write

TARGETS = ("out", "out.pth")
ROUNDS = int(os.environ.get("HXACONV_KILL_ROUNDS", "4"))
"""Kills per run of the tests; the full count is kill_rounds.py's."""


@pytest.fixture
def small_batches(monkeypatch):
    """Journal lines after every few tensors, as a large output has them."""
    monkeypatch.setattr(fill, "BATCH_BYTES", 20_000)


def reference(tmp_path, name, **changes):
    """What an undisturbed run of the same output publishes."""
    folder = tmp_path / "reference"
    folder.mkdir(exist_ok=True)
    out = output(folder / name, plan_over(source(tmp_path)), **changes)
    write(out, WriteSettings(), verify=lambda path: {"ok": True})
    return tree(out.target)


def verified(out, **options):
    return write(out, WriteSettings(**options), verify=lambda path: {"ok": True})


def error_of(out):
    """What writing says if it fails; None if it does not."""
    try:
        verified(out)
    except HxaconvError as error:
        return str(error)
    return None


def stop_after(monkeypatch, count, error):
    """Make the count-th write of a tensor's bytes fail."""
    real, calls = fill.write_from, iter(range(10**9))

    def write_from(fd, data, offset):
        if next(calls) >= count:
            raise error
        real(fd, data, offset)

    monkeypatch.setattr(fill, "write_from", write_from)


def partials(tmp_path):
    return [path for path in tmp_path.iterdir() if ".partial-" in path.name]


# Existing targets


@pytest.mark.parametrize("name", TARGETS)
def test_an_existing_target_is_refused_and_untouched(tmp_path, name):
    out = output(tmp_path / name, plan_over(source(tmp_path)))
    verified(out)
    before = tree(out.target)
    changed = replace(out, documents=dict.fromkeys(out.documents, b'{"new": 1}'))
    with pytest.raises(HxaconvError, match="add --overwrite"):
        write(changed, WriteSettings())
    assert tree(out.target) == before
    write(changed, WriteSettings(overwrite=True))
    assert tree(out.target) != before
    assert leftovers(out.target) == []


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path, name):
    out = output(tmp_path / name, plan_over(source(tmp_path)))

    def appear(path):
        out.target.write_text("somebody else's")
        return {}

    with pytest.raises(HxaconvError, match="appeared while"):
        write(out, WriteSettings(), verify=appear)
    assert out.target.read_text() == "somebody else's"
    out.target.unlink()
    assert verified(out, resume=True).published


def test_overwrite_deletes_nothing_but_checkpoints(tmp_path):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    out.target.mkdir()
    (out.target / "thesis.tex").write_text("mine")
    with pytest.raises(HxaconvError, match="does not look like a checkpoint"):
        write(out, WriteSettings(overwrite=True))
    assert (out.target / "thesis.tex").read_text() == "mine"
    (out.target / "thesis.tex").unlink()
    write(out, WriteSettings(overwrite=True))
    link = tmp_path / "link"
    link.symlink_to(out.target)
    with pytest.raises(HxaconvError, match="symbolic link"):
        write(replace(out, target=link), WriteSettings(overwrite=True))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("failing", range(4))
def test_a_failing_rename_leaves_the_old_target(tmp_path, monkeypatch, name, failing):
    out = output(tmp_path / name, plan_over(source(tmp_path)))
    verified(out)
    before, changed = tree(out.target), replace(out, provenance={"hxaconv": "newer"})
    real, calls = os.rename, iter(range(10**9))

    def rename(old, new):
        if next(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    renames = 2 if name == "out" else 4
    if failing >= renames:
        verified(changed, overwrite=True)
        return
    with pytest.raises(HxaconvError, match="renaming the finished files") as caught:
        verified(changed, overwrite=True)
    assert "--resume" in str(caught.value)
    assert tree(out.target) == before
    monkeypatch.setattr(os, "rename", real)
    verified(changed, overwrite=True, resume=True)
    assert tree(out.target) != before
    assert leftovers(out.target) == []


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("resumed", [True, False])
@pytest.mark.parametrize("step", range(5))
def test_dying_between_two_renames_is_recovered_from(tmp_path, monkeypatch, name, step, resumed):
    old = output(tmp_path / name, plan_over(source(tmp_path)))
    verified(old)
    before = tree(old.target)
    new = replace(old, provenance={"hxaconv": "newer"})
    real, calls = os.rename, iter(range(10**9))

    def rename(*paths):
        if next(calls) == step:
            raise Killed
        real(*paths)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(staging.Staging, "remove", lambda self: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        verified(new, overwrite=True)
    monkeypatch.undo()
    if resumed:
        verified(new, overwrite=True, resume=True)
        assert b"newer" in b"".join(tree(old.target).values())
        assert leftovers(old.target) == []
    else:
        other = replace(old, provenance={"hxaconv": "third"})
        with pytest.raises(HxaconvError, match="add --overwrite"):
            verified(other)
        assert tree(old.target) == before or b"newer" in b"".join(tree(old.target).values())


# Resuming


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("count", [5, 12, 20, 28])
def test_resuming_gives_the_same_bytes_and_rewrites_only_the_rest(tmp_path, monkeypatch, small_batches, name, count):
    out = output(tmp_path / name, plan_over(source(tmp_path)))
    stop_after(monkeypatch, count, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(HxaconvError, match="Input/output error") as caught:
        verified(out)
    assert not out.target.exists()
    monkeypatch.undo()
    monkeypatch.setattr(fill, "BATCH_BYTES", 20_000)
    if not partials(tmp_path):
        assert "Nothing had been finished" in str(caught.value)
        return
    assert "--resume" in str(caught.value)
    with pytest.raises(HxaconvError, match="Add --resume to continue"):
        verified(out)
    written = []
    real = fill.write_from
    monkeypatch.setattr(fill, "write_from", lambda fd, data, at: (written.append(len(data)), real(fd, data, at)))
    verified(out, resume=True)
    assert tree(out.target) == reference(tmp_path, name)
    assert leftovers(out.target) == []
    finished = sum(recipe.nbytes for recipe in out.tensors.values())
    assert 0 < sum(written) < 2 * finished


@pytest.mark.parametrize("digest", ["crc32", "sha256", "none"])
def test_a_finished_tensor_that_changed_on_disk_is_written_again(tmp_path, monkeypatch, small_batches, digest):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))

    def refuse(path):
        raise CheckFailed("not convinced")

    with pytest.raises(CheckFailed, match="not convinced") as caught:
        write(out, WriteSettings(digest=digest), verify=refuse)
    (partial,) = partials(tmp_path)
    assert str(partial) in str(caught.value)
    assert not out.target.exists()
    shard = sorted((partial / "content").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    verified(out, digest=digest, resume=True)
    undisturbed = replace(out, target=tmp_path / "undisturbed")
    verified(undisturbed, digest=digest)
    assert tree(out.target) == tree(undisturbed.target)


def test_resuming_another_plan_is_refused_with_what_differs(tmp_path, monkeypatch, small_batches):
    file = source(tmp_path)
    out = output(tmp_path / "out", plan_over(file))
    stop_after(monkeypatch, 20, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(HxaconvError):
        verified(out)
    monkeypatch.undo()
    tensors = out.tensors | {"t.3": with_origin(out.tensors["t.3"], "elsewhere")}
    with pytest.raises(HxaconvError) as caught:
        verified(replace(out, tensors=tensors), resume=True)
    assert "t.3: was F32" in str(caught.value)
    assert "elsewhere" in str(caught.value)
    assert "t.4" not in str(caught.value)
    os.utime(file.path, ns=(5, 5))
    with pytest.raises(HxaconvError, match=r"sources, 0 source-0\.bin: was .* modified"):
        verified(output(tmp_path / "out", plan_over(source(tmp_path))), resume=True)


def test_resuming_nothing_begins(tmp_path):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    assert verified(out, resume=True).published


def test_a_leftover_of_another_plan_is_reported(tmp_path, monkeypatch, small_batches):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    stop_after(monkeypatch, 20, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(HxaconvError):
        verified(out)
    monkeypatch.undo()
    (partial,) = partials(tmp_path)
    result = verified(replace(out, provenance={"hxaconv": "other"}))
    assert result.leftovers == (partial,)


def test_a_torn_journal_line_says_nothing(tmp_path, monkeypatch, small_batches):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    stop_after(monkeypatch, 25, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(HxaconvError):
        verified(out)
    monkeypatch.undo()
    (partial,) = partials(tmp_path)
    with open(partial / "journal", "ab") as journal:
        journal.write(b'{"tensor": "t.23", "crc32": 12')
    verified(out, resume=True)
    assert tree(out.target) == reference(tmp_path, "out")


# Faults


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("seed", range(7))
def test_random_faults_below_leave_nothing_or_something_to_resume(tmp_path, monkeypatch, small_batches, name, seed):
    rng = random.Random(seed)
    call = ["pwrite", "write", "fsync", "fdatasync", "preadv", "rename", "ftruncate"][seed]
    number = rng.choice([errno.EIO, errno.ENOSPC]) if call != "preadv" else errno.EIO
    real, calls, failing = getattr(os, call), iter(range(10**9)), rng.randrange(0, 12)

    def faulty(*arguments):
        if next(calls) >= failing:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    out = output(tmp_path / name, plan_over(source(tmp_path)))
    with monkeypatch.context() as patched:
        patched.setattr(os, call, faulty)
        message = error_of(out)
    if out.target.exists():
        assert message is None
    else:
        assert os.strerror(number) in message
        verified(out, resume=True)
    assert tree(out.target) == reference(tmp_path, name)
    assert leftovers(out.target) == []


def test_a_failed_sync_is_never_taken_for_a_success_later(tmp_path, monkeypatch, small_batches):
    out = output(tmp_path / "out.pth", plan_over(source(tmp_path)))
    real, calls = os.fdatasync, iter(range(10**9))

    def fails_once(fd):
        # The system reports lost pages to the first sync only.
        if os.readlink(f"/proc/self/fd/{fd}").endswith("out.pth") and next(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fails_once)
    with pytest.raises(HxaconvError, match="syncing failed"):
        verified(out)
    (partial,) = partials(tmp_path)
    recorded = len(read_journals(partial).tensors)
    assert next(calls) == 2
    assert 0 < recorded < len(out.tensors)


@pytest.mark.parametrize("name", TARGETS)
def test_no_space_at_a_random_byte(tmp_path, monkeypatch, small_batches, name):
    out = output(tmp_path / name, plan_over(source(tmp_path)))
    budget = [random.Random(name).randrange(50_000, 200_000)]
    real = os.pwrite

    def pwrite(fd, data, offset):
        if budget[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(fd, data[: budget[0]], offset)
        budget[0] -= done
        return done

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(HxaconvError, match="No space left on device") as caught:
        verified(out)
    assert "bytes in all" in str(caught.value)
    assert str(partials(tmp_path)[0] / "content") in str(caught.value)
    assert not out.target.exists()
    monkeypatch.undo()
    verified(out, resume=True)
    assert tree(out.target) == reference(tmp_path, name)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("name", TARGETS)
def test_a_full_disk_is_found_out_before_and_survived_meanwhile(tmp_path, monkeypatch, small_batches, small_disk, name):
    monkeypatch.setattr("hxaconv.writing.preflight.SLACK_BYTES", 0)
    out = output(small_disk / name, plan_over(source(tmp_path, count=150_000)))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(700_000))
    with pytest.raises(HxaconvError, match=r"[\d,]+ bytes are needed; [\d,]+ are free"):
        verified(out)
    assert leftovers(out.target) == []
    monkeypatch.setattr(diskio, "free_bytes", lambda folder: 10**9)
    with pytest.raises(HxaconvError, match="No space left on device"):
        verified(out)
    assert not out.target.exists()
    ballast.unlink()
    verified(out, resume=True)
    assert out.target.exists()
    assert leftovers(out.target) == []


# Before the first byte


def test_all_problems_are_told_at_once(tmp_path, monkeypatch):
    file = source(tmp_path)
    out = output(tmp_path / "out", plan_over(file))
    verified(out)
    monkeypatch.setattr(diskio, "free_bytes", lambda folder: 1000)
    with pytest.raises(HxaconvError) as caught:
        verified(out)
    assert "exists" in str(caught.value)
    assert "1,000 are free" in str(caught.value)


def test_a_target_may_not_touch_its_sources(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    plan = plan_over(source(folder))
    cases = {
        folder: "lies inside it",
        folder / "source-0.bin": "source .* itself",
        folder / "student": "lies inside the source",
    }
    for target, message in cases.items():
        out = replace(output(target, plan), source_roots=() if target != folder / "student" else (folder,))
        with pytest.raises(HxaconvError, match=message):
            write(out, WriteSettings(overwrite=True))
    assert [path.name for path in folder.iterdir()] == ["source-0.bin"]
    write(output(folder / "student.pth", plan), WriteSettings())


def test_a_missing_parent_and_too_large_files_are_refused(tmp_path, monkeypatch):
    plan = plan_over(source(tmp_path))
    with pytest.raises(HxaconvError, match="not a folder"):
        write(output(tmp_path / "no" / "out", plan), WriteSettings())
    monkeypatch.setattr("hxaconv.writing.preflight._file_system", lambda folder: "vfat")
    monkeypatch.setattr("hxaconv.writing.preflight._LARGEST_FILE", {"vfat": 30_000})
    with pytest.raises(HxaconvError, match=r"a vfat file system holds at most 30,000 per file"):
        write(output(tmp_path / "out", plan), WriteSettings())
    with pytest.raises(HxaconvError, match="longer than"):
        write(output(tmp_path / ("x" * 250), plan), WriteSettings())
    assert leftovers(tmp_path / "out") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_parent_is_refused(tmp_path):
    place = tmp_path / "locked"
    place.mkdir(mode=0o500)
    with pytest.raises(HxaconvError, match="not writable"):
        write(output(place / "out", plan_over(source(tmp_path))), WriteSettings())


# Two runs at once


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
    ):
        path.write_text(json.dumps(holder))
        lock = locks.acquire(path, "test")
        assert (not isinstance(lock, locks.Lock)) == held
        if isinstance(lock, locks.Lock):
            lock.release()
            assert not path.exists()


# Signals and kills


def wait_until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited a minute in vain")


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


def test_killed_at_random_moments_and_resumed(tmp_path):
    found = writer_rounds(ROUNDS, seed=ROUNDS, scratch=tmp_path)
    assert found.total() == ROUNDS


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
    killed = subprocess.Popen(commands[0], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands[1:]]
    killed.stdout.readline()
    time.sleep(0.15)
    killed.kill()
    killed.communicate()
    said = [process.communicate(timeout=60)[0].split() for process in others]
    assert all(process.returncode == 0 for process in others)
    assert not target.exists() or "published" in {words[-1] for words in said}
    if not target.exists():
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
        patched.setattr(writer._Run, "_finish", lambda self, verify: writer._unpublished(self.staging))
        verified(out, part=(1, 2))
    assert verified(out, finish_only=True).published
    assert tree(out.target) == reference(tmp_path, "out")
    other = replace(out, target=tmp_path / "fresh")
    with pytest.raises(HxaconvError, match="no parts to finish"):
        verified(other, finish_only=True)


def test_a_part_without_files_has_nothing_to_do(tmp_path):
    out = output(tmp_path / "out.pth", plan_over(source(tmp_path)))
    assert not verified(out, part=(1, 2)).published
    assert partials(tmp_path) == []
    assert verified(out, part=(0, 2)).published
