"""`--logits-out`: logits and residual streams in one safetensors file, written as they come."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from hxaconv.formats.diskio import explained
from hxaconv.formats.files import write_from
from hxaconv.formats.safetensors import file_layout
from hxaconv.model.config import ModelConfig
from hxaconv.model.plan import Ranges, Recipe
from hxaconv.surgery.arithmetic import dtype_name


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
        for offset, data in layout.segments():
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
