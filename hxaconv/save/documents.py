"""The small files of an output: what config.json and the model card say; written, and read back from disk."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import CheckFailed, raise_all
from hxaconv.formats import FileLayout
from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.json_files import PROVENANCE_NAME, as_bytes
from hxaconv.formats.safetensors import INDEX_NAME, index_json
from hxaconv.model.config import StudentConfig
from hxaconv.model.plan import Buffers
from hxaconv.model.variants.base import MODEL_TYPE, RANK_KEYS
from hxaconv.save import diskio
from hxaconv.save.checksums import Finished, digest_of, digest_of_file

if TYPE_CHECKING:
    from hxaconv.calibration.report import CalibrationReport
    from hxaconv.save.output import Output
    from hxaconv.save.staging import Staging
    from hxaconv.save.writer import Check

AUTO_MAP = {
    "AutoConfig": "configuration_hxa079.Hxa079Config",
    "AutoModel": "modeling_hxa079.Hxa079Model",
    "AutoModelForCausalLM": "modeling_hxa079.Hxa079ForCausalLM",
}

CARRIED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
    "initializer_range",
    "attention_dropout",
)
"""Keys of the teacher's config.json that keep their meaning in the student's."""


def student_json(config: StudentConfig, raw: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config as a dict in a stable order; `raw` is the config.json that the model came from.

    rope_theta and the dtype stand in both spellings: RWKV-Infer and transformers 4 read the first,
    transformers 5 the second.
    """
    scaling = config.rope_scaling.to_dict() if config.rope_scaling else None
    torch_name = BY_NAME[dtype].torch_name
    return {
        "architectures": ["Hxa079ForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": AUTO_MAP,
        "rwkv_architecture": config.rwkv_architecture,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_word_embeddings,
        "transformer_layers": list(config.gqa_layers),
        "rwkv_layers": list(config.rwkv_layers),
        "nope_in_transformer": True,
        "nope_in_rwkv": False,
        "enable_qk_norm": config.qk_norm,
        "attention_bias": config.attention_bias,
        "attention_out_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        **(config.experts.to_config() if config.experts is not None else {}),
        "has_layer_records": config.layer_records,
        **{RANK_KEYS[name]: getattr(config.ranks, name) for name in config.variant.rank_names},
        **{key: raw[key] for key in CARRIED if key in raw},
        "use_cache": True,
        "torch_dtype": torch_name,
        "dtype": torch_name,
    }


STRIP_WIDTH = 60
"""Layers in a line of the layer strip."""

_TEMPLATE = """---
{front_matter}
---

# {title}

An RWKV-7/GQA hybrid ({variant}){made_from}.{purpose}

## Layers

`R` is an RWKV-7 time-mix layer (RoPE on), `G` a grouped-query attention layer (no RoPE).

```
{strip}
```

| | |
|---|---|
| layers | {layers}, of which {rwkv} RWKV and {gqa} GQA {gqa_list} |
| hidden size, MLP, vocabulary | {hidden}, {mlp}, {vocab} |
| heads, kv heads, head_dim | {heads}, {groups}, {head_dim} |
| KV cache per token | {kv} bytes in bf16 ({gqa} of {layers} layers) |
| recurrent state per sequence | {state} bytes in float32 |
| rope_theta, rms_norm_eps | {theta:g}, {eps:g} |

## How to use it

```python
from transformers import AutoModelForCausalLM

# Before transformers 4.56: torch_dtype="auto"
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True, dtype="auto")
```

{infer}
{section}
## How it was made

{how} Details, with the origin of every tensor, are in `hxaconv.json`.
"""

UNTRAINED = (
    "Its RWKV layers are initialised from the teacher's attention and not trained yet:"
    " it is the starting point of a distillation, not a finished model."
)
CALIBRATED = (
    "Its mixers are fitted to the teacher's attention on a short text, a layer at a time, and not trained yet:"
    " it is a better starting point of a distillation than the plain initialisation, not a finished model."
)
CONVERTED = "The weights are those of the checkpoint it was converted from."


def partly_untrained(layers: Sequence[int]) -> str:
    """The purpose of a student some of whose RWKV layers, if any, were initialised just now."""
    if not layers:
        return ""
    named = f"layer {layers[0]} is" if len(layers) == 1 else f"layers {', '.join(map(str, layers))} are"
    return (
        f"Its RWKV {named} newly initialised from the teacher's attention and not trained yet;"
        " the others are the source's."
    )


def model_card(
    config: StudentConfig,
    *,
    base_model: str | None,
    purpose: str,
    how: str,
    raw: Mapping[str, Any],
    section: str = "",
    taught: bool = True,
) -> bytes:
    """README.md with the Hub's front matter; `base_model` is a Hub id or a bare folder name, never a path.

    `taught`: it is the teacher, not the student that this one was converted from.

    `section` is Markdown that goes before the story of how it was made.
    """
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    if base_model and "/" in base_model:
        front.append(f"base_model: {base_model}")
    if re.fullmatch(r"[\w.+-]+", str(raw.get("license", ""))):
        front.append(f"license: {raw['license']}")
    front += ["tags:", *(f"- {tag}" for tag in ("linear-attention", "rwkv", "hybrid", "knowledge-distillation"))]
    layers, gqa, name = config.num_hidden_layers, len(config.gqa_layers), config.rwkv_architecture
    return _TEMPLATE.format(
        front_matter="\n".join(front),
        title=f"{name} student of {base_model}" if base_model and taught else f"{name} student",
        variant=name,
        made_from=f" made from {base_model}" if base_model else "",
        purpose=f" {purpose}" if purpose else "",
        strip="\n".join(config.strip[start : start + STRIP_WIDTH] for start in range(0, layers, STRIP_WIDTH)),
        layers=layers,
        rwkv=layers - gqa,
        gqa=gqa,
        gqa_list=f"({', '.join(map(str, config.gqa_layers))})" if gqa else "",
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        vocab=config.vocab_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=config.head_dim,
        kv=config.kv_cache_bytes(gqa),
        state=config.state_bytes,
        theta=config.rope_theta,
        eps=config.rms_norm_eps,
        how=how,
        section=f"\n{section}\n" if section else "",
        infer=_infer_text(config),
    ).encode()


def calibration_section(report: CalibrationReport) -> str:
    """How near the student is to its teacher, and how the fit of every layer went."""
    kl, judging = report.distances, report.tokens - report.fitted_tokens
    text = (
        f"Fitted to {report.fitted_tokens} of {report.tokens} tokens; the other {judging} judge. The error of a"
        " layer's mixer, on the teacher's hidden states, is a share of the energy of the teacher's attention."
    )
    lines = ["## Calibration", "", text, ""]
    if report.polish is not None:
        lines += [f"{report.polish.sentence}.", ""]
    if not report.taken:
        lines += ["**The fit is not used**: with it the student is no nearer to its teacher. Every layer is plain.", ""]
    if kl is not None:
        lines += [f"| KL(teacher \\|\\| student), nats per token, on {kl.tokens} held-out tokens | |", "|---|--:|"]
        fitted = "calibrated" if report.taken else "calibrated, not used"
        named = {fitted: kl.calibrated, "plain": kl.plain, "attention zeroed": kl.attention_zeroed}
        lines += [*(f"| {name} | {value:.3g} |" for name, value in named.items()), ""]
        lines += [f"{kl.recall_sentence}.", ""] if kl.recall else []
    lines += [
        "| layer | | error before | after | decay by head | a by head | bonus clamped | output refitted |",
        "|--:|---|--:|--:|---|---|--:|---|",
    ]
    for layer in report.layers:
        cells = (
            layer.layer,
            layer.kind + (", kept plain" if layer.fell_back else ""),
            f"{layer.error_before:.3f}",
            f"{layer.error_after:.3f}",
            _spread(layer.decay),
            _spread(layer.iclr),
            f"{layer.clamped:.1%}",
            "yes" if layer.output_refitted else "no",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}" if values else ""


def _infer_text(config: StudentConfig) -> str:
    if config.hidden_size % 256:
        return f"RWKV-Infer does not take it: hidden size {config.hidden_size} is no multiple of 256."
    return (
        "RWKV-Infer loads this folder as it is. A `.pth` made of it does not carry rope_theta and rms_norm_eps: pass\n"
        f"`rope_theta={config.rope_theta:g}` and `rms_norm_eps={config.rms_norm_eps:g}`."
    )


SMALL_BYTES = 64 * 1024
"""Records of a zip that are read back whole."""


def write_documents(staging: Staging, output: Output) -> None:
    """Files taken over, documents (config.json is the last of them), and then the index.

    Raises:
        OSError: naming the file.
    """
    buffers = Buffers()
    for name, file in output.copied_files.items():
        _write(staging, name, file.pieces(0, file.size, buffers.read))
    for name, data in _documents(output).items():
        _write(staging, name, [data])


def _documents(output: Output) -> dict[str, bytes]:
    """The documents as they are to stand on disk before there is a verdict."""
    if not output.is_folder or len(output.files) < 2:
        return dict(output.documents)
    return {**output.documents, INDEX_NAME: index_json(output.tensors, output.files)}


def write_provenance(
    staging: Staging,
    output: Output,
    tensors: Mapping[str, Finished],
    verification: Mapping[str, Any] | None,
    digest: str,
) -> None:
    """hxaconv.json, or the sidecar's key `hxaconv`: what was done, and what every tensor and small file is.

    Raises:
        OSError: naming the file.
    """
    entries: dict[str, dict[str, str]] = {}
    for name, recipe in output.tensors.items():
        found = tensors[name].digest(digest)
        entries[name] = {"origin": recipe.origin} | ({"digest": found} if found else {})
    provenance = {**output.provenance, "verification": verification, "tensors": entries}
    if digest != "none":
        provenance["files"] = _file_digests(staging, output, digest)
    nonfinite = {name: tensor.nonfinite for name, tensor in tensors.items() if tensor.nonfinite}
    if nonfinite:
        provenance["nonfinite"] = nonfinite
    name, document = PROVENANCE_NAME, provenance
    if not output.is_folder:
        settings = json.loads(output.documents.get(output.sidecar_name, b"{}"))
        name, document = output.sidecar_name, {**settings, "hxaconv": provenance}
    data = as_bytes(document)
    del entries, provenance, document  # of 20,000 tensors, as long as the file itself
    _write(staging, name, [data])
    if (staging.content / name).read_bytes() != data:
        raise CheckFailed(f"{staging.content / name} is not what was written")


def _file_digests(staging: Staging, output: Output, kind: str) -> dict[str, str]:
    """Small files by name; of a sidecar, in which this is to stand, its settings."""
    found = {name: digest_of_file(staging.content / name, kind) for name in [*output.copied_files, *_documents(output)]}
    if not output.is_folder and output.sidecar_name in found:
        settings = json.loads((staging.content / output.sidecar_name).read_bytes())
        found[output.sidecar_name] = settings_digest(settings, kind)
    return found


def settings_digest(sidecar: Mapping[str, Any], kind: str) -> str:
    """The digest of a sidecar's settings: all of it but the key `hxaconv`."""
    settings = {key: value for key, value in sidecar.items() if key != "hxaconv"}
    return digest_of(json.dumps(settings, sort_keys=True).encode(), kind)


def read_back(staging: Staging, output: Output, tensors: Mapping[str, Finished], check: Check | None) -> None:
    """Compare what stands on disk with what was to be written: documents, names, shapes, dtypes, places, checksums.

    Headers and directories are read by code that shares nothing with what wrote them.

    Raises:
        CheckFailed: listing everything that differs.
    """
    content = staging.content
    problems = _settings_problems(content, output, check)
    for name, data in _documents(output).items():
        if (content / name).read_bytes() != data:
            problems.append(f"{name} is not what was written")
    for name, file in output.copied_files.items():
        problems += _size_problem(content / name, file.size)
    for layout in output.files:
        wrong = _size_problem(content / layout.name, layout.size)
        problems += wrong or _layout_problems(content / layout.name, layout, output, tensors)
    raise_all(f"{content}: on disk is not what was to be written:", problems, kind=CheckFailed)


def _layout_problems(path: Path, layout: FileLayout, output: Output, tensors: Mapping[str, Finished]) -> list[str]:
    try:
        if output.is_folder:
            found: dict[str, Any] = _safetensors_tensors(path)
            wanted = {
                fill.name: [fill.recipe.dtype, [*fill.recipe.shape], fill.offset, fill.offset + fill.recipe.nbytes]
                for fill in layout.fills
            }
        else:
            found = _zip_tensors(path)
            wanted = {f"data/{i}": [tensors[f.name].crc32, f.recipe.nbytes] for i, f in enumerate(layout.fills)}
    except (ValueError, KeyError, TypeError, struct.error, zipfile.BadZipFile) as error:
        return [f"{path.name} cannot be read: {error}"]
    return [
        f"{path.name}: {name} is {found.get(name, 'not there')}, expected {wanted.get(name, 'nothing')}"
        for name in dict.fromkeys([*wanted, *found])
        if found.get(name) != wanted.get(name)
    ]


def _settings_problems(content: Path, output: Output, check: Check | None) -> list[str]:
    """What the check says of the settings on disk."""
    if check is None:
        return []
    name = "config.json" if output.is_folder else output.sidecar_name
    return check.settings(output, json.loads((content / name).read_bytes()), name)


def _size_problem(path: Path, expected: int) -> list[str]:
    size = path.stat().st_size
    return [] if size == expected else [f"{path.name} has {size:,} bytes, expected {expected:,}"]


def _safetensors_tensors(path: Path) -> dict[str, list[Any]]:
    """Name -> dtype, shape, first and last byte in the file, by the format's own description.

    Source: https://github.com/huggingface/safetensors#format
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: [entry["dtype"], entry["shape"], *(8 + length + offset for offset in entry["data_offsets"])]
        for name, entry in header.items()
    }


def _zip_tensors(path: Path) -> dict[str, list[Any]]:
    """Record -> CRC-32 and size of the tensors in a `.pth`, by Python's zipfile, which compares those it reads."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        for info in entries.values():
            if info.file_size <= SMALL_BYTES or "/data/" not in info.filename:
                archive.read(info)
    return {name: [info.CRC, info.file_size] for name, info in entries.items() if name.startswith("data/")}


def _write(staging: Staging, name: str, chunks: Iterable[bytes | memoryview]) -> None:
    path = staging.content / name
    try:
        path.parent.mkdir(exist_ok=True)
        diskio.write_file(path, chunks, staging.path)
        if path.parent != staging.content:
            diskio.sync_folder(path.parent)
    except OSError as error:
        error.filename = path  # not all calls know it
        raise
