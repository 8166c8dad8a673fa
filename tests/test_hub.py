"""Models of the Hub, against a stand-in of its HTTP API; every test is a process of its own, as the
Hub's library reads its environment when it is imported."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer

ROOT = Path(__file__).parents[1]
TEACHER = Path(__file__).parent / "golden" / "reka_tiny" / "teacher"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

DOWNLOAD = "checkpoint = open_checkpoint('org/teacher'); download([checkpoint], checkpoint.files)"
PRELUDE = """
import sys
from pathlib import Path
from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.errors import HxaconvError
from hxaconv.load.models import download
from hxaconv.save.run import push_folder
from hxaconv.model.plan import Buffers
def digest(checkpoint):
    import hashlib
    total = hashlib.sha256()
    for name in sorted(checkpoint.plan):
        for piece in checkpoint.plan[name].chunks(Buffers()):
            total.update(piece)
    return total.hexdigest()
class Bar:
    def __init__(self): self.total, self.done, self.stopped = 0, 0, False
    def start(self, title, total): self.total += total
    def advance(self, n, what=""): self.done += n
    def stop(self): self.stopped = True
def main():
{body}
try:
    main()
except HxaconvError as error:
    print("REFUSED", error)
"""


@dataclass
class Hub:
    """The server, and a user with a cache of their own."""

    server: HubServer
    home: Path

    def run(self, body: str, *, token: str | None = None, **environment: str) -> str:
        """What a script prints; it must not fail, nor print anything else or any token."""
        code = PRELUDE.format(body=textwrap.indent(textwrap.dedent(body), "    "))
        variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **self.server.environment(self.home, token)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=variables | environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout.strip()

    def blobs(self, name: str) -> Path:
        """Where the cache keeps the contents of a repository's files."""
        return self.home / "hub" / f"models--{name.replace('/', '--')}" / "blobs"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with HubServer() as server:
        server.add_folder("org/teacher", TEACHER)
        yield Hub(server, tmp_path / "home")


def local_digest() -> str:
    from hxaconv.load.checkpoint import open_checkpoint
    from hxaconv.model.plan import Buffers

    total = hashlib.sha256()
    plan = open_checkpoint(TEACHER).plan
    for name in sorted(plan):
        for piece in plan[name].chunks(Buffers()):
            total.update(piece)
    return total.hexdigest()


def test_planned_from_headers_alone(hub: Hub) -> None:
    """Shards larger than the first request, so that not a byte of weights can be among what was read."""
    big = {"model.embed_tokens.weight": torch.zeros(500_000, 2, dtype=torch.bfloat16)}
    from safetensors.torch import save

    hub.server.add("org/big", {"model.safetensors": save(big), "config.json": b'{"a": 1}'})
    found = hub.run("""
        checkpoint = open_checkpoint("org/big")
        print(len(checkpoint.plan), checkpoint.config, checkpoint.repo, checkpoint.files[0].path)
    """)
    assert found == "1 {'a': 1} org/big None"
    assert hub.server.downloaded("model.safetensors") == ["bytes=0-131071"]


@pytest.mark.slow
def test_long_header_takes_a_second_request(hub: Hub) -> None:
    from safetensors.torch import save

    data = save({"model.embed_tokens.weight": torch.zeros(200_000, 2)}, {"note": "x" * 200_000})
    hub.server.add("org/long", {"model.safetensors": data})
    assert hub.run("print(list(open_checkpoint('org/long').plan))") == "['model.embed_tokens.weight']"
    assert len(hub.server.downloaded("model.safetensors")) == 2


@pytest.mark.slow
def test_opened_by_branch_commit_and_revision(hub: Hub) -> None:
    commit = hub.server.repos["org/teacher"].branches["main"]
    found = hub.run(f"""
        for spec, revision in (("org/teacher", None), ("org/teacher@main", None), ("org/teacher@{commit}", None),
                               ("org/teacher", "main")):
            checkpoint = open_checkpoint(spec, revision=revision)
            print(checkpoint.revision, len(checkpoint.plan), checkpoint.label)
    """)
    assert [line.split()[:2] for line in found.splitlines()] == [[commit, "48"]] * 4


def test_weights_are_downloaded_when_first_read(hub: Hub) -> None:
    assert hub.run("print(digest(open_checkpoint('org/teacher')))") == local_digest()
    before = len(hub.server.requests)
    assert hub.run("print(digest(open_checkpoint('org/teacher')))") == local_digest()
    assert [path for _, path, _ in hub.server.requests[before:]] == ["/api/models/org/teacher"]


def test_download_with_progress_in_bytes(hub: Hub) -> None:
    found = hub.run("""
        checkpoint, bar = open_checkpoint("org/teacher"), Bar()
        download([checkpoint], checkpoint.files, progress=bar)
        print(bar.total == bar.done == sum(file.size for file in checkpoint.files), bar.stopped, digest(checkpoint))
        download([checkpoint], checkpoint.files, progress=bar)
    """)
    assert found == f"True True {local_digest()}"


def test_without_network_the_cache_serves(hub: Hub) -> None:
    hub.run(DOWNLOAD)
    script = "c = open_checkpoint('org/teacher'); print(digest(c), c.repo, len(c.revision))"
    expected = f"{local_digest()} org/teacher 40"
    assert hub.run(script, HF_HUB_OFFLINE="1") == expected
    assert hub.run(script, HF_ENDPOINT="http://127.0.0.1:9") == expected


def test_a_refusal_is_not_answered_from_the_cache(hub: Hub) -> None:
    hub.run(DOWNLOAD)
    hub.server.repos["org/teacher"].private = True
    assert "no such model on the Hub" in hub.run("open_checkpoint('org/teacher')")


def test_without_network_and_cache(hub: Hub) -> None:
    found = hub.run("open_checkpoint('org/teacher')", HF_HUB_OFFLINE="1")
    assert found.startswith("REFUSED org/teacher is not in the Hub's cache, and the Hub is not used (HF_HUB_OFFLINE)")
    assert "hf download org/teacher" in found
    found = hub.run("open_checkpoint('org/teacher')", HF_ENDPOINT="http://127.0.0.1:9")
    assert found.startswith("REFUSED org/teacher: no such path here, and the Hub cannot be reached")
    assert "Check the network" in found


@pytest.mark.slow
def test_without_network_and_with_half_a_cache(hub: Hub) -> None:
    hub.run("open_checkpoint('org/teacher').files[0].open()")
    found = hub.run("open_checkpoint('org/teacher')", HF_HUB_OFFLINE="1")
    assert f"{SHARDS[1]} is missing" in found
    assert SHARDS[0] not in found


def test_refusals_name_the_next_step(hub: Hub) -> None:
    hub.server.add_folder("org/private", TEACHER, private=True)
    hub.server.add_folder("org/gated", TEACHER, gated=True)
    expected = {
        "org/none": ("no such model on the Hub, or a private one", "Check the spelling"),
        "org/teacher@none": ("org/teacher has no revision 'none'", "/tree/main"),
        "org/private": ("no such model on the Hub, or a private one", "hf auth login"),
        "org/gated": ("org/gated is gated", "Accept them at https://huggingface.co/org/gated"),
    }
    body = f"""
        for spec in {list(expected)}:
            try:
                open_checkpoint(spec)
            except HxaconvError as error:
                print(str(error).replace("\\n", " "))
    """
    found = hub.run(body, token="hf_of_somebody_else").splitlines()
    for line, (message, step) in zip(found, expected.values(), strict=True):
        assert message in line
        assert step in line
        assert "hf_of_somebody_else" not in line
    assert "Bearer hf_of_somebody_else" in hub.server.tokens_seen


def test_private_and_gated_with_the_token(hub: Hub) -> None:
    hub.server.add_folder("org/closed", TEACHER, private=True, gated=True)
    assert hub.run("print(digest(open_checkpoint('org/closed')))", token=TOKEN) == local_digest()


def test_server_in_trouble(hub: Hub) -> None:
    hub.server.fail_with = 500
    assert "The Hub answers 500 for org/teacher" in hub.run("open_checkpoint('org/teacher')")


@pytest.mark.slow
def test_server_that_ignores_ranges(hub: Hub) -> None:
    hub.server.ignore_ranges = True
    assert hub.run("print(digest(open_checkpoint('org/teacher')))") == local_digest()


def test_whole_files_of_an_interrupted_download_are_kept(hub: Hub) -> None:
    hub.run("open_checkpoint('org/teacher').files[0].open()")
    before = len(hub.server.requests)
    assert hub.run("print(digest(open_checkpoint('org/teacher')))") == local_digest()
    asked = [path for method, path, _ in hub.server.requests[before:] if method == "GET"]
    assert not [path for path in asked if path.endswith(SHARDS[0])]
    assert [path for path in asked if path.endswith(SHARDS[1])]


def test_connection_that_breaks_is_taken_up_again(hub: Hub) -> None:
    in_weights = 60_000
    hub.run("open_checkpoint('org/teacher')")
    hub.server.cuts = [None, None, in_weights]
    assert hub.run("print(digest(open_checkpoint('org/teacher')))") == local_digest()
    assert hub.server.cuts == []


def test_a_download_that_is_cut_for_good_says_so(hub: Hub) -> None:
    hub.server.cuts = [None, None, *[1000] * 60]
    found = hub.run("open_checkpoint('org/teacher').files[0].open()")
    assert "the connection broke while model-00001" in found
    assert "no such path" not in found


def test_the_hub_is_waited_for_where_it_asks_to(hub: Hub) -> None:
    hub.server.busy = 2
    assert hub.run("print(digest(open_checkpoint('org/teacher')))") == local_digest()
    assert hub.server.busy == 0


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stalled_download_ends_with_the_signal(hub: Hub, name: str, code: int, tmp_path: Path) -> None:
    hub.run("open_checkpoint('org/teacher')")
    hub.server.stall = True
    words = ["init-from-teacher", "org/teacher", str(tmp_path / "out"), "--gqa-layers", "1"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **hub.server.environment(hub.home)}
    with subprocess.Popen(
        [sys.executable, "-m", "hxaconv", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as running:
        deadline = time.monotonic() + 60
        while not hub.server.stalled.is_set() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        began = time.monotonic()
        running.send_signal(getattr(signal, name))
        _, said = running.communicate(timeout=60)
    assert time.monotonic() - began < 2
    assert running.returncode == code
    assert b"kept in the Hub's cache" in said
    assert not (tmp_path / "out").exists()


def test_the_disk_is_asked_for_the_whole_download(hub: Hub) -> None:
    found = hub.run("""
        import shutil
        from hxaconv.load.models import load_teacher, download
        real = shutil.disk_usage
        model = load_teacher("org/teacher", headers_only=True)
        shutil.disk_usage = lambda path: type("Usage", (), {"free": 150_000})()
        from hxaconv.model.plan import source_files
        download([model.checkpoint], source_files(model.plan), [model], None)
    """)
    assert "bytes to download (2 files), 150,000 bytes free" in found
    assert "HF_HOME" in found


def test_wrong_digest_is_an_error(hub: Hub) -> None:
    name = SHARDS[0]
    blob = hub.blobs("org/teacher") / hashlib.sha256((TEACHER / name).read_bytes()).hexdigest()
    hub.server.corrupt.add(name)
    found = hub.run("digest(open_checkpoint('org/teacher'))")
    assert "sha256 is" in found
    assert f"the Hub announces {blob.name}" in found
    assert not blob.exists()
    hub.server.corrupt.clear()
    assert hub.run("print(digest(open_checkpoint('org/teacher')))") == local_digest()


@pytest.mark.slow
def test_damaged_file_in_the_cache(hub: Hub) -> None:
    hub.run(DOWNLOAD)
    blob = hub.blobs("org/teacher") / hashlib.sha256((TEACHER / SHARDS[0]).read_bytes()).hexdigest()
    blob.write_bytes(blob.read_bytes()[:-5])
    found = hub.run("open_checkpoint('org/teacher')")
    assert "107395 bytes, the Hub announces 107400" in found
    assert "Delete that file" in found


def test_pickled_weights_are_downloaded_to_be_planned(hub: Hub, tmp_path: Path) -> None:
    torch.save({"model.embed_tokens.weight": torch.ones(4, 2)}, tmp_path / "pytorch_model.bin")
    hub.server.add("org/old", {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    found = hub.run("""
        bar = Bar()
        print(len(open_checkpoint("org/old", progress=bar).plan), bar.done == bar.total > 0)
    """)
    assert found == "1 True"


@pytest.mark.slow
def test_files_of_subfolders_are_left_alone(hub: Hub) -> None:
    files = {path.name: path.read_bytes() for path in TEACHER.iterdir()}
    hub.server.add("org/more", files | {"original/consolidated.pth": b"x", "onnx/model.safetensors": b"y"})
    assert hub.run("print(open_checkpoint('org/more').extra['stray_files'])") == "()"


def test_uploaded_folder_comes_back_the_same(hub: Hub) -> None:
    body = f"print(push_folder(Path({str(TEACHER)!r}), 'me/student'))"
    assert hub.run(body, token=TOKEN) == f"{hub.server.url}/me/student"
    repo = hub.server.repos["me/student"]
    assert repo.private is True
    uploaded = repo.files[repo.branches["main"]]
    assert {name for name in uploaded if not name.startswith(".")} == {path.name for path in TEACHER.iterdir()}
    assert hub.run("print(digest(open_checkpoint('me/student')))", token=TOKEN) == local_digest()
    before = len(hub.server.lfs)
    hub.run(body, token=TOKEN)
    assert len(hub.server.lfs) == before


def test_upload_of_a_pth_with_its_sidecar(hub: Hub, tmp_path: Path) -> None:
    for name in ("student.pth", "student.json", "notes.txt", "another.pth"):
        (tmp_path / name).write_bytes(b"{}")
    hub.run(f"push_folder(Path({str(tmp_path / 'student.pth')!r}), 'me/pth')", token=TOKEN)
    repo = hub.server.repos["me/pth"]
    assert set(repo.files[repo.branches["main"]]) == {".gitattributes", "student.pth", "student.json"}


def test_upload_refused(hub: Hub) -> None:
    found = hub.run(f"push_folder(Path({str(TEACHER)!r}), 'me/new')", token="hf_of_somebody_else")
    assert "The Hub refuses access to me/new (status 401)" in found
    assert "hf_of_somebody_else" not in found
