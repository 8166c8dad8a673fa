"""JSON: files that come with a checkpoint, read within bounds, values of the right type; and figures to store."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats.files import SourceFile, not_the_file, show

PROVENANCE_NAME = "hxaconv.json"
"""In a folder that this package wrote: how it was made."""
MAX_JSON_BYTES = 16 * 1024 * 1024
MAX_LAYERS = 10_000
"""Everything that is done per layer must end, whatever a config holds."""


def read_json(file: SourceFile) -> dict[str, Any]:
    """The object that a small JSON file holds.

    Raises:
        HxaconvError: when it is too large, malformed, or holds something else than an object.
    """
    if file.size > MAX_JSON_BYTES:
        raise HxaconvError(f"{file.label} has {file.size} bytes, expected at most {MAX_JSON_BYTES}")
    data = file.read(0, file.size)
    file.close()
    try:
        value = parse_json(data)
    except ValueError as error:
        hint = "Correct it, or download it again." if data.strip() else "The file is empty: download it again."
        if data.startswith(b"\xef\xbb\xbf"):
            hint = "Save it as UTF-8 without a byte order mark, which no reader of such files takes."
        if (instead := not_the_file(data[:512])) is not None:
            hint = f"It is {instead[0]}. {instead[1]}"
        raise HxaconvError(f"{file.label} is not valid JSON: {error}", hint=hint) from None
    if not isinstance(value, dict):
        raise HxaconvError(f"{file.label} holds a JSON {type(value).__name__}, expected an object")
    return value


def parse_json(data: bytes | str) -> Any:
    """The value that JSON text holds; of two values under one key readers take either, so that none is right.

    Raises:
        ValueError: naming what is wrong, also for numbers and nesting without bounds.
    """
    try:
        return json.loads(data if isinstance(data, str) else data.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(why_unread(error)) from None


def why_unread(error: ValueError | RecursionError) -> str:
    """What is wrong with a text that JSON or TOML could not be made of, in a few words about the text."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if "set_int_max_str_digits" in str(error):  # Python's message is about its own setting
        return "it holds a number of thousands of digits"
    return show(str(error))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for json.loads; ValueError is raised for a key that occurs twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {show(twice)} occurs twice")
    return made


def read_config(file: SourceFile) -> dict[str, Any]:
    """A config.json whose known keys have values of the right type.

    Raises:
        HxaconvError: listing every value of another type.
    """
    return _checked(read_json(file), file.label)


def read_sidecar(file: SourceFile) -> dict[str, Any] | None:
    """The settings beside a `.pth`; None for a JSON file of that name from another program.

    Raises:
        HxaconvError: when it is malformed, or ours with values of the wrong type.
    """
    raw = read_json(file)
    return _checked(raw, file.label) if raw.keys() & {"rwkv_architecture", "hxaconv"} else None


def as_bytes(document: Mapping[str, Any]) -> bytes:
    """A JSON file's bytes: two-space indent, UTF-8, a final newline; NaN is ours to avoid."""
    return b"".join(json_chunks(document))


def json_chunks(document: Mapping[str, Any]) -> Iterator[bytes]:
    """The same in chunks, of a document that may be long."""
    words = json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False).iterencode(document)
    while chunk := "".join(itertools.islice(words, 10_000)):
        yield chunk.encode()
    yield b"\n"


def plain_data(value: Any, digits: int | None = None) -> Any:
    """What JSON has words for: tuples as lists, floats that are not finite as text, others to so many digits."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return value if digits is None else float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: plain_data(item, digits) for key, item in value.items()}
    return [plain_data(item, digits) for item in value] if isinstance(value, list | tuple) else value


def _checked(raw: dict[str, Any], label: str) -> dict[str, Any]:
    problems = []
    for key, (fits, expected) in _TYPES.items():
        value: Any = raw
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and not fits(value):
            # Not the repr of lists and objects: it recurses as deeply as they are nested.
            shown = (
                "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else show(repr(value))
            )
            problems.append(f"{key} is {shown}, expected {expected}")
    raise_all(f"{label}: values of the wrong type:", problems, hint="Compare it with the original model's file.")
    return raw


def _is_int(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


_MOST = 2**31 - 1
_SIZE = (lambda value: _is_int(value, 0, _MOST), f"a whole number up to {_MOST}")
_NUMBER = (lambda value: type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value), "a number")
_BOOL = (lambda value: isinstance(value, bool), "true or false")
_TEXT = (lambda value: isinstance(value, str), "text")
_LAYERS = (_all(lambda value: _is_int(value, 0, MAX_LAYERS - 1)), "layer numbers only")
_TOKENS = (
    lambda value: _all(lambda one: _is_int(one, -_MOST, _MOST))(value if isinstance(value, list) else [value]),
    "a token id or a list of them",
)
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_hidden_layers": (lambda value: _is_int(value, 0, MAX_LAYERS), f"a whole number up to {MAX_LAYERS}"),
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"), _SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings"), _SIZE),
    "sliding_window": (lambda value: value is False or _is_int(value, 0, _MOST), _SIZE[1]),
    **dict.fromkeys(("lora_rank_decay", "lora_rank_iclr", "lora_rank_gate"), _SIZE),
    **dict.fromkeys(("lora_rank_value_residual_mix", "lora_rank_key_residual_mix"), _SIZE),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _SIZE),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "partial_rotary_factor"), _NUMBER),
    **dict.fromkeys(("initializer_range", "attention_dropout"), _NUMBER),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias"), _BOOL),
    **dict.fromkeys(("use_sliding_window", "enable_qk_norm", "has_layer_records"), _BOOL),
    **dict.fromkeys(("nope_in_transformer", "nope_in_rwkv"), _BOOL),
    **dict.fromkeys(("model_type", "hidden_act", "hidden_activation", "rwkv_architecture"), _TEXT),
    **dict.fromkeys(("dtype", "torch_dtype", "quantization_config.quant_method"), _TEXT),
    **dict.fromkeys(("architectures", "layer_types"), (_all(_TEXT[0]), "texts only")),
    **dict.fromkeys(("transformer_layers", "rwkv_layers"), _LAYERS),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _TOKENS),
    **dict.fromkeys(
        ("auto_map", "hxaconv", "rope_parameters", "rope_scaling", "quantization_config"),
        (lambda value: isinstance(value, dict), "an object"),
    ),
    **{
        f"{outer}.{key}": kind
        for outer in ("rope_parameters", "rope_scaling")
        for kind, keys in ((_NUMBER, ("rope_theta", "partial_rotary_factor")), (_TEXT, ("rope_type", "type")))
        for key in keys
    },
}
"""What the keys hold that are read anywhere in the package; null is allowed, and left to who reads it."""
