"""What each operation has to leave true, checked on what it wrote, without asking the code that wrote it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hxaconv.errors import shortened
from hxaconv.forward.tokens import probe_tokens
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import HEAD, is_attention, layer_index
from hxaconv.model.plan import Plan
from hxaconv.verification import specification
from hxaconv.verification.claims import (
    Claim,
    States,
    bits_taken_over,
    copied,
    initial_claims,
    part_of_mixer,
    with_head,
)
from hxaconv.verification.compare import Compute, Thresholds, compare_models, verify_model
from hxaconv.verification.report import Report
from hxaconv.verification.specification import FITTED, REFITTED

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.progress import Progress

PROBE_TOKENS = 16
"""Enough for every fault of structure: benchmarks/MUTATIONS.md."""
SAME_ATTENTION = 1e-5
"""Relative error of two float32 attentions with the same weights that sum in another order."""
CAST_ATTENTION = 3e-2
"""The same where the weights were rounded to another dtype, bf16 at worst."""
CAST = Thresholds(layer=CAST_ATTENTION, kl=0.1, may_differ=("intermediate_size",))
"""Each tensor is checked to be rounded once. Weights that were trained in small steps from bf16 round the same way all
together: up to 1.6e-2 in a layer and 1.4e-3 nats were seen; a damaged layer costs much more."""
PADDED = Thresholds(layer=1e-5, kl=1e-9, may_differ=("intermediate_size",))
"""Zeros that are added change the order of summation, nothing else."""

SETTINGS = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "rope_theta", "qk_norm", "attention_bias", "output_bias", "mlp_bias", "experts"),
)
"""What a student has from its teacher."""


# --- A student and its teacher ---------------------------------------------------------------------------------------


def check_initialised(
    teacher: Model,
    student: Model,
    *,
    factors: Mapping[str, float],
    seed: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a freshly initialised student, whole or attention only, against its teacher.

    Copied tensors have equal bits (or are the teacher's, rounded once), projections of RWKV layers are factor times
    the teacher's, each GQA layer fed the teacher's hidden states equals its attention with all positions 0, and the
    logits are finite. `factors`: receptance, key, value, output. With `seed`, one random matrix of each layer has to
    be the one of that seed, to the bit; `check_against` makes them all again.
    """
    claims = [copied(student.student), *initial_claims(student.student, factors, seed=seed, sampled=True)]
    report = against_teacher(student, teacher, claims, progress=progress)
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


@dataclass(slots=True)
class History:
    """A student's own record of its layers; nothing is known where it is empty."""

    made: list[Made] = field(default_factory=list)
    refitted: frozenset[int] = frozenset()
    """Layers that stayed attention, whose q and o a calibration changed."""
    polished: bool = False
    """Whether all mixers were trained together: nothing of the initial values is left to check then."""

    @classmethod
    def read(cls, steps: Iterable[Mapping[str, Any]]) -> History:
        """The steps of a record, the first one first.

        It comes with a checkpoint, from strangers: where it is not as this package writes it, nothing is known.
        """
        found = cls()
        try:
            for step in steps:
                found._add(step)
        except (AttributeError, KeyError, TypeError, ValueError):
            return cls()
        return found

    def _add(self, step: Mapping[str, Any]) -> None:
        again = frozenset(int(layer) for layer in step.get("changed_layers", ()))
        self.made = [replace(made, layers=made.layers - again, fitted=made.fitted - again) for made in self.made]
        self.refitted -= again
        if "init" in step:
            init = step["init"]
            factors = {name: float(init["factors"][name]) for name in specification.FACTORS}
            self.made.append(Made(layers=frozenset(map(int, init["layers"])), factors=factors, seed=int(init["seed"])))
        if step.get("calibration"):
            fit = step["calibration"]
            if (fit.get("polish") or {}).get("best_step"):
                self.made, self.polished = [], True
            changed = {int(layer["layer"]): layer["kind"] for layer in fit["layers"] if not layer["fell_back"]}
            self.refitted |= {layer for layer, kind in changed.items() if kind == "gqa"}
            self.made = [replace(made, fitted=made.fitted | (made.layers & changed.keys())) for made in self.made]

    @property
    def calibrated(self) -> frozenset[int]:
        """Layers."""
        return self.refitted.union(*(made.fitted for made in self.made))

    def expectation(self, student: StudentConfig) -> str:
        """What the student should be beside its teacher; where nothing is known, only its attention was trained."""
        if not set(student.rwkv_layers) <= {layer for made in self.made for layer in made.layers}:
            return "attention-trained"
        return "calibrated" if self.calibrated else "untrained"


def check_against(
    student: Model, teacher: Model, *, expect: str | None = None, history: History | None = None, **more: Any
) -> Report:
    """Every claim that can be made of a student against its teacher.

    Args:
        expect: `untrained`, `calibrated`, `attention-trained` or `report`; None: what its `history` makes it.
        more: what `compare_models` takes beside it: ids, thresholds, how, progress.
    """
    config, history = student.student, history or History()
    asked = expect is not None
    expect = expect or history.expectation(config)
    states = States(config, history.calibrated)
    refitted = history.refitted if expect == "calibrated" else frozenset()
    claims: list[Claim] = []
    if expect == "attention-trained":
        claims = [copied(config, without=is_attention, but="only attention may have changed")]
    elif expect != "report":
        claims = [copied(config, without=_parts_of(refitted, REFITTED))]
        for made in history.made:
            without = _parts_of(made.fitted if expect == "calibrated" else (), FITTED)
            claims += initial_claims(
                config, made.factors, layers=made.layers, without=without, seed=made.seed, cast=True
            )
    report = compare_models(student, teacher, expect=expect, claims=[*claims, states], **more)
    _explain(report, plain=bool(config.rwkv_layers) and set(states.found.values()) <= {"untrained", "kept"})
    if history.polished and expect == "attention-trained":
        report.notes.append("By its record all mixers were trained together (polished): attention-trained is expected.")
    if expect == "report":
        return report
    check_settings(report, config, teacher.config)
    if expect == "attention-trained":
        _check_copied_dtypes(report, student.plan, teacher.plan)
    else:
        check_one_dtype(report, student.plan)
        _check_states(report, expect, states, asked=asked)
        check_ranks(report, config)
        check_gqa_layers(report, without=refitted)
    return report


def _parts_of(layers: Collection[int], parts: Collection[str]) -> Callable[[str], bool]:
    return lambda name: layer_index(name) in layers and part_of_mixer(name) in parts


def _explain(report: Report, *, plain: bool = False) -> None:
    """The zero-ablation baseline in words, so that an untrained student does not look like a failure."""
    logits = report.logits
    if logits is None or logits.kl_attention_zeroed is None:
        return
    text = (
        f"KL(teacher || student) is {logits.kl_other_source:.3g} nats per token on {logits.tokens} tokens;"
        f" the teacher with every attention output zeroed has {logits.kl_attention_zeroed:.3g}."
    )
    if plain and logits.kl_other_source > 0.5 * logits.kl_attention_zeroed:
        text += (
            " On text, a plain initialisation is expected near that zero-ablation baseline (random tokens show less):"
            " its RWKV layers have learned nothing yet, which is no fault of the conversion. Training brings the"
            " number down."
        )
    report.notes.append(text)


def _check_states(report: Report, expect: str, states: States, *, asked: bool) -> None:
    """Whether every layer is as expected; who asks for a calibrated student expects one layer of it at least.

    Without being asked, none is: by its record a calibration may have left every layer its plain values.
    """
    fine = {"untrained", "kept"} | ({"calibrated"} if expect == "calibrated" else set())
    wrong = [f"layer {i} is {state}" for i, state in states.found.items() if state not in fine]
    hint = " (of a student that was trained since: --expect attention-trained)" if wrong else ""
    if asked and expect == "calibrated" and not wrong and "calibrated" not in states.found.values():
        wrong = ["no layer is calibrated"]
        hint = f" ({states.sentence()}; of a student that was not calibrated: --expect untrained)"
    report.check(f"as {expect}", not wrong, shortened(wrong, "; ") + hint or "every layer")


def against_teacher(
    student: Model,
    teacher: Model,
    claims: Collection[Claim],
    *,
    beside: Mapping[str, Model] | None = None,
    without_gqa: Collection[int | None] = (),
    ids: Tensor | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Compare a student, whole or attention only, with its teacher: claims, settings, GQA layers."""
    whole = completed(student, teacher)
    report = compare_models(
        whole,
        teacher,
        ids=_probe(teacher, student) if ids is None else ids,
        how=Compute(device=device),
        beside=beside,
        claims=claims,
        each_layer=False,
        progress=progress,
    )
    if ids is not None:  # KL on random tokens does not carry over to text
        _explain(report)
    check_settings(report, whole.student, teacher.config)
    check_gqa_layers(report, without=without_gqa)
    return report


def _probe(*models: Model) -> Tensor:
    return probe_tokens(min(model.config.vocab_size for model in models), tokens=PROBE_TOKENS)


def completed(model: Model, base: Model) -> Model:
    """A model of which only the attention is stored, with all else taken from `base`; others as they are."""
    if any(not is_attention(name) for name in model.plan):
        return model
    rest: Plan = {name: recipe for name, recipe in with_head(base).items() if not is_attention(name)}
    if model.config.tie_word_embeddings:
        rest.pop(HEAD, None)
    return replace(model, plan=rest | model.plan)


# --- Checks that several operations share ----------------------------------------------------------------------------


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
    report.problems("settings", wrong, f"the teacher's: rope_theta {theta}, rms_norm_eps {eps}")


def check_ranks(report: Report, config: StudentConfig) -> None:
    """The low-rank pairs have the published widths."""
    ranks = config.ranks
    wanted = specification.ranks(config.variant.name, config.attention_size)
    found = {"w1": ranks.decay, "a1": ranks.iclr, "v1": ranks.value, "k1": ranks.key, "g1": ranks.gate}
    found = {name: found[name] for name in wanted}
    wrong = [f"{n} has rank {found[n]}, published is {rank}" for n, rank in wanted.items() if found[n] != rank]
    if config.rwkv_layers:
        report.problems("ranks", wrong, ", ".join(f"{n} {rank}" for n, rank in found.items()))


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
    report.problems("dtypes of copies", odd, usual)


def check_gqa_layers(report: Report, *, without: Collection[int | None] = ()) -> None:
    """Each GQA layer, but for some, fed the teacher's hidden states is its attention with every position 0."""
    layers = [result for result in report.layers if result.nope_error is not None and result.layer not in without]
    if not layers:
        return
    of_q = [r for r in report.tensors if ".q_proj." in r.name and "only" not in r.status]
    limit = CAST_ATTENTION if any(result.status != "equal" for result in of_q) else SAME_ATTENTION
    wrong = [f"layer {r.layer} ({r.nope_error:.3g})" for r in layers if not (r.nope_error or 0.0) <= limit]
    worst = max(result.nope_error or 0.0 for result in layers)
    count = "1 layer equals" if len(layers) == 1 else f"{len(layers)} layers equal"
    text = f"{count} the teacher's attention with every position 0, relative error {worst:.2g}"
    report.problems("GQA layers", wrong, text, "are not the teacher's attention without RoPE")


# --- Conversions, and another choice of layers -----------------------------------------------------------------------


def check_converted(source: Model, output: Model, *, progress: Progress | None = None) -> Report:
    """Check that a conversion kept the model: identical tensors and logits.

    Where the dtype was changed each tensor has to be the source's, rounded once, and the logits close; where the MLP
    was padded the new rows and columns have to be zero, and the logits the same but for rounding.
    """
    cast = any(recipe.dtype != output.plan[name].dtype for name, recipe in source.plan.items() if name in output.plan)
    padded = output.config.intermediate_size > source.config.intermediate_size
    good, bad = "are the source's, rounded or padded with zeros", "are not the source's"
    rounded = Claim("tensors", good, bad, lambda name: True, complete=True)
    report = compare_models(
        completed(output, source),
        source,
        ids=_probe(source, output) if any(not is_attention(name) for name in source.plan) else None,
        expect="close" if cast or padded else "identical",
        thresholds=CAST if cast else PADDED if padded else Thresholds(),
        claims=[rounded] if cast or padded else [],
        progress=progress,
    )
    if cast:
        check_one_dtype(report, output.plan)
    return report


def check_repicked(
    source: Model,
    teacher: Model | None,
    output: Model,
    *,
    other: Model | None,
    factors: Mapping[str, float],
    seed: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check `output` against the student it was made of, and its new layers against where they come from."""
    layers, config = range(output.config.num_hidden_layers), output.student
    changed = {i for i in layers if source.student.layer_kind(i) != config.layer_kind(i)}
    taken = {i for i in changed if other and other.student.layer_kind(i) == config.layer_kind(i)}
    gqa = {i for i in changed - taken if config.layer_kind(i) == "gqa"}

    def mixers(some: Collection[int]) -> Callable[[str], bool]:
        return lambda name: is_attention(name) and layer_index(name) in some

    good, bad, rest = "have the bits of the source", "differ from the source", mixers(changed)
    claims = [Claim("kept tensors", good, bad, lambda name: not rest(name), bits_taken_over, role="before")]
    beside = {"before": source}
    if other is not None and taken:
        beside["from"] = other
        good = f"of layers {', '.join(map(str, sorted(taken)))} are those of --from"
        claims.append(Claim("layers taken over", good, "differ from the other checkpoint", mixers(taken), role="from"))
    if teacher is not None and changed - taken:
        beside["teacher"] = teacher
        good, bad = "are the teacher's attention", "differ from the teacher's"
        claims.append(Claim("new GQA layers", good, bad, mixers(gqa), role="teacher"))
        new = changed - taken - gqa
        claims += initial_claims(config, factors, layers=new, role="teacher", seed=seed, sampled=True)
    report = verify_model(output, ids=_probe(output), beside=beside, claims=claims, progress=progress)
    # What is particular to the layers may change, nothing else.
    kept = replace(config, gqa_layers=source.student.gqa_layers) == source.student
    report.check("config", kept, "the source's but for the layers" if kept else "settings differ from the source's")
    return report
