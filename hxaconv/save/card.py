"""The model card of an output folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hxaconv.model.config import StudentConfig

if TYPE_CHECKING:
    from hxaconv.calibration import CalibrationReport

STRIP_WIDTH = 60
"""Layers in a line of the layer strip."""

_TEMPLATE = """---
{front_matter}
---

# {title}

An RWKV-7/GQA hybrid (hxa079){made_from}.{purpose}

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
    layers, gqa = config.num_hidden_layers, len(config.gqa_layers)
    return _TEMPLATE.format(
        front_matter="\n".join(front),
        title=f"hxa079 student of {base_model}" if base_model and taught else "hxa079 student",
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
    lines += [
        "| layer | | error before | after | decay by head | a by head | bonus clamped | output refitted |",
        "|--:|---|--:|--:|---|---|--:|---|",
    ]
    for layer in report.layers:
        cells = (
            layer.layer,
            layer.kind + (", kept plain" if layer.kept_plain else ""),
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
