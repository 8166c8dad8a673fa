"""Reads pickles of torch.save and of trainers without executing anything of them.

`pickletools.genops` of the standard library decodes the opcodes; what they do is done here, on lists, dictionaries and
the few records below. The globals that a pickle names stay names, its calls become records or descriptions of tensors:
there is no way from a file to code. The number of steps bounds time and memory.
"""

from __future__ import annotations

import contextlib
import io
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hxaconv.errors import HxaconvError
from hxaconv.formats.dtypes import BY_NAME, BY_STORAGE_CLASS, BY_TORCH_NAME, MAX_DIMS, are_sizes, is_shape
from hxaconv.formats.files import broken, show

MAX_PICKLE_BYTES = 64 * 1024 * 1024
MAX_STEPS = 1_000_000
"""A tensor takes about 25 opcodes and an opcode at most about 100 bytes of memory."""
_MAX_BITS = 128
_MAX_ARGUMENTS = 9
"""More than any builder takes: the same long tuple could be handed over again and again."""
_MAX_KEY = 2**31
"""Numbers from 2**61 on can be chosen to hash alike, and a dictionary of such keys takes quadratic time."""


class Refused(HxaconvError):
    """The pickle asks for something that neither a state dict nor torch.load(weights_only=True) has."""

    value: Any = None
    """What the pickle holds otherwise, the unknown objects as they were written."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class, function or constant that a pickle names: its dotted name, and nothing else."""

    name: str


@dataclass(eq=False, slots=True)
class Record:
    """What an object that is passed over was written with: its class, arguments and state. It is never made."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None

    @property
    def fields(self) -> dict[str, Any]:
        """The object's attributes, where it was written with some."""
        return self.state if isinstance(self.state, dict) else {}


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements somewhere else in the file: a zip record or a part of a legacy file."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_PLAIN_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
OTHER_DTYPE = "torch._utils._rebuild_tensor_v3"
OPAQUE_TENSORS = frozenset(
    f"torch._utils._rebuild_{kind}"
    for kind in (
        *("qtensor", "sparse_tensor", "nested_tensor", "wrapper_subclass", "meta_tensor_no_storage"),
        *("device_tensor_from_numpy", "device_tensor_from_cpu_tensor"),
    )
)
"""What makes tensors that are more, or less, than bytes and a shape: no weights, but they may lie beside some."""
_ALLOWED = OPAQUE_TENSORS | {
    *("collections.Counter", "_codecs.encode", "builtins.bytearray", "builtins.set", "builtins.complex"),
    *("torch.Tensor", "torch.device", "torch.nn.parameter.Parameter", "torch.serialization._get_layout"),
    *("torch.storage.TypedStorage", "torch.per_tensor_affine", "torch.per_tensor_symmetric"),
    *("torch.per_channel_affine", "torch.per_channel_symmetric", "torch.per_channel_affine_float_qparams"),
}
"""What torch.load(weights_only=True) lets through beside state dicts. Its dtypes, typed tensors and storages follow a
pattern."""
_ALLOWED_PATTERN = re.compile(
    r"torch\.(cuda\.)?(sparse\.)?(Byte|Char|Short|Int|Long|Half|Float|Double|Bool|BFloat16)Tensor"
    r"|torch\.(cuda\.)?\w+Storage"
    r"|torch\.(q?u?int\d+(x\d+)?|quint\dx\d|bits\d+(x\d+)?|b?float\d+\w*|complex\d+|bool)"
)
TRAINER_OBJECTS = (
    *("deepspeed.", "lightning.", "pytorch_lightning.", "lightning_fabric.", "accelerate.", "omegaconf.", "numpy."),
    *("argparse.Namespace", "pathlib.", "datetime.timedelta", "collections.defaultdict", "torch.distributed."),
    "builtins.getattr",
)
"""What trainers put into their own folders besides (stages, loss scalers, random states, how tensors are divided): for
`inert` of `parse`. The first releases of Python 3.11 write a member of an enumeration as getattr(class, name): a record
like others, which nothing can call."""
_DANGEROUS = frozenset(
    (
        *("os", "posix", "nt", "subprocess", "sys", "builtins", "runpy", "shutil", "socket", "importlib", "pty"),
        *("code", "ctypes"),
    )
)
"""Modules that no training state needs and that malware asks for."""
_CONSTANTS = frozenset(
    (
        *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    )
)
"""Opcodes that push what stands behind them."""
_STORAGES = {f"torch.{name}": dtype.name for name, dtype in BY_STORAGE_CLASS.items()}
_STORAGES["torch.storage.UntypedStorage"] = "U8"  # counts bytes; the tensors on it have the dtype
_KEY_TYPES = frozenset({str, int, float, bool, bytes, type(None), Record})
"""Others could be hashed only by recursion, which has no bound here; Records are distinguished by identity."""


def parse(stream: io.BytesIO, where: str, *, inert: tuple[str, ...] = (), max_steps: int = MAX_STEPS) -> Machine:
    """Interpret the pickle at the stream's position, and stop behind it; nothing is executed.

    `inert` are beginnings of names (`package.`, `package.module.Class`; an empty one for all) of classes and constants
    beside those of a state dict that are expected and become records of what they were written with.

    Raises:
        Refused: for a global that a state dict does not need.
        HxaconvError: for a malformed, truncated or oversized pickle.
    """
    start = stream.tell()
    machine = Machine(where, inert, max_steps)
    try:
        machine.run(stream)
    except Refused as refused:
        if "" not in inert:  # what else it holds decides what can be done about it
            stream.seek(start)
            with contextlib.suppress(HxaconvError):
                refused.value = parse(stream, where, inert=("",), max_steps=max_steps).value
        raise
    return machine


class Machine:
    """Stack, marks and memo of one pickle; `value` is what it holds, once it has run."""

    def __init__(self, where: str, inert: tuple[str, ...] = (), max_steps: int = MAX_STEPS) -> None:
        self.where, self.inert, self.max_steps = where, inert, max_steps
        self.value: Any = None
        self.storages: dict[str, Storage] = {}
        """Every storage that is referred to, by key, as it was first seen."""
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self._steps, self._position = 0, 0

    def run(self, stream: io.BytesIO) -> None:
        """Interpret up to STOP."""
        try:
            for opcode, argument, position in pickletools.genops(stream):
                self._position = position or 0
                self.charge(1)
                if type(argument) is int and argument.bit_length() > _MAX_BITS:
                    raise self.fail(f"holds a number of {argument.bit_length()} bits")
                self.step(opcode.name, argument)
        except IndexError:
            raise self.fail("takes from an empty stack") from None
        except ValueError as error:  # of genops, also at the end of the data
            raise self.fail(f"is malformed or cut short: {show(str(error))}") from None
        if self.marked or len(self.stack) != 1:
            raise self.fail("leaves more or less than one value")
        self.value = self.stack[0]

    def step(self, opcode: str, argument: Any) -> None:
        """What an opcode does."""
        stack = self.stack
        match opcode:
            case _ if opcode in _CONSTANTS:
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise self.fail(f"recalls value {argument}, which it never stored")
                stack.append(self.memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode]())
            case "MARK":
                self.marked.append(stack)
                self.stack = []
            case "TUPLE":
                items = self.items_above_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                if len(stack) < count:
                    raise IndexError
                stack[-count:] = [tuple(stack[-count:])]
            case "LIST":
                items = self.items_above_mark()
                self.stack.append(items)
            case "APPEND":
                value = stack.pop()
                self.top(list).append(value)
            case "APPENDS":
                items = self.items_above_mark()
                self.top(list).extend(items)
            case "DICT":
                made: dict[Any, Any] = {}
                self.store_items(made, self.items_above_mark())
                self.stack.append(made)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.store_items(self.top(dict), [key, value])
            case "SETITEMS":
                items = self.items_above_mark()
                self.store_items(self.top(dict), items)
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                stack.append(self.find_global(module, name))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not (isinstance(name, str) and isinstance(module, str)):
                    raise self.fail("names a global by something else than text")
                stack.append(self.find_global(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, callee = stack.pop(), stack.pop()
                stack.append(self.call(callee, arguments))
            case "BUILD":
                state, target = stack.pop(), self.top(OrderedDict, Record)
                if isinstance(target, Record):  # else `_metadata` of a module's state dict: versions, of no use here
                    target.state = state
            case "PROTO":
                if argument > 5:
                    raise self.fail(f"is of protocol {argument}, expected at most 5")
            case "FRAME" | "STOP":  # genops ends behind the second
                pass
            case _:
                raise self.fail(f"uses opcode {opcode}, which torch.save does not write")

    def fail(self, what: str) -> HxaconvError:
        """The error for a pickle that no torch.save writes: what it does, and where."""
        return broken(self.where, f"its pickle {what} (at byte {self._position})")

    def charge(self, count: int) -> None:
        """Count steps.

        Raises:
            HxaconvError: for too many of them.
        """
        self._steps += count
        if self._steps > self.max_steps:
            raise HxaconvError(
                f"{self.where}: its pickle takes more than {self.max_steps} steps, which no state dict needs"
            )

    def items_above_mark(self) -> list[Any]:
        """What was pushed since the last MARK, which goes with it."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def top(self, *kinds: type) -> Any:
        """The value on top of the stack, of one of these types, or HxaconvError is raised."""
        if not isinstance(self.stack[-1], kinds):
            raise self.fail(f"adds items to a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def store_items(self, target: dict[Any, Any], flat: list[Any]) -> None:
        """Put keys and values, which alternate in `flat`, into a dictionary.

        Raises:
            HxaconvError: for keys that are no text or small numbers.
        """
        if len(flat) % 2:
            raise self.fail("has a key without a value")
        keys = flat[::2]
        if not all(type(key) in _KEY_TYPES for key in keys):
            raise self.fail("has dictionary keys that are neither text nor numbers")
        if not all(-_MAX_KEY < key < _MAX_KEY for key in keys if type(key) in (int, float)):
            raise self.fail(f"has dictionary keys beyond {_MAX_KEY}, which no state dict needs")
        target.update(zip(keys, flat[1::2], strict=True))

    def find_global(self, module: str, name: str) -> Global:
        """What stands for a name of the allow-list, which is that of torch.load(weights_only=True).

        Raises:
            Refused: for every other name.
        """
        module = "builtins" if module == "__builtin__" else module  # protocol 2 has Python 2's name
        full, package = f"{module}.{name}", module.partition(".")[0]
        if full in _KNOWN or _ALLOWED_PATTERN.fullmatch(full) or full.startswith(self.inert):
            return Global(full)
        hint = f"Load and save it again as a state dict where {package} is installed."
        if package in _DANGEROUS:
            hint = "Do not load this file with torch: take the weights as safetensors, from whom you trust."
        raise Refused(
            f"{self.where}: its pickle asks for {show(full)}, which a state dict does not need;"
            " nothing of it was executed",
            hint=hint,
        )

    def call(self, callee: Any, arguments: Any) -> Any:
        """What stands for a call: a tensor, a dictionary, or a record of the call."""
        if not isinstance(arguments, tuple):
            raise self.fail("calls with arguments that are no tuple")
        if not isinstance(callee, Global):
            raise self.fail(f"calls a {type(callee).__name__}")
        builder = _BUILDERS.get(callee.name)
        if builder is None:
            return Record(callee.name, arguments)
        return builder(self, *arguments[:_MAX_ARGUMENTS])

    def storage(self, ident: Any) -> Storage | Record:
        """The storage that a persistent id names.

        Raises:
            HxaconvError: for ids of another form, and for a whole module.
        """
        if not isinstance(ident, tuple) or not ident or ident[0] not in ("storage", "module"):
            raise self.fail("refers to something else than a storage")
        if ident[0] == "module":
            raise HxaconvError(
                f"{self.where} holds a whole module with its code, not a state dict",
                hint="Save module.state_dict() instead, where you trust the module's code.",
            )
        if len(ident) not in (5, 6) or not isinstance(ident[1], Global) or not isinstance(ident[2], str):
            raise self.fail("refers to a storage of unknown form")
        kind, key, _device, numel = ident[1:5]
        if kind.name not in _STORAGES:
            return Record(kind.name, (key,))
        if not are_sizes(numel):
            raise self.fail("refers to a storage with an impossible number of elements")
        if ident[5:] not in ((), (None,)):
            raise self.fail("refers to a view of a storage, as releases of PyTorch before 0.4 did")
        made = Storage(_STORAGES[kind.name], key, numel)
        self.storages.setdefault(key, made)
        return made


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The sizes (or offsets) of a tensor; None for what is none."""
    return value if isinstance(value, tuple) and is_shape(value) else None


def expect(value: Any, kind: type, where: str, what: str) -> Any:
    """The value, if it is of this type, or an error for a damaged file is raised."""
    if not isinstance(value, kind):
        raise broken(where, f"{what} is a {type(value).__name__}, expected a {kind.__name__}")
    return value


# --- what is built, by the name that the pickle calls ---------------------------------------------------


def _ordered_dict(machine: Machine, *arguments: Any) -> OrderedDict[Any, Any]:
    if arguments not in ((), ([],)):
        raise machine.fail("builds a dictionary by something else than its items")
    return OrderedDict()


def _tensor(machine: Machine, *arguments: Any) -> Tensor | Record:
    """What `_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, flags)` would view."""
    if arguments and isinstance(arguments[0], Record):
        return Record("torch._utils._rebuild_tensor_v2", arguments)  # on a storage of quantized elements
    if len(arguments) not in (4, 6, 7) or not isinstance(arguments[0], Storage):
        raise machine.fail("builds a tensor from something else than a storage")
    storage, offset, shape, strides = arguments[:4]
    if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= MAX_DIMS):
        raise machine.fail("builds a tensor whose shape and strides do not fit together")
    if not are_sizes(offset, *shape, *strides):
        raise machine.fail("builds a tensor with a size, stride or offset that is no whole number from 0 to 2**63")
    if len(arguments) == 7 and arguments[6]:
        raise machine.fail("marks a tensor as conjugated or negated, which is not supported")
    return Tensor(storage, offset, shape, strides)


def _tensor_of_dtype(machine: Machine, *arguments: Any) -> Tensor | Record:
    """What `_rebuild_tensor_v3` would view: a tensor on bytes, its dtype named beside it."""
    if len(arguments) < 7 or not (isinstance(arguments[0], Storage) and isinstance(arguments[6], Global)):
        raise machine.fail("builds a tensor from something else than a storage and a dtype")
    known, whole = BY_TORCH_NAME.get(arguments[6].name.removeprefix("torch.")), arguments[0]
    if known is None:
        return Record(OTHER_DTYPE, arguments)
    numel = whole.numel * BY_NAME[whole.dtype].itemsize // known.itemsize
    return _tensor(machine, Storage(known.name, whole.key, numel), *arguments[1:6])


def _parameter(machine: Machine, *arguments: Any) -> Any:
    if len(arguments) not in (3, 4) or not isinstance(arguments[0], Tensor | Record):
        raise machine.fail("builds a parameter from something else than a tensor")
    return arguments[0]


def _typed(machine: Machine, *arguments: Any) -> Tensor | Record:
    """`_rebuild_from_type_v2(function, class, arguments, state)`: a tensor with attributes, which are passed over."""
    if len(arguments) != 4 or not isinstance(arguments[0], Global) or not isinstance(arguments[2], tuple):
        raise machine.fail("builds a typed tensor from something else than a function and its arguments")
    if arguments[0].name in _PLAIN_TENSORS:
        return _tensor(machine, *arguments[2][:_MAX_ARGUMENTS])
    return Record(arguments[0].name, arguments)


def _size(machine: Machine, *arguments: Any) -> Any:
    if len(arguments) != 1 or not isinstance(arguments[0], tuple):
        raise machine.fail("builds a shape from something else than a tuple")
    return arguments[0]


_BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    **dict.fromkeys(_PLAIN_TENSORS, _tensor),
    OTHER_DTYPE: _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Size": _size,
}
_KNOWN = _BUILDERS.keys() | _STORAGES.keys() | _ALLOWED
