"""The bytes that are written: right, whatever the workers, the file system's calls and its short answers."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from models import Literal
from writing import leftovers, output, plan_over, reference, source, tree, verified, write

from hxaconv.errors import HxaconvError
from hxaconv.formats import diskio
from hxaconv.formats.dtypes import BY_NAME, count_nonfinite
from hxaconv.formats.files import Extent, SourceFile
from hxaconv.model.plan import Buffers, Ranges, Recipe
from hxaconv.options import Write
from hxaconv.save import fill, writer

TARGETS = ("out", "out.pth")


def expected_bytes(plan):
    return {name: b"".join(bytes(p) for p in r.chunks(Buffers())) for name, r in plan.items()}


def written_bytes(result_output):
    """Tensor bytes found in the published files, at the laid-out places."""
    found = {}
    for layout in result_output.files:
        path = result_output.target / layout.name if result_output.is_folder else result_output.target
        data = path.read_bytes()
        assert len(data) == layout.size
        for place in layout.fills:
            found[place.name] = data[place.offset : place.offset + place.recipe.nbytes]
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_written_is_what_was_planned(tmp_path, name):
    plan = plan_over(source(tmp_path))
    plan["made"] = Recipe("F32", (2, 2), Literal(struct.pack("<4f", 1, 2, 3, 4)), "made up")
    zeros = Extent(None, 0, 700_000)
    plan["padded"] = Recipe("F32", (175_000,), Ranges((zeros,), "pad"), "zeros")
    out = output(tmp_path / name, plan)
    write(out, Write(), verify=lambda path: {"looked_at": path.name})
    expected = expected_bytes(plan)
    assert written_bytes(out) == expected
    record = json.loads(tree(out.target)["hxaconv.json" if name == "out" else "out.json"])
    entries = (record if name == "out" else record["hxaconv"])["tensors"]
    digests = {tensor: entry["digest"] for tensor, entry in entries.items()}
    assert digests == {tensor: f"crc32:{zlib.crc32(data):08x}" for tensor, data in expected.items()}
    assert leftovers(out.target) == []


@pytest.mark.parametrize("name", TARGETS)
def test_provenance_says_where_every_tensor_is_from(tmp_path, name):
    plan = plan_over(source(tmp_path))
    out = output(tmp_path / name, plan)
    write(out, Write(digest="sha256"), verify=lambda path: {"verdict": "fine"})
    files = tree(out.target)
    if name == "out":
        provenance = json.loads(files["hxaconv.json"])
        assert files["config.json"] == b"{}"
    else:
        sidecar = json.loads(files["out.json"])
        assert sidecar["rope_theta"] == 1
        provenance = sidecar["hxaconv"]
    assert provenance["hxaconv"] == "test"
    assert provenance["verification"] == {"verdict": "fine"}
    assert provenance["tensors"]["t.3"]["origin"] == "t.3 in source-0.bin"
    assert provenance["tensors"]["t.3"]["digest"].startswith("sha256:")


@pytest.mark.parametrize("digest", ["crc32", "sha256", "none"])
@pytest.mark.parametrize("name", TARGETS)
def test_bytes_do_not_depend_on_workers(tmp_path, name, digest):
    plan = plan_over(source(tmp_path))
    trees = []
    for workers in (1, 2, 7):
        folder = tmp_path / str(workers)
        folder.mkdir()
        out = output(folder / name, plan)
        write(out, Write(workers=workers, digest=digest))
        trees.append(tree(out.target))
        assert (b'"digest"' in b"".join(trees[-1].values())) == (digest != "none")
    assert trees[0] == trees[1] == trees[2]
    other = output(tmp_path / name, plan | {"t.0": plan["t.10"]})
    write(other, Write(digest=digest))
    assert tree(other.target) != trees[0]


def special_values(dtype):
    """(NaN, -NaN, inf, -inf) and (largest, -largest, smallest, -0) as bytes."""
    if dtype == "BF16":
        bad, good = (0x7FC0, 0xFFC1, 0x7F80, 0xFF80), (0x7F7F, 0xFF7F, 0x0001, 0x8000)
    elif dtype == "F16":
        bad, good = (0x7E00, 0xFE01, 0x7C00, 0xFC00), (0x7BFF, 0xFBFF, 0x0001, 0x8000)
    elif dtype == "F32":
        bad = (0x7FC00000, 0xFF800001, 0x7F800000, 0xFF800000)
        good = (0x7F7FFFFF, 0xFF7FFFFF, 0x00000001, 0x80000000)
    else:
        bad = (0x7FF8 << 48, (0xFFF0 << 48) + 1, 0x7FF0 << 48, 0xFFF0 << 48)
        good = ((0x7FF0 << 48) - 1, (0xFFF0 << 48) - 1, 1, 1 << 63)
    code = {2: "H", 4: "I", 8: "Q"}[BY_NAME[dtype].itemsize]
    return [struct.pack(f"<{code}", v) for v in bad], [struct.pack(f"<{code}", v) for v in good]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_every_kind_of_nonfinite_value_is_counted(dtype):
    bad, good = special_values(dtype)
    assert count_nonfinite(memoryview(b"".join(good) * 9), dtype) == 0
    for value in bad:
        assert count_nonfinite(memoryview(b"".join(good) + value + b"".join(good)), dtype) == 1
    assert count_nonfinite(memoryview(b"".join(bad) * 3), dtype) == 12
    assert count_nonfinite(memoryview(b""), dtype) == 0
    assert count_nonfinite(memoryview(b"\xff" * 16), "I64") == 0


def test_nonfinite_tensors_are_all_reported_and_nothing_is_published(tmp_path):
    plan = plan_over(source(tmp_path))
    nan, inf = struct.pack("<f", float("nan")), struct.pack("<f", float("-inf"))
    plan["bad.1"] = Recipe("F32", (3,), Literal(nan + inf + bytes(4)), "one")
    plan["bad.2"] = Recipe("F32", (2,), Literal(bytes(4) + inf), "two")
    out = output(tmp_path / "out", plan)
    with pytest.raises(HxaconvError) as caught:
        write(out, Write())
    assert "bad.1: 2 of 3 (one)" in str(caught.value)
    assert "bad.2: 1 of 2 (two)" in str(caught.value)
    assert "--allow-nonfinite" in str(caught.value)
    assert not out.target.exists()
    write(out, Write(allow_nonfinite=True, resume=True))
    assert json.loads((out.target / "hxaconv.json").read_bytes())["nonfinite"] == {"bad.1": 2, "bad.2": 1}


def test_short_reads_and_writes_change_nothing(tmp_path, monkeypatch):
    plan = plan_over(source(tmp_path))
    real_read, real_write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real_read(fd, [buffers[0][:1009]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_write(fd, data[:1013], at))
    out = output(tmp_path / "out.pth", plan)
    write(out, Write())
    assert written_bytes(out) == expected_bytes(plan)


def test_systems_without_the_fast_calls_get_the_same_bytes(tmp_path, monkeypatch):
    plan = plan_over(source(tmp_path))
    out = output(tmp_path / "out", plan)
    write(out, Write())
    with_calls = tree(out.target)
    monkeypatch.setattr(diskio, "_libc", lambda name: None)
    for name in ("posix_fadvise", "fdatasync", "sysconf"):
        monkeypatch.delattr(os, name, raising=False)
    write(out, Write(overwrite=True))
    assert tree(out.target) == with_calls


def test_dropping_caches_changes_no_byte(tmp_path, monkeypatch):
    plan = plan_over(source(tmp_path))
    out = output(tmp_path / "out", plan)
    write(out, Write())
    kept = tree(out.target)
    dropped = []
    real = diskio.drop_cached
    monkeypatch.setattr(diskio, "drop_cached", lambda *a: (dropped.append(a), real(*a)))
    monkeypatch.setattr(diskio, "memory_limit", lambda: 1000)
    monkeypatch.setattr(fill, "WINDOW_BYTES", 10_000)
    write(out, Write(overwrite=True))
    assert tree(out.target) == kept
    assert len(dropped) > 20
    dropped.clear()
    monkeypatch.setattr(diskio, "memory_limit", lambda: None)
    write(out, Write(overwrite=True))
    assert dropped == []


def test_a_tensor_is_recorded_only_after_its_bytes_were_synced(tmp_path, monkeypatch):
    plan = plan_over(source(tmp_path))
    events = []
    real = diskio.sync_file
    monkeypatch.setattr(fill, "BATCH_BYTES", 1)
    monkeypatch.setattr(
        diskio, "sync_file", lambda fd: (real(fd), events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    )

    def recorded(finished) -> None:
        assert events[-1] == layout.name
        events.append("recorded")

    for layout in output(tmp_path / "out", plan).files:
        path = tmp_path / layout.name
        path.write_bytes(bytes(layout.size))
        fill.Filling([(layout, path, layout.fills)], {}, recorded).run()
    assert events.count("recorded") == len(plan)


def test_config_and_index_come_last(tmp_path, monkeypatch):
    out = output(tmp_path / "out", plan_over(source(tmp_path)), copied_files={"tokenizer.json": source(tmp_path)})
    written, real = [], diskio.write_file
    monkeypatch.setattr(diskio, "write_file", lambda path, *rest: (written.append(path.name), real(path, *rest)))
    verified(out)
    last = ["tokenizer.json", "config.json", "model.safetensors.index.json", "hxaconv.json", "publishing"]
    assert written == ["plan.json", *last]


@pytest.mark.parametrize("how", ["truncated", "replaced", "removed"])
def test_a_source_that_changes_meanwhile_stops_the_run(tmp_path, how):
    file = source(tmp_path)
    out = output(tmp_path / "out", plan_over(file))

    def tamper(path: Path) -> dict[str, str]:
        if how == "truncated":
            os.truncate(file.path, 100)
        elif how == "replaced":
            (tmp_path / "new").write_bytes(file.path.read_bytes())
            os.utime(tmp_path / "new", ns=(1, 1))
            os.replace(tmp_path / "new", file.path)
        else:
            file.path.unlink()
        return {}

    with pytest.raises(HxaconvError, match=r"changed while|vanished") as caught:
        write(out, Write(), verify=tamper)
    assert "--resume" not in str(caught.value)
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ([] if how == "removed" else [file.name])


def test_a_written_file_that_another_program_changes_can_be_repaired(tmp_path):
    out = output(tmp_path / "out.pth", plan_over(source(tmp_path)))

    def tamper(path: Path) -> dict[str, str]:
        written = SourceFile.local(path)
        os.truncate(path, 100)
        written.check_unchanged()
        return {}

    with pytest.raises(HxaconvError, match=r"out\.pth changed while(.|\n)*24 finished tensors are kept(.|\n)*--resume"):
        write(out, Write(), verify=tamper)
    verified(out, resume=True)
    assert tree(out.target) == reference(tmp_path, "out.pth")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_while_verifying_keeps_everything(tmp_path, error):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))

    def exhaust(path: Path) -> dict[str, str]:
        raise error

    with pytest.raises(HxaconvError, match=r"memory has run out(.|\n)*24 finished tensors are kept(.|\n)*--resume"):
        write(out, Write(), verify=exhaust)
    verified(out, resume=True)
    assert tree(out.target) == reference(tmp_path, "out")


@pytest.mark.parametrize("place", ["/", "folder/.."])
def test_a_target_needs_a_name(tmp_path, place):
    out = output(tmp_path / place, plan_over(source(tmp_path)))
    for call in (verified, lambda out: writer.refuse(out, Write())):
        with pytest.raises(HxaconvError, match=r"cannot be written: it has no name of its own"):
            call(out)


def test_a_source_truncated_before_it_is_read_is_named(tmp_path):
    file = source(tmp_path)
    out = output(tmp_path / "out", plan_over(file))
    file.open()
    os.truncate(file.path, 1000)
    with pytest.raises(HxaconvError, match=r"source-0\.bin changed while .* expected 240000 bytes, found 1000"):
        write(out, Write(workers=1))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


CONVERT = """
import sys
from pathlib import Path
import rich.progress, typer
from hxaconv.calls import Call
from hxaconv.formats.files import SourceFile
from hxaconv.model.plan import Buffers, stored
from hxaconv.options import Write
from hxaconv.save.output import Output, Record, layouts
from hxaconv.save.writer import write
file = SourceFile.local(Path(sys.argv[1]))
step = 60_000_000
plan = {f"t{i}": stored("BF16", (step // 2,), file, i * step, "x") for i in range(file.size // step)}
target = Path(sys.argv[2])
format = "pth" if target.suffix else "hf"
files = layouts(target, format, plan, 100_000_000)
out = Output(target=target, format=format, tensors=plan, files=files, documents={}, record=Record(call=Call("test")))
write(out, Write())
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]), "torch" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", TARGETS)
def test_a_pure_conversion_needs_64_mib_and_no_torch(tmp_path, name):
    path = tmp_path / "big.bin"
    with open(path, "wb") as file:
        file.truncate(240_000_000)
    arguments = [sys.executable, "-c", CONVERT, str(path), str(tmp_path / name)]
    environment = os.environ | {"PYTHONPATH": str(Path(writer.__file__).parents[2])}
    result = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    peak_kib, imported = result.stdout.split()
    # 64 MiB is the promise; a tensor takes as much, so that holding one would be seen.
    assert int(peak_kib) <= 64 * 1024
    assert imported == "False"
