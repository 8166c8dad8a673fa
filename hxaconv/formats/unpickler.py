"""A pickle interpreter that can build a state dict and nothing else: the opcodes that one needs, each a small step.

Nothing is executed (see `pickle_machine`); an opcode that torch.save does not write is refused.
"""

from __future__ import annotations

import contextlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from hxaconv.errors import HxaconvError
from hxaconv.formats.pickle_machine import (
    MAX_LONG_BYTES,
    MAX_OPCODES,
    MAX_TEXT_BYTES,
    Callee,
    Inert,
    Machine,
    Pickled,
    Record,
    Refused,
    StorageClass,
    UntypedStorage,
)


def parse(
    data: bytes, where: str, start: int = 0, *, inert: Sequence[str] = (), max_steps: int = MAX_OPCODES
) -> Pickled:
    """Interpret the pickle at `start`; nothing is executed.

    `inert` names classes and constants (`package.module.Class`, `package.*`, or `*`) beside those of a state dict
    that are expected and become records of what they were written with.

    Raises:
        Truncated: when the data ends first.
        Refused: for a global that a state dict does not need.
        HxaconvError: for a malformed or an oversized pickle.
    """
    machine = Machine(data, where, start, inert, max_steps)
    try:
        return Pickled(machine.run(_OPERATIONS), machine.position, machine.storages)
    except IndexError:
        raise machine.fail("takes from an empty stack") from None
    except Refused as refused:
        if "*" not in inert:  # what it holds besides tells what can be done about it
            with contextlib.suppress(HxaconvError):
                refused.value = parse(data, where, start, inert=("*",), max_steps=max_steps).value
        raise


def _push(value: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    def operation(machine: Machine) -> None:
        made = value(machine)  # first: it may exchange the stack
        machine.stack.append(made)

    return operation


def _skip(width: int) -> Callable[[Machine], None]:
    def operation(machine: Machine) -> None:
        machine.take(width)

    return operation


def _put(index: Callable[[Machine], int]) -> Callable[[Machine], None]:
    def operation(machine: Machine) -> None:
        machine.memo[index(machine)] = machine.stack[-1]

    return operation


def _get(width: int) -> Callable[[Machine], None]:
    def operation(machine: Machine) -> None:
        index = machine.number(width)
        if index not in machine.memo:
            raise machine.fail(f"recalls value {index}, which it never stored")
        machine.stack.append(machine.memo[index])

    return operation


def _tuple_of(count: int) -> Callable[[Machine], None]:
    def operation(machine: Machine) -> None:
        if len(machine.stack) < count:
            raise IndexError
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return operation


def _long(width: int) -> Callable[[Machine], None]:
    def operation(machine: Machine) -> None:
        count = machine.number(width)
        if count > MAX_LONG_BYTES:
            raise machine.fail(f"holds a number of {count} bytes")
        machine.stack.append(machine.number(count, signed=True))

    return operation


def _decimal(machine: Machine) -> int | bool:
    line = machine.line()
    if line in (b"00", b"01"):  # how protocol 1 writes booleans
        return line == b"01"
    digits = line.removesuffix(b"L")
    if not digits.removeprefix(b"-").isdigit() or len(digits) > 40:
        raise machine.fail("holds a malformed number")
    return int(digits)


def _mark(machine: Machine) -> None:
    machine.marked.append(machine.stack)
    machine.stack = []


def _raw_bytes(width: int) -> Callable[[Machine], bytes]:
    def value(machine: Machine) -> bytes:
        count = machine.number(width)
        if count > MAX_TEXT_BYTES:
            raise machine.fail(f"holds {count} bytes of text")
        return machine.take(count)

    return value


def _protocol(machine: Machine) -> None:
    version = machine.number(1)
    if version > 5:
        raise machine.fail(f"is of protocol {version}, expected at most 5")


def _setitem(machine: Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.store_items(machine.top(dict), [key, value])


def _setitems(machine: Machine) -> None:
    items = machine.items_above_mark()
    machine.store_items(machine.top(dict), items)


def _append(machine: Machine) -> None:
    value = machine.stack.pop()
    machine.top(list).append(value)


def _appends(machine: Machine) -> None:
    items = machine.items_above_mark()
    machine.top(list).extend(items)


def _dict(machine: Machine) -> None:
    made: dict[Any, Any] = {}
    machine.store_items(made, machine.items_above_mark())
    machine.stack.append(made)


def _reduce(machine: Machine) -> None:
    arguments, callee = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.call(callee, arguments))


def _new_object(machine: Machine) -> None:
    arguments, callee = machine.stack.pop(), machine.stack.pop()
    if not isinstance(callee, Inert):
        raise machine.fail("uses opcode 0x81, which torch.save does not write")
    machine.stack.append(machine.call(callee, arguments))


def _build(machine: Machine) -> None:
    state = machine.stack.pop()
    target = machine.top(OrderedDict, Record)
    if isinstance(target, Record):  # else `_metadata` of a module's state dict: versions of modules, of no use here
        target.state = state


def _global(machine: Machine) -> Callee | StorageClass | UntypedStorage | Inert:
    module = machine.decode(machine.line())
    return machine.find_global(module, machine.decode(machine.line()))


def _stack_global(machine: Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not (isinstance(name, str) and isinstance(module, str)):
        raise machine.fail("names a global by something else than text")
    machine.stack.append(machine.find_global(module, name))


_OPERATIONS: dict[int, Callable[[Machine], None]] = {
    0x80: _protocol,
    0x95: _skip(8),  # FRAME
    ord("("): _mark,
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("I"): _push(_decimal),
    ord("L"): _push(_decimal),
    ord("J"): _push(lambda m: m.number(4, signed=True)),
    ord("K"): _push(lambda m: m.number(1)),
    ord("M"): _push(lambda m: m.number(2)),
    0x8A: _long(1),
    0x8B: _long(4),
    ord("G"): _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    ord("U"): _push(lambda m: m.text(1)),  # Python 2's str
    ord("T"): _push(lambda m: m.text(4)),
    0x8C: _push(lambda m: m.text(1)),
    ord("X"): _push(lambda m: m.text(4)),
    0x8D: _push(lambda m: m.text(8)),
    ord("C"): _push(_raw_bytes(1)),
    ord("B"): _push(_raw_bytes(4)),
    0x8E: _push(_raw_bytes(8)),
    ord("]"): _push(lambda m: []),
    ord("l"): _push(lambda m: m.items_above_mark()),
    ord("a"): _append,
    ord("e"): _appends,
    ord("}"): _push(lambda m: {}),
    ord("d"): _dict,
    ord("s"): _setitem,
    ord("u"): _setitems,
    ord(")"): _push(lambda m: ()),
    ord("t"): _push(lambda m: tuple(m.items_above_mark())),
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("q"): _put(lambda m: m.number(1)),
    ord("r"): _put(lambda m: m.number(4)),
    0x94: _put(lambda m: len(m.memo)),  # MEMOIZE
    ord("h"): _get(1),
    ord("j"): _get(4),
    ord("c"): _push(_global),
    0x93: _stack_global,
    ord("Q"): _push(lambda m: m.storage(m.stack.pop())),
    ord("R"): _reduce,
    0x81: _new_object,
    ord("b"): _build,
}
