"""The small files of an output: config.json or a sidecar's settings, the model card, and hxaconv.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv import __version__
from hxaconv.errors import HxaconvError
from hxaconv.formats.dtypes import BY_NAME
from hxaconv.formats.json_files import as_bytes, read_json
from hxaconv.model.config import StudentConfig, kv_cache_bytes, state_bytes
from hxaconv.model.rwkv_infer import FOLDER, PTH, loadmodel_body
from hxaconv.model.variants.base import MODEL_TYPE, RANK_KEYS
from hxaconv.save.fill import digest_of

if TYPE_CHECKING:
    from hxaconv.calibration.report import CalibrationReport
    from hxaconv.model.model import Checkpoint
    from hxaconv.options import Init
    from hxaconv.save.output import Output, Record
    from hxaconv.surgery.init import InitSettings

CODE_FILES = ("configuration_hxa079.py", "modeling_hxa079.py")
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


def documents(output: Output) -> dict[str, bytes]:
    """The model card, the modelling code and config.json of a folder, or the sidecar of a file."""
    assert output.student is not None
    config, raw, record = output.student.student, output.student.raw, output.record
    settings = student_json(config, raw, output.dtype)
    if not output.is_folder:
        settings = {key: value for key, value in settings.items() if key not in ("auto_map", "architectures")}
        return {output.sidecar_name: as_bytes(settings | (_loadmodel(output) if output.format == "pth" else {}))}
    code = resources.files("hxaconv") / "model" / "hf"
    # The parts that are carried along, from a shell's config.json.
    shell = record.shell.shell_config if output.shell and record.shell else {}
    found = {name: (code / name).read_bytes() for name in CODE_FILES}
    found["README.md"] = model_card(config, raw, record)
    return found | {"config.json": as_bytes({**settings, **shell, **settings})}


def _loadmodel(output: Output) -> dict[str, Any]:
    """The request that RWKV-Infer loads this with, where it runs the variant."""
    assert output.student is not None
    config, kind = output.student.student, FOLDER if output.is_folder else PTH
    if config.variant.loaders.get(f"RWKV-Infer, {'HF folder' if output.is_folder else '.pth'}"):
        return {}
    return {"rwkv_infer_loadmodel": loadmodel_body(config, output.student.plan, kind, output.target.name)}


STRIP_WIDTH = 60
"""Layers in a line of the layer strip."""
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


def model_card(config: StudentConfig, raw: Mapping[str, Any], record: Record) -> bytes:
    """README.md with the Hub's front matter; `raw` is the config.json that the model came from, with its license."""
    origin = record.sources.get("teacher") or record.sources.get("source")
    base = origin.name if origin else None  # a Hub id or a bare folder name, never a path
    layers, gqa, name = config.num_hidden_layers, len(config.gqa_layers), config.rwkv_architecture
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    if base and "/" in base:
        front.append(f"base_model: {base}")
    if re.fullmatch(r"[\w.+-]+", str(raw.get("license", ""))):
        front.append(f"license: {raw['license']}")
    front += ["tags:", *(f"- {tag}" for tag in ("linear-attention", "rwkv", "hybrid", "knowledge-distillation"))]
    lines, listed = "\n".join(front), f"({', '.join(map(str, config.gqa_layers))})" if gqa else ""
    title = f"{name} student of {base}" if base and "teacher" in record.sources else f"{name} student"
    strip = "\n".join(config.strip[start : start + STRIP_WIDTH] for start in range(0, layers, STRIP_WIDTH))
    section = f"\n{record.section}\n" if record.section else ""
    cache = kv_cache_bytes(gqa, config.num_key_value_heads, config.head_dim)
    state = state_bytes(layers - gqa, config.num_attention_heads, config.head_dim)
    infer = (
        "RWKV-Infer loads this folder as it is. A `.pth` made of it does not carry rope_theta and rms_norm_eps: pass\n"
        f"`rope_theta={config.rope_theta:g}` and `rms_norm_eps={config.rms_norm_eps:g}`."
    )
    if config.hidden_size % 256:
        infer = f"RWKV-Infer does not take it: hidden size {config.hidden_size} is no multiple of 256."
    return f"""---
{lines}
---

# {title}

An RWKV-7/GQA hybrid ({name}){f" made from {base}" if base else ""}.{f" {record.purpose}" if record.purpose else ""}

## Layers

`R` is an RWKV-7 time-mix layer (RoPE on), `G` a grouped-query attention layer (no RoPE).

```
{strip}
```

| | |
|---|---|
| layers | {layers}, of which {layers - gqa} RWKV and {gqa} GQA {listed} |
| hidden size, MLP, vocabulary | {config.hidden_size}, {config.intermediate_size}, {config.vocab_size} |
| heads, kv heads, head_dim | {config.num_attention_heads}, {config.num_key_value_heads}, {config.head_dim} |
| KV cache per token | {cache} bytes in bf16 ({gqa} of {layers} layers) |
| recurrent state per sequence | {state} bytes in float32 |
| rope_theta, rms_norm_eps | {config.rope_theta:g}, {config.rms_norm_eps:g} |

## How to use it

```python
from transformers import AutoModelForCausalLM

# Before transformers 4.56: torch_dtype="auto"
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True, dtype="auto")
```

{infer}
{section}
## How it was made

`{record.call.line}` with hxaconv {__version__}. Details, with the origin of every tensor, are in `hxaconv.json`.
""".encode()


def calibration_section(report: CalibrationReport) -> str:
    """How near the student is to its teacher, and how the fit of every layer went."""
    kl, validation = report.distances, report.tokens - report.fitted_tokens
    text = (
        f"Fitted to {report.fitted_tokens} of {report.tokens} tokens, validated on {validation}. The error of a"
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
            layer.kind + (", fell back" if layer.fell_back else ""),
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


# hxaconv.json, or the key `hxaconv` of a sidecar

MAX_STEPS = 32
"""Of a history; the latest are kept."""
STEP = ("hxaconv", "command_line", "gqa_layers", "changed_layers", "init", "calibration")
"""The sections of a record that a history keeps, as they are."""


def provenance(output: Output) -> dict[str, Any]:
    """How an output is made, before it is: no times, no run options, no local folders."""
    assert output.student is not None
    call, config = output.record.call, output.student.student
    return {
        "hxaconv": __version__,
        "command_line": call.line,
        "options": call.recorded,
        "sources": {role: _source(checkpoint) for role, checkpoint in output.record.sources.items()},
        "format": output.format,
        "variant": config.rwkv_architecture,
        "gqa_layers": list(config.gqa_layers),
        **(_loadmodel(output) if output.is_folder else {}),
        **output.record.extra,
    }


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    files = [{"name": f.name, "bytes": f.size, "header_sha256": f.header_digest} for f in checkpoint.files]
    name = checkpoint.repo or Path(checkpoint.label).name
    described: dict[str, Any] = {"name": name, "revision": checkpoint.revision, "files": files}
    history = history_of(checkpoint)
    return described | {"history": history} if history else described


def init_record(layers: Iterable[int], values: Init, settings: InitSettings) -> dict[str, Any]:
    """The section `init` of a record: which layers were initialised, and how."""
    how = {"method": values.init, "preset": values.preset, "factors": dict(settings.factors), "seed": settings.seed}
    return how | {"layers": list(layers)}


def record_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """hxaconv.json of a folder, or the key `hxaconv` of the sidecar of a `.pth`; empty where there is none.

    Raises:
        HxaconvError: when it is not JSON, or no object.
    """
    if checkpoint.record is not None and checkpoint.container == "safetensors":
        return read_json(checkpoint.record)
    return (checkpoint.sidecar or {}).get("hxaconv") or {}


def history_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The steps that made a checkpoint, the first one first, by their records; empty where there is none.

    A record comes with a checkpoint, from strangers: its content has to be checked before use.
    """
    try:
        record = record_of(checkpoint)
        earlier = record["sources"]["source"].get("history", []) if "source" in record.get("sources", {}) else []
        steps = [step for step in earlier if isinstance(step, dict)]
    except (HxaconvError, AttributeError, KeyError, TypeError):
        return []
    own = {key: record[key] for key in STEP if key in record}
    return [*steps, own][-MAX_STEPS:] if own else steps


def settings_digest(sidecar: Mapping[str, Any], kind: str) -> str:
    """The digest of a sidecar's settings: all of it but the key `hxaconv`."""
    settings = {key: value for key, value in sidecar.items() if key != "hxaconv"}
    return digest_of([json.dumps(settings, sort_keys=True).encode()], kind)
