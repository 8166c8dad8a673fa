"""What a checkpoint is, from its headers alone; with statistics, from its weights too."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError
from hxaconv.load.student import MissingSettings, is_student, parameters_found, student_model, tensor_settings
from hxaconv.load.tensors import split_fused
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import ModelConfig, StudentConfig, kv_cache_bytes, state_bytes, teacher_config
from hxaconv.model.names import HEAD, is_attention, layer_kinds, template_of
from hxaconv.model.plan import Buffers, Plan, Recipe, check
from hxaconv.model.rope import rope_of
from hxaconv.model.shells import summary
from hxaconv.model.variants import matching, nearest
from hxaconv.model.variants.base import RANK_KEYS

if TYPE_CHECKING:
    from hxaconv.model.model import Checkpoint

PARTS = {
    "embedding": ("model.embed_tokens.",),
    "RWKV mixers": (),
    "GQA attention": (),
    "routers and experts": (".mlp.experts.", ".mlp.gate.weight"),
    "MLPs": (".mlp.",),
    "norms": ("layernorm.", "model.norm."),
    "head": ("lm_head.",),
}


def inspect(checkpoint: Checkpoint, *, stats: bool = False) -> dict[str, Any]:
    """Everything that headers and config hold, as plain data; `stats` reads every weight.

    Values that nothing names are None and listed under `unknown`, never filled in.
    """
    plan = checkpoint.plan
    config, problem = _judged(checkpoint)
    everything = [*plan.values(), *checkpoint.unknown.values()]
    report: dict[str, Any] = {
        "path": checkpoint.label,
        "kind": "",
        "advice": [],
        "format": _format(checkpoint),
        "key_format": checkpoint.key_format,
        "variant": _variant(checkpoint),
        "files": [{"name": file.name, "bytes": file.size} for file in checkpoint.files],
        "tensors": len(everything),
        "parameters": sum(recipe.numel for recipe in everything),
        "bytes": sum(recipe.nbytes for recipe in everything),
        "dtypes": dict(Counter(recipe.dtype for recipe in everything)),
        "parts": _parts(plan),
        "layers": _strip(plan),
        "left_behind": list(checkpoint.dropped),
        "shell": summary(checkpoint.shell) or None,
        "unknown_names": list(checkpoint.unknown),
        "not_opened": list(checkpoint.extra.get("stray_files", ())),
        "only_in_index": list(checkpoint.extra.get("only_in_index", ())),
        "nested_under": checkpoint.extra.get("nested_under"),
        "not_tensors": list(checkpoint.extra.get("ignored", ())),
        "one_tensor": [list(names) for names in checkpoint.extra.get("aliases", ())],
        "dimensions": _dimensions(checkpoint, config),
        "problem": problem,
    }
    report["kind"], advice = _kind(checkpoint, config, problem)
    report["advice"] = [*advice, *checkpoint.warnings]
    report["unknown"] = [key for key, value in report["dimensions"].items() if value is None]
    report["memory"] = _memory(report["dimensions"], plan)
    if stats:
        report["statistics"] = {name: _statistics(recipe) for name, recipe in plan.items()}
    return report


def _kind(checkpoint: Checkpoint, config: ModelConfig | None, problem: str | None) -> tuple[str, list[str]]:
    """What it is, in one sentence, and what can be done with it here."""
    label, path = checkpoint.label, shlex.quote(checkpoint.label)
    if checkpoint.problem is not None:
        first, *rest = checkpoint.problem.message.split("\n")
        first = re.sub(rf"^{re.escape(label)}(/\S+)?:? (is )?", "", first)
        return first.removesuffix(":"), [*rest, *([checkpoint.problem.hint] if checkpoint.problem.hint else [])]
    kinds = layer_kinds(checkpoint.plan)
    rwkv, gqa = (sorted(i for i, kind in kinds.items() if kind == name) for name in ("rwkv", "gqa"))
    part = not any(name.endswith("embed_tokens.weight") for name in checkpoint.plan) and HEAD not in checkpoint.plan
    if rwkv or (part and gqa):
        what = f"{len(rwkv)} RWKV layer{'s' if len(rwkv) != 1 else ''} and {len(gqa)} of attention (GQA)"
        if part:
            what = f"the mixers of a student as trainers save them: {what}"
            return what, [f"`hxaconv to-hf {path} OUT --teacher TEACHER` completes it"]
        experts = any(".mlp.experts." in name for name in checkpoint.plan)  # no .pth carries them
        to_pth = checkpoint.container == "safetensors" and not experts
        other = f"to-pth {path} OUT.pth" if to_pth else f"to-hf {path} OUT"
        advice = f"`hxaconv verify {path}` checks it, `hxaconv {other}` converts it"
        return f"a student ({_variant(checkpoint)}) of {what}", [advice]
    if checkpoint.config is None:
        return "a transformer without its config.json", ["Give its folder, with config.json, to make a student of it"]
    if config is None:
        return f"a model of type {checkpoint.config.get('model_type')!r}", []
    made = [] if problem else [f"`hxaconv init-from-teacher {path} OUT` makes a student of it"]
    return f"a teacher of the {checkpoint.config.get('model_type')} family, {config.num_hidden_layers} layers", made


def _format(checkpoint: Checkpoint) -> str:
    facts, count = checkpoint.extra, len(checkpoint.files)
    if not count:
        return "not opened"
    ranks = facts.get("ranks")
    kinds = {
        "safetensors": "safetensors",
        "pth": "PyTorch zip",
        "legacy": "PyTorch legacy pickle (before 1.6)",
        "zero": f"DeepSpeed ZeRO-{facts.get('zero_stage')}, master weights of {ranks} rank{'s' if ranks != 1 else ''}",
        "dcp": "torch.distributed.checkpoint",
        "dtensor": "DTensors of several ranks",
    }
    kind = kinds.get(checkpoint.container, checkpoint.container)
    if checkpoint.container == "zero" and facts.get("weights") == "model":
        kind = "DeepSpeed, the model's own weights"
    return f"{kind}, {count} file{'s' if count != 1 else ''}"


def _judged(checkpoint: Checkpoint) -> tuple[ModelConfig | None, str | None]:
    """Its config, and why there is none, or what the tensors lack or have too much by it."""
    config: ModelConfig
    plan = checkpoint.plan
    try:
        if is_student(checkpoint):
            config = student_model(checkpoint, headers_only=True).config
        elif checkpoint.config is not None:
            config = teacher_config(checkpoint.config, where=checkpoint.label)
        else:
            return None, None
    except MissingSettings as error:
        return None, f"no file has {', '.join(error.missing)}"
    except HxaconvError as error:
        return None, error.message
    expected = expected_tensors(config)
    if all(is_attention(name) for name in plan):  # such a checkpoint lacks nothing else
        expected = {name: shape for name, shape in expected.items() if is_attention(name)}
    try:
        plan = split_fused(plan, config)
        check({name: recipe for name, recipe in plan.items() if name != HEAD or name in expected}, expected, "it")
    except HxaconvError as error:
        return config, error.message
    return config, None


def _variant(checkpoint: Checkpoint) -> str:
    kinds, raw = layer_kinds(checkpoint.plan).values(), checkpoint.config or {}
    if "rwkv" not in kinds:
        family = raw.get("model_type")
        return f"transformer ({family})" if family else "attention layers only" if kinds else "unknown"
    found = parameters_found(checkpoint.plan)
    candidates = [variant.name for variant in matching(found)]
    named = raw.get("rwkv_architecture") or (checkpoint.sidecar or {}).get("rwkv_architecture")
    if named is not None and (not candidates or named in candidates):
        return str(named)
    if named is not None:
        return f"{' or '.join(candidates)} by its tensors, {named} by its config"
    if len(candidates) > 1:
        return f"{' or '.join(candidates)} (the same tensors: --variant decides)"
    return candidates[0] if candidates else f"unknown, the nearest is {nearest(found).name}"


def _strip(plan: Plan) -> str:
    """One letter per layer found: R, G, or ? for a layer without a mixer."""
    kinds = layer_kinds(plan)
    last = max((index for name in plan if (index := template_of(name)[1]) is not None), default=-1)
    return "".join(kinds.get(layer, "?")[0].upper() for layer in range(last + 1))


def part_of(name: str, kinds: Mapping[int, str]) -> str:
    """The part of the model that a canonical name belongs to."""
    index = template_of(name)[1]
    if ".self_attn." in name and index is not None:
        return "RWKV mixers" if kinds.get(index) == "rwkv" else "GQA attention"
    return next(part for part, marks in PARTS.items() if any(mark in name for mark in marks))


def _parts(plan: Plan) -> dict[str, dict[str, int]]:
    """Parameters and bytes by part of the model; parts that it does not have are left out."""
    kinds = layer_kinds(plan)
    sums = {part: {"tensors": 0, "parameters": 0, "bytes": 0} for part in PARTS}
    for name, recipe in plan.items():
        entry = sums[part_of(name, kinds)]
        entry["tensors"] += 1
        entry["parameters"] += recipe.numel
        entry["bytes"] += recipe.nbytes
    return {part: entry for part, entry in sums.items() if entry["tensors"]}


def _dimensions(checkpoint: Checkpoint, config: ModelConfig | None) -> dict[str, Any]:
    if config is not None:
        known = asdict(config)
        known.pop("raw", None)
        known.pop("warnings", None)
        known |= {"rope_scaling": config.rope_scaling.to_dict() if config.rope_scaling else "none"}
        known["nope_layers"] = list(config.nope_layers)
        known |= known.pop("experts") or {}
        if isinstance(config, StudentConfig):
            ranks = known.pop("ranks")
            known |= {RANK_KEYS[name]: ranks[name] for name in config.variant.rank_names}
            known["gqa_layers"] = list(config.gqa_layers)
        return known
    raw = checkpoint.config or checkpoint.sidecar or {}
    keys = [key for key in ModelConfig.__dataclass_fields__ if key != "experts"]
    facts = {"rope_theta": rope_of(raw)[0], **tensor_settings(checkpoint.plan)}
    known = {key: facts.pop(key, raw.get(key)) for key in keys}
    return known | {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}


def _memory(dimensions: Mapping[str, Any], plan: Plan) -> dict[str, int] | None:
    kinds = layer_kinds(plan)
    heads, groups, width = (dimensions[key] or 0 for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if not kinds or not heads * groups * width:
        return None
    attention = sum(kind == "gqa" for kind in kinds.values())
    return {
        "kv_cache_bytes_per_token": kv_cache_bytes(attention, groups, width),
        "teacher_kv_cache_bytes_per_token": kv_cache_bytes(len(kinds), groups, width),
        "state_bytes_per_sequence": state_bytes(len(kinds) - attention, heads, width),
    }


def _statistics(recipe: Recipe) -> dict[str, Any]:
    """Range, mean, and counts of NaN, Inf and zero of one tensor, a chunk at a time."""
    import torch

    from hxaconv.surgery.arithmetic import torch_dtype

    counts: Counter[str] = Counter(nan=0, inf=0, zeros=0)
    low, high, total, count = float("inf"), float("-inf"), 0.0, 0
    for chunk in recipe.chunks(Buffers()):
        values = torch.frombuffer(bytearray(chunk), dtype=torch_dtype(recipe.dtype)).double()
        finite = values[torch.isfinite(values)]
        marks = {"nan": torch.isnan(values), "inf": torch.isinf(values), "zeros": values == 0}
        counts.update({name: int(mark.sum()) for name, mark in marks.items()})
        if len(finite):
            low, high = min(low, finite.min().item()), max(high, finite.max().item())
            total, count = total + finite.sum().item(), count + len(finite)
    ranges = {"min": low, "max": high, "mean": total / max(count, 1)}
    found = {"dtype": recipe.dtype, "shape": list(recipe.shape), **counts}
    return found | {key: value if count else None for key, value in ranges.items()}
