"""Existing targets, and going on where another run stopped: a target is absent or complete and right."""

from __future__ import annotations

import errno
import os
import re
import shutil
from dataclasses import replace

import pytest
from writing import (
    TARGETS,
    leftovers,
    output,
    partials,
    plan_over,
    reference,
    source,
    stop_after,
    tree,
    verified,
    write,
)

from hxaconv.errors import CheckFailed, HxaconvError
from hxaconv.model.plan import with_origin
from hxaconv.options import Write
from hxaconv.save import fill, staging

# Existing targets


@pytest.mark.parametrize("name", TARGETS)
def test_an_existing_target_is_refused_and_untouched(tmp_path, name):
    out = output(tmp_path / name, plan_over(source(tmp_path)))
    verified(out)
    before = tree(out.target)
    changed = replace(out, documents=dict.fromkeys(out.documents, b'{"new": 1}'))
    with pytest.raises(HxaconvError, match="add --overwrite"):
        write(changed, Write())
    assert tree(out.target) == before
    write(changed, Write(overwrite=True))
    assert tree(out.target) != before
    assert leftovers(out.target) == []


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path, name):
    out = output(tmp_path / name, plan_over(source(tmp_path)))

    def appear(path):
        out.target.write_text("somebody else's")
        return {}

    with pytest.raises(HxaconvError, match="appeared while"):
        write(out, Write(), verify=appear)
    assert out.target.read_text() == "somebody else's"
    out.target.unlink()
    verified(out, resume=True)


BELONGS = (
    *("README.md", "LICENSE", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("modeling_hxa079.py", "generation_config.json", "chat_template.jinja", "pytorch_model-00001-of-00002.bin"),
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.json", "merges.txt", ".gitattributes"),
)
FOREIGN = ("notes.txt", "train.py", "trainer_state.json", "optimizer.pt", "rwkv.pth", "other.safetensors", "log.csv")


def test_overwrite_deletes_nothing_but_checkpoints(tmp_path):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    verified(out)
    for name in FOREIGN:
        (out.target / name).write_text("mine")
    (out.target / "runs").mkdir()
    with pytest.raises(HxaconvError, match="no part of a checkpoint") as caught:
        verified(out, overwrite=True)
    assert all(name in str(caught.value) for name in (*FOREIGN, "runs/"))
    assert all((out.target / name).read_text() == "mine" for name in FOREIGN)
    assert leftovers(out.target) == []
    for name in FOREIGN:
        (out.target / name).unlink()
    (out.target / "runs").rmdir()
    for name in BELONGS:
        (out.target / name).write_text("old")
    (out.target / "__pycache__").mkdir()
    verified(replace(out, copied_files={"wkv.py": source(tmp_path)}), overwrite=True)
    verified(replace(out, copied_files={"wkv.py": source(tmp_path)}), overwrite=True)  # what it wrote, it replaces
    assert not {path.name for path in out.target.iterdir()} & set(BELONGS[:3])
    link = tmp_path / "link"
    link.symlink_to(out.target)
    with pytest.raises(HxaconvError, match="symbolic link"):
        write(replace(out, target=link), Write(overwrite=True))


@pytest.mark.parametrize("text", ["my own table", "[]", '{"learning_rate": 1}'])
def test_overwrite_replaces_no_json_file_of_somebody_else(tmp_path, text):
    out = output(tmp_path / "out.pth", plan_over(source(tmp_path)))
    verified(out)
    verified(out, overwrite=True)
    (tmp_path / "out.json").write_text(text)
    with pytest.raises(HxaconvError, match=r"would replace .*out\.json, which is no sidecar"):
        verified(out, overwrite=True)
    assert (tmp_path / "out.json").read_text() == text


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
@pytest.mark.parametrize("count", [2, 8, 15, 22])
def test_resuming_gives_the_same_bytes_and_rewrites_only_the_rest(tmp_path, monkeypatch, small_batches, name, count):
    out = output(tmp_path / name, plan_over(source(tmp_path)))
    stop_after(monkeypatch, count, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(HxaconvError, match="Input/output error") as caught:
        verified(out)
    assert not out.target.exists()
    monkeypatch.undo()
    monkeypatch.setattr(fill, "BATCH_BYTES", 20_000)
    if not partials(tmp_path):
        assert "Nothing was written" in str(caught.value)
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
        write(out, Write(digest=digest), verify=refuse)
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
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert re.fullmatch(r"  - tensors: ([0-9a-f]{64}) then, (?!\1)[0-9a-f]{64} now", line)
    os.utime(file.path, ns=(5, 5_000_000))
    with pytest.raises(HxaconvError, match=r"source-0\.bin: 240,000 bytes, modified 20.* then, .* 1970-01-01 .*\.005"):
        verified(output(tmp_path / "out", plan_over(source(tmp_path))), resume=True)
    file.path.write_bytes(bytes(240_400))
    with pytest.raises(HxaconvError, match=r"source-0\.bin: 240,000 bytes, .* then, 240,400 bytes, .* now"):
        verified(output(tmp_path / "out", plan_over(source(tmp_path))), resume=True)


def test_resuming_with_other_options_names_them(tmp_path, monkeypatch, small_batches, tiny_teacher, cli, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_teacher, "teacher")
    words = ["init-from-teacher", "teacher", "out", "--quiet", "--no-verify"]
    stop_after(monkeypatch, 20, OSError(errno.EIO, "Input/output error"))
    assert cli(*words) == 2
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for options, expected in {
        ("--dtype", "float16"): "--dtype: bfloat16 then, float16 now",
        ("--seed", "1", "--scale", "key=0.4"): "--scale: not given then, key=0.4 now; --seed: 0 then, 1 now",
        ("--allow-output-bias", "--digest", "none"): "--allow-output-bias: not given then, given now;"
        " --digest: crc32 then, none now",
    }.items():
        capsys.readouterr()
        assert cli(*words, *options, "--resume") == 2
        said = capsys.readouterr().err.splitlines()
        assert "; ".join(line.removeprefix("  - ") for line in said if line.startswith("  - ")) == expected
    assert cli("init-from-teacher", "./teacher/", "out", "--quiet", "--no-verify", "--resume") == 0  # the same path


def test_resuming_nothing_begins(tmp_path):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    verified(out, resume=True)


def test_a_leftover_of_another_plan_stays(tmp_path, monkeypatch, small_batches):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    stop_after(monkeypatch, 20, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(HxaconvError):
        verified(out)
    monkeypatch.undo()
    (partial,) = partials(tmp_path)
    verified(replace(out, provenance={"hxaconv": "other"}))
    assert [one.path for one in staging.stagings_at(out.target)] == [partial]


def test_a_torn_journal_line_says_nothing(tmp_path, monkeypatch, small_batches):
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    stop_after(monkeypatch, 22, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(HxaconvError):
        verified(out)
    monkeypatch.undo()
    (partial,) = partials(tmp_path)
    with open(partial / "journal", "ab") as journal:
        journal.write(b'{"tensor": "t.23", "crc32": 12')
    verified(out, resume=True)
    assert tree(out.target) == reference(tmp_path, "out")
