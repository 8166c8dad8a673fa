"""`data.pkl` of a flat dict of contiguous CPU tensors, byte for byte as `torch.save` pickles it (protocol 2).

The opcodes are written one by one: there is no object to pickle, and torch is not needed.
"""

from __future__ import annotations

import pickle
import struct
from pickle import encode_long

from hxaconv.formats.dtypes import BY_NAME
from hxaconv.model.plan import Plan, Recipe

_BATCH = 1000
"""Items that the pickler puts under one SETITEMS."""


def state_dict_pickle(plan: Plan, *, ordered: bool) -> bytes:
    """The pickle of an OrderedDict (a plain dict if not `ordered`) whose n-th tensor is storage `n`."""
    stream = _Stream()
    if ordered:
        stream.constant("collections OrderedDict", pickle.GLOBAL, b"collections\nOrderedDict\n")
        stream.write(pickle.EMPTY_TUPLE + pickle.REDUCE)
    else:
        stream.write(pickle.EMPTY_DICT)
    stream.remember()
    items = list(enumerate(plan.items()))
    for start in range(0, len(items), _BATCH):
        _batch(stream, items[start : start + _BATCH], single=len(items) == 1 or ordered)
    if items and not ordered and len(items) % _BATCH == 0:
        # The pickler goes by the size of its last batch of a plain dict, and opens an empty one.
        stream.write(pickle.MARK + pickle.SETITEMS)
    stream.write(pickle.STOP)
    return bytes(stream.out)


def _batch(stream: _Stream, items: list[tuple[int, tuple[str, Recipe]]], *, single: bool) -> None:
    alone = single and len(items) == 1
    stream.write(b"" if alone else pickle.MARK)
    for index, (name, recipe) in items:
        stream.text(name)
        _tensor(stream, index, recipe)
    stream.write(pickle.SETITEM if alone else pickle.SETITEMS)


def _tensor(stream: _Stream, index: int, recipe: Recipe) -> None:
    """`_rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, backward_hooks)`."""
    stream.constant("rebuild", pickle.GLOBAL, b"torch._utils\n_rebuild_tensor_v2\n")
    stream.write(pickle.MARK)
    _storage(stream, index, recipe)
    stream.integer(0)
    stream.integers(recipe.shape)
    stream.integers(contiguous_strides(recipe.shape))
    stream.write(pickle.NEWFALSE)
    stream.constant("collections OrderedDict", pickle.GLOBAL, b"collections\nOrderedDict\n")
    stream.write(pickle.EMPTY_TUPLE + pickle.REDUCE)
    stream.remember()
    stream.write(pickle.TUPLE)
    stream.remember()
    stream.write(pickle.REDUCE)
    stream.remember()


def _storage(stream: _Stream, index: int, recipe: Recipe) -> None:
    """The persistent id ("storage", storage class, key, location, elements)."""
    storage_class = BY_NAME[recipe.dtype].storage_class
    assert storage_class is not None
    stream.write(pickle.MARK)
    stream.constant("storage", pickle.BINUNICODE, _sized("storage"))
    stream.constant(storage_class, pickle.GLOBAL, f"torch\n{storage_class}\n".encode())
    stream.text(str(index))
    stream.constant("cpu", pickle.BINUNICODE, _sized("cpu"))
    stream.integer(recipe.numel)
    stream.write(pickle.TUPLE)
    stream.remember()
    stream.write(pickle.BINPERSID)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements, counted by torch's rule for empty dimensions."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _sized(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<I", len(data)) + data


class _Stream:
    """Opcodes, and the pickler's memo: what was written once is referred to by number later."""

    def __init__(self) -> None:
        self.out = bytearray(pickle.PROTO + b"\x02")
        self._remembered = 0
        self._numbers: dict[str, int] = {}

    def write(self, data: bytes) -> None:
        self.out += data

    def remember(self) -> int:
        number = self._remembered
        self._remembered += 1
        short = number < 256
        self.write(pickle.BINPUT + bytes([number]) if short else pickle.LONG_BINPUT + struct.pack("<I", number))
        return number

    def constant(self, key: str, opcode: bytes, argument: bytes) -> None:
        if key not in self._numbers:
            self.write(opcode + argument)
            self._numbers[key] = self.remember()
        elif (number := self._numbers[key]) < 256:
            self.write(pickle.BINGET + bytes([number]))
        else:
            self.write(pickle.LONG_BINGET + struct.pack("<I", number))

    def text(self, text: str) -> None:
        self.write(pickle.BINUNICODE + _sized(text))
        self.remember()

    def integer(self, value: int) -> None:
        if value < 1 << 8:
            self.write(pickle.BININT1 + bytes([value]))
        elif value < 1 << 16:
            self.write(pickle.BININT2 + struct.pack("<H", value))
        elif value < 1 << 31:
            self.write(pickle.BININT + struct.pack("<i", value))
        else:
            data = encode_long(value)
            self.write(pickle.LONG1 + bytes([len(data)]) + data)

    def integers(self, values: tuple[int, ...]) -> None:
        if not values:
            self.write(pickle.EMPTY_TUPLE)
            return
        short = {1: pickle.TUPLE1, 2: pickle.TUPLE2, 3: pickle.TUPLE3}
        self.write(b"" if len(values) in short else pickle.MARK)
        for value in values:
            self.integer(value)
        self.write(short.get(len(values), pickle.TUPLE))
        self.remember()
