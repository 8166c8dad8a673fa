"""Shells: models that wrap a language model beside vision or audio. Their text model is what is converted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
"""What the text model's names begin with inside a shell -> alone. Mistral 3 (first two), Qwen3-VL (last)."""

PARTS = (
    *("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    *("visual.", "model.visual.", "audio_tower.", "model.audio_tower."),
)
"""What the names of everything else begin with."""

TEXT_TYPES = {"qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe"}
"""`model_type` of a text model in a shell -> the family that it is, where that has another name."""

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files that a shell's processor needs."""


_SETTING = re.compile(r"(vision|image|video|audio|projector|multimodal|spatial|deepstack)_")


def is_part(name: str) -> bool:
    """Whether a stored name belongs to a shell, and not to its text model."""
    return name.startswith(PARTS)


def text_name(name: str) -> str:
    """The name that a tensor of a shell's text model has without the shell; others as they are."""
    found = next((prefix for prefix in TEXT_PREFIXES if name.startswith(prefix)), None)
    return name if found is None else TEXT_PREFIXES[found] + name[len(found) :]


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that the text model alone would have; `raw` names it in `text_config`."""
    text = dict(raw["text_config"])
    for key in ("tie_word_embeddings", "torch_dtype", "dtype", "quantization_config"):
        if raw.get(key) is not None:
            text[key] = raw[key]  # the shell's class reads its own
    kind = str(text.get("model_type") or raw.get("model_type"))
    return text | {"model_type": TEXT_TYPES.get(kind, kind)}


def shell_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json, a shell's or that of a student that carries one, has beside the text model."""
    return {key: value for key, value in raw.items() if _SETTING.match(key)}


def summary(names: Iterable[str]) -> str:
    """`12 tensors of vision_tower, 4 of multi_modal_projector`."""
    counts: dict[str, int] = {}
    for name in names:
        part = next(prefix for prefix in PARTS if name.startswith(prefix)).removeprefix("model.").rstrip(".")
        counts[part] = counts.get(part, 0) + 1
    return ", ".join(f"{count} tensors of {part}" for part, count in counts.items())
