"""`inspect`: what a checkpoint is, from its headers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.load.inspection import inspect

if TYPE_CHECKING:
    from hxaconv.progress import Progress


def run(
    source: str, *, revision: str | None = None, stats: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Say what `source` is, from its headers alone unless `stats`: then every weight is read.

    Args:
        source: Folder, file or Hub id (`org/name@revision`).
        revision: Branch, tag or commit of a Hub id.
        stats: Report ranges, NaN and infinite values of every tensor.
        progress: Told of downloads: a pickle on the Hub has to be here before it can be read.

    Returns:
        Plain data, the same as `hxaconv inspect --json` prints; sizes in bytes.

    Raises:
        HxaconvError: when there is nothing there, or it is damaged.
    """
    return inspect(open_checkpoint(source, revision=revision, judged=False, progress=progress), stats=stats)
