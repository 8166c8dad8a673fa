"""A model run layer by layer: one layer's weights in memory, as many residual streams as one likes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hxaconv.errors import HxaconvError
from hxaconv.formats.dtypes import parse_dtype
from hxaconv.forward import hxa079, llama
from hxaconv.forward.chunked import chunked
from hxaconv.forward.weights import Weights
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD
from hxaconv.surgery.arithmetic import torch_dtype

LOGIT_BYTES = 64 * 2**20
"""Memory for the logits of some tokens over the whole vocabulary."""

LOOP_TOKENS = 64
"""Longer inputs run on the chunked recurrence."""


def reference_of(model: Model) -> ModuleType:
    """The file of the reference forward that describes this model."""
    return hxa079 if isinstance(model.config, StudentConfig) else llama


def compute_settings(dtype: str, device: str) -> tuple[torch.dtype, str]:
    """The torch dtype and device to run on.

    Raises:
        HxaconvError: for a dtype in which agreement would mean nothing, and a device that is not there.
    """
    name = parse_dtype(dtype)
    if name not in ("F32", "F64"):
        raise HxaconvError(f"the reference forward does not run in {dtype}", hint="Use float32 or float64.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise HxaconvError(f"device {device!r} cannot be used: {reason}", hint="Use --device cpu.") from None
    return torch_dtype(name), device


@dataclass
class Stream:
    """A residual stream (B, T, C) on its way through the layers, with what its layers hand on."""

    x: Tensor
    carry: hxa079.Carry = field(default_factory=hxa079.Carry)
    mixed: Tensor | None = None
    """What the last layer's mixer added."""


class Runner:
    """One model's layers, applied to streams."""

    def __init__(self, model: Model, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.model, self.reference = model, reference_of(model)
        self.weights = Weights(model.plan, dtype=dtype, device=device)

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.model.config

    def start(self, ids: Tensor) -> Stream:
        """Embed the tokens (B, T)."""
        return Stream(self.weights.rows(EMBEDDING, ids))

    def layer(self, stream: Stream, index: int, *, without_mixer: bool = False) -> None:
        """Move a stream through one layer."""
        normed = self.normed(stream.x, index)
        stream.mixed = torch.zeros_like(normed) if without_mixer else self.mixer(normed, index, stream.carry)
        stream.x = self.reference.feed_forward(stream.x + stream.mixed, self.weights, self.config, index)

    def normed(self, x: Tensor, index: int) -> Tensor:
        """What a layer's mixer sees of a residual stream."""
        normed: Tensor = self.reference.input_norm(x, self.weights, self.config, index)
        return normed

    def mixer(self, normed: Tensor, index: int, carry: hxa079.Carry) -> Tensor:
        """The mixer of a layer on a normed input; `carry` matters to students only."""
        arguments: tuple[Any, ...] = (normed, self.weights, self.config, index)
        if not isinstance(self.config, StudentConfig):
            attended: Tensor = self.reference.attention(*arguments)
            return attended
        recurrence = self.reference.loop if normed.shape[1] <= LOOP_TOKENS else chunked
        mixed: Tensor = self.reference.mixer(*arguments, carry, recurrence)
        # Nobody continues these tokens.
        carry.states.clear()
        carry.caches.clear()
        return mixed

    @property
    def tokens_per_step(self) -> int:
        """How many tokens' logits are made at once."""
        return max(1, LOGIT_BYTES // (self.config.vocab_size * self.weights.dtype.itemsize))

    def logits(self, streams: list[Tensor], step: int) -> Iterator[list[Tensor]]:
        """Logits of residual streams after the last layer, `step` tokens at a time: (tokens, V) each.

        The head is read in slices, once for each step.
        """
        normed = [self.reference.final_norm(x, self.weights, self.config).flatten(0, 1) for x in streams]
        name = EMBEDDING if self.config.tie_word_embeddings else HEAD
        for start in range(0, len(normed[0]), step):
            some = [x[start : start + step] for x in normed]
            parts = [[linear(x, part) for x in some] for part in self.weights.slices(name)]
            yield [torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)]
