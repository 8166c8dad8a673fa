"""Shared fixtures: golden cases, the small trained teacher, and the command line in-process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

GOLDEN = Path(__file__).parent / "golden"
TINY_TEACHER = Path(__file__).parents[1] / "hxaconv" / "commands" / "embedded" / "teacher"


@pytest.fixture
def golden() -> Path:
    """The folder of golden cases."""
    return GOLDEN


@pytest.fixture
def tiny_teacher() -> Path:
    """A six-layer byte-level teacher, really trained."""
    return TINY_TEACHER


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command line in this process; returns its exit code. An exception that nobody foresaw ends the test."""
    from hxaconv.cli.app import run

    def fault() -> NoReturn:
        raise

    monkeypatch.setattr("hxaconv.cli.app.traceback.print_exc", fault)

    def call(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["hxaconv", *map(str, arguments)])
        return run()

    return call


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Journal lines after every few tensors, as a large output has them."""
    from hxaconv.save import fill

    monkeypatch.setattr(fill, "BATCH_BYTES", 20_000)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors gain nothing from more threads, and lose much on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies modelling code to one temporary place: it imports from the first that a process names."""
    transformers = pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", place)
        yield
