"""NaN and infinite values in an output: counted while it was written, refused where nobody has allowed them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hxaconv.errors import HxaconvError, bullet_list
from hxaconv.model.plan import Recipe
from hxaconv.save.checksums import Finished
from hxaconv.save.target import Output


class NonfiniteError(HxaconvError):
    """Tensors that hold NaN or infinite values, which nobody has allowed."""


def nonfinite_counts(tensors: Mapping[str, Finished]) -> dict[str, int]:
    """Tensor -> how many of its values are not finite, for those that have any."""
    return {name: tensor.nonfinite for name, tensor in tensors.items() if tensor.nonfinite}


def refuse_nonfinite(output: Output, tensors: Mapping[str, Finished]) -> None:
    """Name all tensors with NaN or infinite values.

    Raises:
        NonfiniteError: when there are any.
    """
    counts = {name: tensors[name].nonfinite for name in output.tensors if tensors[name].nonfinite}
    recipes = [output.tensors[name] for name in counts]
    problems = [
        f"{name}: {count} of {recipe.numel} ({recipe.origin})"
        for (name, count), recipe in zip(counts.items(), recipes, strict=True)
    ]
    if problems:
        message = f"these tensors hold NaN or infinite values:\n{bullet_list(problems)}"
        raise NonfiniteError(message, hint=_hint(recipes))


def _hint(recipes: Sequence[Recipe]) -> str:
    if any(recipe.dtype == "F16" and recipe.make.kind in ("cast", "scale") for recipe in recipes):
        return "float16 ends at 65504: use --dtype bfloat16 or float32, or add --allow-nonfinite."
    return "The source is damaged or its training diverged. To convert it all the same, add --allow-nonfinite."
