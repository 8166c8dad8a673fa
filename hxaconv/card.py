"""The model card of an output folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hxaconv.config import StudentConfig

_TEMPLATE = """---
{front_matter}
---

# {title}

An RWKV-7/GQA hybrid (hxa079){made_from}. {purpose}

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

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

{infer}

## How it was made

{how} Details, with the origin of every tensor, are in `hxaconv.json`.
"""

UNTRAINED = (
    "Its RWKV layers are initialised from the teacher's attention and not trained yet:"
    " it is the starting point of a distillation, not a finished model."
)
CALIBRATED = (
    "Its RWKV layers are fitted to the teacher's attention in closed form and not trained yet:"
    " it is a better starting point of a distillation than the plain initialisation, not a finished model."
)
CONVERTED = "The weights are those of the checkpoint it was converted from."


def model_card(
    config: StudentConfig, *, base_model: str | None, purpose: str, how: str, raw: Mapping[str, Any]
) -> bytes:
    """README.md with the Hub's front matter; `base_model` is a Hub id or a bare folder name, never a path."""
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    if base_model and "/" in base_model:
        front.append(f"base_model: {base_model}")
    if raw.get("license"):
        front.append(f"license: {raw['license']}")
    front += ["tags:", *(f"- {tag}" for tag in ("linear-attention", "rwkv", "hybrid", "knowledge-distillation"))]
    layers, gqa = config.num_hidden_layers, len(config.gqa_layers)
    return _TEMPLATE.format(
        front_matter="\n".join(front),
        title=f"hxa079 student of {base_model}" if base_model else "hxa079 student",
        made_from=f" made from {base_model}" if base_model else "",
        purpose=purpose,
        strip="\n".join(config.strip[start : start + 60] for start in range(0, layers, 60)),
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
        infer=_infer_text(config),
    ).encode()


def _infer_text(config: StudentConfig) -> str:
    if config.hidden_size % 256:
        return f"RWKV-Infer does not take it: hidden size {config.hidden_size} is no multiple of 256."
    return (
        "RWKV-Infer loads this folder as it is. A `.pth` made of it does not carry rope_theta and rms_norm_eps: pass\n"
        f"`rope_theta={config.rope_theta:g}` and `rms_norm_eps={config.rms_norm_eps:g}`."
    )
