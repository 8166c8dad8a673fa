"""A checkpoint opened as a student: its config read off config.json, tensors and named settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError, Inconsistent, bullet_list, raise_all, shortened
from hxaconv.load.tensors import INCOMPLETE, split_fused, split_tied_head
from hxaconv.model import layer_maps
from hxaconv.model.config import ModelConfig, StudentConfig, number_problems, teacher_config
from hxaconv.model.experts import KEYS as EXPERT_KEYS
from hxaconv.model.experts import Experts, expert_facts, expert_problems
from hxaconv.model.families import FAMILIES
from hxaconv.model.model import Model, checked_here
from hxaconv.model.names import (
    EMBEDDING,
    is_attention,
    is_expert,
    layer_kinds,
    mixer_prefix,
    template_of,
)
from hxaconv.model.plan import Plan
from hxaconv.model.rope import rope_of
from hxaconv.model.variants import VARIANTS, matching, nearest
from hxaconv.model.variants.base import MODEL_TYPE, RANK_KEYS, Ranks
from hxaconv.options import Settings

if TYPE_CHECKING:
    from hxaconv.model.model import Checkpoint

FLAGS = {
    "rope_theta": "--rope-theta",
    "rms_norm_eps": "--rms-norm-eps",
    "tie_word_embeddings": "--tie-word-embeddings or --no-tie-word-embeddings",
}
"""What no tensor shows, and the option that sets it."""

_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", *_HEADS)


@dataclass(frozen=True, slots=True)
class SettingsSource:
    """Values with the name of where they come from; sources are asked in order."""

    source: str
    values: Mapping[str, Any]
    weak: frozenset[str] = frozenset()
    """Keys that count only where no source before it has them."""


class MissingSettings(HxaconvError):
    """Settings that no source gives."""

    def __init__(self, where: str, missing: list[str], lines: list[str]) -> None:
        super().__init__(
            f"{where} lacks settings of a student, and nothing is guessed:\n{bullet_list(lines)}",
            hint="What hxaconv wrote has them in config.json, or beside a .pth in NAME.json: put that file back.",
        )
        self.missing = missing


VARIANT = frozenset({"rwkv_architecture"})
TRAINER = "the published trainer's names"
"""A source of last resort: names that only the published trainer gives."""

FIXED = {"nope_in_transformer": (True,), "nope_in_rwkv": (False,), "hidden_act": ("silu", "swish")}
"""What no variant leaves a choice in; a config.json with other values describes another model."""


def is_student(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a student by its tensors, or, with every layer GQA, by its config."""
    raw = checkpoint.config or {}
    named = raw.get("rwkv_architecture") or raw.get("model_type") == MODEL_TYPE
    return bool(named) or "rwkv" in layer_kinds(checkpoint.plan).values()


def parameters_found(plan: Plan) -> set[str]:
    """Names of the parameters in RWKV layers, in any of them, beside projections and norms."""
    rwkv = {mixer_prefix(layer) for layer, kind in layer_kinds(plan).items() if kind == "rwkv"}
    split = (name.partition(".self_attn.") for name in plan)
    return {short for layer, dot, short in split if "." not in short and f"{layer}{dot}" in rwkv}


LOW_RANK = {"w1": "decay", "a1": "iclr", "v1": "value", "k1": "key", "g1": "gate", "dv1": "own_value"}
_SHAPES: dict[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("vocab_size",),
    "self_attn.r_k": ("num_attention_heads", "head_dim"),
    "self_attn.r_norm.weight": ("head_dim",),
    "self_attn.q_norm.weight": ("head_dim",),
    "self_attn.key.weight": ("key_rows",),
    "self_attn.receptance.weight": ("rows", "hidden_size"),
    "self_attn.q_proj.weight": ("rows", "hidden_size"),
    **{f"self_attn.{name}": ("", RANK_KEYS[rank]) for name, rank in LOW_RANK.items()},
    "mlp.up_proj.weight": ("intermediate_size",),
    "mlp.experts.{e}.up_proj.weight": ("moe_intermediate_size",),
}
"""What the sizes of a tensor are, first to last."""
_SWITCHES = {
    "qk_norm": ("self_attn.q_norm.weight", "self_attn.r_norm.weight"),
    "attention_bias": ("self_attn.q_proj.bias", "self_attn.receptance.bias"),
    "output_bias": ("self_attn.o_proj.bias", "self_attn.output.bias"),
}
"""What is true where there is one of these tensors."""


def tensor_settings(plan: Plan) -> dict[str, Any]:
    """What shapes and names alone determine of a student's config, whole or attention only."""
    kinds = layer_kinds(plan)
    facts: dict[str, Any] = {
        "num_hidden_layers": max(kinds) + 1 if kinds else 0,
        "gqa_layers": tuple(sorted(i for i, kind in kinds.items() if kind == "gqa")),
    }
    shapes = {template_of(name)[0].removeprefix("model.layers.{i}."): recipe.shape for name, recipe in plan.items()}
    sizes: dict[str, int] = {}
    for name, keys in _SHAPES.items():
        if len(shapes.get(name, ())) >= len(keys):
            sizes |= zip(keys, shapes[name], strict=False)
    key_rows, rows, _ = (sizes.pop(key, None) for key in ("key_rows", "rows", ""))
    if "head_dim" in sizes and key_rows:
        facts["num_key_value_heads"] = key_rows // sizes["head_dim"]
    if "head_dim" in sizes and rows:
        facts["num_attention_heads"] = rows // sizes["head_dim"]
    facts |= sizes
    experts = [template_of(name)[2] or 0 for name in plan if is_expert(name)]
    if experts:
        facts["num_experts"] = max(experts) + 1
    if "self_attn.layer_architecture" in shapes:
        facts["layer_records"] = True
    if plan:
        facts |= {key: any(name in shapes for name in names) for key, names in _SWITCHES.items()}
    if "intermediate_size" in facts:
        facts["mlp_bias"] = "mlp.up_proj.bias" in shapes
    return facts


def config_settings(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings in a student's config.json.

    Raises:
        HxaconvError: listing what cannot be: an unknown variant, scaled RoPE, layer kinds that do not add up.
    """
    (theta, scaling, _), problems = rope_of(raw), _config_problems(raw)
    hint = "Correct the file if it is wrong; if it is right, this is another model, which this tool does not convert."
    raise_all(f"{where}: config.json is not a student's that is known here:", problems, hint=hint, kind=Inconsistent)
    switches = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    keys = ("rwkv_architecture", *SIZES, "rms_norm_eps", *switches, *RANK_KEYS.values())
    renamed = {"enable_qk_norm": "qk_norm", "attention_out_bias": "output_bias", "has_layer_records": "layer_records"}
    facts = {ours: raw.get(key) for key, ours in (*zip(keys, keys, strict=True), *renamed.items())}
    if raw.get("transformer_layers") is not None:
        facts["gqa_layers"] = tuple(sorted(raw["transformer_layers"]))
    known = {key: value for key, value in (facts | {"rope_theta": theta}).items() if value is not None}
    return known | expert_facts(raw) | {"rope_scaling": scaling}


def _config_problems(raw: Mapping[str, Any]) -> list[str]:
    variant, scaling = raw.get("rwkv_architecture"), rope_of(raw)[2]
    problems = []
    if variant is None:
        problems.append(f"there is no rwkv_architecture; loaders need it, one of {', '.join(VARIANTS)}")
    elif variant not in VARIANTS:
        problems.append(f"rwkv_architecture is {variant!r}, expected one of {', '.join(VARIANTS)}")
    if scaling is not None:
        problems.append(f"rope_scaling cannot be followed: {scaling}")
    problems += [
        f"{key} is {raw[key]!r}, expected {allowed[0]!r}"
        for key, allowed in FIXED.items()
        if raw.get(key) is not None and raw[key] not in allowed
    ]
    gqa, rwkv, count = raw.get("transformer_layers"), raw.get("rwkv_layers"), raw.get("num_hidden_layers")
    if gqa is not None and rwkv is not None and count is not None and sorted([*gqa, *rwkv]) != list(range(count)):
        problems.append(f"rwkv_layers {rwkv} and transformer_layers {gqa} are not layers 0..{count - 1}, each once")
    return problems


def model_settings(config: ModelConfig) -> dict[str, Any]:
    """What a teacher's config determines of its students, and theirs of each other."""
    keys = (*SIZES, "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings")
    facts = {key: getattr(config, key) for key in (*keys, "qk_norm", "attention_bias", "output_bias", "mlp_bias")}
    return facts if config.experts is None else facts | {key: getattr(config.experts, key) for key in EXPERT_KEYS}


def student_settings(config: StudentConfig) -> dict[str, Any]:
    """What a student's config determines of others of its teacher: everything but the choice of layers."""
    ranks = {RANK_KEYS[name]: getattr(config.ranks, name) for name in config.variant.rank_names}
    return model_settings(config) | ranks | {"rwkv_architecture": config.rwkv_architecture}


def settings_sources(
    checkpoint: Checkpoint,
    settings: Settings,
    *,
    teacher: ModelConfig | None = None,
    layers: SettingsSource | None = None,
    other: SettingsSource | None = None,
) -> list[SettingsSource]:
    """Every source of a student's settings, the strongest first.

    `layers`, of a checkpoint that lacks some, is the kind of all of them; `other` comes last, in place of the layer
    map that the settings name.
    """
    given = {key: value for key in FLAGS if (value := getattr(settings, key)) is not None}
    if settings.drop_rope_scaling:
        given["rope_scaling"] = None
    # The other options correct a file; no option turns one variant into another.
    variant = {"rwkv_architecture": settings.variant} if settings.variant is not None else {}
    candidates = matching(parameters_found(checkpoint.plan))
    found = tensor_settings(checkpoint.plan)
    if len(candidates) == 1:
        found["rwkv_architecture"] = candidates[0].name
    sources = [SettingsSource("the options given", given), SettingsSource("--variant", variant)]
    if layers is not None:
        found = {key: value for key, value in found.items() if key not in layers.values}
        sources.append(layers)
    sources.append(SettingsSource("the tensors", found))
    if settings.gqa_layers is not None and layers is None and "num_hidden_layers" in found:
        confirmed = layer_maps.parse_layers(
            settings.gqa_layers, found["num_hidden_layers"], allow_layer_0=True, option="--gqa-layers"
        )
        sources.append(SettingsSource("--gqa-layers", {"gqa_layers": confirmed}))
    raw, sidecar = checkpoint.config or {}, checkpoint.sidecar
    if teacher is not None and all(is_attention(name) for name in checkpoint.plan):
        # The MLPs will be the teacher's; the student that this attention is from may have had padded ones.
        raw = {key: value for key, value in raw.items() if key != "intermediate_size"}
        sidecar = sidecar and {key: value for key, value in sidecar.items() if key != "intermediate_size"}
    if raw.get("rwkv_architecture") or raw.get("model_type") == MODEL_TYPE:
        sources += _file_settings("config.json", raw, checkpoint.label)
    elif raw.get("model_type") in FAMILIES:
        beside = teacher_config(
            checkpoint.config or {},
            where=checkpoint.label,
            rope_theta=given.get("rope_theta"),
            rms_norm_eps=given.get("rms_norm_eps"),
            allow_output_bias=True,
            drop_rope_scaling=rope_of(checkpoint.config or {})[2] is not None,
        )
        sources.append(SettingsSource("config.json", model_settings(beside)))
    if sidecar is not None:
        sources += _file_settings("the sidecar", sidecar, f"sidecar of {checkpoint.label}")
    if isinstance(teacher, StudentConfig):
        sources.append(SettingsSource("the student that completes it", student_settings(teacher)))
    elif teacher is not None:
        # Its scaling may have been dropped when the student was made.
        sources.append(SettingsSource("the teacher", model_settings(teacher), frozenset({"rope_scaling"})))
    trained = [variant for variant in candidates if variant.ranks is not None]
    if checkpoint.key_format == "training" and len(trained) == 1:
        # Of variants with the same parameters, the one that the published trainer trains.
        sources.append(SettingsSource(TRAINER, {"rwkv_architecture": trained[0].name}, VARIANT))
    if other is not None:
        sources.append(replace(other, weak=VARIANT))  # a student of another variant may have the same layers
    elif settings.layer_map is not None:
        chosen = layer_maps.load(settings.layer_map)
        values = {key: value for key, value in chosen.model.items() if key != "model_type"}
        values |= {"rwkv_architecture": chosen.variant} if chosen.variant else {}
        sources.append(SettingsSource(f"{LAYER_MAP}{chosen.name}", values, VARIANT))
    return sources


LAYER_MAP = "layer map "


def _file_settings(source: str, raw: Mapping[str, Any], where: str) -> list[SettingsSource]:
    """The settings in a file; a second rope_theta in it is a source of its own, which has to agree."""
    found, nested = [SettingsSource(source, config_settings(raw, where))], raw.get("rope_parameters") or {}
    if nested.get("rope_theta") is not None:
        found.append(SettingsSource(f"rope_parameters in {source}", {"rope_theta": float(nested["rope_theta"])}))
    return found


def resolve(sources: list[SettingsSource], where: str, plan: Plan | None = None) -> StudentConfig:
    """One config from many sources: an option wins, everything else has to agree.

    `plan` are the tensors, where there are some.

    Raises:
        HxaconvError: listing all contradictions, or all values that no source gives.
    """
    values: dict[str, Any] = dict(sources[0].values)
    origin: dict[str, str | None] = dict.fromkeys(values)
    problems: list[str] = []
    of_map: list[str] = []
    keys = set()
    for source in sources[1:]:
        for key, value in source.values.items():
            if key not in values:
                values[key], origin[key] = value, source.source
            elif values[key] != value and origin[key] is not None and key not in source.weak:
                keys.add(key)
                found = of_map if source.source.startswith(LAYER_MAP) else problems
                found.append(f"{key} is {values[key]!r} by {origin[key]}, {value!r} by {source.source}")
    hint = "Give the right value as an option."
    if not keys <= FLAGS.keys():
        hint = "One of them belongs to another model, or the checkpoint holds tensors that it should not."
    if of_map:
        problems.append(shortened(of_map, "; ", most=2))
        hint = "The layer map is for another model: leave --layer-map out, or name the one of this model."
    if any("by --gqa-layers" in line for line in problems):
        hint += " A finished student needs no --gqa-layers."
    raise_all(f"{where}: its sources contradict each other:", problems, hint=hint, kind=Inconsistent)
    _refuse_gaps(values, where, plan or {})
    raise_all(f"{where}:", number_problems({key: values[key] for key in ("rope_theta", "rms_norm_eps")}))
    variant = VARIANTS[values["rwkv_architecture"]]
    candidates = [variant.name for variant in matching(parameters_found(plan or {}))]
    if candidates and variant.name not in candidates:
        raise Inconsistent(
            f"{where}: rwkv_architecture is {variant.name!r} by {origin['rwkv_architecture']}, its tensors are those of"
            f" {' or '.join(candidates)}",
            hint="The file belongs to another model, or names the wrong variant.",
        )
    experts = {key: values[key] for key in EXPERT_KEYS if key in values and "num_experts" in values}
    hint = "Its config.json, or --teacher, has to define how tokens are routed."
    raise_all(f"{where} holds experts:", expert_problems(experts), hint=hint)
    switches = ("tie_word_embeddings", "qk_norm", "attention_bias", "output_bias", "mlp_bias", "layer_records")
    own: dict[str, Any] = {key: values[key] for key in SIZES} | {key: bool(values.get(key)) for key in switches}
    return StudentConfig(
        **own,
        rms_norm_eps=float(values["rms_norm_eps"]),
        rope_theta=float(values["rope_theta"]),
        rope_scaling=values.get("rope_scaling"),
        rwkv_architecture=variant.name,
        gqa_layers=values["gqa_layers"],
        ranks=Ranks(**{name: values[RANK_KEYS[name]] for name in variant.rank_names}),
        experts=Experts(**experts) if experts else None,
    )


def _refuse_gaps(values: Mapping[str, Any], where: str, plan: Plan) -> None:
    """Stop where settings are not known; missing tensors are named before missing settings."""
    if not any(key in values for key in RANK_KEYS.values()):
        raise HxaconvError(
            f"{where} has no RWKV layers: it is a teacher or all-attention checkpoint, not a student",
            hint="`hxaconv init-from-teacher` makes a student of a teacher.",
        )
    found, variant = parameters_found(plan), VARIANTS.get(values.get("rwkv_architecture", ""))
    candidates = matching(found) if variant is None else [variant]
    if found and not candidates:
        near = nearest(found)
        lacking, extra = sorted(near.required - found), sorted(found - {p.name for p in near.parameters})
        parts = [f"{', '.join(names)} {what}" for names, what in ((lacking, "missing"), (extra, "too much")) if names]
        raise Inconsistent(
            f"the RWKV layers of {where} are those of no known variant; the nearest is {near.name}, with"
            f" {' and '.join(parts)}",
            hint=f"Known: {', '.join(VARIANTS)}. If the checkpoint is incomplete, --variant names what it should be.",
        )
    if variant is not None:
        raise_all(
            f"{where} lacks low-rank tensors of its RWKV layers, and config.json does not give their sizes either:",
            [RANK_KEYS[name] for name in variant.rank_names if RANK_KEYS[name] not in values],
            hint=f"The checkpoint is incomplete; an {variant.name} layer has {', '.join(sorted(variant.required))}.",
            kind=Inconsistent,
        )
    alike = " and ".join(variant.name for variant in candidates)
    remedies = {
        **dict.fromkeys(SIZES, "--teacher (the checkpoint holds attention only)"),
        **dict.fromkeys(_HEADS, "--teacher, or --layer-map (no tensor shows it)"),
        **{key: f"{option}, or --teacher, or --layer-map" for key, option in FLAGS.items()},
        "rwkv_architecture": f"--variant ({alike} have the same tensors, and compute different things with them)",
    }
    missing = [key for key in remedies if key not in values]
    if not missing:
        return
    rwkv = [layer for layer, kind in layer_kinds(plan).items() if kind == "rwkv"]
    shared = sorted(frozenset.intersection(*(variant.required for variant in candidates))) if candidates else []
    raise_all(
        f"{where} lacks tensors of its RWKV layers:",
        [name for layer in rwkv for short in shared if (name := f"{mixer_prefix(layer)}{short}") not in plan],
        hint=INCOMPLETE,
        kind=Inconsistent,
    )
    raise MissingSettings(where, missing, [f"{key}: pass {remedies[key]}" for key in missing])


def student_model(
    checkpoint: Checkpoint,
    settings: Settings | None = None,
    *,
    teacher: ModelConfig | None = None,
    layers: SettingsSource | None = None,
    other: SettingsSource | None = None,
    headers_only: bool = False,
) -> Model:
    """The student in a checkpoint, whole or attention only; a head stored by a tied model is left out.

    `teacher` is the config of the model that completes it; `layers` and `other` are those of `settings_sources`;
    `headers_only` leaves that head for later (see `checked_here`).

    Raises:
        HxaconvError: for layers of no known variant, contradictions, and settings that no source gives.
    """
    sources = settings_sources(checkpoint, settings or Settings(), teacher=teacher, layers=layers, other=other)
    config = resolve(sources, checkpoint.label, checkpoint.plan)
    plan, tied = checkpoint.plan, None
    if config.tie_word_embeddings and (EMBEDDING in plan or teacher is None):
        plan, tied = split_tied_head(plan, checkpoint.label)
    plan, name = split_fused(plan, config), config.rwkv_architecture
    notes = []
    if next(source.source for source in sources if "rwkv_architecture" in source.values) == TRAINER:
        others = " or ".join(v.name for v in matching(VARIANTS[name].required) if v.name != name)
        notes.append(f"taken for {name}: its names are the published trainer's, which trains no {others}")
    raw = checkpoint.config or checkpoint.sidecar or {}
    model = Model(config, plan, checkpoint.label, raw, tied, checkpoint, notes=tuple(notes))
    return model if headers_only else checked_here(model)
