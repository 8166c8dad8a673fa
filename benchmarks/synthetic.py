"""Synthetic checkpoints of any size, with Reka Flash 3's proportions: random finite values, or sparse files.

    python benchmarks/synthetic.py OUT --kind teacher --bytes 4GB
    python benchmarks/synthetic.py OUT.pth --kind student --container legacy --bytes 1GB
    python benchmarks/synthetic.py OUT --kind teacher --reka --sparse

Values are written a few MiB at a time, so that a checkpoint may be larger than memory. A sparse checkpoint
has Reka's exact shapes and right headers, and holes where its values (all zero) would be: it takes no disk.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hxaconv.formats import FileLayout, safetensors, torchzip
from hxaconv.formats.dtypes import BY_NAME, num_bytes, parse_dtype
from hxaconv.formats.gathered import contiguous_strides
from hxaconv.formats.json_files import as_bytes
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import ModelConfig, TeacherConfig, student_of, teacher_config
from hxaconv.model.layer_maps import uniform
from hxaconv.model.names import stored_name
from hxaconv.model.plan import Plan, Ranges, Recipe
from hxaconv.options import parse_size
from hxaconv.save.documents import student_json

REKA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 44,
    "hidden_size": 6144,
    "intermediate_size": 19648,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 100352,
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 8000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SCALED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
KEY_FORMATS = {"hf": "hf", "pth": "rwkv", "legacy": "rwkv"}
PIECE_ELEMENTS = 4 * 1024 * 1024
VALUE_BITS = {
    "BF16": ("<u2", 0x81FF, 117 << 7),
    "F16": ("<u2", 0x87FF, 5 << 10),
    "F32": ("<u4", 0x81FFFFFF, 117 << 23),
}
"""Bits that are random, and the lowest exponent."""


def scaled_reka(nbytes: int, itemsize: int) -> dict[str, Any]:
    """Reka's config narrowed by 1, 2, 4 or 8 so that `nbytes` give about a dozen layers."""
    for divisor in (1, 2, 4, 8):
        raw = REKA | {key: REKA[key] // divisor for key in SCALED} | {"num_hidden_layers": 1}
        fixed, layer = _bytes_per_part(raw, itemsize)
        layers = round((nbytes - fixed) / layer)
        if layers >= 10 or divisor == 8:
            return raw | {"num_hidden_layers": max(2, layers)}
    raise AssertionError


def _bytes_per_part(raw: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    """(bytes outside the layers, bytes of a layer) of a teacher."""
    one, two = (
        sum(num_bytes("U8", shape) for shape in expected_tensors(_teacher({**raw, "num_hidden_layers": n})).values())
        for n in (1, 2)
    )
    return (2 * one - two) * itemsize, (two - one) * itemsize


def _teacher(raw: Mapping[str, Any]) -> TeacherConfig:
    return teacher_config(raw, where="benchmark")


class Values:
    """Random bits whose exponent lies in a narrow range: finite, about 0.006 in size, not compressible."""

    def __init__(self, seed: int, head_dim: int) -> None:
        self.seed = seed
        self.constants = {"layer_architecture": 78.0, "head_size_record": float(head_dim)}

    def chunks(self, name: str, recipe: Recipe) -> Iterator[bytes]:
        """The tensor's bytes; the same for the same seed and name."""
        kind, mask, base = VALUE_BITS[recipe.dtype]
        parameter = name.rpartition(".")[2]
        if parameter in self.constants:
            yield _constant(self.constants[parameter], recipe.dtype)
            return
        generator = np.random.Generator(np.random.SFC64([self.seed, zlib.crc32(name.encode())]))
        left = recipe.numel
        while left:
            count = min(left, PIECE_ELEMENTS)
            bits = np.frombuffer(generator.bytes(count * np.dtype(kind).itemsize), dtype=kind)
            yield ((bits & mask) + base).astype(kind).tobytes()
            left -= count


def _constant(value: float, dtype: str) -> bytes:
    if dtype == "BF16":
        return np.float32(value).tobytes()[2:]
    return np.dtype({"F16": "<f2", "F32": "<f4"}[dtype]).type(value).tobytes()


Fill = Callable[[str, Recipe], Iterator[bytes]]


def write_layout(layout: FileLayout, folder: Path, fill: Fill | None) -> None:
    """A laid-out file with its tensors filled in; without `fill` it stays sparse."""
    crcs: dict[str, int] = {}
    with open(folder / layout.name, "wb") as file:
        file.truncate(layout.size)
        _write_segments(file, layout.segments())
        for tensor in layout.fills:
            if fill is None:
                crcs[tensor.name] = _crc_of_zeros(tensor.recipe.nbytes)
                continue
            file.seek(tensor.offset)
            crc = 0
            for piece in fill(tensor.name, tensor.recipe):
                file.write(piece)
                crc = zlib.crc32(piece, crc) if layout.seal else 0
            crcs[tensor.name] = crc
        if layout.seal is not None:
            _write_segments(file, layout.seal(crcs))
        _sync(file)


def _write_segments(file: BinaryIO, segments: Any) -> None:
    for offset, data in segments:
        file.seek(offset)
        file.write(data)


def _sync(file: BinaryIO) -> None:
    # Written back and dropped: what was generated should not take the page cache from what is measured.
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@functools.cache
def _crc_of_zeros(count: int) -> int:
    zeros, crc = bytes(8 * 1024 * 1024), 0
    while count:
        part = min(count, len(zeros))
        crc = zlib.crc32(zeros[:part], crc)
        count -= part
    return crc


class _Storage:
    def __init__(self, key: str, recipe: Recipe) -> None:
        self.key, self.recipe = key, recipe


class _Tensor:
    def __init__(self, key: str, recipe: Recipe) -> None:
        self.storage, self.shape = _Storage(key, recipe), recipe.shape

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        strides = contiguous_strides(self.shape)
        arguments = (self.storage, 0, self.shape, strides, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _LegacyPickler(pickle.Pickler):
    def persistent_id(self, item: Any) -> Any:
        import torch

        if not isinstance(item, _Storage):
            return None
        storage = getattr(torch, str(BY_NAME[item.recipe.dtype].storage_class))
        return "storage", storage, item.key, "cpu", item.recipe.numel, None


def write_legacy(path: Path, plan: Plan, fill: Fill | None) -> None:
    """The form that torch.save had before zip files: five pickles, then every storage behind its length."""
    keys = {name: str(1_000_000 + index) for index, name in enumerate(plan)}
    state = collections.OrderedDict((name, _Tensor(keys[name], recipe)) for name, recipe in plan.items())
    system = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    with open(path, "wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, system):
            pickle.dump(value, file, protocol=2)
        _LegacyPickler(file, protocol=2).dump(state)
        pickle.dump(sorted(keys.values()), file, protocol=2)
        for name, recipe in plan.items():
            file.write(recipe.numel.to_bytes(8, "little"))
            if fill is None:
                file.seek(recipe.nbytes, os.SEEK_CUR)
            else:
                file.writelines(fill(name, recipe))
        file.truncate(file.tell())
        _sync(file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to make."""

    kind: str
    container: str = "hf"
    dtype: str = "BF16"
    nbytes: int | None = None
    """None: Reka's exact shapes."""
    sparse: bool = False
    max_shard_bytes: int = 1_000_000_000
    gqa_layers: tuple[int, ...] | None = None
    seed: int = 0


def make(target: Path, wanted: Wanted) -> int:
    """Write a checkpoint; returns the bytes of its tensors."""
    itemsize = BY_NAME[wanted.dtype].itemsize
    raw = REKA if wanted.nbytes is None else scaled_reka(wanted.nbytes, itemsize)
    raw = raw | {"torch_dtype": BY_NAME[wanted.dtype].torch_name}
    config, document = _config(raw, wanted)
    key_format = KEY_FORMATS[wanted.container]
    plan = {
        stored_name(name, key_format): Recipe(wanted.dtype, shape, Ranges(()), "synthetic")
        for name, shape in expected_tensors(config).items()
    }
    fill = None if wanted.sparse else Values(wanted.seed, config.head_dim).chunks
    text = json.dumps(document, indent=2) + "\n"
    if wanted.container == "hf":
        target.mkdir(parents=True, exist_ok=True)
        layouts = safetensors.shard_layouts(plan, wanted.max_shard_bytes)
        for layout in layouts:
            write_layout(layout, target, fill)
        if len(layouts) > 1:
            (target / safetensors.INDEX_NAME).write_bytes(as_bytes(safetensors.index(plan, layouts)))
        (target / "config.json").write_text(text)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        if wanted.container == "pth":
            write_layout(torchzip.file_layout(target.name, plan), target.parent, fill)
        else:
            write_legacy(target, plan, fill)
        target.with_suffix(".json").write_text(text)
    return sum(recipe.nbytes for recipe in plan.values())


def _config(raw: dict[str, Any], wanted: Wanted) -> tuple[ModelConfig, dict[str, Any]]:
    teacher = _teacher(raw)
    if wanted.kind == "teacher":
        return teacher, raw
    layers = uniform(teacher.num_hidden_layers) if wanted.gqa_layers is None else wanted.gqa_layers
    student = student_of(teacher, layers)
    return student, student_json(student, raw, wanted.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder, or NAME.pth")
    parser.add_argument("--kind", choices=("teacher", "student"), default="teacher")
    parser.add_argument("--container", choices=tuple(KEY_FORMATS), default="hf")
    parser.add_argument("--dtype", default="bfloat16")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--bytes", help="about this much: 4GB")
    size.add_argument("--reka", action="store_true", help="44 layers, the exact shapes of Reka Flash 3")
    parser.add_argument("--sparse", action="store_true", help="holes instead of values")
    parser.add_argument("--max-shard-size", default="1GB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kind == "teacher" and args.container != "hf":
        parser.error("teachers are hf folders")
    wanted = Wanted(
        kind=args.kind,
        container=args.container,
        dtype=parse_dtype(args.dtype),
        nbytes=None if args.reka else parse_size(args.bytes),
        sparse=args.sparse,
        max_shard_bytes=parse_size(args.max_shard_size),
        seed=args.seed,
    )
    print(f"{args.target}: {make(args.target, wanted):,} bytes of tensors")


if __name__ == "__main__":
    main()
