"""Weight files of a source that can stand in the output as they are."""

from __future__ import annotations

from hxaconv.formats.files import SourceFile
from hxaconv.formats.safetensors_layout import Shard, shard_layouts
from hxaconv.model.model import Checkpoint
from hxaconv.model.plan import Plan, Recipe, total_bytes


def kept_shards(source: Checkpoint, before: Plan, after: Plan, max_shard_bytes: int) -> list[Shard] | None:
    """The source's own sharding for the new plan, so that shards without a change need not be written again.

    A shard that became larger than allowed is split. None where the source is no local safetensors folder.
    """
    ours = all(file in source.files for recipe in before.values() for file in recipe.make.sources())
    if source.container != "safetensors" or source.repo is not None or not ours:
        return None
    groups: dict[str, Plan] = {file.name: {} for file in source.files}
    for name, recipe in after.items():
        groups[_home(name, recipe, before)][name] = recipe
    shards = []
    for file in source.files:
        group = groups[file.name]
        held = {name for name, recipe in source.plan.items() if _file_of(recipe) is file}
        same = set(group) == held and all(after[name] is before[name] for name in group)
        if group and same and total_bytes(group) <= max_shard_bytes:
            linkable = file.path is not None and not file.path.is_symlink()
            shards.append(Shard(tuple(group), file if linkable else None))
        elif group:
            layouts = shard_layouts(group, max_shard_bytes)
            shards += [Shard(tuple(fill.name for fill in layout.fills)) for layout in layouts]
    return shards


def _home(name: str, recipe: Recipe, before: Plan) -> str:
    """The source file whose successor a tensor goes into: its own, or, where it is new, its layer's."""
    if before.get(name) is not recipe:
        prefix = name[: name.index("self_attn.")]
        recipe = next(found for known, found in before.items() if known.startswith(prefix))
    return _file_of(recipe).name


def _file_of(recipe: Recipe) -> SourceFile:
    return next(iter(recipe.make.sources()))
