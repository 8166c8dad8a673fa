"""The operations that change which tensors a model has: plans in, plan out, nothing read or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention, layer_index, mixer_prefix
from hxaconv.model.plan import Plan, Recipe, check, pad_columns, pad_rows, with_origin

PRESETS: dict[str, dict[str, float]] = {
    "openmose-stage1": {"receptance": 0.5, "key": 0.5, "value": 0.3, "output": 0.5},
    "openmose-stage2": {"receptance": 1.0, "key": 1.0, "value": 1.0, "output": 1.0},
}
"""What the teacher's q, k, v and o are multiplied by in an RWKV layer."""

PROJECTIONS = {"receptance": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
NORMS = {"r_norm": "q_norm", "k_norm": "k_norm"}


def parse_scale(text: str | None, preset: str) -> dict[str, float]:
    """`receptance=0.5,key=1` over a preset -> the factor of every projection.

    Raises:
        HxaconvError: listing every part that is not NAME=NUMBER with a known name.
    """
    if preset not in PRESETS:
        raise HxaconvError(f"unknown preset {preset!r}", hint=f"Presets: {', '.join(PRESETS)}.")
    factors, problems, seen = dict(PRESETS[preset]), [], set[str]()
    for part in filter(None, (text or "").split(",")):
        name, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if name.strip() not in factors or not abs(number) < float("inf"):
            problems.append(f"{part!r} is not one of {', '.join(factors)} followed by =NUMBER")
        elif name.strip() in seen:
            problems.append(f"{name.strip()} is given twice")
        else:
            factors[name.strip()] = number
            seen.add(name.strip())
    raise_all("--scale is not understood:", problems, hint="Example: --scale receptance=0.5,value=0.3")
    return factors


def as_options(preset: str, factors: Mapping[str, float], seed: int) -> str:
    """The options that initialise so."""
    differing = [f"{name}={value:g}" for name, value in factors.items() if value != PRESETS[preset][name]]
    scale = f" --scale {','.join(differing)}" if differing else ""
    return f"--preset {preset}{scale} --seed {seed}"


@dataclass(frozen=True, slots=True)
class InitSettings:
    """How RWKV layers start: factors of the teacher's projections, seed, dtype of the output."""

    factors: Mapping[str, float]
    seed: int
    dtype: str


def init_from_teacher(teacher: Plan, config: StudentConfig, settings: InitSettings) -> Plan:
    """The student that section 5 of the specification describes; `teacher` has canonical names."""
    from hxaconv.surgery.arithmetic import cast

    plan: Plan = {}
    for name in expected_tensors(config):
        if not is_attention(name):
            plan[name] = cast(teacher[name], settings.dtype)
            continue
        layer = layer_index(name)
        assert layer is not None
        if name not in plan:
            plan |= mixer_from_teacher(teacher, config, layer, settings)
    return in_order(plan, config, "student")


def mixer_from_teacher(teacher: Plan, config: StudentConfig, layer: int, settings: InitSettings) -> Plan:
    """The mixer of one layer: the teacher's attention as it is (GQA), or an initialised time-mix."""
    from hxaconv.surgery.arithmetic import cast, scaled
    from hxaconv.surgery.initial import initial_parameters

    prefix = mixer_prefix(layer)
    source = {name: recipe for name, recipe in teacher.items() if name.startswith(prefix)}
    if config.layer_kind(layer) == "gqa":
        return {name: cast(recipe, settings.dtype) for name, recipe in source.items()}
    plan = initial_parameters(config, layer, settings.seed, settings.dtype)
    for target, origin in PROJECTIONS.items():
        factor = settings.factors[target]
        for part in ("weight", "bias"):
            recipe = source.get(f"{prefix}{origin}.{part}")
            if recipe is not None:
                text = recipe.origin if factor == 1.0 else f"{recipe.origin} x {factor:g}"
                plan[f"{prefix}{target}.{part}"] = scaled(recipe, factor, settings.dtype, text)
    for target, origin in NORMS.items():
        if f"{prefix}{origin}.weight" in source:
            plan[f"{prefix}{target}.weight"] = cast(source[f"{prefix}{origin}.weight"], settings.dtype)
    return plan


def in_order(plan: Plan, config: StudentConfig, what: str) -> Plan:
    """The plan in the architecture's order, checked against it.

    Raises:
        HxaconvError: listing every tensor that is missing, unexpected or misshapen.
    """
    expected = expected_tensors(config)
    check(plan, expected, what)
    return {name: plan[name] for name in expected}


@dataclass(frozen=True, slots=True)
class Grafted:
    """A trained checkpoint completed by its teacher."""

    plan: Plan
    from_teacher: tuple[str, ...]
    both: tuple[str, ...]
    """Tensors that both hold: the trained one won."""


def graft(trained: Plan, teacher: Plan, config: StudentConfig) -> Grafted:
    """Trained tensors where there are some, the teacher's for the rest, in the architecture's order.

    Raises:
        HxaconvError: when a trained tensor would end up unused, or something is in neither.
    """
    expected = expected_tensors(config)
    layers = {layer_index(name) for name in trained if is_attention(name)}
    raise_all(
        "the trained checkpoint holds these layers' attention only in part, and the teacher's was not trained with it:",
        [f"{n} is missing" for n in expected if is_attention(n) and layer_index(n) in layers and n not in trained],
        hint="Is the file whole? A layer's attention comes from one checkpoint.",
    )
    unused = [f"{name} {trained[name].shape} ({trained[name].origin})" for name in trained if name not in expected]
    raise_all(
        f"{len(unused)} tensors of the trained checkpoint have no place in the result:",
        unused,
        hint="The layer kinds or the tied head differ between the checkpoint and the teacher's config.",
    )
    plan = {name: trained.get(name) or teacher.get(name) for name in expected}
    missing = [name for name, recipe in plan.items() if recipe is None]
    hint = "Is it the teacher that this checkpoint was trained from, and is the checkpoint complete?"
    raise_all("neither the trained checkpoint nor the teacher holds:", missing, hint=hint)
    complete = {name: recipe for name, recipe in plan.items() if recipe is not None}
    check(complete, expected, "the trained checkpoint with its teacher")
    return Grafted(
        complete,
        tuple(name for name in expected if name not in trained),
        tuple(name for name in expected if name in trained and name in teacher),
    )


def repick(
    student: Plan,
    teacher: Plan,
    old: StudentConfig,
    new: StudentConfig,
    settings: InitSettings,
    donor: Model | None = None,
) -> Plan:
    """Another choice of GQA layers: layers that change kind come from `donor` where it has that kind, else the teacher.

    All tensors of layers that keep their kind, and everything outside the mixers, stay as they are.
    """
    plan = {name: recipe for name, recipe in student.items() if not _changes(name, old, new)}
    for layer in range(new.num_hidden_layers):
        if old.layer_kind(layer) == new.layer_kind(layer):
            continue
        if donor is not None and donor.student.layer_kind(layer) == new.layer_kind(layer):
            plan |= _mixer(donor.plan, layer, "trained ")
        else:
            plan |= mixer_from_teacher(teacher, new, layer, settings)
    return in_order(plan, new, "the student with the new layers")


def _changes(name: str, old: StudentConfig, new: StudentConfig) -> bool:
    layer = layer_index(name)
    return is_attention(name) and layer is not None and old.layer_kind(layer) != new.layer_kind(layer)


def _mixer(plan: Plan, layer: int, prefix: str) -> Plan:
    inside = mixer_prefix(layer)
    return {n: with_origin(r, f"{prefix}{r.origin}") for n, r in plan.items() if n.startswith(inside)}


def pad_ffn(plan: Plan, config: StudentConfig, multiple: int) -> tuple[Plan, int]:
    """MLPs widened with zero rows and columns to a multiple; (plan, new intermediate size).

    silu(0) * 0 = 0, so that the logits do not change.
    """
    size = -(-config.intermediate_size // multiple) * multiple
    if size == config.intermediate_size:
        return plan, size

    def pad(name: str, recipe: Recipe) -> Recipe:
        if name.endswith((".mlp.gate_proj.weight", ".mlp.up_proj.weight", ".mlp.gate_proj.bias", ".mlp.up_proj.bias")):
            return pad_rows(recipe, size)
        return pad_columns(recipe, size) if name.endswith(".mlp.down_proj.weight") else recipe

    return {name: pad(name, recipe) for name, recipe in plan.items()}, size
