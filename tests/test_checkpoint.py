"""Which files of a folder are opened, what stands beside them, and what the plan says of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hostile import corpus, forge

from hxaconv.errors import HxaconvError
from hxaconv.formats import hub
from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import teacher_config
from hxaconv.model.model import Checkpoint
from hxaconv.model.names import stored_name
from hxaconv.model.plan import Buffers, pad_columns, pad_rows, rows, total_bytes

GOLDEN = Path(__file__).parent / "golden"
REKA = Path(__file__).parents[2] / "shared" / "reka-flash-3"
EMBEDDING = "model.embed_tokens.weight"


def tensor_bytes(checkpoint: Checkpoint, name: str) -> bytes:
    return b"".join(bytes(piece) for piece in checkpoint.plan[name].chunks(Buffers()))


@pytest.mark.parametrize("case", ["reka_tiny", "qwen3_tiny", "reka_tiny_init"])
def test_golden_cases_in_all_key_formats(case: str) -> None:
    teacher = open_checkpoint(GOLDEN / case / "teacher")
    assert (teacher.container, teacher.key_format) == ("safetensors", "hf")
    assert teacher.config is not None
    assert teacher.config["num_hidden_layers"]
    student = open_checkpoint(GOLDEN / case / "student.pth")
    assert (student.container, student.key_format, student.config) == ("pth", "rwkv", None)
    trained = open_checkpoint(GOLDEN / case / "trained_attention.pth")
    assert trained.key_format == "training"
    hf = open_checkpoint(GOLDEN / case / "student_hf")
    assert tensor_bytes(hf, EMBEDDING) == tensor_bytes(student, EMBEDDING) == tensor_bytes(teacher, EMBEDDING)
    for name in trained.plan:
        assert tensor_bytes(trained, name) == tensor_bytes(hf, name)
    for opened in (teacher, student, trained, hf):
        for name in opened.plan:
            assert stored_name(name, opened.key_format) == opened.stored_names[name]
            assert opened.plan[name].origin.startswith(f"{opened.stored_names[name]} in ")


def test_single_safetensors_file_knows_the_config_beside_it(tmp_path: Path) -> None:
    corpus.good_safetensors(tmp_path).rename(tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path / "model.safetensors").config is None
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert open_checkpoint(tmp_path / "model.safetensors").config == {"a": 1}
    assert open_checkpoint(str(tmp_path)).config == {"a": 1}


def test_sidecar_of_a_pth(tmp_path: Path) -> None:
    corpus.good_zip(tmp_path).rename(tmp_path / "student.pth")
    assert open_checkpoint(tmp_path / "student.pth").sidecar is None
    ours = {"rwkv_architecture": "hxa079", "rope_theta": 8000000.0}
    for content, expected in ((ours, ours), ({"somebody": "else's"}, None)):
        (tmp_path / "student.json").write_text(json.dumps(content))
        for spec in (tmp_path / "student.pth", tmp_path):
            assert open_checkpoint(spec).sidecar == expected


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    corpus.good_folder(tmp_path)
    corpus.good_zip(tmp_path).rename(tmp_path / "pytorch_model.bin")
    (tmp_path / "training_args.bin").write_bytes(b"anything")
    found = open_checkpoint(tmp_path)
    assert found.container == "safetensors"
    assert found.extra["stray_files"] == ("pytorch_model.bin",)


def test_a_single_file_wins_over_an_index_of_others(tmp_path: Path) -> None:
    corpus.good_folder(tmp_path)
    corpus.good_safetensors(tmp_path).rename(tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    assert [file.name for file in found.files] == ["model.safetensors"]
    assert found.extra["stray_files"] == ("a.safetensors", "b.safetensors")
    corpus.write_index(tmp_path, {"emb.weight": "model.safetensors", "head.weight": "model.safetensors"})
    assert [file.name for file in open_checkpoint(tmp_path).files] == ["model.safetensors"]


def test_strays_beside_an_index(tmp_path: Path) -> None:
    corpus.good_folder(tmp_path)
    corpus.good_safetensors(tmp_path).rename(tmp_path / "consolidated.safetensors")
    assert open_checkpoint(tmp_path).extra["stray_files"] == ("consolidated.safetensors",)


def test_pytorch_model_bin_in_shards(tmp_path: Path) -> None:
    names = {EMBEDDING: "pytorch_model-00001-of-00002.bin", "lm_head.weight": "pytorch_model-00002-of-00002.bin"}
    for name, file in names.items():
        torch.save({name: torch.full((4, 2), float(len(name)))}, tmp_path / file)
    assert len(open_checkpoint(tmp_path).plan) == 2
    index = {"metadata": {"total_size": 64}, "weight_map": names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = open_checkpoint(tmp_path)
    assert found.container == "pth"
    assert tensor_bytes(found, "lm_head.weight") == torch.full((4, 2), 14.0).numpy().tobytes()


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_folder_of_several_pickles_without_an_index(suffix: str, tmp_path: Path) -> None:
    torch.save({EMBEDDING: torch.ones(4, 2)}, tmp_path / f"embedding.{suffix}")
    torch.save({"lm_head.weight": torch.ones(4, 2)}, tmp_path / f"head.{suffix}", _use_new_zipfile_serialization=False)
    for name in ("optimizer.pt", "rng_state.pth", "rng_state_0.pth", "scheduler.pt", "training_args.bin"):
        (tmp_path / name).write_bytes(b"a trainer's own")
    found = open_checkpoint(tmp_path)
    assert list(found.plan) == [EMBEDDING, "lm_head.weight"]
    assert len(found.files) == 2


def test_rotary_buffers_are_known_and_dropped(tmp_path: Path) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    torch.save({EMBEDDING: torch.ones(4, 2), buffer: torch.ones(3)}, tmp_path / "x.bin")
    found = open_checkpoint(tmp_path / "x.bin")
    assert found.dropped == (buffer,)
    assert list(found.plan) == [EMBEDDING]


def test_unknown_names_are_all_reported(tmp_path: Path) -> None:
    names = {EMBEDDING: 0, "model.layers.0.mlp.up_project.weight": 0, "patch.weight": 0}
    torch.save({name: torch.ones(2) for name in names}, tmp_path / "x.bin")
    with pytest.raises(HxaconvError, match=r"2 tensor names") as caught:
        open_checkpoint(tmp_path / "x.bin")
    assert "patch.weight" in str(caught.value)
    assert "nearest: model.layers.0.mlp.up_proj.weight" in str(caught.value)


def test_only_listed_companions_are_offered(tmp_path: Path) -> None:
    corpus.good_folder(tmp_path)
    for name in ("tokenizer.json", "generation_config.json", "modeling_x.py", "notes.txt", "run.sh", ".env"):
        (tmp_path / name).write_text("{}")
    found = open_checkpoint(tmp_path)
    assert set(found.companions) == {"tokenizer.json", "generation_config.json"}
    assert set(found.code_files) == {"modeling_x.py"}


def test_folder_named_through_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    corpus.good_folder(real)
    (tmp_path / "link").symlink_to(real)
    assert len(open_checkpoint(tmp_path / "link").plan) == 2


def test_links_within_the_folder(tmp_path: Path) -> None:
    corpus.good_folder(tmp_path)
    (tmp_path / "a.safetensors").rename(tmp_path / "stored")
    (tmp_path / "a.safetensors").symlink_to("stored")
    assert len(open_checkpoint(tmp_path).plan) == 2


NOWHERE = ("nothing/here.pth", "./a/b", "/nowhere/at/all", "nothing", "a/b/c", "~nobody/x", "~no such user/x")


@pytest.mark.parametrize("spec", NOWHERE)
def test_what_is_no_path_and_no_hub_id(spec: str) -> None:
    with pytest.raises(HxaconvError, match="does not exist") as caught:
        open_checkpoint(spec)
    assert "Hub id" in caught.value.hint


@pytest.mark.parametrize("spec", ["x" * 300, "/" + "y/" * 4000, "a\0b", "models/" + "z" * 300 + ".pth"])
def test_what_no_file_system_can_name(spec: str) -> None:
    with pytest.raises(HxaconvError, match="cannot be opened"):
        open_checkpoint(spec)


def test_a_source_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    path = corpus.good_safetensors(tmp_path)
    found = open_checkpoint(path)
    forge.safetensors_file(path, corpus.HEADER, bytes(32))
    with pytest.raises(HxaconvError, match="changed while it was being read"):
        found.files[0].check_unchanged()


def reka_with_holes(folder: Path) -> Path:
    """Reka Flash 3 in full size: its own config and index, shards whose weights are holes."""
    config = json.loads((REKA / "config.json").read_text())
    weight_map = json.loads((REKA / "model.safetensors.index.json").read_text())["weight_map"]
    shapes = expected_tensors(teacher_config(config, where="Reka"))
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(REKA / name, folder)
    for shard in sorted(set(weight_map.values())):
        header, position = {}, 0
        for name in (name for name, file in weight_map.items() if file == shard):
            size = 2 * torch.Size(shapes[name]).numel()
            header[name] = {
                "dtype": "BF16",
                "shape": list(shapes[name]),
                "data_offsets": [position, position + size],
            }
            position += size
        forge.safetensors_file(folder / shard, header, position)
    return folder


@pytest.mark.skipif(not REKA.is_dir(), reason="the real config and index are not here")
def test_reka_in_full_size(tmp_path: Path) -> None:
    found = open_checkpoint(reka_with_holes(tmp_path))
    assert len(found.plan) == 399
    assert total_bytes(found.plan) == 41_810_964_480
    assert len(found.files) == len({file.name for file in found.files})


def test_rows_of_a_transposed_matrix_are_refused_in_a_sentence(tmp_path: Path) -> None:
    torch.save({EMBEDDING: torch.ones(2, 4).t(), "lm_head.weight": torch.ones(4, 2)}, tmp_path / "x.bin")
    plan = open_checkpoint(tmp_path / "x.bin").plan
    assert rows(plan["lm_head.weight"], 1, 3, "").shape == (2, 2)
    for part in (lambda r: rows(r, 1, 3, ""), lambda r: pad_rows(r, 5), lambda r: pad_columns(r, 3)):
        part(plan["lm_head.weight"])
        with pytest.raises(HxaconvError, match="is not stored contiguously"):
            part(plan[EMBEDDING])


@pytest.mark.parametrize(
    ("spec", "asked", "said"),
    [
        ("student/ahead", "student/ahead", "the folder student/ is here, and holds no ahead"),
        ("org/ahead", "org/ahead", "no such path here, and the Hub cannot be reached"),
        ("org/ahead/", "org/ahead", "no such path here, and the Hub cannot be reached"),
        ("org/ahead/deeper/", None, "does not exist"),
    ],
)
def test_what_is_no_path_may_be_a_hub_id(
    spec: str, asked: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def unreachable(repo: str, *_: object) -> None:
        names.append(repo)
        raise hub.explain(ConnectionError(), repo, None)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    monkeypatch.setattr(hub, "open_repository", unreachable)
    with pytest.raises(HxaconvError) as caught:
        open_checkpoint(spec)
    assert said in caught.value.message and names == ([asked] if asked else [])
    assert "whole files" not in str(caught.value)


def test_a_json_file_beside_weights_leads_to_them(tmp_path: Path) -> None:
    for name in ("config.json", "s.json", "s.pth"):
        (tmp_path / name).write_text("{}")
    for name, way in (("config.json", f"Give the folder that it is in: {tmp_path}/"), ("s.json", "s.pth.")):
        with pytest.raises(HxaconvError) as caught:
            open_checkpoint(tmp_path / name)
        assert "not a file of weights" in caught.value.message and caught.value.hint.endswith(way)


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(HxaconvError, match="no file system can name"):
        open_checkpoint("\ud800")
    with pytest.raises(HxaconvError, match="does not exist"):
        open_checkpoint("./\udcff")
