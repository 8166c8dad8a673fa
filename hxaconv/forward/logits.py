"""Logits over a vocabulary that is never held whole: KL(p || q) block by block, and `--logits-out` in one file."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hxaconv.formats.diskio import explained
from hxaconv.formats.files import write_from
from hxaconv.formats.safetensors import file_layout
from hxaconv.forward.pool import ROWS
from hxaconv.model.config import ModelConfig
from hxaconv.model.plan import Ranges, Recipe
from hxaconv.surgery.arithmetic import dtype_name

if TYPE_CHECKING:
    from hxaconv.forward.walk import Walk


class Dump:
    """A safetensors file filled in chunks, so that its tensors never stand in memory together."""

    def __init__(self, path: Path, config: ModelConfig, ids: Tensor, dtype: torch.dtype) -> None:
        batch, length = ids.shape
        self._vocabulary = config.vocab_size
        name = dtype_name(dtype)
        shapes = {f"hidden.{i}": (batch, length, config.hidden_size) for i in range(config.num_hidden_layers)}
        shapes = {"logits": (batch, length, config.vocab_size), **shapes}
        plan = {key: Recipe(name, shape, Ranges(()), "a forward") for key, shape in shapes.items()}
        layout = file_layout(path.name, {"input_ids": Recipe("I64", (batch, length), Ranges(()), "given"), **plan})
        self._starts = {fill.name: fill.offset for fill in layout.fills}
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        for offset, data in layout.segments:
            write_from(self._fd, memoryview(data), offset)
        self.append("input_ids", ids)

    def append(self, name: str, values: Tensor) -> None:
        """Write values after those already written of this tensor."""
        data = memoryview(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        write_from(self._fd, data, self._starts[name])
        self._starts[name] += len(data)

    def place(self, name: str, start: int, values: Tensor) -> None:
        """Write columns from `start` on of a tensor whose last axis is the vocabulary, (tokens, columns)."""
        first, row = self._starts[name], self._vocabulary * values.element_size()
        for i, line in enumerate(values.detach().cpu().contiguous()):
            data = memoryview(line.view(torch.uint8).numpy())
            write_from(self._fd, data, first + i * row + start * values.element_size())

    def close(self) -> None:
        """Nothing more comes."""
        os.close(self._fd)


@contextmanager
def dumping(path: Path | None, config: ModelConfig, ids: Tensor | None, dtype: torch.dtype) -> Iterator[Dump | None]:
    """A dump that gets the name `path` when it is complete; None without a path.

    Raises:
        HxaconvError: where the file cannot be written; it is not there then.
    """
    if path is None or ids is None:
        yield None
        return
    growing = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with explained(path):
            dump = Dump(growing, config, ids, dtype)
            try:
                yield dump
            finally:
                dump.close()
            os.replace(growing, path)
    finally:
        growing.unlink(missing_ok=True)


LOGITS_AT_ONCE = 2**18
"""Elements of a block of logits: in float64, and with its temporaries, some 12 MB."""


class Divergence:
    """KL(p || q) per token in nats for several q, from logits that come in blocks of the vocabulary, in float64."""

    def __init__(self) -> None:
        self._log_p = torch.empty(0)
        self._log_q: list[Tensor] = []
        self._moved: list[Tensor] = []
        """sum of p (z - y) over the blocks so far, z and y the logits of p and q, p by the normaliser so far."""

    def add(
        self, p: Tensor, count: int, logits: Callable[[int], Tensor], each: Callable[..., Iterable[None]] = map
    ) -> None:
        """Logits (tokens, block) of p over the next block; `logits(i)` gives those of q number i of `count`."""
        z = p.double()
        if not self._log_q:
            self._log_p = z.new_full(z.shape[:1], -torch.inf)
            self._log_q = [self._log_p.clone() for _ in range(count)]
            self._moved = [torch.zeros_like(self._log_p) for _ in range(count)]
        before, self._log_p = self._log_p, torch.logaddexp(self._log_p, z.logsumexp(dim=-1))
        shrink, share = (before - self._log_p).exp(), (z - self._log_p[:, None]).exp()

        def one(i: int) -> None:
            y = logits(i).double()
            self._log_q[i] = torch.logaddexp(self._log_q[i], y.logsumexp(dim=-1))
            self._moved[i] = self._moved[i] * shrink + (share * (z - y)).sum(dim=-1)

        list(each(one, range(count)))

    def result(self) -> list[Tensor]:
        """(tokens) for every q."""
        return [m - self._log_p + q for m, q in zip(self._moved, self._log_q, strict=True)]


TOKENS_AT_ONCE = 64


def kl_and_gradient(walk: Walk, role: str, hidden: Tensor, other: str, wanted: Tensor) -> tuple[float, Tensor]:
    """(mean KL in nats per token, its gradient with respect to `hidden`) of what the heads of two models see, (T, C).

    The KL is from the distribution that model `other` has of `wanted` to that which model `role` has of `hidden`.
    Whole logits of both are held, (T, V).
    """
    seen = {role: hidden, other: wanted}
    heads = {name: walk[name].head for name in seen}
    logits = {name: wanted.new_empty(len(wanted), head.shape[0]) for name, head in heads.items()}
    for start, stop in walk.slices(heads, "head"):
        for name, x in seen.items():
            logits[name][:, start:stop] = walk.product(x, walk.held(name)["head"].values)
    kl = []
    # Two matrices of logits are enough: some tokens at a time, the model's become the gradient.
    for mine, theirs in zip(*(torch.split(logits[name], TOKENS_AT_ONCE) for name in seen), strict=True):
        q, p = mine.log_softmax(dim=-1), theirs.log_softmax(dim=-1)
        kl.append((p.exp() * (p - q)).sum(dim=-1))
        mine.copy_(q.exp_().sub_(p.exp_()).div_(len(wanted)))
    gradient = torch.zeros_like(hidden)
    for start, stop in walk.slices({role: walk[role].head}, "head"):
        block = walk.held(role)["head"].values.to(walk.device, gradient.dtype)
        columns = torch.split(logits[role][:, start:stop], ROWS)
        gradient += torch.cat(walk.pool.map(functools.partial(torch.mm, mat2=block), columns))
    return float(torch.cat(kl).double().mean()), gradient
