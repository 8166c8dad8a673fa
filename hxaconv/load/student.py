"""A checkpoint opened as a student: its config read off config.json, tensors and named settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError, Inconsistent, bullet_list, raise_all
from hxaconv.load.teacher import split_fused, split_tied_head
from hxaconv.model.config import (
    ModelConfig,
    StudentConfig,
    number_problems,
    teacher_config,
)
from hxaconv.model.experts import KEYS as EXPERT_KEYS
from hxaconv.model.experts import Experts, expert_facts, expert_problems
from hxaconv.model.families import FAMILIES
from hxaconv.model.model import Model, checked_here
from hxaconv.model.names import EMBEDDING, expert_index, is_attention, is_expert, layer_kinds, template_of
from hxaconv.model.plan import Plan
from hxaconv.model.rope import rope_of
from hxaconv.model.variants import VARIANTS, matching, nearest
from hxaconv.model.variants.base import MODEL_TYPE, RANK_KEYS, Ranks

if TYPE_CHECKING:
    from hxaconv.model.model import Checkpoint

FLAGS = {
    "rope_theta": "--rope-theta",
    "rms_norm_eps": "--rms-norm-eps",
    "tie_word_embeddings": "--tie-word-embeddings or --no-tie-word-embeddings",
}
"""What no tensor says, and the option that does."""

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True, slots=True)
class SettingsSource:
    """Values with the name of where they come from; sources are asked in order."""

    source: str
    values: Mapping[str, Any]


class MissingSettings(HxaconvError):
    """Settings that no source gives."""

    def __init__(self, where: str, missing: list[str], lines: list[str]) -> None:
        super().__init__(
            f"{where} does not say everything that a student's config needs, and nothing is guessed:\n"
            f"{bullet_list(lines)}",
            hint="What hxaconv wrote has them in config.json, or beside a .pth in NAME.json: put that file back.",
        )
        self.missing = missing


TRAINER = "the published trainer's names"
"""A source of last resort: names that only the published trainer gives."""

FIXED = {"nope_in_transformer": (True,), "nope_in_rwkv": (False,), "hidden_act": ("silu", "swish")}
"""What no variant leaves a choice in; a config.json that says otherwise describes another model."""


def is_student(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a student by its tensors, or, with every layer GQA, by its config."""
    raw = checkpoint.config or {}
    named = raw.get("rwkv_architecture") or raw.get("model_type") == MODEL_TYPE
    return bool(named) or "rwkv" in layer_kinds(checkpoint.plan).values()


def parameters_found(plan: Plan) -> set[str]:
    """Names of the parameters in RWKV layers, in any of them, beside projections and norms."""
    layers = {layer for layer, kind in layer_kinds(plan).items() if kind == "rwkv"}
    found = set()
    for name in plan:
        template, layer = template_of(name)
        short = template.rpartition(".self_attn.")[2]
        if layer in layers and is_attention(name) and "." not in short:
            found.add(short)
    return found


def variant_facts(checkpoint: Checkpoint) -> dict[str, str]:
    """The variant, where the names of its parameters tell it: some variants have the same."""
    candidates = matching(parameters_found(checkpoint.plan))
    return {"rwkv_architecture": candidates[0].name} if len(candidates) == 1 else {}


def trained_variant(checkpoint: Checkpoint) -> dict[str, str]:
    """Of variants with the same parameters, the one that the published trainer trains, where the names are its."""
    candidates = [variant for variant in matching(parameters_found(checkpoint.plan)) if variant.ranks is not None]
    told = checkpoint.key_format == "training" and len(candidates) == 1
    return {"rwkv_architecture": candidates[0].name} if told else {}


def variant_note(sources: list[SettingsSource]) -> list[str]:
    """What is said where nothing but the names of the published trainer tells the variant."""
    told = [source for source in sources if "rwkv_architecture" in source.values]
    if [source.source for source in told] != [TRAINER]:
        return []
    name = told[0].values["rwkv_architecture"]
    others = [v.name for v in matching(VARIANTS[name].required) if v.name != name]
    return [f"taken for {name}: its names are the published trainer's, which trains no {' or '.join(others)}"]


def tensor_settings(plan: Plan) -> dict[str, Any]:
    """What shapes and names alone say about a student's config, whole or attention only."""
    kinds = layer_kinds(plan)
    facts: dict[str, Any] = {
        "num_hidden_layers": max(kinds) + 1 if kinds else 0,
        "gqa_layers": tuple(sorted(i for i, kind in kinds.items() if kind == "gqa")),
    }
    if EMBEDDING in plan:
        facts["vocab_size"] = plan[EMBEDDING].shape[0]
    for name, recipe in plan.items():
        template = template_of(name)[0]
        short = template.rsplit("self_attn.", 1)[-1] if ".self_attn." in template else template
        _shape_settings(short, recipe.shape, facts)
    experts = {expert_index(name) for name in plan if is_expert(name)} - {None}
    if experts:
        facts["num_experts"] = max(expert or 0 for expert in experts) + 1
    key_rows, rows = facts.pop("rwkv_key_rows", None), facts.pop("rwkv_rows", None)
    if key_rows and "head_dim" in facts:
        facts["num_key_value_heads"] = key_rows // facts["head_dim"]
    if rows and "head_dim" in facts:
        facts.setdefault("num_attention_heads", rows // facts["head_dim"])
    names = {template_of(name)[0].rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1] for name in plan if "." in name}
    if plan:
        facts["qk_norm"] = bool(names & {"r_norm.weight", "q_norm.weight"})
        facts["attention_bias"] = bool(names & {"receptance.bias", "q_proj.bias"})
        facts["output_bias"] = bool(names & {"output.bias", "o_proj.bias"})
    if "intermediate_size" in facts:
        facts["mlp_bias"] = "up_proj.bias" in names
    return facts


def _shape_settings(short: str, shape: tuple[int, ...], facts: dict[str, Any]) -> None:
    ranks = {"w1": "decay", "a1": "iclr", "v1": "value", "k1": "key", "g1": "gate", "dv1": "own_value"}
    if short == "r_k" and len(shape) == 2:
        facts["num_attention_heads"], facts["head_dim"] = shape
    elif short in ("r_norm.weight", "q_norm.weight"):
        facts.setdefault("head_dim", shape[0])
    elif short == "key.weight":
        facts["rwkv_key_rows"] = shape[0]
    elif short in ("receptance.weight", "q_proj.weight"):
        facts["rwkv_rows"], facts["hidden_size"] = shape
    elif short in ranks and len(shape) == 2:
        facts[RANK_KEYS[ranks[short]]] = shape[1]
    elif short == "layer_architecture":
        facts["layer_records"] = True
    elif short.endswith("mlp.up_proj.weight"):
        facts["intermediate_size"] = shape[0]
    elif short.endswith("mlp.experts.{e}.up_proj.weight"):
        facts["moe_intermediate_size"] = shape[0]


def config_settings(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a student's config.json says.

    Raises:
        HxaconvError: listing what cannot be: an unknown variant, scaled RoPE, layer kinds that do not add up.
    """
    (theta, scaling, _), problems = rope_of(raw), _config_problems(raw)
    hint = "Correct the file if it is wrong; if it is right, this is another model, which this tool does not convert."
    raise_all(f"{where}: config.json is not a student's that is known here:", problems, hint=hint, kind=Inconsistent)
    switches = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    keys = ("rwkv_architecture", *SIZES, "rms_norm_eps", *switches, *RANK_KEYS.values())
    facts = {key: raw[key] for key in keys if raw.get(key) is not None} | expert_facts(raw)
    facts["rope_scaling"] = scaling
    if theta is not None:
        facts["rope_theta"] = theta
    renamed = {"enable_qk_norm": "qk_norm", "attention_out_bias": "output_bias", "has_layer_records": "layer_records"}
    for key, ours in renamed.items():
        if raw.get(key) is not None:
            facts[ours] = bool(raw[key])
    if raw.get("transformer_layers") is not None:
        facts["gqa_layers"] = tuple(sorted(raw["transformer_layers"]))
    return facts


def _config_problems(raw: Mapping[str, Any]) -> list[str]:
    variant, scaling = raw.get("rwkv_architecture"), rope_of(raw)[2]
    problems = []
    if variant is None:
        problems.append(f"there is no rwkv_architecture; loaders need it, one of {', '.join(VARIANTS)}")
    elif variant not in VARIANTS:
        problems.append(f"rwkv_architecture is {variant!r}, this tool knows {', '.join(VARIANTS)}")
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
    """What a teacher's config says of its students, and theirs of each other."""
    keys = (*SIZES, "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings")
    facts = {key: getattr(config, key) for key in (*keys, "qk_norm", "attention_bias", "output_bias", "mlp_bias")}
    return facts if config.experts is None else facts | {key: getattr(config.experts, key) for key in EXPERT_KEYS}


def student_settings(config: StudentConfig) -> dict[str, Any]:
    """What a student's config says of others of its teacher: everything but the choice of layers."""
    ranks = {RANK_KEYS[name]: getattr(config.ranks, name) for name in config.variant.rank_names}
    return model_settings(config) | ranks | {"rwkv_architecture": config.rwkv_architecture}


def settings_sources(
    checkpoint: Checkpoint,
    *,
    flags: Mapping[str, Any] | None = None,
    teacher: ModelConfig | None = None,
    layer_map: SettingsSource | None = None,
    layers: SettingsSource | None = None,
) -> list[SettingsSource]:
    """Every source that says something about a student's config, the strongest first.

    `layers`, of a checkpoint that lacks some, says what all of them are.
    """
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    if given.pop("drop_rope_scaling", False):
        given["rope_scaling"] = None
    # The other options correct a file; no option turns one variant into another.
    variant = {key: given.pop(key) for key in ("rwkv_architecture",) if key in given}
    found = tensor_settings(checkpoint.plan) | variant_facts(checkpoint)
    facts = [SettingsSource("the options given", given), SettingsSource("--variant", variant)]
    if layers is not None:
        found = {key: value for key, value in found.items() if key not in layers.values}
        facts.append(layers)
    facts.append(SettingsSource("the tensors", found))
    raw, sidecar = checkpoint.config or {}, checkpoint.sidecar
    if teacher is not None and all(is_attention(name) for name in checkpoint.plan):
        # The MLPs will be the teacher's; the student that this attention is from may have had padded ones.
        raw = {key: value for key, value in raw.items() if key != "intermediate_size"}
        sidecar = sidecar and {key: value for key, value in sidecar.items() if key != "intermediate_size"}
    if raw.get("rwkv_architecture") or raw.get("model_type") == MODEL_TYPE:
        facts += _file_settings("config.json", raw, checkpoint.label)
    elif raw.get("model_type") in FAMILIES:
        beside = teacher_config(
            checkpoint.config or {},
            where=checkpoint.label,
            rope_theta=given.get("rope_theta"),
            rms_norm_eps=given.get("rms_norm_eps"),
            allow_output_bias=True,
            drop_rope_scaling=rope_of(checkpoint.config or {})[2] is not None,
        )
        facts.append(SettingsSource("config.json", model_settings(beside)))
    if sidecar is not None:
        facts += _file_settings("the sidecar", sidecar, f"sidecar of {checkpoint.label}")
    if isinstance(teacher, StudentConfig):
        facts.append(SettingsSource("the student that completes it", student_settings(teacher)))
    elif teacher is not None:
        # Its scaling may have been dropped when the student was made.
        facts.append(_without_told(SettingsSource("the teacher", model_settings(teacher)), "rope_scaling", facts))
    facts.append(_without_told(SettingsSource(TRAINER, trained_variant(checkpoint)), "rwkv_architecture", facts))
    if layer_map is not None:
        # A student of another variant may have the same layers.
        facts.append(_without_told(layer_map, "rwkv_architecture", facts))
    return facts


def _without_told(source: SettingsSource, key: str, others: list[SettingsSource]) -> SettingsSource:
    """The source, silent on `key` where another one says it."""
    told = any(key in other.values for other in others)
    return replace(source, values={name: value for name, value in source.values.items() if not told or name != key})


def _file_settings(source: str, raw: Mapping[str, Any], where: str) -> list[SettingsSource]:
    """What a file says; a second rope_theta in it is a source of its own, which has to agree."""
    nested = (raw.get("rope_parameters") or {}).get("rope_theta")
    inner = (
        [SettingsSource(f"rope_parameters in {source}", {"rope_theta": float(nested)})] if nested is not None else []
    )
    return [SettingsSource(source, config_settings(raw, where)), *inner]


def resolve(sources: list[SettingsSource], where: str, alike: Sequence[str] = ()) -> StudentConfig:
    """One config from many sources: an option wins, everything else has to agree.

    `alike` are the variants that the tensors may be of.

    Raises:
        HxaconvError: listing all contradictions, or all values that no source gives.
    """
    values: dict[str, Any] = dict(sources[0].values)
    origin: dict[str, str | None] = dict.fromkeys(values)
    problems, keys = [], set()
    for facts in sources[1:]:
        for key, value in facts.values.items():
            if key not in values:
                values[key], origin[key] = value, facts.source
            elif values[key] != value and origin[key] is not None:
                keys.add(key)
                problems.append(f"{key} is {values[key]!r} by {origin[key]}, {value!r} by {facts.source}")
    hint = "Give the right value as an option."
    if not keys <= FLAGS.keys():
        hint = "One of them belongs to another model, or the checkpoint holds tensors that it should not."
    raise_all(f"{where}: its sources contradict each other:", problems, hint=hint, kind=Inconsistent)
    _refuse_gaps(values, where, alike)
    raise_all(f"{where}:", number_problems({key: values[key] for key in ("rope_theta", "rms_norm_eps")}))
    variant = VARIANTS[values["rwkv_architecture"]]
    ranks = Ranks(**{name: values[RANK_KEYS[name]] for name in variant.rank_names})
    sizes = {key: values[key] for key in SIZES}
    return StudentConfig(
        **sizes,
        rms_norm_eps=float(values["rms_norm_eps"]),
        rope_theta=float(values["rope_theta"]),
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        rope_scaling=values.get("rope_scaling"),
        rwkv_architecture=variant.name,
        gqa_layers=values["gqa_layers"],
        ranks=ranks,
        layer_records=values.get("layer_records", False),
        qk_norm=bool(values.get("qk_norm")),
        attention_bias=bool(values.get("attention_bias")),
        output_bias=bool(values.get("output_bias")),
        mlp_bias=bool(values.get("mlp_bias")),
        experts=_experts(values, where),
    )


def _experts(values: Mapping[str, Any], where: str) -> Experts | None:
    facts = {key: values[key] for key in EXPERT_KEYS if key in values}
    if "num_experts" not in facts:
        return None
    hint = "Its config.json, or --teacher, has to say how tokens are routed."
    raise_all(f"{where} holds experts:", expert_problems(facts), hint=hint)
    return Experts(**facts)


def _refuse_gaps(values: dict[str, Any], where: str, alike: Sequence[str]) -> None:
    if not any(key in values for key in RANK_KEYS.values()):
        raise HxaconvError(
            f"{where} has no RWKV layers: it is a teacher or all-attention checkpoint, not a student",
            hint="`hxaconv init-from-teacher` makes a student of a teacher.",
        )
    variant = VARIANTS.get(values.get("rwkv_architecture", ""))
    if variant is not None:
        raise_all(
            f"{where} lacks low-rank tensors of its RWKV layers, and config.json does not give their sizes either:",
            [RANK_KEYS[name] for name in variant.rank_names if RANK_KEYS[name] not in values],
            hint=f"The checkpoint is incomplete; an {variant.name} layer has {', '.join(sorted(variant.required))}.",
            kind=Inconsistent,
        )
    missing = [key for key in (*SIZES, *FLAGS, "rwkv_architecture") if key not in values]
    if missing:
        raise MissingSettings(where, missing, [f"{key}: {_remedy(key, alike)}" for key in missing])


def _remedy(key: str, alike: Sequence[str]) -> str:
    if key == "rwkv_architecture":
        return f"pass --variant ({' and '.join(alike)} have the same tensors, and compute different things with them)"
    if key in FLAGS:
        return f"pass {FLAGS[key]}, or --teacher, or --layer-map"
    if key in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        return "pass --teacher, or --layer-map (no tensor says it)"
    return "pass --teacher (the checkpoint holds attention only)"


def _refuse_another_variant(name: str, facts: list[SettingsSource], checkpoint: Checkpoint) -> None:
    """Stop where a file names a variant, and the parameters are those of others."""
    candidates = [variant.name for variant in matching(parameters_found(checkpoint.plan))]
    if candidates and name not in candidates:
        source = next(one.source for one in facts if "rwkv_architecture" in one.values)
        raise Inconsistent(
            f"{checkpoint.label}: rwkv_architecture is {name!r} by {source}, its tensors are those of"
            f" {' or '.join(candidates)}",
            hint="The file belongs to another model, or names the wrong variant.",
        )


def _refuse_unknown_variant(plan: Plan, where: str) -> None:
    """Stop at RWKV layers whose parameters are those of no known variant."""
    found = parameters_found(plan)
    if not found or matching(found):
        return
    near = nearest(found)
    lacking, extra = sorted(near.required - found), sorted(found - {p.name for p in near.parameters})
    parts = [f"{', '.join(names)} {what}" for names, what in ((lacking, "missing"), (extra, "too much")) if names]
    raise Inconsistent(
        f"the RWKV layers of {where} are those of no known variant; the nearest is {near.name}, with"
        f" {' and '.join(parts)}",
        hint=f"Known: {', '.join(VARIANTS)}. If the checkpoint is incomplete, --variant says what it should be.",
    )


def student_model(
    checkpoint: Checkpoint,
    *,
    flags: Mapping[str, Any] | None = None,
    teacher: ModelConfig | None = None,
    layer_map: SettingsSource | None = None,
    layers: SettingsSource | None = None,
    headers_only: bool = False,
) -> Model:
    """The student in a checkpoint, whole or attention only; a head stored by a tied model is left out.

    `teacher` is the config of the model that completes it, `layers` what `partial.layers_of` found; `headers_only`
    leaves that head for later (see `checked_here`).

    Raises:
        HxaconvError: for layers of no known variant, contradictions, and settings that no source gives.
    """
    facts = settings_sources(checkpoint, flags=flags, teacher=teacher, layer_map=layer_map, layers=layers)
    if not any("rwkv_architecture" in source.values for source in facts):
        _refuse_unknown_variant(checkpoint.plan, checkpoint.label)
    config = resolve(facts, checkpoint.label, [v.name for v in matching(parameters_found(checkpoint.plan))])
    _refuse_another_variant(config.rwkv_architecture, facts, checkpoint)
    plan, tied = checkpoint.plan, None
    if config.tie_word_embeddings and (EMBEDDING in plan or teacher is None):
        plan, tied = split_tied_head(plan, checkpoint.label)
    plan = split_fused(plan, config)
    raw, notes = checkpoint.config or checkpoint.sidecar or {}, tuple(variant_note(facts))
    model = Model(config, plan, checkpoint.label, raw, tied, checkpoint, notes=notes)
    return model if headers_only else checked_here(model)
