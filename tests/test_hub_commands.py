"""Commands with Hub ids, against a stand-in of the Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer
from models import weights
from safetensors.torch import load_file, save_file


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def run(hub: HubServer, home: Path, *words: object, token: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **hub.environment(home, token)}
    command = [sys.executable, "-m", "hxaconv", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_teacher_is_planned_before_it_is_downloaded(hub: HubServer, golden: Path, tmp_path: Path) -> None:
    hub.add_folder("org/teacher", golden / "reka_tiny" / "teacher")
    dry = run(hub, tmp_path / "home", "init-from-teacher", "org/teacher", tmp_path / "out", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert all(ranged is not None for ranged in hub.downloaded(".safetensors"))
    done = run(hub, tmp_path / "home", "init-from-teacher", "org/teacher", tmp_path / "out", "--quiet")
    assert done.returncode == 0, done.stderr
    story = json.loads((tmp_path / "out" / "hxaconv.json").read_text())
    assert story["sources"]["teacher"]["name"] == "org/teacher"
    assert len(story["sources"]["teacher"]["revision"]) == 40
    assert "base_model: org/teacher" in (tmp_path / "out" / "README.md").read_text()


def test_only_the_shards_that_are_needed_are_fetched(hub: HubServer, golden: Path, tmp_path: Path) -> None:
    case = golden / "reka_tiny"
    hub.add_folder("org/teacher", case / "teacher")
    words = ["to-training", case / "trained_attention.pth", tmp_path / "t.pth", "--teacher", "org/teacher", "--quiet"]
    words += ["--variant", "hxa079"]
    done = run(hub, tmp_path / "home", *words, "--no-verify")
    assert done.returncode == 0, done.stderr
    # Attention alone needs the teacher's config, and none of its weights.
    assert all(ranged is not None for ranged in hub.downloaded(".safetensors"))
    # A student that lacks only what stands in the teacher's last shard makes do with that one.
    index = json.loads((case / "teacher" / "model.safetensors.index.json").read_text())["weight_map"]
    last = index["model.norm.weight"]
    student = load_file(case / "student_hf" / "model.safetensors")
    partial = {n: t for n, t in student.items() if ".self_attn." in n or index.get(n) != last}
    save_file(partial, tmp_path / "partial.safetensors")
    words = ["to-hf", tmp_path / "partial.safetensors", tmp_path / "hf", "--teacher", "org/teacher", "--quiet"]
    words += ["--variant", "hxa079"]
    done = run(hub, tmp_path / "home", *words, "--no-verify")
    assert done.returncode == 0, done.stderr
    fetched = {path.rsplit("/", 1)[-1] for _, path, ranged in hub.requests if ranged is None and "/resolve/" in path}
    assert {name for name in fetched if name.endswith(".safetensors")} == {last}
    made = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(made[name], student[name]) for name in student)


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("me/student", None, "nobody is logged in"),
        ("me/student", "hf_of_somebody_else", "The Hub refuses access"),
        ("else/student", TOKEN, "me may write to me"),
    ],
)
def test_what_cannot_be_uploaded_to_is_refused_before_any_work(
    hub: HubServer, tiny_teacher: Path, tmp_path: Path, repo: str, token: str | None, said: str
) -> None:
    words = ["init-from-teacher", tiny_teacher, tmp_path / "out", "--push-to", repo, *(["--dry-run"] if token else [])]
    done = run(hub, tmp_path / "home", *words, token=token)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()
    assert not hub.repos


@pytest.mark.parametrize("repo", ["student", "me/a student", "a/b/c"])
def test_what_names_no_repository_is_refused(
    cli: Callable[..., int], tiny_teacher: Path, tmp_path: Path, repo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("init-from-teacher", tiny_teacher, tmp_path / "out", "--push-to", repo, "--dry-run") == 2
    assert "It takes ORG/NAME" in capsys.readouterr().err


def test_a_token_that_may_only_read_is_refused_too(hub: HubServer, tiny_teacher: Path, tmp_path: Path) -> None:
    hub.role = "read"
    words = ["init-from-teacher", tiny_teacher, tmp_path / "out", "--push-to", "me/student", "--dry-run"]
    done = run(hub, tmp_path / "home", *words, token=TOKEN)
    assert done.returncode == 2
    assert "may only read" in done.stderr


def test_a_failed_upload_says_that_the_output_is_complete(hub: HubServer, tiny_teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hub.refuse_creating = True
    words = ["init-from-teacher", tiny_teacher, out, "--no-verify", "--push-to", "me/student", "--quiet"]
    done = run(hub, tmp_path / "home", *words, token=TOKEN)
    assert done.returncode == 2
    assert f"{out} is complete; `hf upload me/student {out}` sends it as well." in done.stderr
    assert (out / "hxaconv.json").is_file()


def test_the_finished_folder_is_uploaded_privately(hub: HubServer, tiny_teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["init-from-teacher", tiny_teacher, out, "--push-to", "me/student", "--json"]
    done = run(hub, tmp_path / "home", *words, token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert json.loads(done.stdout)["pushed_to"].endswith("me/student")
    repo = hub.repos["me/student"]
    assert repo.private
    files = repo.files[repo.branches["main"]]
    assert files["config.json"] == (out / "config.json").read_bytes()
    back = run(hub, tmp_path / "home", "verify", "me/student", "--against", out, "--quiet", token=TOKEN)
    assert back.returncode == 0, back.stderr


def test_a_missing_repository_is_one_message(hub: HubServer, tmp_path: Path) -> None:
    done = run(hub, tmp_path / "home", "inspect", "org/nothing")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "org/nothing" in done.stderr


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_stored_is_compared_when_it_is_here(
    hub: HubServer, golden: Path, tmp_path: Path, same: bool
) -> None:
    """Two shards: the embedding in one, the head and the rest in the other."""
    case, teacher = golden / "qwen3_tiny", tmp_path / "teacher"
    teacher.mkdir()
    tensors = weights(case / "teacher")
    embedding = tensors["model.embed_tokens.weight"]
    shards = {
        "model-00001-of-00002.safetensors": {"model.embed_tokens.weight": embedding},
        "model-00002-of-00002.safetensors": {
            **{name: tensor for name, tensor in tensors.items() if name != "model.embed_tokens.weight"},
            "lm_head.weight": embedding.clone() if same else embedding + 1,
        },
    }
    for file, held in shards.items():
        save_file(held, teacher / file, {"format": "pt"})
    index = {name: file for file, held in shards.items() for name in held}
    (teacher / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = json.loads((case / "teacher" / "config.json").read_text())
    assert config["tie_word_embeddings"]
    (teacher / "config.json").write_text(json.dumps(config))
    hub.add_folder("org/tied", teacher)
    plans = (
        ["init-from-teacher", "org/tied", tmp_path / "s", "--gqa-layers", "1,3", "--dry-run"],
        ["to-hf", case / "trained_attention.pth", tmp_path / "s", "--teacher", "org/tied", "--dry-run"],
        ["to-training", case / "trained_attention.pth", tmp_path / "a.pth", "--teacher", "org/tied", "--no-verify"],
    )
    for words in plans if same else plans[:1]:
        done = run(hub, tmp_path / "home", *words, "--quiet")
        assert done.returncode == 0, done.stderr
    assert all(ranged is not None for ranged in hub.downloaded(".safetensors"))
    done = run(hub, tmp_path / "home", "to-hf", case / "trained_attention.pth", tmp_path / "s", "--teacher", "org/tied")
    if same:
        assert done.returncode == 0, done.stderr
        assert "lm_head.weight" not in load_file(tmp_path / "s" / "model.safetensors")
    else:
        assert done.returncode == 2
        assert "lm_head.weight differs from model.embed_tokens.weight" in done.stderr
        assert not (tmp_path / "s").exists()
