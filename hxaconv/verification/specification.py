"""The specification a second time, literally: what checks compare an output with.

Nothing here comes from the code that writes: names, formulas, spellings and checksums are stated anew from
docs/hxa079.md (section numbers below) and from the published code that it names, so that a mistake in a table that
writer and reader share is not agreed to by the check as well.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from hxaconv.model.plan import Recipe

# --- Section 5: initial values. Source: OpenMOSE/RWKVInside, rwkv_inside/TimeMixer.py at d03af49. ------------------

FACTORS = {"receptance": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
"""Projection of an RWKV layer -> the teacher's that it is a multiple of."""
NORMS = {"r_norm": "q_norm", "k_norm": "k_norm"}
"""Norm of an RWKV layer -> the teacher's that it is."""

ORTHOGONAL = "semi-orthogonal, 0.1"
RAMP = "as published"


def _initial(random: str, zero: str, **constants: float) -> dict[str, float | str]:
    values = {"w0": RAMP, "a0": RAMP} | dict.fromkeys(random.split(), ORTHOGONAL)
    return values | dict.fromkeys(zero.split(), 0.0) | constants


INITIAL = {
    "hxa079": _initial("w2 a2 g2 v2 k2", "w1 a1 g1 v1 k1", v0=0.73, k0=0.73, r_k=-0.04, layer_architecture=78.0),
    "hxa07a": _initial("w2 a2 g2", "w1 a1 g1"),
    "hxa07b": _initial("w2 a2 g2 w1 a1 v1 v2", "g1"),
}
"""Variant -> parameter -> its initial value. `head_size_record` is head_dim."""
INITIAL["hxa07c"] = INITIAL["hxa07b"]
GAIN = 0.1
"""Of orthogonal matrices, times sqrt(rows / columns) where there are more rows than columns."""
FITTED = frozenset({"v0", "k0", "w0", "a0", "r_k", "g2", "receptance", "key", "value", "output"})
"""Parameters of an RWKV layer that a calibration replaces; all others keep their initial values."""
REFITTED = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})
"""The same of a layer that stays attention: all of its mixer."""


def decay_bias(channels: int, head_dim: int, layer: int, layers: int) -> np.ndarray:
    """w0: how fast each channel forgets, as log(-log decay) + 0.5 before the softplus; (channels), float64."""
    import numpy as np

    depth = layer / (layers - 1) if layers > 1 else 0.0
    values: np.ndarray = -5.5 + 6.0 * np.linspace(0.0, 1.0, channels) ** (1.0 + depth**0.3)
    return values + 2.5 * _zig(channels, head_dim)


def iclr_bias(channels: int, head_dim: int) -> np.ndarray:
    """a0: the in-context learning rate before the sigmoid; (channels), float64."""
    import numpy as np

    values: np.ndarray = -0.19 + 0.3 * _zig(channels, head_dim) + np.linspace(-0.2, 0.2, channels)
    return values


def _zig(channels: int, head_dim: int) -> np.ndarray:
    """-1 to 1 within each head, its square with its sign."""
    import numpy as np

    place = np.linspace(-1.0, 1.0, head_dim)
    return np.tile(place * np.abs(place), channels // head_dim)


def ranks(variant: str, attention_size: int) -> dict[str, int]:
    """Inner widths of the low-rank pairs, by the parameter that shows them."""
    a = float(attention_size)

    def rank(least: int, factor: float, exponent: float) -> int:
        return max(least, round(factor * math.pow(a, exponent) / 32.0) * 32)

    value = rank(32, 1.3, 0.5)
    if variant == "hxa07a":
        return {"w1": rank(32, 1.7, 0.6), "a1": value, "g1": rank(32, 1.7, 0.6)}
    if variant in ("hxa07b", "hxa07c"):
        return {"w1": rank(256, 1.7, 0.6), "a1": rank(128, 1.8, 0.5), "v1": value, "g1": rank(256, 1.7, 0.6)}
    widths = {"w1": rank(256, 1.7, 0.6), "a1": rank(32, 1.8, 0.5), "v1": value, "k1": value}
    return {**widths, "g1": rank(256, 0.35, 0.8)}


# --- Section 6: names. Source: OpenMOSE/RWKV-Infer (.pth) and OpenMOSE/RWKVInside (training) ------------------------

_RWKV_NAMES = """
model.embed_tokens.weight                            emb.weight
model.norm.weight                                    ln_out.weight
lm_head.weight                                       head.weight
model.layers.#.input_layernorm.weight                blocks.#.ln1.weight
model.layers.#.post_attention_layernorm.weight       blocks.#.ln2.weight
model.layers.#.mlp.gate_proj.weight                  blocks.#.ffn.gate.weight
model.layers.#.mlp.gate_proj.bias                    blocks.#.ffn.gate.bias
model.layers.#.mlp.up_proj.weight                    blocks.#.ffn.up.weight
model.layers.#.mlp.up_proj.bias                      blocks.#.ffn.up.bias
model.layers.#.mlp.down_proj.weight                  blocks.#.ffn.down.weight
model.layers.#.mlp.down_proj.bias                    blocks.#.ffn.down.bias
model.layers.#.self_attn.r_norm.weight               blocks.#.att.ln_r.weight
model.layers.#.self_attn.q_norm.weight               blocks.#.att.ln_r.weight
model.layers.#.self_attn.k_norm.weight               blocks.#.att.ln_k.weight
"""
RWKV_NAMES = dict(line.split() for line in _RWKV_NAMES.strip().splitlines())


def stored_name(canonical: str, key_format: str) -> str:
    """What a tensor is called in a folder (`hf`, the canonical name), a `.pth` (`rwkv`) or a training checkpoint."""
    if key_format == "hf":
        return canonical
    if key_format == "training":
        return "model." + canonical.replace(".self_attn.", ".self_attn.student_attn.")
    layer = re.match(r"model\.layers\.(\d+)\.", canonical)
    template = canonical if layer is None else f"model.layers.#.{canonical[layer.end() :]}"
    name = RWKV_NAMES.get(template)
    if name is None:
        return re.sub(r"^model\.layers\.(\d+)\.self_attn\.", r"blocks.\1.att.", canonical)
    return name.replace("#", layer[1]) if layer else name


def wrong_names(stored: Mapping[str, str], key_format: str) -> list[str]:
    """Canonical -> stored names that are not the specification's, as sentences."""
    return [
        f"{found} holds {name}, which is {expected} in a {key_format} file"
        for name, found in stored.items()
        if found != (expected := stored_name(name, key_format))
    ]


# --- Section 7: config.json, as RWKV-Infer and the modelling code read it -------------------------------------------

SWITCHES = {
    "enable_qk_norm": (".r_norm.weight", ".q_norm.weight"),
    "attention_bias": (".receptance.bias", ".q_proj.bias"),
    "attention_out_bias": (".output.bias", ".o_proj.bias"),
    "mlp_bias": (".up_proj.bias",),
}
"""What is true where there are tensors with such endings."""
RANKS = {
    "w1": "lora_rank_decay",
    "a1": "lora_rank_iclr",
    "v1": "lora_rank_value_residual_mix",
    "k1": "lora_rank_key_residual_mix",
    "g1": "lora_rank_gate",
}
"""The parameter that shows a rank -> where config.json has it."""
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.up_proj\.weight$")


def shape_values(tensors: Mapping[str, Recipe]) -> dict[str, Any]:
    """What the config.json of a student has to say, from its tensors alone. Canonical names."""

    def one(ending: str) -> tuple[int, ...] | None:
        return next((tensor.shape for name, tensor in tensors.items() if name.endswith(ending)), None)

    layers = [int(found[1]) for name in tensors if (found := re.match(r"model\.layers\.(\d+)\.", name))]
    kept = sorted({int(name.split(".")[2]) for name in tensors if name.endswith(".self_attn.q_proj.weight")})
    values: dict[str, Any] = {"num_hidden_layers": max(layers) + 1 if layers else None, "transformer_layers": kept}
    if embedding := one("model.embed_tokens.weight"):
        values["vocab_size"], values["hidden_size"] = embedding
    if up := one(".mlp.up_proj.weight"):
        values["intermediate_size"] = up[0]
    experts = {int(found[1]): tensor.shape for name, tensor in tensors.items() if (found := _EXPERT.search(name))}
    if experts:
        values["num_experts"], values["moe_intermediate_size"] = max(experts) + 1, experts[0][0]
    bonus, key = one(".self_attn.r_k"), one(".self_attn.key.weight")
    if bonus and key:
        values["num_attention_heads"], values["head_dim"] = bonus
        values["num_key_value_heads"] = key[0] // bonus[1]
    values |= {setting: first[1] for name, setting in RANKS.items() if (first := one(f".self_attn.{name}"))}
    return values | {key: any(name.endswith(ends) for name in tensors) for key, ends in SWITCHES.items()}


def dtype_values(tensors: Mapping[str, Recipe]) -> dict[str, str]:
    """What it has to say of dtypes: that of most values, in the older spelling and the newer."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + math.prod(tensor.shape)
    most = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}.get(
        max(counts, key=lambda dtype: counts[dtype], default="")
    )
    return {"torch_dtype": most, "dtype": most} if most else {}


NESTED_THETA = "rope_theta in rope_parameters"


def wrong_values(
    expected: Mapping[str, Any], raw: Mapping[str, Any], where: str, *, complete: bool = True
) -> list[str]:
    """Where a config.json, or a sidecar, differs from what it has to hold, as sentences.

    Not `complete`: what it does not say is not missed.
    """
    nested = raw.get("rope_parameters")
    theta = (nested if isinstance(nested, dict) else raw).get("rope_theta")
    found = {"dtype": raw.get("torch_dtype"), **raw, NESTED_THETA: theta}
    return [
        f"{where} has {key} {found.get(key)!r}, expected {value!r}"
        for key, value in expected.items()
        if (complete or found.get(key) is not None)
        and (found.get(key) != value or isinstance(found.get(key), bool) != isinstance(value, bool))
    ]


# --- Files: what their own formats imply ----------------------------------------------------------------


def wrong_index(folder: Path) -> list[str]:
    """Where the index of a folder differs from its shards, read by their headers alone."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    listed, found, total, problems = json.loads(index.read_bytes()), dict[str, str](), 0, []
    for file in sorted(set(listed["weight_map"].values())):
        with open(folder / file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found |= dict.fromkeys(header, file)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
        if 8 + length + end != (folder / file).stat().st_size:
            problems.append(f"{file} does not end where its header implies, at byte {8 + length + end}")
    if found != listed["weight_map"]:
        both = {*found, *listed["weight_map"]}
        names = sorted(name for name in both if found.get(name) != listed["weight_map"].get(name))
        problems.append(f"the index names other files than hold {', '.join(names[:3])}")
    announced = (listed.get("metadata") or {}).get("total_size", total)
    if announced != total:
        problems.append(f"the index has {announced} bytes, the tensors have {total}")
    return problems


CHUNK = 1 << 20


def wrong_checksums(path: Path, workers: int = 2) -> list[str]:
    """Records of a zip whose CRC-32 in the directory, or in the record's own header, is not that of their bytes.

    Source: PKWARE APPNOTE 4.3.7 and 4.3.12; the directory is read by Python's own zipfile.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()

    def problem(record: zipfile.ZipInfo) -> str:
        crc, left = 0, record.file_size
        with open(path, "rb", buffering=0) as stream:
            stream.seek(record.header_offset)
            local = stream.read(30)
            own = int.from_bytes(local[14:18], "little")
            behind = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
            stream.seek(record.header_offset + 30 + behind)
            while left:
                data = stream.read(min(CHUNK, left))
                if not data:
                    return f"{record.filename} ends early"
                crc, left = zlib.crc32(data, crc), left - len(data)
        # Bit 3: the record's own header leaves its checksum to what follows the data.
        if crc != record.CRC or (crc != own and not record.flag_bits & 8):
            return f"{record.filename} has CRC-32 {crc:08x}, recorded are {record.CRC:08x} and {own:08x}"
        return ""

    with ThreadPoolExecutor(workers) as pool:
        return [text for text in pool.map(problem, records) if text]
