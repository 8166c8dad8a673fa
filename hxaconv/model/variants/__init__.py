"""The variants of the RWKV layer, one file each; see README.md. Others ask `StudentConfig.variant`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from hxaconv.model.variants.base import Variant


def _all() -> dict[str, Variant]:
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {module.VARIANT.name: module.VARIANT for module in modules if hasattr(module, "VARIANT")}


VARIANTS = _all()
"""By name, sorted."""


def matching(parameters: Iterable[str]) -> tuple[Variant, ...]:
    """The variants that have exactly these parameters in their RWKV layers, optional ones aside."""
    found = set(parameters)
    return tuple(
        variant
        for variant in VARIANTS.values()
        if variant.required <= found <= {parameter.name for parameter in variant.parameters}
    )


def nearest(parameters: Iterable[str]) -> Variant:
    """The variant that differs from these parameters in the fewest names."""
    found = set(parameters)
    return min(VARIANTS.values(), key=lambda variant: len(variant.required ^ found))
