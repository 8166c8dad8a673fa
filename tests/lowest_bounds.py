"""Whether the lowest versions in pyproject.toml are true: installs exactly them, and runs a quick part of the tests.

    python tests/lowest_bounds.py VENV [PYTEST WORDS]

VENV is made anew. Without a GPU, a torch from PyPI brings several GB of libraries; PIP_EXTRA_INDEX_URL can name an
index of CPU builds. Prints the versions that were installed; exits with the result of pytest.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of releases before 1.3, a connection that breaks ends the download; the next one goes on where it stopped.
LEFT_OUT = ("test_connection_that_breaks_is_taken_up_again", "test_a_download_that_is_cut_for_good_says_so")
QUICK = ("test_api", "test_cli", "test_newcomer", "test_outputs", "test_round_trip", "test_hub", "test_probe")


def lowest() -> list[str]:
    """`package==version` of every dependency and of what tests of the command line need beside them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bounds = [*project["dependencies"], *extras["text"], *extras["plot"]]
    return [re.sub(r">=", "==", bound) for bound in bounds]


def main(place: str, *words: str) -> int:
    """Install, list, test."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
    python = str(Path(place) / "bin" / "python")
    pinned = lowest()
    subprocess.run([python, "-m", "pip", "install", "-q", *pinned, "pytest>=8", "hypothesis>=6.100"], check=True)
    listing = [python, "-m", "pip", "list", "--format=freeze"]
    listed = subprocess.run(listing, capture_output=True, text=True, check=True)
    print(*(line for line in listed.stdout.splitlines() if not line.startswith("nvidia")), sep="\n", flush=True)
    tests = words or tuple(str(ROOT / "tests" / f"{name}.py") for name in QUICK)
    left_out = [f"--deselect=tests/test_hub.py::{name}" for name in LEFT_OUT]
    command = [python, "-m", "pytest", "-m", "not slow", *left_out, *tests]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
