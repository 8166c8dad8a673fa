"""What each operation has to leave true, checked on what it wrote, without asking the code that wrote it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hxaconv.forward.tokens import probe_tokens
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import HEAD, is_attention, layer_index
from hxaconv.model.plan import Plan
from hxaconv.verification import specification
from hxaconv.verification.claims import Claim, Copied, Initial, Scaled, States, listing
from hxaconv.verification.compare import compare_models
from hxaconv.verification.report import Report, Thresholds
from hxaconv.verification.single import verify_model
from hxaconv.verification.values import in_rwkv_layer, part_of_mixer, with_head

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.progress import Progress

PROBE_TOKENS = 16
"""Enough for every fault of structure: benchmarks/MUTATIONS.md."""
SAME_ATTENTION = 1e-5
"""Relative error of two float32 attentions with the same weights that sum in another order."""
CAST_ATTENTION = 3e-2
"""The same where the weights were rounded to another dtype, bf16 at worst."""
CAST = Thresholds(layer=CAST_ATTENTION, kl=0.1)
"""Each tensor is checked to be rounded once. Weights that were trained in small steps from bf16 round the same way all
together: up to 1.6e-2 in a layer and 1.4e-3 nats were seen; a damaged layer costs much more."""
PADDED = Thresholds(layer=1e-5, kl=1e-9)
"""Zeros that are added change the order of summation, nothing else."""

SETTINGS = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "rope_theta", "qk_norm", "attention_bias", "output_bias", "mlp_bias", "experts"),
)
"""What a student has from its teacher."""


def check_initialised(
    teacher: Model,
    student: Model,
    *,
    factors: Mapping[str, float],
    seed: int | None = None,
    ids: Tensor | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a freshly initialised student, whole or attention only, against its teacher.

    Copied tensors have equal bits (or are the teacher's, rounded once), projections of RWKV layers are factor times
    the teacher's, each GQA layer fed the teacher's hidden states equals its attention with all positions 0, the
    logits are finite, and KL divergences are reported. `factors`: receptance, key, value, output. With `seed`, random
    matrices have to be those of that seed, to the bit.
    """
    claims = [copied(student.student), *initial_claims(student.student, factors, seed=seed)]
    report = against_teacher(student, teacher, claims, ids=ids, progress=progress)
    check_ranks(report, student.student)
    check_one_dtype(report, student.plan)
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """How some RWKV layers were initialised, by a student's own record."""

    layers: frozenset[int]
    factors: Mapping[str, float]
    seed: int
    fitted: frozenset[int] = frozenset()
    """Those of them that were calibrated since."""


def made_by(history: Iterable[Mapping[str, Any]]) -> tuple[list[Made], bool]:
    """How a student's layers were initialised, by its record; and whether a calibration changed kept attention.

    A record comes with a checkpoint, from anybody: where it is not as this package writes it, nothing is known.
    """
    steps: list[Made] = []
    folded = False
    try:
        for step in history:
            again = {int(layer) for layer in step.get("changed_layers", ())}
            steps = [replace(made, layers=made.layers - again, fitted=made.fitted - again) for made in steps]
            if "init" in step:
                init = step["init"]
                factors = {name: float(init["factors"][name]) for name in specification.FACTORS}
                layers = frozenset(map(int, init["layers"]))
                steps.append(Made(layers=layers, factors=factors, seed=int(init["seed"])))
            if step.get("calibration"):
                fit = step["calibration"]
                if (fit.get("polish") or {}).get("best_step"):
                    steps = []  # all mixers were trained together: nothing of the initial values is left to check
                kept = [layer for layer in fit["layers"] if layer["kind"] == "gqa" and not layer["fell_back"]]
                folded = folded or bool(kept)
                changed = {int(layer["layer"]) for layer in fit["layers"] if not layer["fell_back"]}
                steps = [replace(made, fitted=made.fitted | (made.layers & changed)) for made in steps]
    except (AttributeError, KeyError, TypeError, ValueError):
        return [], False
    return [made for made in steps if made.layers], folded


def usual_claim(student: StudentConfig, made: Collection[Made]) -> str:
    """What a student should be against its teacher: what its record says, else that only attention was trained."""
    known = {layer for step in made for layer in step.layers}
    if not set(student.rwkv_layers) <= known:
        return "attention-trained"
    return "calibrated" if any(step.fitted for step in made) else "untrained"


def check_against(
    student: Model,
    teacher: Model,
    *,
    expect: str | None = None,
    made: Collection[Made] = (),
    folded: bool = False,
    **how: Any,
) -> Report:
    """Every claim that can be made of a student against its teacher.

    Args:
        expect: `untrained`, `calibrated`, `attention-trained` or `report`; None: `usual_claim`.
        made: how the layers were initialised, by the student's record.
        folded: whether a calibration has changed q_proj, q_norm and o_proj of the layers that stayed attention.
        how: what `compare_models` takes beside it: ids, thresholds, dtype, device, logits_out, progress.
    """
    config = student.student
    expect = expect or usual_claim(config, made)
    states = States(config)
    claims: list[Claim | States] = []
    if expect == "attention-trained":
        claims.append(copied(config, without_attention=True))
    elif expect in ("untrained", "calibrated"):
        claims += _as_made(config, made, folded and expect == "calibrated", fitted=expect == "calibrated")
    report = compare_models(student, teacher, expect=expect, claims=[*claims, states], **how)
    if expect == "report":
        return report
    check_settings(report, config, teacher.config)
    if expect == "attention-trained":
        _check_copied_dtypes(report, student.plan, teacher.plan)
    else:
        check_one_dtype(report, student.plan)
        _check_states(report, expect, states)
        check_ranks(report, config)
        check_gqa_layers(report, without=config.gqa_layers if folded else ())
    return report


def _as_made(config: StudentConfig, made: Collection[Made], folded: bool, *, fitted: bool) -> list[Claim | States]:
    """What an initialised student, or one that was calibrated since, has kept."""

    def changed(name: str, step: Made) -> bool:
        return fitted and layer_index(name) in step.fitted and part_of_mixer(name) in specification.FITTED

    claims: list[Claim | States] = [
        copied(config, without_parts=specification.REFITTED if folded else ()),
    ]
    for step in made:
        claims += initial_claims(
            config,
            step.factors,
            layers=step.layers,
            except_for=functools.partial(changed, step=step),
            seed=step.seed,
            cast_since=True,
        )
    return claims


def _check_states(report: Report, expect: str, states: States) -> None:
    fine = {"untrained", "kept"} | ({"calibrated"} if expect == "calibrated" else set())
    wrong = [f"layer {i} is {state}" for i, state in states.found.items() if state not in fine]
    report.check(f"as {expect}", not wrong, specification.listed(wrong) or "every layer")


def against_teacher(
    student: Model,
    teacher: Model,
    claims: Collection[Claim | States],
    *,
    beside: Mapping[str, Model] | None = None,
    without_gqa: Collection[int | None] = (),
    ids: Tensor | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Compare a student, whole or attention only, with its teacher: claims, settings, GQA layers."""
    random = ids is None
    if ids is None:
        ids = probe_tokens(min(teacher.config.vocab_size, student.config.vocab_size), tokens=PROBE_TOKENS)
    whole = completed(student, teacher)
    report = compare_models(
        whole,
        teacher,
        ids=ids,
        device=device,
        beside=beside,
        claims=claims,
        each_layer=False,
        progress=progress,
    )
    if random:
        report.notes.clear()  # KL on random tokens says little of text
    check_settings(report, whole.student, teacher.config)
    check_gqa_layers(report, without=without_gqa)
    return report


def completed(model: Model, base: Model) -> Model:
    """A model of which only the attention is stored, with all else taken from `base`; others as they are."""
    if any(not is_attention(name) for name in model.plan):
        return model
    rest: Plan = {name: recipe for name, recipe in with_head(base).items() if not is_attention(name)}
    if model.config.tie_word_embeddings:
        rest.pop(HEAD, None)
    return replace(model, plan=rest | model.plan)


def copied(
    config: StudentConfig,
    *,
    without: Collection[str] = (),
    without_parts: Collection[str] = (),
    without_attention: bool = False,
) -> Claim:
    """Everything outside the mixers of RWKV layers, or outside all attention, is the teacher's."""

    def wanted(name: str) -> bool:
        if is_attention(name) and (without_attention or part_of_mixer(name) in without_parts):
            return False
        return not in_rwkv_layer(config, name) and name not in without

    return Copied(
        check="copied tensors",
        good="are the teacher's",
        bad="differ from the teacher's",
        wanted=wanted,
        complete=True,
        padded=True,
    )


def initial_claims(
    config: StudentConfig,
    factors: Mapping[str, float],
    *,
    layers: Collection[int] | None = None,
    without: Collection[str] = (),
    except_for: Callable[[str], bool] = lambda name: False,
    role: str = "other",
    seed: int | None = None,
    cast_since: bool = False,
) -> list[Claim]:
    """RWKV layers (all, or some) are as they were initialised, but for tensors that were fitted since."""
    from_teacher = specification.FACTORS | specification.NORMS

    def wanted(name: str, *, projection: bool) -> bool:
        mine = in_rwkv_layer(config, name) and (layers is None or layer_index(name) in layers)
        mine = mine and name not in without and not except_for(name)
        return mine and (part_of_mixer(name) in from_teacher) == projection

    bad = "are not what they should be"
    return [
        Scaled(
            check="scaled projections",
            good="are the teacher's",
            bad=bad,
            wanted=lambda name: wanted(name, projection=True),
            role=role,
            factors=factors,
            cast_since=cast_since,
        ),
        Initial(
            check="initial values",
            good="are as published, random matrices orthogonal" if seed is None else f"are those of seed {seed}",
            bad=bad,
            wanted=lambda name: wanted(name, projection=False),
            config=config,
            seed=seed,
        ),
    ]


def check_settings(report: Report, student: StudentConfig, teacher: ModelConfig) -> None:
    """What a student has from its teacher it has as the teacher has it, theta and eps above all."""
    pairs = [(name, getattr(student, name), getattr(teacher, name)) for name in SETTINGS]
    wrong = [f"{name} is {found!r}, the teacher's is {wanted!r}" for name, found, wanted in pairs if found != wanted]
    if student.tie_word_embeddings and not teacher.tie_word_embeddings:
        wrong.append("the head is tied to the embedding, the teacher's is not")
    if student.rope_scaling is None and teacher.rope_scaling is not None:
        report.notes.append("The teacher scales RoPE, the student does not: beyond the trained length they differ.")
    elif student.rope_scaling != teacher.rope_scaling:
        wrong.append(f"rope_scaling is {student.rope_scaling}, the teacher's is {teacher.rope_scaling}")
    theta, eps = f"{student.rope_theta:.10g}", f"{student.rms_norm_eps:g}"
    report.check("settings", not wrong, "; ".join(wrong) or f"the teacher's: rope_theta {theta}, rms_norm_eps {eps}")


def check_ranks(report: Report, config: StudentConfig) -> None:
    """The low-rank pairs have the published widths."""
    names = {"w1": "decay", "a1": "iclr", "v1": "value", "k1": "key", "g1": "gate"}
    wanted = specification.ranks(config.variant.name, config.attention_size)
    found = {first: getattr(config.ranks, names[first]) for first in wanted}
    wrong = [f"{n} has rank {found[n]}, published is {rank}" for n, rank in wanted.items() if found[n] != rank]
    if config.rwkv_layers:
        report.check("ranks", not wrong, "; ".join(wrong) or ", ".join(f"{n} {rank}" for n, rank in found.items()))


def check_one_dtype(report: Report, plan: Plan) -> None:
    """What was initialised or cast has one dtype, every tensor of it."""
    found = sorted({recipe.dtype for recipe in plan.values()})
    report.check("one dtype", len(found) == 1, " and ".join(found))


def _check_copied_dtypes(report: Report, student: Plan, teacher: Plan) -> None:
    """What was copied has one dtype, or the teacher's own: a tensor that alone was cast is none of a trainer's work."""
    copies = {name: recipe.dtype for name, recipe in student.items() if not is_attention(name)}
    usual = Counter(copies.values()).most_common(1)[0][0] if copies else ""
    odd = [
        f"{name} is {dtype}, the others are {usual}"
        for name, dtype in copies.items()
        if dtype != usual and (name not in teacher or dtype != teacher[name].dtype)
    ]
    report.check("dtypes of copies", not odd, specification.listed(odd) or usual)


def check_gqa_layers(report: Report, *, without: Collection[int | None] = ()) -> None:
    """Each GQA layer, but for some, fed the teacher's hidden states is its attention with every position 0."""
    layers = [result for result in report.layers if result.nope_error is not None and result.layer not in without]
    if not layers:
        return
    cast = any(
        result.status != "equal"
        for result in report.tensors
        if ".q_proj." in result.name and "only" not in result.status
    )
    limit = CAST_ATTENTION if cast else SAME_ATTENTION
    wrong = [f"layer {r.layer} ({r.nope_error:.3g})" for r in layers if not (r.nope_error or 0.0) <= limit]
    worst = max(result.nope_error or 0.0 for result in layers)
    count = "1 layer equals" if len(layers) == 1 else f"{len(layers)} layers equal"
    text = f"{count} the teacher's attention with every position 0, relative error {worst:.2g}"
    report.check("GQA layers", not wrong, listing(wrong, "are not the teacher's attention without RoPE") or text)


def check_converted(source: Model, output: Model, *, progress: Progress | None = None) -> Report:
    """Check that a conversion kept the model: identical tensors and logits.

    Where the dtype was changed each tensor has to be the source's, rounded once, and the logits close; where the MLP
    was padded the new rows and columns have to be zero, and the logits the same but for rounding.
    """
    whole = completed(output, source)
    ids = None
    if any(not is_attention(name) for name in source.plan):
        ids = probe_tokens(min(source.config.vocab_size, output.config.vocab_size), tokens=PROBE_TOKENS)
    cast = any(recipe.dtype != output.plan[name].dtype for name, recipe in source.plan.items() if name in output.plan)
    padded = output.config.intermediate_size > source.config.intermediate_size
    rounded = Copied(
        check="tensors",
        good="are the source's, rounded or padded with zeros",
        bad="are not the source's",
        wanted=lambda name: True,
        complete=True,
        padded=True,
    )
    report = compare_models(
        whole,
        source,
        ids=ids,
        expect="close" if cast or padded else "identical",
        thresholds=CAST if cast else PADDED if padded else None,
        claims=[rounded] if cast or padded else [],
        progress=progress,
    )
    if cast:
        check_one_dtype(report, output.plan)
    if cast or padded:
        # What fits any two models that are close is said more exactly by the claim.
        report.checks = [check for check in report.checks if check.name != "config"]
        report.checks = [c for i, c in enumerate(report.checks) if c.name != "tensors" or i == _last(report, "tensors")]
        other = [text for text in report.config_differences if not (padded and text.startswith("intermediate_size"))]
        report.check("config", not other, "; ".join(other) or "the same settings")
    return report


def _last(report: Report, name: str) -> int:
    return max(i for i, check in enumerate(report.checks) if check.name == name)


def check_repicked(
    source: Model,
    teacher: Model | None,
    output: Model,
    *,
    other: Model | None,
    factors: Mapping[str, float],
    progress: Progress | None = None,
) -> Report:
    """Check `output` against the student it was made of, and its new layers against where they come from."""
    layers, config = range(output.config.num_hidden_layers), output.student
    changed = {i for i in layers if source.student.layer_kind(i) != config.layer_kind(i)}
    taken = {i for i in changed if other and other.student.layer_kind(i) == config.layer_kind(i)}
    fresh = changed - taken
    beside = {"before": source}

    def mixer_of(some: Collection[int]) -> Callable[[str], bool]:
        return lambda name: is_attention(name) and layer_index(name) in some

    claims: list[Claim] = [
        Copied(
            check="kept tensors",
            good="have the bits of the source",
            bad="differ from the source",
            wanted=lambda name: not mixer_of(changed)(name),
            role="before",
            exact=True,
        )
    ]
    if other is not None and taken:
        beside["source_student"] = other
        claims.append(
            Copied(
                check="layers taken over",
                good=f"of layers {', '.join(map(str, sorted(taken)))} are those of --from",
                bad="differ from the other checkpoint",
                wanted=mixer_of(taken),
                role="source_student",
            )
        )
    if teacher is not None and fresh:
        beside["teacher"] = teacher
        gqa = {i for i in fresh if config.layer_kind(i) == "gqa"}
        if gqa:
            claims.append(
                Copied(
                    check="new GQA layers",
                    good="are the teacher's attention",
                    bad="differ from the teacher's",
                    wanted=mixer_of(gqa),
                    role="teacher",
                )
            )
        if fresh - gqa:
            claims += initial_claims(config, factors, layers=fresh, role="teacher")
    ids = probe_tokens(output.config.vocab_size, tokens=PROBE_TOKENS)
    report = verify_model(output, ids=ids, beside=beside, claims=claims, progress=progress)
    # What is particular to the layers may change, nothing else.
    kept = replace(config, gqa_layers=source.student.gqa_layers) == source.student
    report.check("config", kept, "the source's but for the layers" if kept else "settings differ from the source's")
    return report
