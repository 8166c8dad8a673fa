"""What can be known to go wrong is refused before the first byte."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest
from writing import leftovers, output, partials, plan_over, source, stop_after, verified

from hxaconv.errors import HxaconvError
from hxaconv.save import diskio
from hxaconv.save.target import WriteSettings
from hxaconv.save.writer import write


def test_all_problems_are_told_at_once(tmp_path, monkeypatch):
    file = source(tmp_path)
    out = output(tmp_path / "out", plan_over(file))
    verified(out)
    monkeypatch.setattr(diskio, "free_bytes", lambda folder: 1000)
    with pytest.raises(HxaconvError) as caught:
        verified(out)
    assert "exists" in str(caught.value)
    assert "1,000 are free" in str(caught.value)


def test_a_full_disk_names_the_work_folder_that_could_go(tmp_path, monkeypatch, small_batches):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    stop_after(monkeypatch, 20, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(HxaconvError, match="Input/output error"):
        verified(out)
    (partial,) = partials(tmp_path)
    monkeypatch.setattr(diskio, "free_bytes", lambda folder: 1000)
    with pytest.raises(HxaconvError, match=rf"1,000 are free on .*; {partial.name} of another run takes [\d,]{{6,}}"):
        verified(replace(out, provenance={"hxaconv": "other"}))


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
    monkeypatch.setattr("hxaconv.save.preflight._file_system", lambda folder: "vfat")
    monkeypatch.setattr("hxaconv.save.preflight._LARGEST_FILE", {"vfat": 30_000})
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
