"""`maps`: the shipped layer maps, one of them, or the table of tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from hxaconv.model import layer_maps
from hxaconv.model.layer_maps import LayerMap
from hxaconv.model.names import TABLE
from hxaconv.options import Argument, Option
from hxaconv.progress import Result


@dataclass(frozen=True, repr=False)
class Maps(Result):
    """Layer maps by name; `names`: the table of tensor names instead."""

    maps: Mapping[str, LayerMap]
    name: str | None = None
    """The one that was named."""
    names: bool = False

    @property
    def headline(self) -> str:
        """Which maps these are."""
        return f"the names of {len(TABLE)} kinds of tensors" if self.names else ", ".join(self.maps)

    def to_dict(self) -> dict[str, Any]:
        """The maps by name; one that was named, by itself."""
        if self.names:
            return {"names": [asdict(row) for row in TABLE]}
        keys = ("name", "title", "model_ids", "gqa_layers", "source", "model")
        found = {name: {key: getattr(one, key) for key in keys} for name, one in self.maps.items()}
        return found if self.name is None else found[self.name]


def maps(
    name: Annotated[str | None, Argument("A map to show: its name or a TOML file.")] = None,
    *,
    names: Annotated[bool, Option("Print the table of tensor names instead.")] = False,
) -> Maps:
    """List the shipped layer maps, or show one.

    Command line:
        hxaconv maps
        hxaconv maps reka-flash-3

    Raises:
        HxaconvError: where there is no such map.
    """
    if names:
        return Maps({}, names=True)
    if name is not None:
        return Maps({name: layer_maps.load(name)}, name)
    return Maps(layer_maps.shipped())
