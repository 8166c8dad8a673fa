"""Hostile and damaged checkpoints: one clear message each, bounded memory, nothing executed."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import corpus, forge
from hostile.corpus import CASES, GOOD

from hxaconv.errors import HxaconvError
from hxaconv.load.checkpoint import open_checkpoint

TESTS = Path(__file__).parent
MEMORY_LIMIT = 500_000_000
"""Address space: an interpreter with this package, and the worst that the readers' own bounds allow."""


@pytest.mark.parametrize("kind", GOOD)
def test_without_the_fault_it_opens(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(GOOD[kind](tmp_path))
    assert {recipe.shape for recipe in checkpoint.plan.values()} == {(4, 2)}
    assert len(checkpoint.plan) == 2


def test_corpus_has_no_name_twice() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) > 200


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused_with_its_message(case: corpus.Case, tmp_path: Path) -> None:
    with pytest.raises(HxaconvError) as caught:
        open_checkpoint(case.build(tmp_path))
    message = caught.value.message
    assert case.message in message
    assert caught.value.exit_code == 2
    assert len(message) < 4000
    assert all(line.isprintable() for line in message.splitlines())


def test_memory_is_bounded(tmp_path: Path) -> None:
    """The whole corpus again, in a process that is not given more address space than MEMORY_LIMIT."""
    script = """
        import resource, sys
        from pathlib import Path
        resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[3]),) * 2)
        sys.path.insert(0, sys.argv[1])
        from hostile.corpus import CASES
        from hxaconv.load.checkpoint import open_checkpoint
        from hxaconv.errors import HxaconvError
        for number, case in enumerate(CASES):
            folder = Path(sys.argv[2]) / str(number)
            folder.mkdir()
            try:
                open_checkpoint(case.build(folder))
            except HxaconvError:
                continue
            raise SystemExit(f"{case.name} was accepted")
        print(len(CASES))
    """
    code = textwrap.dedent(script)
    command = [sys.executable, "-c", code, str(TESTS), str(tmp_path), str(MEMORY_LIMIT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(CASES)


@pytest.mark.parametrize(
    "falsified", [{"count": 60_000}, {"count": 6}, {"end64": 2**60, "always": 1}, {"count": 2**60, "always": 1}]
)
def test_numbers_that_a_zip_directory_says_twice_are_not_relied_on(falsified: dict[str, int], tmp_path: Path) -> None:
    end = {key: value for key, value in falsified.items() if key != "always"}
    path = forge.zip_file(tmp_path / "x.pth", corpus.RECORDS, always_zip64="always" in falsified, end=end)
    assert len(open_checkpoint(path).plan) == 2


def _armed(folder: Path, form: str) -> tuple[Path, Path]:
    """A checkpoint whose pickle writes a file when it is unpickled, and that file."""
    trace = folder / "executed"
    command = forge.call(forge.global_("os", "system"), forge.text(f"touch {trace}"))
    value = forge.dict_of({"emb.weight": command})
    if form == "zip":
        return forge.zip_file(folder / "x.pth", forge.torch_records(value, {})), trace
    return forge.legacy_file(folder / "x.pth", value, {}), trace


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_armed_pickle_does_not_run(form: str, tmp_path: Path) -> None:
    path, trace = _armed(tmp_path, form)
    with pytest.raises(HxaconvError, match=r"asks for os\.system"):
        open_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_it_would_have_run(form: str, tmp_path: Path) -> None:
    import torch

    path, trace = _armed(tmp_path, form)
    loaded = torch.load(path, weights_only=False)
    assert loaded == {"emb.weight": 0}
    assert trace.exists()


def test_it_would_have_run_in_plain_pickle(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    pickle.loads(forge.pickled(forge.call(forge.global_("os", "system"), forge.text(f"touch {trace}"))))
    assert trace.exists()


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    corpus.good_folder(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert len(open_checkpoint(snapshot).plan) == 2


def test_unreadable_folder(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    if os.access(folder, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(HxaconvError, match="Permission denied"):
        open_checkpoint(folder)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 15])
def test_command_line_says_one_thing_and_leaves_nothing(
    every: int, cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, the message once and on stderr, and no output."""
    quick = [case for case in CASES if not any(word in case.name for word in ("steps", "shared", "deep"))][::every]
    for number, case in enumerate(quick):
        folder = tmp_path / str(number)
        folder.mkdir()
        path, out = case.build(folder), tmp_path / f"out-{number}"
        before = sorted(folder.rglob("*"))
        for arguments in (["inspect", path], ["to-hf", path, out], ["init-from-teacher", path, out]):
            code, printed = cli(*arguments), capsys.readouterr()
            if arguments[0] == "inspect" and code == 0:  # it says what a whole file with odd names or shapes is
                assert open_checkpoint(path, validate=False).problem is not None, case.name
                continue
            assert code == 2, case.name
            assert printed.out == "", case.name
            said = " ".join(printed.err.split())
            assert said.startswith("Error: "), case.name
            assert said.count(" ".join(case.message.split())) == 1, (case.name, printed.err)
            assert "Traceback" not in said
        assert not list(tmp_path.glob("out-*")), case.name
        assert sorted(folder.rglob("*")) == before, case.name
