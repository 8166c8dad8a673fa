"""A command as one could type it again: its options by name, its paths without their folders."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

OPTION_NAMES = {"other": "from", "all_tensors": "all"}
"""Arguments whose option is called otherwise, `from` being a word of Python's."""


def version() -> str:
    """The installed version of the package."""
    try:
        return metadata.version("hxaconv")
    except metadata.PackageNotFoundError:  # used from a source tree that was never installed
        return "0+unknown"


def option_name(key: str) -> str:
    """The option of an argument: `max_shard_size` -> `max-shard-size`, `from_` -> `from`."""
    return OPTION_NAMES.get(key, key.rstrip("_").replace("_", "-"))


def bare(value: Any) -> Any:
    """An option as it may be published: local paths as bare names, Hub ids and numbers as they are."""
    if isinstance(value, str) and (value.startswith((".", "/", "~")) or "\\" in value or value.count("/") > 1):
        return Path(value).name
    if isinstance(value, str) and "/" in value and Path(value.partition("@")[0]).exists():
        return Path(value).name
    return value


def command_line(command: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The command as one could type it again, without local folders and with OUT for the target."""
    words = ["hxaconv", command]
    for key, value in options.items():
        if key == "out":
            words.append("OUT")
        elif key in ("source", "teacher") and words[-1] == command:
            words.append(str(bare(value)))
        elif key == "calibration":
            words += [
                word
                for name, setting in (value or {}).items()
                if setting != defaults.get(name)
                for word in _option(name, setting)
            ]
        elif value != defaults.get(key):
            words += _option(key, value)
    return shlex.join(words)


def _option(key: str, value: Any) -> list[str]:
    name = option_name(key)
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(bare(value))]
