"""`--logits-out`: input_ids, logits and the residual stream after each layer, in one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from hxaconv.formats.dtypes import num_bytes
from hxaconv.formats.files import write_from
from hxaconv.model.config import ModelConfig
from hxaconv.save.diskio import output_error
from hxaconv.surgery.arithmetic import dtype_name


class Dump:
    """A safetensors file filled piece by piece, so that its tensors never stand in memory together."""

    def __init__(self, path: Path, config: ModelConfig, ids: Tensor, dtype: torch.dtype) -> None:
        batch, length = ids.shape
        self._vocabulary = config.vocab_size
        name = dtype_name(dtype)
        entries = {"input_ids": ("I64", (batch, length)), "logits": (name, (batch, length, config.vocab_size))}
        entries |= {f"hidden.{i}": (name, (batch, length, config.hidden_size)) for i in range(config.num_hidden_layers)}
        header: dict[str, dict[str, object]] = {}
        starts, position = {}, 0
        for key, (kind, shape) in entries.items():
            end = position + num_bytes(kind, shape)
            header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, end]}
            starts[key], position = position, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._starts = {key: 8 + len(text) + start for key, start in starts.items()}
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        write_from(self._fd, memoryview(len(text).to_bytes(8, "little") + text), 0)
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
        dump = Dump(growing, config, ids, dtype)
        try:
            yield dump
        finally:
            dump.close()
        os.replace(growing, path)
    except OSError as error:
        raise output_error(error, path, "writing") from error
    finally:
        growing.unlink(missing_ok=True)
