"""The corpus: name -> how to build the file or folder, and a part of the message it must give.

Every case is a fault put into something that opens without it (`test_hostile.py` opens those too).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostile import forge
from hostile.forge import dict_of, global_, integer, pickled, storage, tensor, text, torch_records, tuple_of

NAME = "emb.weight"


@dataclass(frozen=True)
class Case:
    """`build` makes it in an empty folder and returns what a user would name."""

    name: str
    build: Callable[[Path], Path]
    message: str


CASES: list[Case] = []


def case(message: str, *, name: str | None = None) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    """Register a builder under its own name."""

    def register(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
        CASES.append(Case(name or build.__name__.strip("_"), build, message))
        return build

    return register


# --- the good files that the faults are put into --------------------------------------------------

HEADER: dict[str, Any] = {
    NAME: {"dtype": "BF16", "shape": [4, 2], "data_offsets": [0, 16]},
    "head.weight": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [16, 32]},
}
GOOD_VALUE = dict_of({NAME: tensor(storage("0", 8), (4, 2)), "head.weight": tensor(storage("1", 8), (4, 2))})
GOOD_STORAGES: dict[str, bytes | int] = {"0": bytes(16), "1": bytes(16)}
LEGACY_VALUE = dict_of(
    {
        NAME: tensor(storage("0", 8, view=b"N"), (4, 2)),
        "head.weight": tensor(storage("1", 8, view=b"N"), (4, 2)),
    }
)


def good_safetensors(folder: Path) -> Path:
    """Two tensors, nothing wrong."""
    return forge.safetensors_file(folder / "x.safetensors", HEADER, bytes(32))


def good_zip(folder: Path) -> Path:
    """Two tensors, nothing wrong."""
    return forge.zip_file(folder / "x.pth", torch_records(GOOD_VALUE, GOOD_STORAGES))


def good_legacy(folder: Path) -> Path:
    """Two tensors, nothing wrong."""
    return forge.legacy_file(folder / "x.pth", LEGACY_VALUE, {"0": (8, bytes(16)), "1": (8, bytes(16))})


def good_folder(folder: Path) -> Path:
    """Two shards with an index."""
    names = {"model.embed_tokens.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}
    for name, file in names.items():
        header = {name: {"dtype": "BF16", "shape": [4, 2], "data_offsets": [0, 16]}}
        forge.safetensors_file(folder / file, header, bytes(16))
    write_index(folder, names)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    """model.safetensors.index.json."""
    index = {"metadata": {"total_size": 32}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


GOOD = {"safetensors": good_safetensors, "zip": good_zip, "legacy": good_legacy, "folder": good_folder}


# --- safetensors -----------------------------------------------------------------------------------


def header_case(name: str, header: Any, message: str, data: bytes | int = bytes(32), **falsified: Any) -> None:
    """A safetensors file with this header."""
    CASES.append(
        Case(
            f"safetensors_{name}",
            lambda folder: forge.safetensors_file(folder / "x.safetensors", header, data, **falsified),
            message,
        )
    )


def _entry(**changes: Any) -> dict[str, Any]:
    return HEADER | {NAME: HEADER[NAME] | changes}


_PLAIN = json.dumps(HEADER)
header_case("truncated_data", HEADER, "the file is truncated: the tensors take 32 bytes, there are 31", bytes(31))
header_case("trailing_data", HEADER, "the file is longer than its header implies", bytes(40))
header_case("truncated_header", HEADER, "a safetensors header of 4000 bytes does not fit a file", length=4000)
header_case("absurd_length", HEADER, "a safetensors header of 9223372036854775807 bytes", length=2**63 - 1)
header_case("long_header", b"{" + b" " * 10, "expected at most 25000000", 30_000_000, length=26_000_000)
header_case("header_length_1", b"{", "a safetensors header of 1 bytes does not fit", b"", length=1)
header_case("overlap", _entry(shape=[5, 2], data_offsets=[0, 20]), "emb.weight and head.weight overlap by 4 bytes")
header_case(
    "hole", _entry(shape=[3, 2], data_offsets=[0, 12]), "4 bytes between emb.weight and head.weight belong to no"
)
header_case("hole_at_start", _entry(shape=[3, 2], data_offsets=[4, 16]), "4 bytes between the header and emb.weight")
header_case("offsets_swapped", _entry(data_offsets=[16, 0]), "takes 16 bytes, its data_offsets are [16, 0]")
header_case("offsets_overflow", _entry(data_offsets=[0, 2**64]), "expected dtype, shape and data_offsets of whole")
header_case("offsets_past_end", _entry(shape=[2**40, 2], data_offsets=[0, 2**42]), "overlap by 4398046511088 bytes")
header_case("size_of_dtype", _entry(dtype="F32"), "F32 [4, 2] takes 32 bytes, its data_offsets are [0, 16]")
header_case("shape_overflow", _entry(shape=[2**62, 2**62]), f"takes {2**125} bytes")
header_case("negative_size", _entry(shape=[-4, -2]), "emb.weight: expected dtype, shape and data_offsets of whole")
header_case("fractional_size", _entry(shape=[4.0, 2]), "emb.weight: expected dtype, shape and data_offsets of whole")
header_case("boolean_size", _entry(shape=[True, 8]), "emb.weight: expected dtype, shape and data_offsets of whole")
header_case("many_dimensions", _entry(shape=[1] * 500), "emb.weight: expected dtype, shape and data_offsets of whole")
header_case("unknown_dtype", _entry(dtype="F4"), "emb.weight has dtype F4")
header_case("unknown_key", _entry(more=1), "emb.weight: expected dtype, shape and data_offsets")
header_case("entry_is_a_list", {NAME: [1, 2]}, "emb.weight: expected dtype, shape and data_offsets")
header_case("metadata_is_a_list", HEADER | {"__metadata__": []}, "__metadata__ of the header does not map text to text")
header_case("metadata_nested", HEADER | {"__metadata__": {"a": {}}}, "__metadata__ of the header does not map text")
header_case("duplicate_name", f'{{"{NAME}": {{}}, {_PLAIN[1:]}'.encode(), "the name emb.weight occurs twice")
header_case("not_json", b'{"a": nonsense}', "the safetensors header is not valid")
header_case("not_utf8", b'{"\xff": 1}', "the safetensors header is not valid")
header_case(
    "nan",
    _PLAIN.replace("[4, 2]", "[NaN, 2]", 1).encode(),
    "emb.weight: expected dtype, shape and data_offsets of whole",
)
header_case("long_number", b'{"a": ' + b"9" * 5000 + b"}", "the safetensors header is not valid")
header_case("deep", b'{"a":' + b"[" * 100_000, "nested too deeply")
header_case("brackets", b'{"a":[' + b"[]," * 2_000_000, "what should be the safetensors header is not one")
header_case("brackets_in_bounds", b'{"a":[' + b"[]," * 1_300_000 + b"[]]}", "a: expected dtype, shape and data_offsets")
header_case("control_characters", {"\x1b[2Jx": HEADER[NAME]}, "tensor names must be printable text")
header_case("lone_surrogate", b'{"\\ud800": {}}', "tensor names must be printable text")
header_case("endless_name", {"x" * 2000: HEADER[NAME]}, "tensor names must be printable text of at most 512")
header_case("empty_name", {"": HEADER[NAME]}, "tensor names must be printable text")


# --- zip -------------------------------------------------------------------------------------------

RECORDS = torch_records(GOOD_VALUE, GOOD_STORAGES)
_DATA0 = "archive/data/0"


def zip_case(name: str, message: str, records: Any = None, **falsified: Any) -> None:
    """A zip archive with falsified fields or other records."""
    CASES.append(
        Case(f"zip_{name}", lambda folder: forge.zip_file(folder / "x.pth", records or RECORDS, **falsified), message)
    )


def _without(name: str) -> list[tuple[str, bytes | int]]:
    return [record for record in RECORDS if record[0] != name]


zip_case("compressed", "compressed zip records", central={_DATA0: {"method": 8}}, local={_DATA0: {"method": 8}})
zip_case("compressed_locally", "record archive/data/0 has no plain local header", local={_DATA0: {"method": 8}})
zip_case("bomb", "compressed zip records", central={"archive/data.pkl": {"method": 8, "size": 2**40}})
zip_case("encrypted", "encrypted zip records", central={_DATA0: {"flags": 1}})
zip_case("encrypted_directory", "encrypted zip records", central={_DATA0: {"flags": 0x2000}})
zip_case("bad_signature", "missing or damaged (Bad magic number for central", central={_DATA0: {"signature": b"PKxx"}})
zip_case("directory_offset", "zip records that overlap or leave the file", end={"offset": 10**9})
zip_case("directory_moved", "zip records that overlap or leave the file", end={"offset": 3})
zip_case("zip64_offset", "zip records that overlap or leave the file", always_zip64=True, end={"offset": 2**63})
zip_case(
    "zip64_sizes_missing",
    "zip records that overlap or leave the file",
    always_zip64=True,
    central={_DATA0: {"without_zip64": 1}},
)
zip_case("huge_directory", "a zip directory of 40000000 bytes", [("a/data.pkl", 50_000_000)],
         end={"size": 40_000_000, "offset": 5_000_000})  # fmt: skip
zip_case("overlapping", "zip records that overlap or leave the file", central={_DATA0: {"size": 500, "packed": 500}})
zip_case("past_the_end", "zip records that overlap or leave the file", central={_DATA0: {"offset": 2**31}})
zip_case("two_at_one_place", "zip records that overlap or leave the file", central={"archive/data/1": {"offset": 0}})
zip_case("packed_size", "archive/data/0: 15 bytes for 16", central={_DATA0: {"packed": 15}})
zip_case("local_signature", "record archive/data/0 has no plain local header", local={_DATA0: {"signature": b"PKxx"}})
zip_case("local_extra", "record archive/data/0 reaches into what follows it", local={_DATA0: {"extra_length": 60_000}})
zip_case("duplicate_record", "the zip directory names a record twice", [*RECORDS, (_DATA0, bytes(16))])
zip_case("no_pickle", "but not one that torch.save wrote: it has 0 data.pkl", _without("archive/data.pkl"))
zip_case("two_pickles", "it has 2 data.pkl", [*RECORDS, ("other/data.pkl", b"x")])
zip_case("torchscript", "is a TorchScript program", [*RECORDS, ("archive/constants.pkl", b"x")])
zip_case("missing_storage", "record data/0 is missing, its tensors need 16", _without(_DATA0))
zip_case("short_storage", "record data/0 has 15 bytes, its tensors need 16",
         torch_records(GOOD_VALUE, GOOD_STORAGES | {"0": bytes(15)}))  # fmt: skip
zip_case("long_storage", "record data/0 has 18 bytes, its tensors need 16",
         torch_records(GOOD_VALUE, GOOD_STORAGES | {"0": bytes(18)}))  # fmt: skip
zip_case(
    "big_endian", "was written on a big-endian machine", torch_records(GOOD_VALUE, GOOD_STORAGES, byteorder=b"big")
)
zip_case("long_byteorder", "record byteorder has 999 bytes",
         torch_records(GOOD_VALUE, GOOD_STORAGES, byteorder=b"x" * 999))  # fmt: skip
zip_case("huge_pickle", "record data.pkl has 70000000 bytes", [("archive/data.pkl", 70_000_000)])


@case("the zip directory at the end of the file is missing")
def zip_truncated(folder: Path) -> Path:
    path = good_zip(folder)
    os.truncate(path, path.stat().st_size - 30)
    return path


# --- pickles: each in a zip and in a file of the older form ----------------------------------------


def pickle_case(name: str, value: bytes, message: str) -> None:
    """A pickle that says `value` where a state dict should be."""
    CASES.append(
        Case(
            f"pickle_{name}_zip",
            lambda folder: forge.zip_file(folder / "x.pth", torch_records(value, GOOD_STORAGES)),
            message,
        )
    )
    older = value.replace(integer(8) + b"tQ", integer(8) + b"NtQ")
    CASES.append(
        Case(
            f"pickle_{name}_legacy",
            lambda folder: forge.legacy_file(folder / "x.pth", older, {"0": (8, bytes(16)), "1": (8, bytes(16))}),
            message,
        )
    )


def _pair(first: bytes, second: bytes) -> bytes:
    """Two tensors; both storages are referred to, so that the older form is whole but for the fault."""
    return dict_of({NAME: first, "head.weight": second, "both": tuple_of(storage("0", 8), storage("1", 8))})


_GOOD = tensor(storage("1", 8), (4, 2))
_WEIGHT = tensor(storage("0", 8), (4, 2))

pickle_case("os_system", forge.call(global_("os", "system"), text("exit 1")), "asks for os.system, which a state dict")
pickle_case("posix_system", forge.call(global_("posix", "system"), text("exit 1")), "asks for posix.system")
pickle_case("eval", forge.call(global_("builtins", "eval"), text("1")), "asks for builtins.eval")
pickle_case("getattr", forge.call(global_("builtins", "getattr"), text("1")), "asks for builtins.getattr")
pickle_case("torch_load", forge.call(global_("torch", "load"), text("x")), "asks for torch.load")
pickle_case(
    "dotted", forge.call(global_("torch", "serialization.load"), text("x")), "asks for torch.serialization.load"
)
pickle_case("stack_global", text("os") + text("system") + b"\x93", "asks for os.system")
pickle_case(
    "bare_global",
    global_("torch._utils", "_rebuild_qtensor"),
    "holds a class or an object of one, expected a dictionary",
)
pickle_case("escape_in_global", global_("os\x1b[2J", "x"), r"asks for 'os\x1b[2J.x'")
pickle_case("whole_module", tuple_of(text("module"), integer(1)) + b"Q", "holds a whole module with its code")
pickle_case("inst", b"(ios\nsystem\n", "uses opcode INST, which torch.save does not write")
pickle_case("obj", b"(" + global_("collections", "OrderedDict") + b"o", "uses opcode OBJ")
pickle_case("newobj", global_("collections", "OrderedDict") + b")\x81", "holds no tensors")
pickle_case("extension", b"\x82\x01", "uses opcode EXT1")
pickle_case("text_persid", b"Pstorage\n", "uses opcode PERSID")
pickle_case("empty_stack", b"}u", "its pickle takes from an empty stack")
pickle_case("memo", b"h\x05", "recalls value 5, which it never stored")
pickle_case("calls_text", text("x") + b")R", "calls a str")
pickle_case("calls_storage", global_("torch", "HalfStorage") + b")R", "holds a class or an object of one")
pickle_case("arguments_list", global_("collections", "OrderedDict") + b"]R", "calls with arguments that are no tuple")
pickle_case("build_tensor", _WEIGHT + b"}b", "adds items to a Tensor")
pickle_case("append_to_dict", b"}Na", "adds items to a dict")
pickle_case("odd_items", b"}(NNNu", "has a key without a value")
pickle_case("deep_lists", b"]" * 300_000 + b"a" * 299_999, "holds a list, expected a dictionary")
pickle_case("deep_tuples", b")" + b"\x85" * 300_000, "holds a tuple, expected a dictionary")
pickle_case("deep_key", b"})" + b"\x85" * 300_000 + b"Ns", "has dictionary keys that are neither text nor numbers")
pickle_case(
    "colliding_keys",
    b"}(" + b"".join(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(1, 50_000)) + b"u",
    "has dictionary keys beyond 2147483648",
)
pickle_case("steps", b"N0" + b"]" * 1_050_000, "uses opcode POP")
pickle_case("many_steps", b"]" * 1_050_000, "takes more than 1000000 steps")
pickle_case("doubling", b")" + b"q\x00\x87h\x00h\x00" * 5 + b"".join(
    b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(200)), "takes from an empty stack")  # fmt: skip
pickle_case("laughs", b"]" + b"".join(b"q" + bytes([i]) + b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e"
                                      for i in range(100)), "leaves more or less than one value")  # fmt: skip
pickle_case(
    "shared_items",
    b"](" + b"".join(tuple_of(integer(i), b"N") for i in range(20_000)) + b"eq\x00"
    + (global_("collections", "OrderedDict") + b"(h\x00tR") * 1_000,
    "builds a dictionary by something else than its items",
)  # fmt: skip
pickle_case("long_number", b"\x8b" + (10**6).to_bytes(4, "little") + b"\1" * 10**6, "holds a number of 7999993 bits")
pickle_case("long_text", b"\x8d" + (2**40).to_bytes(8, "little"), "cut short: expected 1099511627776 bytes")
pickle_case("bad_text", b"X\x01\x00\x00\x00\xff", "can't decode byte 0xff")
pickle_case("protocol", b"\x80\x09N", "is of protocol 9")
pickle_case("number", b"Ione\n", "invalid literal for int")
pickle_case("no_newline", b"I" + b"1" * 5000, "no newline found")
pickle_case("two_values", b"NN", "leaves more or less than one value")
pickle_case("list", b"](" + _WEIGHT + _GOOD + b"e", "holds a list, expected a dictionary name -> tensor")
pickle_case("single_tensor", _WEIGHT, "holds a single tensor, expected a dictionary")
pickle_case("no_tensors", dict_of({"epoch": integer(3)}), "holds no tensors; its keys are: epoch")
pickle_case("numbers_as_names", dict_of([(integer(1), _WEIGHT)]), "tensors must be stored by name")
pickle_case("control_characters", dict_of({"\x1b[2J": _WEIGHT}), "tensor names must be printable text")
pickle_case(
    "several_state_dicts",
    dict_of({"model": dict_of({NAME: _WEIGHT}), "module": dict_of({NAME: _GOOD})}),
    "holds several state dicts: model, module",
)
pickle_case("too_large", _pair(tensor(storage("0", 8), (5, 2)), _GOOD), "emb.weight [5, 2] needs bytes up to 20 of a")
pickle_case("offset_outside", _pair(tensor(storage("0", 8), (0,), offset=9), _GOOD), "of a storage of 16 bytes")
pickle_case("strides_outside", _pair(tensor(storage("0", 8), (4, 2), (2, 9)), _GOOD), "emb.weight [4, 2] needs bytes")
pickle_case(
    "expanded", _pair(tensor(storage("0", 8), (10**9, 2), (0, 1)), _GOOD), "emb.weight [1000000000, 2] (strides"
)
pickle_case("quantized", _pair(forge.call(global_("torch._utils", "_rebuild_qtensor"), storage("0", 8)), _GOOD),
            "emb.weight (qtensor)")  # fmt: skip
pickle_case("untyped", _pair(forge.call(global_("torch._utils", "_rebuild_tensor_v3"), storage("0", 8)), _GOOD),
            "builds a tensor from something else than a storage and a dtype")  # fmt: skip
pickle_case("negative_stride", _pair(tensor(storage("0", 8), (4, 2), (-2, 1)), _GOOD), "with a size, stride or offset")
pickle_case("negative_size", _pair(tensor(storage("0", 8), (-4, -2), (2, 1)), _GOOD), "with a size, stride or offset")
pickle_case("huge_size", _pair(tensor(storage("0", 8), (2**80,), (1,)), _GOOD), "with a size, stride or offset")
pickle_case("many_dimensions", _pair(tensor(storage("0", 8), (1,) * 99), _GOOD), "whose shape and strides do not fit")
pickle_case("ranks_differ", _pair(tensor(storage("0", 8), (4, 2), (2,)), _GOOD), "whose shape and strides do not fit")
pickle_case("negative_storage", dict_of({NAME: tensor(storage("0", -8), (4, 2))}), "an impossible number of elements")
pickle_case("storage_of_text", dict_of({NAME: tensor(text("0"), (4, 2))}), "builds a tensor from something else")
pickle_case("parameter_of_text", forge.call(global_("torch._utils", "_rebuild_parameter"), text("x"), b"N", b"N"),
            "builds a parameter from something else than a tensor")  # fmt: skip


@case("its pickle calls a str")
def pickle_conjugated_is_refused_by_name(folder: Path) -> Path:
    value = dict_of({NAME: text("_rebuild_tensor_v2") + b"(tR"})
    return forge.zip_file(folder / "x.pth", torch_records(value, GOOD_STORAGES))


@case("which is not supported")
def pickle_negated(folder: Path) -> Path:
    hooks = global_("collections", "OrderedDict") + b")R"
    parts = [storage("0", 8), integer(0), tuple_of(integer(8)), tuple_of(integer(1)), b"\x89", hooks]
    flags = dict_of({"neg": b"\x88"})
    value = dict_of({NAME: forge.call(global_("torch._utils", "_rebuild_tensor_v2"), *parts, flags)})
    return forge.zip_file(folder / "x.pth", torch_records(value, GOOD_STORAGES))


# --- the older form --------------------------------------------------------------------------------


def legacy_case(
    name: str, message: str, *, storages: Any = None, value: bytes = LEGACY_VALUE, **falsified: Any
) -> None:
    """A file of the older form with a fault in what surrounds the state dict."""
    held = storages or {"0": (8, bytes(16)), "1": (8, bytes(16))}
    CASES.append(
        Case(
            f"legacy_{name}",
            lambda folder: forge.legacy_file(folder / "x.pth", value, held, **falsified),
            message,
        )
    )


legacy_case("magic", "is a pickle, but not one that torch.save wrote", magic=integer(7))
legacy_case("big_endian", "was written on a big-endian machine", little_endian=False)
legacy_case("key_missing", "its list of storages is not the one that its tensors need", keys=["0"])
legacy_case("key_unknown", "its list of storages is not the one that its tensors need", keys=["0", "1", "2"])
legacy_case("key_twice", "its list of storages is not the one that its tensors need", keys=["0", "1", "1"])
legacy_case("count", "9 elements announced at byte", storages={"0": (9, bytes(16)), "1": (8, bytes(16))})
legacy_case("negative_count", "-1 elements announced", storages={"0": (-1, bytes(16)), "1": (8, bytes(16))})
legacy_case("truncated", "its storages at", storages={"0": (8, bytes(16)), "1": (8, bytes(15))})
legacy_case("no_storages", "ends at byte", storages={"0": (8, bytes(16))}, keys=["0", "1"])
legacy_case(
    "view",
    "refers to a view of a storage",
    value=dict_of(
        {
            NAME: tensor(storage("0", 8, view=tuple_of(text("v"), integer(6), integer(8))), (4, 2)),
            "head.weight": tensor(storage("1", 8, view=b"N"), (4, 2)),
        }
    ),
)


@case("its pickle is malformed or cut short")
def legacy_cut_in_pickle(folder: Path) -> Path:
    path = good_legacy(folder)
    os.truncate(path, 200)
    return path


@case("cut short: expected 16777216 bytes")
def legacy_endless_pickle(folder: Path) -> Path:
    path = folder / "x.pth"
    path.write_bytes(pickled(forge.LEGACY_MAGIC) + pickled(integer(1001)) + pickled(b"}") + b"\x80\x02\x8e")
    with path.open("r+b") as out:
        out.seek(0, 2)
        out.write((16 * 2**20).to_bytes(8, "little"))
        for _ in range(5):
            out.seek(16 * 2**20, 1)
            out.write(b"\x8e" + (16 * 2**20).to_bytes(8, "little"))
    return path


# --- folders and their index -----------------------------------------------------------------------


def index_case(name: str, weight_map: Any, message: str) -> None:
    """Two good shards and this weight_map."""

    def build(folder: Path) -> Path:
        good_folder(folder)
        write_index(folder, weight_map)
        return folder

    CASES.append(Case(f"index_{name}", build, message))


_MAP = {"model.embed_tokens.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}
index_case("parent", _MAP | {"x": "../a.safetensors"}, "names files outside the folder:\n  - ../a.safetensors")
index_case("absolute", _MAP | {"x": "/etc/passwd"}, "names files outside the folder:\n  - /etc/passwd")
index_case("backslash", _MAP | {"x": "..\\a.safetensors"}, "names files outside the folder")
index_case("drive", _MAP | {"x": "C:a.safetensors"}, "names files outside the folder")
index_case("nul", _MAP | {"x": "a\0b"}, "names files outside the folder")
index_case("missing_shards", _MAP | {"x": "c.safetensors", "y": "d.safetensors"}, "d.safetensors is missing")
index_case("list", ["a"], "weight_map of model.safetensors.index.json does not map tensor names to file names")
index_case("numbers", {"x": 1}, "weight_map of model.safetensors.index.json does not map tensor names to file names")
index_case("empty", {}, "weight_map of model.safetensors.index.json is empty")


@case("model.safetensors.index.json is not valid JSON")
def index_not_json(folder: Path) -> Path:
    good_folder(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    return folder


@case("model.safetensors.index.json is not valid JSON: nested too deeply")
def index_deep(folder: Path) -> Path:
    good_folder(folder)
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    return folder


@case("holds 2 files that share names of tensors")
def folder_duplicates(folder: Path) -> Path:
    for name in ("rwkv-1.pth", "rwkv-2.pth"):
        good_zip(folder).rename(folder / name)
    return folder


@case("1 of 3 parts are there")
def folder_parts_missing(folder: Path) -> Path:
    return good_safetensors(folder).rename(folder / "model-00001-of-00003.safetensors").parent


@case("holds no weights (1 other file)")
def folder_without_weights(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    return folder


@case("a.safetensors is a link to")
def folder_link_outside(folder: Path) -> Path:
    inside = folder / "model"
    inside.mkdir()
    good_folder(inside)
    (inside / "a.safetensors").rename(folder / "outside.safetensors")
    (inside / "a.safetensors").symlink_to(folder / "outside.safetensors")
    return inside


@case("tokenizer.json is a link to")
def folder_link_of_tokenizer(folder: Path) -> Path:
    inside = folder / "model"
    inside.mkdir()
    good_folder(inside)
    (folder / "secret").write_text("x")
    (inside / "tokenizer.json").symlink_to(folder / "secret")
    return inside


def file_link_case(name: str, place: str, message: str, *, weights: str = "x.safetensors") -> None:
    """A single weight file with a link out of its folder beside it."""

    def build(folder: Path) -> Path:
        inside = folder / "model"
        inside.mkdir()
        made = good_safetensors(inside) if weights.endswith(".safetensors") else good_zip(inside)
        made.rename(inside / weights)
        (folder / "secret").write_text("{}")
        if place != "config.json" and weights.endswith(".safetensors"):
            (inside / "config.json").write_text("{}")
        (inside / place).symlink_to(folder / "secret")
        return inside / weights

    CASES.append(Case(name, build, message))


file_link_case("file_link_of_tokenizer", "tokenizer.json", "tokenizer.json is a link to")
file_link_case("file_link_of_config", "config.json", "config.json is a link to")
file_link_case("file_link_of_sidecar", "x.json", "x.json is a link to", weights="x.pth")


@case("config.json holds a JSON list, expected an object")
def config_is_a_list(folder: Path) -> Path:
    good_folder(folder)
    (folder / "config.json").write_text("[]")
    return folder


@case("config.json is not valid JSON")
def config_is_binary(folder: Path) -> Path:
    good_folder(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe\0")
    return folder


def config_case(name: str, message: str, **values: Any) -> None:
    """A config.json beside good shards."""

    def build(folder: Path) -> Path:
        good_folder(folder)
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    CASES.append(Case(f"config_{name}", build, message))


config_case("endless_layers", "num_hidden_layers is 1000000000, expected a whole number up to 10000",
            num_hidden_layers=10**9)  # fmt: skip
config_case("layers_as_text", "num_hidden_layers is '4'", num_hidden_layers="4")
config_case("layers_true", "num_hidden_layers is True", num_hidden_layers=True)
config_case("negative", "hidden_size is -1", hidden_size=-1)
config_case("infinite", "rope_theta is inf, expected a number", rope_theta=float("inf"))
config_case("token_nan", "eos_token_id is nan, expected a token id or a list of them", eos_token_id=float("nan"))
config_case("token_text", "eos_token_id is '\\ud800'", eos_token_id="\ud800")
config_case("token_deep", "bos_token_id is a list, expected a token id", bos_token_id=[[[1]]])
config_case("dropout_infinite", "attention_dropout is inf, expected a number", attention_dropout=float("inf"))
config_case("nan", "rms_norm_eps is nan, expected a number", rms_norm_eps=float("nan"))
config_case("long_number", "rope_theta is 1000000", rope_theta=10**400)
config_case("rope_list", "rope_scaling is a list, expected an object", rope_scaling=[1])
config_case("rope_inside", "rope_parameters.rope_type is an object, expected text", rope_parameters={"rope_type": {}})
config_case("model_type_list", "model_type is a list, expected text", model_type=["llama"])
config_case("layer_list", "transformer_layers is a list, expected layer numbers only", transformer_layers=[1, -1])
config_case("auto_map", "auto_map is 5, expected an object", auto_map=5)
config_case("control_characters", r"hidden_size is '\x1b[2J'", hidden_size="\x1b[2J")


@case("3000 tensor names are not known in the hf key format")
def names_unknown(folder: Path) -> Path:
    names = [f"model.layers.{i}.mlp.up_projection.weight" for i in range(3000)]
    entries = {
        name: {"dtype": "BF16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]} for i, name in enumerate(names)
    }
    return forge.safetensors_file(folder / "x.safetensors", entries, bytes(6000))


@case("tensors with the wrong number of dimensions, or without elements:\n  - model.embed_tokens.weight has shape [8]")
def dimensions(folder: Path) -> Path:
    value = dict_of({NAME: tensor(storage("0", 8), (8,)), "head.weight": tensor(storage("1", 8), (8, 1))})
    return forge.zip_file(folder / "x.pth", torch_records(value, GOOD_STORAGES))


# --- what is no checkpoint -------------------------------------------------------------------------


def content_case(name: str, content: bytes, message: str) -> None:
    """A file with this content."""

    def build(folder: Path) -> Path:
        (folder / "x.pth").write_bytes(content)
        return folder / "x.pth"

    CASES.append(Case(f"content_{name}", build, message))


content_case("empty", b"", "the file is empty")
content_case("zeros", bytes(4096), "the file begins with zero bytes only")
content_case("lfs_pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer")
content_case("web_page", b"<!DOCTYPE html><html>", "is a web page")
content_case("gguf", b"GGUF\3\0\0\0", "is a GGUF file")
content_case("text", b"hello there", "is neither safetensors nor a file of torch.save")
content_case("gzip", b"\x1f\x8b\x08\0" + bytes(20), "is compressed with gzip")
content_case("tar", b"sys_info\0".ljust(257, b"\0") + b"ustar\0" + bytes(300), "is a tar file, the form of torch.save")
content_case("zip_start", b"PK\x03\x04" + bytes(100), "the zip directory at the end of the file is missing")
content_case("plain_pickle", pickled(b"}"), "is a pickle, but not one that torch.save wrote")


@case("does not exist")
def missing(folder: Path) -> Path:
    return folder / "missing.pth"


@case("is a named pipe, expected a file")
def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "x.pth")
    return folder / "x.pth"


def place_case(name: str, file: str, message: str, put: Callable[[Path], object]) -> None:
    """Something else in the place of a file of a good folder."""

    def build(folder: Path) -> Path:
        good_folder(folder)
        (folder / "config.json").write_text("{}")
        (folder / file).unlink()
        put(folder / file)
        return folder

    CASES.append(Case(f"place_{name}", build, f"these should be files:\n  - {file} is {message}"))


place_case("shard_is_a_pipe", "a.safetensors", "a named pipe", os.mkfifo)
place_case("shard_is_a_device", "b.safetensors", "a device", lambda path: path.symlink_to("/dev/zero"))
place_case("shard_is_missing", "b.safetensors", "a link to blobs/1, which does not", lambda p: p.symlink_to("blobs/1"))
place_case("shard_is_a_socket", "a.safetensors", "a socket", lambda p: os.mknod(p, stat.S_IFSOCK | 0o600))
place_case("config_is_a_pipe", "config.json", "a named pipe", os.mkfifo)
place_case("config_is_a_folder", "config.json", "a folder", os.mkdir)
place_case("index_is_a_folder", "model.safetensors.index.json", "a folder", os.mkdir)


@case("files whose names cannot be printed:\n  - '\\x1b[2J.safetensors'")
def file_name_escapes(folder: Path) -> Path:
    good_safetensors(folder).rename(folder / "\x1b[2J.safetensors")
    return folder


@case("is one of 5 shards")
def single_shard(folder: Path) -> Path:
    return good_safetensors(folder).rename(folder / "model-00002-of-00005.safetensors")
