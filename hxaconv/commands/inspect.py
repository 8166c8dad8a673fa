"""`inspect`: what a checkpoint is, from its headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from hxaconv.calls import Call
from hxaconv.load import inspection, open_checkpoint
from hxaconv.options import Option, Source
from hxaconv.progress import Result


@dataclass(frozen=True, repr=False)
class Inspection(Result):
    """What a checkpoint is: facts by name, as `hxaconv inspect --json` prints them; sizes in bytes."""

    facts: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """One fact."""
        return self.facts[name]

    @property
    def headline(self) -> str:
        """Path, format, variant and size."""
        facts = self.facts
        return f"{facts['path']}, {facts['format']}, {facts['variant']}, {facts['parameters']:,} parameters"

    def to_dict(self) -> dict[str, Any]:
        """All facts."""
        return dict(self.facts)


def inspect(
    source: Source,
    *,
    stats: Annotated[bool, Option("Read every weight: ranges, NaN and Inf.")] = False,
    revision: Annotated[
        str | None, Option("Branch, tag or commit of a Hub source.", panel="Teacher and settings")
    ] = None,
    call: Call,
) -> Inspection:
    """Describe a checkpoint, from its headers alone.

    With --stats, every weight is read. A pickle on the Hub has to be downloaded before it can be read.

    Command line:
        hxaconv inspect RekaAI/reka-flash-3
        hxaconv inspect student.pth --stats --json

    Raises:
        HxaconvError: when there is nothing there, or it is damaged.
    """
    checkpoint = open_checkpoint(source, revision=revision, validate=False, progress=call.progress)
    return Inspection(inspection.inspect(checkpoint, stats=stats))
