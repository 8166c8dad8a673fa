"""A teacher becomes a student: its attention scaled into RWKV layers, published initial values, the rest as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hxaconv.errors import raise_all
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention, mixer_prefix
from hxaconv.model.plan import Plan, check
from hxaconv.options import Init

PRESETS: dict[str, dict[str, float]] = {
    "openmose-stage1": {"receptance": 0.5, "key": 0.5, "value": 0.3, "output": 0.5},
    "openmose-stage2": {"receptance": 1.0, "key": 1.0, "value": 1.0, "output": 1.0},
}
"""What the teacher's q, k, v and o are multiplied by in an RWKV layer."""

PROJECTIONS = {"receptance": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
NORMS = {"r_norm": "q_norm", "k_norm": "k_norm"}
KINDS = ("weight", "bias")


def parse_scale(text: str | None, preset: str) -> dict[str, float]:
    """`receptance=0.5,key=1` over a preset -> the factor of every projection.

    Raises:
        HxaconvError: listing every part that is not NAME=NUMBER with a known name.
    """
    factors, problems, seen = dict(PRESETS[preset]), [], set[str]()
    for part in filter(None, (text or "").split(",")):
        name, _, value = map(str.strip, part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if name not in factors or not abs(number) < float("inf"):
            problems.append(f"{part!r} is not one of {', '.join(factors)} followed by =NUMBER")
        elif name in seen:
            problems.append(f"{name} is given twice")
        else:
            factors[name] = number
        seen.add(name)
    raise_all("--scale is not understood:", problems, hint="It takes factors by name, such as receptance=0.5,value=0.3")
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


def init_settings(values: Init, dtype: str) -> InitSettings:
    """The options of a command as settings.

    Raises:
        HxaconvError: for a preset or factors that there are not.
    """
    return InitSettings(parse_scale(values.scale, values.preset), values.seed, dtype)


def new_student(teacher: Model, config: StudentConfig, settings: InitSettings, *, label: str) -> Model:
    """A student of `teacher` that is to become `label`."""
    plan = init_from_teacher(teacher.plan, config, settings)
    return Model(config, plan, label, teacher.raw, teacher.tied_head)


def init_from_teacher(teacher: Plan, config: StudentConfig, settings: InitSettings) -> Plan:
    """The student that section 5 of the specification describes; `teacher` has canonical names."""
    from hxaconv.surgery.arithmetic import cast

    outside = (name for name in expected_tensors(config) if not is_attention(name))
    plan = {name: cast(teacher[name], settings.dtype) for name in outside}
    for layer in range(config.num_hidden_layers):
        plan |= mixer_from_teacher(teacher, config, layer, settings)
    return in_order(plan, config, "student")


def mixer_from_teacher(teacher: Plan, config: StudentConfig, layer: int, settings: InitSettings) -> Plan:
    """The mixer of one layer: the teacher's attention as it is (GQA), or an initialised time-mix."""
    from hxaconv.surgery.arithmetic import cast, scaled
    from hxaconv.surgery.initial import initial_parameters

    prefix = mixer_prefix(layer)
    parts = (f"{prefix}{part}.{kind}" for part in (*PROJECTIONS.values(), *NORMS.values()) for kind in KINDS)
    source = {name: teacher[name] for name in parts if name in teacher}
    if config.layer_kind(layer) == "gqa":
        return {name: cast(recipe, settings.dtype) for name, recipe in source.items()}
    plan = initial_parameters(config, layer, settings.seed, settings.dtype)
    for target, origin in PROJECTIONS.items():
        factor = settings.factors[target]
        for part in KINDS:
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
