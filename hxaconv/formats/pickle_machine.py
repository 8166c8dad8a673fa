"""What interprets a pickle: its stack, its memo, its budget, and the few values that a state dict is made of.

It imports nothing and calls nothing that a pickle names: the globals of a state dict are plain markers here,
so there is no way from a file to code. Time and memory are bounded by the budget.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from hxaconv.errors import HxaconvError
from hxaconv.formats.contents import broken, show
from hxaconv.formats.dtypes import BY_NAME, BY_STORAGE_CLASS, BY_TORCH_NAME

MAX_PICKLE_BYTES = 64 * 1024 * 1024
MAX_OPCODES = 1_000_000
"""A tensor takes about 25 opcodes and an opcode at most about 100 bytes of memory."""
MAX_DIMS = 16
MAX_TEXT_BYTES = 16 * 1024 * 1024
MAX_LONG_BYTES = 16
_MAX_SIZE = 2**62


class Truncated(HxaconvError):
    """The data ended before the pickle did."""


class Refused(HxaconvError):
    """The pickle asks for something that neither a state dict nor torch.load(weights_only=True) knows."""

    value: Any = None
    """What the pickle holds otherwise, the unknown objects as they were written."""


class Callee(Enum):
    """The callables that a state dict needs; none is ever called."""

    ORDERED_DICT = auto()
    TENSOR = auto()
    TENSOR_OF_DTYPE = auto()
    PARAMETER = auto()
    TYPED = auto()
    SIZE = auto()


@dataclass(frozen=True, slots=True)
class Inert:
    """A class or constant that a pickle names and that is passed over: its dotted name."""

    name: str


@dataclass(eq=False, slots=True)
class Record:
    """What an object of an inert class was written with. No such object is ever made."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None

    @property
    def fields(self) -> dict[str, Any]:
        """The object's attributes, where it was written with some."""
        return self.state if isinstance(self.state, dict) else {}


@dataclass(frozen=True, slots=True)
class StorageClass:
    """A typed storage such as `torch.BFloat16Storage`, by the dtype of its elements."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements somewhere else in the file: a zip record or a part of a legacy file."""

    dtype: str
    key: str
    numel: int
    view: tuple[str, int, int] | None = None
    """Of legacy files: the view's own key, its first element and its number of elements."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UntypedStorage:
    """The class of storages that count bytes; the tensors on them say their dtype."""


_CALLEES = {
    ("collections", "OrderedDict"): Callee.ORDERED_DICT,
    ("torch._utils", "_rebuild_tensor"): Callee.TENSOR,
    ("torch._utils", "_rebuild_tensor_v2"): Callee.TENSOR,
    ("torch._utils", "_rebuild_tensor_v3"): Callee.TENSOR_OF_DTYPE,
    ("torch._utils", "_rebuild_parameter"): Callee.PARAMETER,
    ("torch._utils", "_rebuild_parameter_with_state"): Callee.PARAMETER,
    ("torch._tensor", "_rebuild_from_type_v2"): Callee.TYPED,
    ("torch", "Size"): Callee.SIZE,
}

OPAQUE_TENSORS = frozenset(
    f"torch._utils._rebuild_{kind}"
    for kind in (
        *("qtensor", "sparse_tensor", "nested_tensor", "wrapper_subclass", "meta_tensor_no_storage"),
        *("device_tensor_from_numpy", "device_tensor_from_cpu_tensor"),
    )
)
"""What makes tensors that are more, or less, than bytes and a shape: no weights, but they may lie beside some."""

ALLOWED = OPAQUE_TENSORS | {
    *("collections.Counter", "_codecs.encode", "builtins.bytearray", "builtins.set", "builtins.complex"),
    *("torch.Tensor", "torch.device", "torch.nn.parameter.Parameter", "torch.serialization._get_layout"),
    *("torch.storage.TypedStorage", "torch.per_tensor_affine", "torch.per_tensor_symmetric"),
    *("torch.per_channel_affine", "torch.per_channel_symmetric", "torch.per_channel_affine_float_qparams"),
}
"""What torch.load(weights_only=True) lets through beside state dicts: passed over here. Its dtypes, typed tensors
and storages follow a pattern."""
TRAINER_OBJECTS = (
    *("deepspeed.*", "lightning.*", "pytorch_lightning.*", "lightning_fabric.*", "accelerate.*", "omegaconf.*"),
    *("argparse.Namespace", "pathlib.PosixPath", "pathlib.Path", "datetime.timedelta", "collections.defaultdict"),
    *("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"),
    *("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"),
)
"""What trainers put into their own folders besides (stages, loss scalers, random states): for `inert` of `parse`."""
_ALLOWED_PATTERN = re.compile(
    r"torch\.(cuda\.)?(sparse\.)?(Byte|Char|Short|Int|Long|Half|Float|Double|Bool|BFloat16)Tensor"
    r"|torch\.(cuda\.)?\w+Storage"
    r"|torch\.(q?u?int\d+(x\d+)?|quint\dx\d|bits\d+(x\d+)?|b?float\d+\w*|complex\d+|bool)"
)
_DANGEROUS = frozenset(
    {
        *[
            "os",
            "posix",
            "nt",
            "subprocess",
            "sys",
            "builtins",
            "runpy",
            "shutil",
            "socket",
            "importlib",
            "pty",
            "code",
            "ctypes",
        ]
    }
)
"""Modules that no training state needs and that malware asks for."""
_KEY_TYPES = frozenset({str, int, float, bool, bytes, type(None), Record})
"""Records are told apart by identity, so that hashing one takes no recursion."""
MAX_KEY = 2**31
"""Numbers from 2**61 on can be chosen to hash alike, and a dictionary of such keys takes quadratic time."""


@dataclass(frozen=True, slots=True)
class Pickled:
    """What one pickle holds."""

    value: Any
    end: int
    """Position behind the pickle."""
    storages: dict[str, Storage]
    """Every storage that is referred to, by key, as it was first seen."""


class Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(
        self, data: bytes, where: str, start: int, inert: Sequence[str] = (), max_steps: int = MAX_OPCODES
    ) -> None:
        self.data, self.where, self.position = data, where, start
        self.inert, self.max_steps = inert, max_steps
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.budget = max_steps

    def fail(self, what: str) -> HxaconvError:
        """The error for a pickle that no torch.save writes: what it does, and where."""
        return broken(self.where, f"its pickle {what} (at byte {self.position})")

    def charge(self, count: int) -> None:
        """Take `count` steps off the budget.

        Raises:
            HxaconvError: when it is spent.
        """
        self.budget -= count
        if self.budget < 0:
            raise HxaconvError(
                f"{self.where}: its pickle takes more than {self.max_steps} steps, which no state dict needs"
            )

    def run(self, operations: Mapping[int, Callable[[Machine], None]]) -> Any:
        """Interpret up to STOP; the value that is left.

        Raises:
            Truncated: when the data ends before.
            HxaconvError: for an opcode that is not in `operations`, and for what these refuse.
        """
        data = self.data
        while True:
            self.budget -= 1
            if self.budget < 0:
                self.charge(0)
            if self.position >= len(data):
                raise self.truncated()
            opcode = data[self.position]
            self.position += 1
            if opcode == 0x2E:  # STOP
                if self.marked or len(self.stack) != 1:
                    raise self.fail("leaves more or less than one value")
                return self.stack[0]
            operation = operations.get(opcode)
            if operation is None:
                raise self.fail(f"uses opcode 0x{opcode:02x}, which torch.save does not write")
            operation(self)

    def truncated(self) -> Truncated:
        """The error for data that ends inside the pickle."""
        return Truncated(
            f"{self.where} ends inside a pickle, at byte {len(self.data)}",
            hint="The file is damaged or truncated; download or copy it again.",
        )

    def take(self, count: int) -> bytes:
        """The next `count` bytes, or Truncated is raised."""
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise self.truncated()
        return self.data[start : self.position]

    def number(self, width: int, signed: bool = False) -> int:
        """The next little-endian number of `width` bytes."""
        return int.from_bytes(self.take(width), "little", signed=signed)

    def line(self) -> bytes:
        """The next bytes up to a newline, which is passed over; HxaconvError is raised beyond 1024."""
        end = self.data.find(b"\n", self.position, self.position + 1024)
        if end < 0:
            if self.position + 1024 > len(self.data):
                raise self.truncated()
            raise self.fail("holds a line of more than 1024 bytes")
        start, self.position = self.position, end + 1
        return self.data[start:end]

    def text(self, width: int) -> str:
        """The next text, its length before it in `width` bytes; HxaconvError is raised for one that is too long."""
        count = self.number(width)
        if count > MAX_TEXT_BYTES:
            raise self.fail(f"holds a text of {count} bytes")
        return self.decode(self.take(count))

    def decode(self, raw: bytes) -> str:
        """Bytes as UTF-8, or HxaconvError is raised."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("holds text that is not UTF-8") from None

    def items_above_mark(self) -> list[Any]:
        """What was pushed since the last MARK, which goes with it."""
        items = self.stack
        self.stack = self.marked.pop()
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
        # Other keys could be hashed only by recursion, which has no bound here.
        if not all(type(key) in _KEY_TYPES for key in keys):
            raise self.fail("has dictionary keys that are neither text nor numbers")
        if not all(-MAX_KEY < key < MAX_KEY for key in keys if type(key) in (int, float)):
            raise self.fail(f"has dictionary keys beyond {MAX_KEY}, which no state dict needs")
        target.update(zip(keys, flat[1::2], strict=True))

    def find_global(self, module: str, name: str) -> Callee | StorageClass | UntypedStorage | Inert:
        """What stands for a name of the allow-list, which is that of torch.load(weights_only=True).

        Raises:
            Refused: for every other name.
        """
        if module == "torch" and name in BY_STORAGE_CLASS:
            return StorageClass(BY_STORAGE_CLASS[name].name)
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return UntypedStorage()
        if (module, name) in _CALLEES:
            return _CALLEES[module, name]
        module = "builtins" if module == "__builtin__" else module  # protocol 2 has Python 2's name
        full = f"{module}.{name}"
        if full in ALLOWED or _ALLOWED_PATTERN.fullmatch(full):
            return Inert(full)
        if full in self.inert or {f"{module.partition('.')[0]}.*", "*"} & set(self.inert):
            return Inert(full)
        hint = f"Load and save it again as a state dict where {module.partition('.')[0]} is installed."
        if module.partition(".")[0] in _DANGEROUS:
            hint = "Do not load this file with torch: take the weights as safetensors, from whom you trust."
        raise Refused(
            f"{self.where}: its pickle asks for {show(full)}, which a state dict does not need;"
            " nothing of it was executed",
            hint=hint,
        )

    def call(self, callee: Any, arguments: Any) -> Any:
        """What the callee would make of its arguments; HxaconvError is raised where they are not what it takes."""
        if not isinstance(arguments, tuple):
            raise self.fail("calls with arguments that are no tuple")
        if callee is Callee.TENSOR:
            return self.tensor(arguments)
        if callee is Callee.PARAMETER:
            if len(arguments) not in (3, 4) or not isinstance(arguments[0], Tensor | Record):
                raise self.fail("builds a parameter from something else than a tensor")
            return arguments[0]
        if callee is Callee.TENSOR_OF_DTYPE:
            return self.tensor_of_dtype(arguments)
        if callee is Callee.ORDERED_DICT and len(arguments) <= 1:
            return self.ordered_dict(arguments[0] if arguments else [])
        if callee is Callee.TYPED and len(arguments) == 4 and arguments[0] is Callee.TENSOR:
            return self.tensor(arguments[2])  # one that has attributes of its own, which are passed over
        if callee is Callee.TYPED and len(arguments) == 4 and isinstance(arguments[0], Inert):
            return Record(arguments[0].name, arguments)
        if callee is Callee.SIZE and len(arguments) == 1 and isinstance(arguments[0], tuple):
            return arguments[0]
        if isinstance(callee, Inert):
            return Record(callee.name, arguments)
        raise self.fail(f"calls a {type(callee).__name__}")

    def ordered_dict(self, pairs: Any) -> OrderedDict[Any, Any]:
        """The dictionary that these pairs make; HxaconvError is raised for anything else."""
        # Python 2 hands the items over as one list of two-item lists.
        if not isinstance(pairs, list):
            raise self.fail("builds a dictionary from something else than a list")
        self.charge(len(pairs))  # the list may be shared: what it costs is not bounded by the pickle's length
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise self.fail("builds a dictionary from something else than pairs")
        made: OrderedDict[Any, Any] = OrderedDict()
        self.store_items(made, [item for pair in pairs for item in pair])
        return made

    def tensor(self, arguments: Any) -> Tensor | Record:
        """What `_rebuild_tensor_v2` would view; HxaconvError is raised for numbers that no tensor has."""
        if isinstance(arguments, tuple) and arguments and isinstance(arguments[0], Record):
            return Record("torch._utils._rebuild_tensor_v2", arguments)  # on a storage of quantized elements
        if not isinstance(arguments, tuple) or len(arguments) not in (4, 6, 7) or not isinstance(arguments[0], Storage):
            raise self.fail("builds a tensor from something else than a storage")
        storage, offset, shape, strides = arguments[:4]
        if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= MAX_DIMS):
            raise self.fail("builds a tensor whose shape and strides do not fit together")
        if not all(type(n) is int and 0 <= n < _MAX_SIZE for n in (offset, *shape, *strides)):
            raise self.fail("builds a tensor with a size, stride or offset that is no whole number from 0 to 2**62")
        if len(arguments) == 7 and arguments[6]:
            raise self.fail("marks a tensor as conjugated or negated, which is not supported")
        return Tensor(storage, offset, shape, strides)

    def tensor_of_dtype(self, arguments: tuple[Any, ...]) -> Tensor | Record:
        """What `_rebuild_tensor_v3` would view: a tensor on bytes, its dtype named beside it."""
        dtype = arguments[6] if len(arguments) > 6 and isinstance(arguments[6], Inert) else None
        if dtype is None or not isinstance(arguments[0], Storage):
            raise self.fail("builds a tensor from something else than a storage and a dtype")
        known = BY_TORCH_NAME.get(dtype.name.removeprefix("torch."))
        if known is None:
            return Record("torch._utils._rebuild_tensor_v3", arguments)
        bytes_of = arguments[0]
        numel = bytes_of.numel * BY_NAME[bytes_of.dtype].itemsize // known.itemsize
        return self.tensor((Storage(known.name, bytes_of.key, numel, bytes_of.view), *arguments[1:6]))

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
        if len(ident) not in (5, 6):
            raise self.fail("refers to a storage of unknown form")
        kind, key, _device, numel, view = (*ident[1:], None)[:5]
        if isinstance(kind, Inert) and isinstance(key, str):
            return Record(kind.name, (key,))
        if not (isinstance(kind, StorageClass | UntypedStorage) and isinstance(key, str)):
            raise self.fail("refers to a storage of unknown form")
        if not (type(numel) is int and 0 <= numel < _MAX_SIZE):
            raise self.fail("refers to a storage with an impossible number of elements")
        if view is not None and not (
            isinstance(view, tuple)
            and len(view) == 3
            and isinstance(view[0], str)
            and all(type(n) is int and 0 <= n < _MAX_SIZE for n in view[1:])
        ):
            raise self.fail("refers to a storage view of unknown form")
        made = Storage(kind.dtype if isinstance(kind, StorageClass) else "U8", key, numel, view)
        self.storages.setdefault(key, made)
        return made
