"""Success is said of a target that is there and is what was asked: faults of the program, and of what is around it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from writing import TARGETS, leftovers, output, partials, plan_over, reference, source, tree, verified, write

from hxaconv.errors import CheckFailed, HxaconvError
from hxaconv.formats import diskio, safetensors, torchzip
from hxaconv.options import Write
from hxaconv.save import checks, documents, fill, staging, writer

Cli = Callable[..., int]


# The work folder goes away


def clear(folder: Path) -> None:
    for path in partials(folder):
        shutil.rmtree(path)


def while_filling(folder: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    real, calls = fill.write_from, iter(range(10**9))

    def write_from(*arguments: Any) -> None:
        if next(calls) == count:
            clear(folder)
        real(*arguments)

    monkeypatch.setattr(fill, "write_from", write_from)


def before(module: Any, step: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def plant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = getattr(module, step)

        def cleared(*arguments: Any, **options: Any) -> Any:
            clear(folder)
            return real(*arguments, **options)

        monkeypatch.setattr(module, step, cleared)

    return plant


MOMENTS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "first tensor": lambda folder, patch: while_filling(folder, patch, 0),
    "middle": lambda folder, patch: while_filling(folder, patch, 12),
    "last tensor": lambda folder, patch: while_filling(folder, patch, 23),
    **{step: before(writer, step) for step in ("Filling", "publish")},
    **{step: before(checks, step) for step in ("finish", "put", "read_back")},
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_work_folder_that_vanishes_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, moment: str
) -> None:
    out = output(tmp_path / name, plan_over(source(tmp_path)))
    with monkeypatch.context() as patch:
        MOMENTS[moment](tmp_path, patch)
        with pytest.raises(HxaconvError):
            verified(out)
    assert not out.target.exists()
    verified(out)
    assert tree(out.target) == reference(tmp_path, name)


@pytest.mark.parametrize("resume", [False, True])
def test_a_target_that_is_not_there_in_the_end_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    real = writer.publish

    def published_and_moved(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        out.target.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(writer, "publish", published_and_moved)
    with pytest.raises(HxaconvError, match="is not there, although it was published"):
        verified(out, resume=resume)


def test_a_command_without_an_output_says_no_success(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    while_filling(tmp_path, monkeypatch, 5)
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "out", "--no-verify", "--json") == 2
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


# Faults of the program, caught by what is read back


def wrong_crc(patch: pytest.MonkeyPatch) -> None:
    real = torchzip._central_entry
    patch.setattr(
        torchzip, "_central_entry", lambda record: real(record._replace(crc=record.crc ^ (record.size > 1000)))
    )


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        real = safetensors._header

        def changed(*arguments: Any) -> bytes:
            text: bytes = real(*arguments)
            entries = json.loads(text[8:])
            change(next(entry for name, entry in entries.items() if name != "__metadata__"))
            data = json.dumps(entries, separators=(",", ":")).encode().ljust(len(text) - 8)
            return struct.pack("<Q", len(data)) + data

        patch.setattr(safetensors, "_header", changed)

    return plant


def shorter(patch: pytest.MonkeyPatch) -> None:
    real = diskio.reserve
    patch.setattr(diskio, "reserve", lambda fd, size: real(fd, size + 64))


def other_document(patch: pytest.MonkeyPatch) -> None:
    real = diskio.write_file

    def write_file(path: Path, chunks: Any, workplace: Path) -> None:
        real(path, [bytes(chunk).replace(b"}", b" }") for chunk in chunks], workplace)

    patch.setattr(diskio, "write_file", write_file)


FOLDER_FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "dtype": header(lambda entry: entry.update(dtype="I32")),
    "shape": header(lambda entry: entry.update(shape=[*entry["shape"], 1])),
    "offsets": header(
        lambda entry: entry.update(data_offsets=[entry["data_offsets"][0] + 4, entry["data_offsets"][1]])
    ),
    "size": shorter,
    "document": other_document,
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_faults_of_headers_and_documents_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    FOLDER_FAULTS[fault](monkeypatch)
    out = output(tmp_path / "out", plan_over(source(tmp_path)))
    with pytest.raises(CheckFailed, match=r"on disk is not what was to be written"):
        write(out, Write())
    assert not out.target.exists()


@pytest.mark.parametrize("fault", [wrong_crc, shorter, other_document])
def test_faults_of_a_zip_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fault(monkeypatch)
    out = output(tmp_path / "out.pth", plan_over(source(tmp_path)))
    with pytest.raises(CheckFailed, match=r"on disk is not what was to be written"):
        write(out, Write())
    assert not out.target.exists()


SETTINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "rope_theta": lambda raw: raw.update(rope_theta=2 * raw["rope_theta"], rope_parameters=None),
    "rms_norm_eps": lambda raw: raw.update(rms_norm_eps=1e-6),
    "gqa_layers": lambda raw: raw.update(transformer_layers=[1, 5], rwkv_layers=[0, 2, 3, 4]),
    "tie_word_embeddings": lambda raw: raw.update(tie_word_embeddings=not raw["tie_word_embeddings"]),
    "head_dim": lambda raw: raw.update(head_dim=2 * raw["head_dim"]),
    "ranks": lambda raw: raw.update(lora_rank_gate=raw["lora_rank_gate"] + 1),
    "torch_dtype": lambda raw: raw.update(torch_dtype="float16"),
    "dtype": lambda raw: raw.update(dtype="float16"),
    "vocab_size": lambda raw: raw.update(vocab_size=raw["vocab_size"] - 1),
    "enable_qk_norm": lambda raw: raw.update(enable_qk_norm=not raw["enable_qk_norm"]),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_that_are_written_wrongly_are_refused_even_without_verification(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, setting: str
) -> None:
    real = documents.student_json

    def wrong(*arguments: Any) -> dict[str, Any]:
        raw = real(*arguments)
        SETTINGS[setting](raw)
        return {key: value for key, value in raw.items() if value is not None or key == "rope_scaling"}

    monkeypatch.setattr(documents, "student_json", wrong)
    words = ["init-from-teacher", tiny_teacher, tmp_path / name, "--gqa-layers", "2,5", "--no-verify", "--quiet"]
    assert cli(*words, *(["--format", "pth"] if name == "out.pth" else [])) == 1
    assert not (tmp_path / name).exists()


# The order on disk


@pytest.mark.parametrize("name", TARGETS)
def test_a_power_loss_finds_a_target_whose_bytes_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Everything is synced before the marker, the marker before the renames, and the folder after them."""
    events: list[tuple[str, str]] = []
    path_of = {"fd": lambda fd: Path(os.readlink(f"/proc/self/fd/{fd}"))}

    def noted(module: Any, call: str, what: Callable[..., str]) -> None:
        real = getattr(module, call)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            events.append((call, what(*arguments)))
            return result

        monkeypatch.setattr(module, call, wrapped)

    noted(diskio, "sync_file", lambda fd: path_of["fd"](fd).name)
    noted(diskio, "sync_folder", lambda path: Path(path).name)
    noted(os, "rename", lambda old, new: Path(new).name)
    noted(os, "replace", lambda old, new: Path(new).name)
    noted(fill, "write_from", lambda fd, data, offset: path_of["fd"](fd).name)
    noted(staging, "write_from", lambda fd, data, offset: path_of["fd"](fd).name)
    out = output(tmp_path / name, plan_over(source(tmp_path)))
    verified(out)
    marker = events.index(("replace", "publishing"))
    published = events.index(("rename", name))
    assert events[marker + 1][0] == "sync_folder"
    assert events[marker - 1][0] == "sync_file"  # the marker's own
    assert marker < published
    assert ("sync_folder", tmp_path.name) in events[published:]
    assert ("sync_folder", "content") in events[:marker]
    for layout in out.files:
        written = max(i for i, event in enumerate(events) if event == ("write_from", layout.name))
        assert ("sync_file", layout.name) in events[written:marker]
    for document in (*out.documents, *(["hxaconv.json"] if name == "out" else [])):
        put = events.index(("replace", document))
        assert put < marker
        assert events[put - 1] == ("sync_file", events[put - 1][1])
        assert document in events[put - 1][1]


# What --resume repairs


def damage_data(path: Path) -> None:
    with open(path, "rb+") as file:
        file.seek(-2000, os.SEEK_END)
        file.write(bytes(1000))


def damage_start(path: Path) -> None:
    with open(path, "rb+") as file:
        file.write(bytes(200))


def damage_end(path: Path) -> None:
    with open(path, "rb+") as file:
        file.seek(-60, os.SEEK_END)
        file.write(bytes(60))


def cut(path: Path) -> None:
    os.truncate(path, 100)


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("damage", [damage_data, damage_start, damage_end, cut, delete])
@pytest.mark.parametrize("which", ["weights", "json"])
def test_the_same_command_repairs_any_file_that_a_check_found_damaged(
    tmp_path: Path, name: str, damage: Callable[[Path], None], which: str
) -> None:
    out = output(tmp_path / name, plan_over(source(tmp_path)))
    suffix = ".json" if which == "json" else ".pth" if name == "out.pth" else ".safetensors"

    def damaged(path: Path) -> dict[str, str]:
        content = path if path.is_dir() else path.parent
        for file in sorted(content.glob(f"*{suffix}")):
            if file.stat().st_size > 2000 or damage in (cut, delete):
                damage(file)
        raise CheckFailed("other bytes")

    with pytest.raises(CheckFailed) as caught:
        write(out, Write(), verify=damaged)
    assert 0 < caught.value.hint.index("--resume repairs it") < caught.value.hint.index("delete")
    verified(out, resume=True)
    assert tree(out.target) == reference(tmp_path, name)
    assert leftovers(out.target) == []


def test_a_copy_of_a_kept_shard_that_was_damaged_is_copied_again(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ("--max-shard-size", "1MB", "--quiet")
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "s", "--gqa-layers", "2,5", *shards, "--no-verify") == 0
    pick = ("pick-gqa-layers", tmp_path / "s", tmp_path / "p", "--layers", "2", "--teacher", tiny_teacher, *shards)

    def link(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", link)
    assert cli(*pick) == 0
    whole = tree(tmp_path / "p")
    shutil.rmtree(tmp_path / "p")
    with monkeypatch.context() as patch:
        patch.setattr(checks, "read_back", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert cli(*pick) == 130
    (partial,) = tmp_path.glob("p.partial-*/content")
    for path in partial.glob("*.safetensors"):
        damage_data(path)
    assert cli(*pick, "--resume") == 0
    assert tree(tmp_path / "p") == whole


def test_files_in_folders_are_taken_over_and_replaced(tmp_path: Path) -> None:
    name = "additional_chat_templates/tools.jinja"
    out = output(tmp_path / "out", plan_over(source(tmp_path)), copied_files={name: source(tmp_path)})
    verified(out)
    assert (out.target / name).read_bytes() == source(tmp_path).path.read_bytes()  # type: ignore[union-attr]
    record = json.loads((out.target / "hxaconv.json").read_text())
    assert record["files"].keys() == {name, "config.json", "model.safetensors.index.json"}
    verified(out, overwrite=True)
