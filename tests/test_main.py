"""The entry point: Ctrl-C at any moment of the start is one line, and text in logs keeps its lines."""

from __future__ import annotations

import subprocess
import sys

import pytest

INTERRUPT_AT = """
import sys
from hxaconv.__main__ import main

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, CtrlC())
sys.argv = ["hxaconv", "init-from-teacher", "no/such/place", "out", "--quiet"]
sys.exit(main())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["typer", "hxaconv.options", "hxaconv.commands.init", "hxaconv.load.checkpoint"])
def test_ctrl_c_during_the_imports_is_one_line(module: str) -> None:
    done = run(INTERRUPT_AT.format(module=module))
    assert done.returncode == 130
    assert done.stderr.startswith("Interrupted; ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_without_it_the_command_runs() -> None:
    done = run(INTERRUPT_AT.format(module="nothing"))
    assert done.returncode == 2
    assert "no/such/place does not exist" in done.stderr


def test_messages_in_logs_keep_their_lines() -> None:
    """Paths are found whole by whoever searches the log, however long they are."""
    place = f"./{'long/' * 40}end"
    done = run(INTERRUPT_AT.format(module="nothing").replace("no/such/place", place))
    assert done.stderr.splitlines()[0] == f"Error: {place} does not exist"


IMPORTS = """
import importlib, pkgutil, sys
import torch, hxaconv
for module in pkgutil.walk_packages(hxaconv.__path__, "hxaconv."):
    if not module.name.startswith("hxaconv.model.hf") and not module.name.endswith("__main__"):
        for name in [name for name in sys.modules if name.partition(".")[0] == "hxaconv"]:
            del sys.modules[name]
        importlib.import_module(module.name)
"""


@pytest.mark.slow
def test_every_module_can_be_the_first_that_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
