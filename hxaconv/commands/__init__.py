"""The commands: each a function that the package offers and the command line is made from.

A command reads as its own explanation; how models are loaded, computed and written stands in the folders beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

SUMMARIES = {
    "init-from-teacher": (
        "Make an hxa079 student of a teacher: RWKV layers initialised from its attention, the rest copied."
    ),
    "calibrate": (
        "Fit the RWKV layers of an untrained student to its teacher, layer by layer, on a few hundred tokens of text."
    ),
    "to-hf": "Write a student as a Hugging Face folder that transformers and RWKV-Infer load.",
    "to-pth": "Write a student as a .pth for RWKV-Infer, with a sidecar of the settings it cannot carry.",
    "to-training": "Write a student under the names that published trainers load, to train it further.",
    "pick-gqa-layers": "Choose the layers that stay attention: change the choice, or get advice on it.",
    "verify": "Check a checkpoint with an independent reference forward, alone or against another.",
    "inspect": "Describe a checkpoint, from its headers alone.",
    "maps": "List the shipped layer maps, or show one.",
    "demo": "Run the whole main job on a small embedded teacher, every step an ordinary command; no network needed.",
}
"""Name on the command line -> its line in `hxaconv --help`, in that order: the first line of its docstring."""

_MODULES = {"init-from-teacher": "init", "pick-gqa-layers": "pick"} | dict.fromkeys(
    ("to-hf", "to-pth", "to-training"), "convert"
)


class _Commands(Mapping[str, Callable[..., Any]]):
    """Name on the command line -> function, imported at its first use: `hxaconv --help` needs none."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        module = import_module(f"hxaconv.commands.{_MODULES.get(name, name)}")
        function: Callable[..., Any] = getattr(module, name.replace("-", "_"))
        return function

    def __iter__(self) -> Iterator[str]:
        return iter(SUMMARIES)

    def __len__(self) -> int:
        return len(SUMMARIES)


COMMANDS = _Commands()
