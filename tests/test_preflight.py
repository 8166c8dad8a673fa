"""What can be known to go wrong is refused before the first byte."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace

import pytest
from writing import leftovers, output, partials, plan_over, source, stop_after, verified, write

from hxaconv.calls import Call
from hxaconv.errors import HxaconvError
from hxaconv.formats import diskio
from hxaconv.load import open_checkpoint
from hxaconv.options import Write
from hxaconv.save.output import Record


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


def test_a_target_may_not_touch_its_sources(tmp_path, tiny_teacher):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    plan, opened = plan_over(source(folder)), open_checkpoint(str(folder))
    before = sorted(path.name for path in folder.iterdir())
    cases = {
        folder: "source .* itself",
        folder / "source-0.bin": "lies inside the source",
        folder / "student": "lies inside the source",
        tmp_path: "lies inside it",
    }
    record = Record(call=Call("test"), sources={"source": opened})
    for target, message in cases.items():
        with pytest.raises(HxaconvError, match=message):
            write(output(target, plan, record=record), Write(overwrite=True))
    assert sorted(path.name for path in folder.iterdir()) == before
    write(output(folder / "student.pth", plan), Write())  # beside a file that nobody opened as a checkpoint


def test_a_target_in_the_folder_of_another_model_is_noticed(tmp_path, tiny_teacher, cli, capsys):
    words = ["init-from-teacher", tiny_teacher, tmp_path / "other" / "a.pth", "--format", "pth", "--dry-run", "--quiet"]
    (tmp_path / "other").mkdir()
    assert cli(*words) == 0
    assert "model's folder" not in capsys.readouterr().err
    (tmp_path / "other" / "config.json").write_text("{}")
    assert cli(*words) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path}/other is a model's folder: who loads or uploads it finds a.pth in it too" in said


def test_a_missing_parent_and_too_long_names_are_refused(tmp_path):
    plan = plan_over(source(tmp_path))
    with pytest.raises(HxaconvError, match="not a folder"):
        write(output(tmp_path / "no" / "out", plan), Write())
    with pytest.raises(HxaconvError, match="longer than"):
        write(output(tmp_path / ("x" * 250), plan), Write())
    assert leftovers(tmp_path / "out") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_parent_is_refused(tmp_path):
    place = tmp_path / "locked"
    place.mkdir(mode=0o500)
    with pytest.raises(HxaconvError, match="not writable"):
        write(output(place / "out", plan_over(source(tmp_path))), Write())


def test_a_dry_run_refuses_what_the_run_would_refuse(tmp_path, tiny_teacher, cli, monkeypatch, capsys):
    words = ["init-from-teacher", tiny_teacher, tmp_path / "out", "--gqa-layers", "2,5", "--quiet", "--dry-run"]
    assert cli(*words) == 0
    monkeypatch.setattr(diskio, "free_bytes", lambda folder: 1000)
    assert cli(*words) == 2
    assert "1,000 are free" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    assert cli(*words) == 2
    assert "exists" in capsys.readouterr().err
    assert cli(*words, "--overwrite") == 0
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert cli(*words, "--overwrite") == 2
    words[2] = tmp_path / "nowhere" / "out"
    assert cli(*words) == 2
    assert "create it first" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
