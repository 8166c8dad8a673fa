"""Full disks and failing calls below the writer: a target is absent, or complete and right."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from dataclasses import replace

import pytest
from writing import TARGETS, leftovers, output, partials, plan_over, reference, source, tree, verified

from hxaconv.errors import HxaconvError
from hxaconv.formats import diskio
from hxaconv.save.staging import read_journals


def error_of(out, **options):
    """What writing says if it fails; None if it does not."""
    try:
        verified(out, **options)
    except HxaconvError as error:
        return str(error)
    return None


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


CALLS = (
    *("open", "mkdir", "rename", "replace", "unlink", "rmdir", "scandir", "listdir", "stat", "fstat", "lseek"),
    *("ftruncate", "fsync", "fdatasync", "read", "preadv", "write", "pwrite"),
)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_any_call_that_fails_once_is_one_error_or_none(tmp_path, monkeypatch, small_batches, call, overwrite):
    new = reference(tmp_path, "out")
    real, failing = getattr(os, call), [0]

    def faulty(*arguments, **options):
        failing[0] -= 1
        if failing[0] == -1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments, **options)

    for count in (0, 1, 2, 3, 4, 5, 7, 9, 13, 21):
        out = output(tmp_path / f"{count}" / "out", plan_over(source(tmp_path)))
        out.target.parent.mkdir()
        if overwrite:
            verified(replace(out, provenance={"hxaconv": "old"}))
        old = tree(out.target) if overwrite else {}
        failing[0] = count
        with monkeypatch.context() as patched:
            patched.setattr(os, call, faulty)
            message = error_of(out, overwrite=overwrite)
        now = tree(out.target) if out.target.exists() else {}
        assert now in (old, new)
        if now == old:
            assert "Input/output error" in message
            verified(out, resume=True, overwrite=overwrite)
        assert tree(out.target) == new


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
    recorded = len(read_journals(partial))
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


def test_small_files_that_do_not_fit_are_named(tmp_path, monkeypatch, small_batches):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    real, unlucky = os.write, ["config.json", "hxaconv.json", "index.json", "lock"]

    def write(fd, data):
        if unlucky[0] in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    while unlucky[0] != "lock":  # whose text is for messages only
        with pytest.raises(HxaconvError, match=rf"{unlucky[0]}: writing failed: No space.*\n.*bytes in all") as caught:
            verified(out, resume=True)
        assert "--resume" in str(caught.value)
        assert not out.target.exists()
        del unlucky[0]
    verified(out, resume=True)
    assert tree(out.target) == reference(tmp_path, "out")


@pytest.mark.parametrize("there", [False, True])
def test_a_map_or_plot_is_whole_or_as_before(tmp_path, monkeypatch, there):
    path = tmp_path / "map.toml"
    if there:
        path.write_bytes(b"old")

    def write(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        with pytest.raises(HxaconvError, match=r"map\.toml: writing 3 bytes failed: No space left"):
            diskio.write_result(path, b"new")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([b"old"] if there else [])
    diskio.write_result(path, b"new")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"new"]


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
    monkeypatch.setattr("hxaconv.save.checks.SLACK_BYTES", 0)
    monkeypatch.setattr("hxaconv.save.checks.SLACK_BYTES_PER_TENSOR", 0)
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


@pytest.mark.parametrize("free", [0, 10**9])
def test_a_work_folder_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch, free):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    real = os.write

    def write(fd, data):
        if "plan.json" in os.readlink(f"/proc/self/fd/{fd}"):
            monkeypatch.setattr(diskio, "free_bytes", lambda folder: free)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(HxaconvError, match=r"No space left.*\nThe output needs [\d,]+ bytes in all; ") as caught:
        verified(out)
    assert ("inodes" in caught.value.hint) == bool(free)
    assert leftovers(out.target) == []


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_no_fault_of_the_disk(tmp_path, monkeypatch, number):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))

    def fails(path, *arguments, **options):
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", fails)
        with pytest.raises(HxaconvError, match="Too many open files") as caught:
            verified(out)
    assert "ulimit -n" in caught.value.hint
    with pytest.raises(HxaconvError) as caught, diskio.explained(out.target):
        raise OSError(number, os.strerror(number))
    assert "ulimit -n" in caught.value.hint
