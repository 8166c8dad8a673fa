"""Open what a user names, a folder, a file or a Hub id, as a plan: headers only, without torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hxaconv.errors import HxaconvError
from hxaconv.formats.hub import open_hub
from hxaconv.load.checkpoint import Checkpoint, open_file, open_folder
from hxaconv.load.weight_files import WEIGHTS

if TYPE_CHECKING:
    from hxaconv.progress import Progress

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def open_checkpoint(spec: str | Path, *, revision: str | None = None, progress: Progress | None = None) -> Checkpoint:
    """Open a folder, a file or a Hub id (`org/name[@revision]`); a path that exists wins.

    Raises:
        HxaconvError: when there is nothing there, or it is damaged, ambiguous or of an unknown kind.
    """
    text = str(spec)
    path = Path(text).expanduser()
    if revision is not None and path.exists():
        raise HxaconvError(f"--revision {revision} is for Hub ids; {text} is here", hint="Leave it out.")
    if path.is_dir():
        return open_folder(path, label=text)
    if path.exists():
        return open_file(path, label=text)
    if isinstance(spec, Path) or _looks_like_path(text):
        raise HxaconvError(
            f"{text} does not exist",
            hint="Expected a folder, a .safetensors/.pth/.pt/.bin file, or a Hub id such as RekaAI/reka-flash-3.",
        )
    name, _, pinned = text.partition("@")
    if revision and pinned and revision != pinned:
        raise HxaconvError(f"{text} and --revision {revision} name two revisions", hint="Leave one of them out.")
    return open_hub(name, revision or pinned or None, label=text, progress=progress)


def _looks_like_path(text: str) -> bool:
    return (
        _HUB_ID.match(text) is None
        or text.startswith((".", "/", "~"))
        or text.partition("@")[0].endswith((*WEIGHTS, ".json"))
    )
