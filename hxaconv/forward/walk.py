"""Models walked through layer by layer: weights of the layer at hand in one arena, residual streams moved past them.

    with Walk({"teacher": teacher, "student": student}) as walk:
        stream = walk["teacher"].start(ids)
        for layer in walk.layers():
            walk["teacher"].layer(stream, layer)

Each byte of a layer is read once: while it is in the cache it is compared with the same tensor of the models before,
and its NaN and infinite values are counted. A tensor that two models have with the same bits is held once.
"""

from __future__ import annotations

import functools
import threading
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from hxaconv.errors import HxaconvError
from hxaconv.formats.dtypes import count_nonfinite
from hxaconv.forward import hxa079, llama
from hxaconv.forward.chunked import chunked
from hxaconv.forward.pool import BLOCK_BYTES, Matrix, Pool
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD, template_of
from hxaconv.model.plan import Buffers, Plan, Ranges, Recipe, has_rows, rows
from hxaconv.surgery.arithmetic import SERIAL_BYTES, tensor, tensor_rows, torch_dtype

SLICE_BYTES = 16 * 2**20
"""Of an embedding or a head: a whole one has 1.2 GB at Reka's vocabulary."""
LOOP_TOKENS = 64
"""Longer inputs run on the chunked recurrence."""
TOGETHER = 1024
"""Tokens that pass a product at once: beyond that, what stands in between takes more memory than it saves time."""
First = tuple[Tensor, Tensor] | None
"""v_first and k_first, (B, T, G, N) each; None before the first RWKV layer."""
SMALL = 1 << 16
"""Elements up to which a weight is cast as a whole at its first use."""
ALIGNMENT = 64
_LOCAL = threading.local()


def reference_of(model: Model) -> ModuleType:
    """The file of the reference forward that describes this model."""
    return hxa079 if isinstance(model.config, StudentConfig) else llama


def compute_dtype(name: str) -> torch.dtype:
    """What a forward computes in.

    Raises:
        HxaconvError: for a dtype in which agreement would mean nothing.
    """
    if name not in ("float32", "float64"):
        raise HxaconvError(f"the reference forward does not run in {name}", hint="Use float32 or float64.")
    found: torch.dtype = getattr(torch, name)
    return found


@dataclass
class Stream:
    """A residual stream (B, T, C) on its way through the layers, with what its layers hand on."""

    x: Tensor
    carry: hxa079.Carry = field(default_factory=hxa079.Carry)
    mixed: Tensor | None = None
    """What the last layer's mixer added."""


@dataclass(eq=False)
class Held:
    """A tensor in memory, as it is stored."""

    recipe: Recipe
    start: int
    """In the arena."""
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    nonfinite: int = 0
    """How many of its values are NaN or infinite."""
    twins: list[tuple[str, str, Held]] = field(default_factory=list)
    """Role, name and what is held of the same tensor of later models, which may have the same bits."""


class Walk:
    """One or several models, by role, and the weights of one layer of each."""

    def __init__(
        self,
        models: Mapping[str, Model],
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        workers: int | None = None,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.pool = Pool(workers, device)
        self.tracks = {role: Track(self, role, model) for role, model in models.items()}
        self._arena = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Walk:
        self.pool.__enter__()
        return self

    def __exit__(self, *what: object) -> None:
        self.pool.__exit__(*what)

    def __getitem__(self, role: str) -> Track:
        return self.tracks[role]

    def layers(self, indices: Iterable[int] | None = None) -> Iterator[int]:
        """Load one layer of all models after the other; by default from the first to the last.

        Weights of a layer are valid until the next one: keep none of them. Experts are read when tokens go to them.
        """
        count = max(track.config.num_hidden_layers for track in self.tracks.values())
        for layer in range(count) if indices is None else indices:
            self.hold({role: track.plans.get(layer, {}) for role, track in self.tracks.items()})
            yield layer
        self.release()

    def experts(self, layer: int) -> Iterator[int]:
        """Load one expert of a layer after the other, of all models, in place of what was held of the layer."""
        plans = {role: track.experts.get(layer, {}) for role, track in self.tracks.items()}
        for expert in sorted({expert for found in plans.values() for expert in found}):
            self.hold({role: found.get(expert, {}) for role, found in plans.items()})
            yield expert

    def slices(self, recipes: Mapping[str, Recipe], name: str) -> Iterator[tuple[int, int]]:
        """Hold a large matrix of each role under one name, some rows at a time: (first row, first one after)."""
        sizes = {recipe.nbytes // recipe.shape[0] for recipe in recipes.values()}
        count = max(recipe.shape[0] for recipe in recipes.values())
        step = max(1, SLICE_BYTES // max(sizes)) if all(map(has_rows, recipes.values())) else count
        for start in range(0, count, step):
            there = {role: recipe for role, recipe in recipes.items() if start < recipe.shape[0]}
            parts = {
                role: recipe
                if step >= count
                else rows(recipe, start, min(start + step, recipe.shape[0]), recipe.origin)
                for role, recipe in there.items()
            }
            self.hold({role: {name: part} for role, part in parts.items()})
            yield start, min(count, start + step)
        self.release()

    def hidden(self, role: str, ids: Tensor, advance: Callable[[int], None] = lambda layer: None) -> list[Tensor]:
        """What the head of one model sees of each sequence of ids (B, T), (T, C); `advance` is told each layer.

        Sequences go through a layer at the same time, so that all of its experts are held.
        """
        track = self.tracks[role]
        streams = [track.start(row) for row in torch.split(ids, 1)]
        for layer in range(track.config.num_hidden_layers):
            experts = track.experts.get(layer, {}).values()
            self.hold({role: dict(ChainMap(track.plans.get(layer, {}), *experts))})
            self.pool.map(functools.partial(track.layer, index=layer), streams)
            advance(layer)
        return [track.final_norm(stream.x) for stream in streams]

    def release(self) -> None:
        """Give the arena back."""
        self._forget()
        self._arena = torch.empty(0, dtype=torch.uint8)

    def hold(self, plans: Mapping[str, Plan]) -> None:
        """Read these tensors of each role into the arena, over those of before."""
        self._forget()
        known: dict[tuple[str, str, tuple[int, ...]], Held] = {}
        held, used = list[Held](), 0
        for role, plan in plans.items():
            for name, recipe in plan.items():
                first = known.get(key := (name, recipe.dtype, recipe.shape))
                if first is not None and first.recipe.make == recipe.make:
                    self.tracks[role].held[name] = first
                    continue
                held.append(one := Held(recipe, used))
                self.tracks[role].held[name] = one
                used += -(-recipe.nbytes // ALIGNMENT) * ALIGNMENT
                if first is None:
                    known[key] = one
                else:
                    first.twins.append((role, name, one))
        if used > len(self._arena):
            self._arena = torch.empty(used, dtype=torch.uint8)  # pages that are not written to take no memory
        for one in held:
            flat = self._arena[one.start : one.start + one.recipe.nbytes].view(torch_dtype(one.recipe.dtype))
            one.values = flat.view(one.recipe.shape)
        differing = self._read(list(known.values()))
        for first in known.values():
            for role, name, twin in first.twins:
                if twin not in differing:
                    self.tracks[role].held[name] = first
        self._read(list(differing))

    def _read(self, held: Sequence[Held]) -> set[Held]:
        """Read tensors; of their twins, only blocks to compare with: those of which one differs."""
        differing: set[Held] = set()

        def read(job: tuple[Held, int, int]) -> int:
            one, start, stop = job
            flat = one.values.reshape(-1).view(torch.uint8)
            block = memoryview(flat.numpy())[start:stop]  # type: ignore[arg-type]
            _read_into(one.recipe, start, block)
            for _, _, twin in one.twins:
                if twin not in differing and not _equals(twin.recipe, block, start, stop):
                    differing.add(twin)
            return count_nonfinite(block, one.recipe.dtype)

        jobs = [(one, start, stop) for one in held for start, stop in _blocks(one.recipe)]
        for (one, _, _), count in zip(jobs, self.pool.map(read, jobs), strict=True):
            one.nonfinite += count
        return differing

    def _forget(self) -> None:
        for track in self.tracks.values():
            track.cast, track.held = {}, {}

    def held(self, role: str) -> Mapping[str, Held]:
        """What is in memory of a model now; nothing of one that is not there. What two have alike is one `Held`."""
        return self.tracks[role].held if role in self.tracks else {}

    def product(self, x: Tensor, stored: Tensor) -> Tensor:
        """x (tokens, columns) times some rows of a weight as it is stored -> (tokens, rows)."""
        return Matrix(stored.to(self.device), self.dtype, self.pool).product(x)

    def each(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A function of (B, T, ...) applied to every sequence: what it needs in between does not grow with B."""
        return torch.cat(self.pool.map(function, torch.split(x, 1)))


class Track:
    """One model of a walk: its forward, with the weights of the layer at hand."""

    def __init__(self, walk: Walk, role: str, model: Model) -> None:
        self.model, self.config = model, model.config
        self.reference = reference_of(model)
        self._walk, self.role = walk, role
        self.plans: dict[int | None, Plan] = {}
        """Layer -> its tensors; None -> those that are in no layer."""
        self.experts: dict[int | None, dict[int, Plan]] = {}
        """Layer -> expert -> its tensors."""
        for name, recipe in model.plan.items():
            _, layer, expert = template_of(name)
            of_layer = self.plans.setdefault(layer, {})
            (of_layer if expert is None else self.experts.setdefault(layer, {}).setdefault(expert, {}))[name] = recipe
        self.held: dict[str, Held] = {}
        """What is in memory now."""
        self.cast: dict[str, Tensor] = {}
        """Small weights of it in the compute dtype."""

    def weight(self, name: str) -> Tensor:
        """A weight for the reference forward: in the compute dtype, a large one as a Matrix."""
        if name in self.cast:
            return self.cast[name]
        held = self.held.get(name)
        stored = (tensor(self.model.plan[name]) if held is None else held.values).to(self._walk.device)
        if stored.dim() == 2 and stored.numel() > SMALL:
            return cast(Tensor, Matrix(stored, self._walk.dtype, self._walk.pool))
        found = self.cast[name] = stored.to(self._walk.dtype)
        return found

    def start(self, ids: Tensor) -> Stream:
        """Embed the tokens (B, T): only their rows are read."""
        return Stream(tensor_rows(self.model.plan[EMBEDDING], ids, dtype=self._walk.dtype).to(self._walk.device))

    def layer(self, stream: Stream, index: int) -> None:
        """Move a stream through one layer."""
        self.mix([stream], index)
        self.feed([stream], index)

    def normed(self, x: Tensor, index: int) -> Tensor:
        """What a layer's mixer sees of a residual stream."""
        normed: Tensor = self.reference.input_norm(x, self.weight, self.config, index)
        return normed

    def mix(self, streams: Sequence[Stream], index: int) -> None:
        """The first half of a layer: what the mixer adds is added, and kept as `mixed`."""
        alike = len({(stream.x.shape[1], stream.carry.v_first is None) for stream in streams}) == 1
        few = sum(stream.x.shape[0] * stream.x.shape[1] for stream in streams) <= TOGETHER
        # At once where that goes: the weights are cast once for all of them.
        for some in [list(streams)] if alike and few else [[stream] for stream in streams]:
            carry = hxa079.Carry(_joined([s.carry.v_first for s in some]), _joined([s.carry.k_first for s in some]))
            mixed = self.mixer(self.normed(torch.cat([stream.x for stream in some]), index), index, carry)
            sizes = [len(stream.x) for stream in some]
            firsts = zip(_parted(carry.v_first, sizes), _parted(carry.k_first, sizes), strict=True)
            for stream, part, (v, k) in zip(some, torch.split(mixed, sizes), firsts, strict=True):
                stream.mixed, stream.carry, stream.x = part, hxa079.Carry(v, k), stream.x + part

    def feed(self, streams: Sequence[Stream], index: int) -> None:
        """The second half of a layer, the MLP."""
        tokens = torch.cat([stream.x.flatten(0, 1) for stream in streams])
        # An expert is read once for all tokens that go to it.
        together = len(tokens) if self.config.has_experts(index) else TOGETHER
        moved = [
            self.reference.feed_forward(chunk[None], self.weight, self.config, index)[0]
            for chunk in torch.split(tokens, together)
        ]
        sizes = [stream.x.shape[0] * stream.x.shape[1] for stream in streams]
        for stream, x in zip(streams, torch.split(torch.cat(moved), sizes), strict=True):
            stream.x = x.view_as(stream.x)

    def mixer(self, normed: Tensor, index: int, carry: hxa079.Carry) -> Tensor:
        """The mixer of a layer on a normed input; `carry` matters to students only."""
        arguments: tuple[Any, ...] = (normed, self.weight, self.config, index)
        if not isinstance(self.config, StudentConfig):
            attended: Tensor = self.reference.attention(*arguments)
            return attended
        recurrence = self.reference.loop if normed.shape[1] <= LOOP_TOKENS else chunked
        mixed: Tensor = self.reference.mixer(*arguments, carry, recurrence)
        carry.states.clear()
        carry.caches.clear()
        return mixed

    @property
    def head(self) -> Recipe:
        """The output matrix (V, C)."""
        return self.model.plan[EMBEDDING if self.config.tie_word_embeddings else HEAD]

    def final_norm(self, x: Tensor) -> Tensor:
        """What the head sees of the residual stream, (tokens, C)."""
        normed: Tensor = self.reference.final_norm(x, self.weight, self.config)
        return normed.flatten(0, 1)


def time_mix(
    normed: Tensor,
    get: hxa079.Get,
    config: StudentConfig,
    layer: int,
    first: First,
    each: Callable[[Callable[[int], tuple[Tensor, First]], range], Iterable[tuple[Tensor, First]]] = map,
) -> tuple[Tensor, First]:
    """An RWKV mixer on normed inputs (B, T, C), from an empty state: (output, what it hands on).

    `each` sequence by itself: what is needed in between does not grow with B.
    """

    def one(i: int) -> tuple[Tensor, First]:
        carry = hxa079.Carry(first[0][i : i + 1], first[1][i : i + 1]) if first else hxa079.Carry()
        output = hxa079.time_mix(normed[i : i + 1], get, config, layer, carry, chunked)
        assert carry.v_first is not None and carry.k_first is not None
        return output, (carry.v_first, carry.k_first)

    outputs, firsts = zip(*each(one, range(len(normed))), strict=True)
    if first is None:
        first = torch.cat([pair[0] for pair in firsts]), torch.cat([pair[1] for pair in firsts])
    return torch.cat(outputs), first


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def _parted(whole: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if whole is None else torch.split(whole, sizes)


def _blocks(recipe: Recipe) -> Iterator[tuple[int, int]]:
    """Ranges of bytes that can be read alone; a tensor that has to be made is made whole."""
    step = BLOCK_BYTES if isinstance(recipe.make, Ranges) else max(1, recipe.nbytes)
    for start in range(0, recipe.nbytes, step):
        yield start, min(recipe.nbytes, start + step)


def _read_into(recipe: Recipe, start: int, room: memoryview) -> None:
    """The bytes of a tensor from `start` on."""
    done = 0
    if isinstance(recipe.make, Ranges):
        for extent in recipe.make.part(start, len(room)).extents:
            place = room[done : done + extent.nbytes]
            if extent.file is None:
                place[:] = bytes(extent.nbytes)
            else:
                for _ in extent.file.chunks(extent.offset, extent.nbytes, place):
                    pass
            done += extent.nbytes
        return
    assert start == 0 and len(room) == recipe.nbytes
    for chunk in recipe.chunks(Buffers(SERIAL_BYTES)):
        room[done : done + len(chunk)] = chunk
        done += len(chunk)


def _equals(recipe: Recipe, expected: memoryview, start: int, stop: int) -> bool:
    """Whether a range of a tensor has these bytes."""
    alone = isinstance(recipe.make, Ranges)
    size = stop - start if alone else recipe.nbytes
    buffer: bytearray = getattr(_LOCAL, "buffer", bytearray())
    if len(buffer) < size:
        buffer = _LOCAL.buffer = bytearray(size)
    room = memoryview(buffer)[:size]
    _read_into(recipe, start if alone else 0, room)
    found = room if alone else room[start:stop]
    # Comparing memoryviews is thirty times as slow.
    return np.array_equal(np.frombuffer(found, np.uint8), np.frombuffer(expected, np.uint8))
