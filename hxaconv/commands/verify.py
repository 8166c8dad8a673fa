"""`verify`: one checkpoint against its own config, two against each other, or one against its digests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hxaconv.calls import Call
from hxaconv.commands.plots import check_plot, draw_report, file_problems
from hxaconv.errors import HxaconvError, Inconsistent, raise_all
from hxaconv.load import load_model, open_checkpoint
from hxaconv.load.models import may_be_student, of_another, tells_nothing
from hxaconv.load.student import MissingSettings
from hxaconv.model.config import StudentConfig, TeacherConfig, dropped_scaling
from hxaconv.model.model import Checkpoint, Model
from hxaconv.model.names import EMBEDDING
from hxaconv.model.variants import VARIANTS
from hxaconv.options import STAGES, Check, OfStudent, Option, Probe, Settings, Source, TeacherToo
from hxaconv.save.documents import history_of, record_of

if TYPE_CHECKING:
    from hxaconv.verification.report import Report
    from hxaconv.verification.written import DigestReport

Against = Annotated[str | None, Option("Checkpoint to compare with: any container, student or teacher.")]
Digests = Annotated[bool, Option("Only re-check the digests in hxaconv.json, without a forward.")]


def verify(
    source: Source,
    *,
    against: Against = None,
    digests: Digests = False,
    check: Check = Check(),
    teacher: TeacherToo = None,
    settings: OfStudent = Settings(),
    probe: Probe = Probe(),
    call: Call,
) -> Report | DigestReport:
    """Check a checkpoint with an independent reference forward, alone or against another.

    What is wrong with the checkpoint is in the report.

    Command line:
        hxaconv verify student/
        hxaconv verify student.pth --against student-hf/ --expect identical
        hxaconv verify student/ --against RekaAI/reka-flash-3 --text sample.txt --plot depth.png
        hxaconv verify out/epoch_0_step_300 --against RekaAI/reka-flash-3 --json

    Returns:
        The report: see its `passed`, or call its `raise_if_failed`.

    Raises:
        HxaconvError: when a setting is known from no source, or the two cannot be fed the same input.
    """
    call.refuse_useless(
        (digests, sorted(call.given - {"source", "digests", "revision"}), "--digests only re-reads SOURCE's tensors"),
        (against is None, ("plot",), "it draws a comparison; add --against OTHER"),
        (against is None, ("expect", "max_logit", "max_layer", "max_kl"), "for comparisons only; add --against OTHER"),
        (probe.input_ids is not None, ("tokens", "batch", "seed"), "all ids of --input-ids are used, as they are"),
        (probe.text is not None, ("seed",), "nothing is random with --text"),
        (not (check.plot or probe.logits_out), ("overwrite",), "there is no --plot or --logits-out to write"),
    )
    check_plot(check.plot, overwrite=check.overwrite)
    problems = file_problems("--logits-out", probe.logits_out, (".safetensors",), overwrite=check.overwrite)
    for folder in (Path(name) for name in (source, against, teacher) if name and probe.logits_out):
        if folder.exists() and folder.resolve() in Path(probe.logits_out or "").resolve().parents:
            problems.append(f"--logits-out {probe.logits_out}: it lies inside the checkpoint {folder}")
    raise_all("this cannot be written:", problems)
    checkpoint = open_checkpoint(source, revision=settings.revision, weights=settings.weights, progress=call.progress)
    if digests:
        from hxaconv.verification.written import check_digests

        return check_digests(checkpoint, record_of(checkpoint), call.progress)
    other = open_checkpoint(against, progress=call.progress) if against else None
    opened = [found for found in (checkpoint, other) if found is not None]
    itself = f"{source} is a teacher itself; to verify a student, name it as SOURCE or --against"
    of_students = ("teacher", "layer_map", *(["tie_word_embeddings"] if settings.tie_word_embeddings else []))
    call.refuse_useless((not any(map(may_be_student, opened)), of_students, itself))
    try:
        models = _models(checkpoint, other, teacher, settings)
        for model in models:
            if model.tied_head is not None:
                model.tied_head.check()
    except (Inconsistent, MissingSettings) as error:
        if isinstance(error, MissingSettings) and checkpoint.config is None:
            raise
        return _inconsistent(checkpoint, other, error)
    turned = isinstance(models[0].config, TeacherConfig) and isinstance(models[-1].config, StudentConfig)
    if turned and other is not None:
        if probe.logits_out is not None:
            raise HxaconvError(
                f"--logits-out is of SOURCE, and {source} is the teacher that the student is held against",
                hint="Name the student as SOURCE, or verify the teacher without --against.",
            )
        models, checkpoint, other = models[::-1], other, checkpoint
    report = _run(models, checkpoint, opened, check, probe, call)
    if turned:
        report.notes.append(f"Turned round: {checkpoint.label} is a student, and held against its teacher.")
    from hxaconv.verification.written import check_dtypes, check_own

    own = check_own if isinstance(models[0].config, StudentConfig) else check_dtypes
    own(report, checkpoint, record_of(checkpoint))
    for one, two in ((checkpoint, other), (other, checkpoint)):
        if one is not None and two is not None and teacher is None and tells_nothing(one):
            report.notes.append(f"{one.label} does not record {_unrecorded(models, settings)}: taken from {two.label}")
    report.notes += [line for found in opened for line in dropped_scaling(found.config or {})]
    if check.plot is not None and report.layers:
        draw_report(report, Path(check.plot))
    return report


def _unrecorded(models: tuple[Model, ...], settings: Settings) -> str:
    """What was taken from the other of two models."""
    configs = [model.config for model in models if isinstance(model.config, StudentConfig)]
    taken = ["rope_theta", "rms_norm_eps", "tying"]
    if len(configs) == 2:
        variant = configs[0].variant
        alike = sum(variant.required == other.required for other in VARIANTS.values()) > 1
        taken += ["rope_scaling"] if configs[0].rope_scaling else []
        taken += [f"the variant ({variant.name})"] if alike and settings.variant is None else []
    return f"{', '.join(taken[:-1])} and {taken[-1]}"


def _models(
    checkpoint: Checkpoint, other: Checkpoint | None, teacher: str | None, settings: Settings
) -> tuple[Model, ...]:
    """The model, or both; one may have settings that the other lacks, and a teacher completes what holds a part."""
    if other is None:
        return (load_model(checkpoint, settings, teacher=teacher),)
    others = of_another(settings)
    partial = may_be_student(checkpoint) and EMBEDDING not in checkpoint.plan
    if partial and teacher is None and not may_be_student(other):
        return load_model(checkpoint, settings, teacher=other), load_model(other, others)
    if tells_nothing(checkpoint) and not tells_nothing(other):
        second = load_model(other, others, teacher=teacher)
        return load_model(checkpoint, settings, teacher=teacher, like=second.config), second
    first = load_model(checkpoint, settings, teacher=teacher)
    return first, load_model(other, others, teacher=teacher, like=first.config)


def _run(
    models: Sequence[Model],
    checkpoint: Checkpoint,
    opened: Sequence[Checkpoint],
    check: Check,
    probe: Probe,
    call: Call,
) -> Report:
    """Run one model, or both on the same tokens."""
    from hxaconv.forward.tokens import checked_device, forward_need, tokens_of
    from hxaconv.verification.compare import Compute, Thresholds, compare_models, verify_model
    from hxaconv.verification.invariants import PROBE_TOKENS, History, check_against
    from hxaconv.verification.lint import lint

    tokenizer = next((found for found in opened if "tokenizer.json" in found.companions), checkpoint)
    if len(models) == 1 and not probe.given and not call.given & {"tokens", "logits_out"}:
        probe = replace(probe, tokens=PROBE_TOKENS)  # nothing is measured that more would make exact
    vocabulary, need = min(model.config.vocab_size for model in models), forward_need(models, probe.dtype)
    kept = Path(probe.logits_out) if probe.logits_out else None
    run: dict[str, Any] = {
        "how": Compute(probe.dtype, checked_device(probe.device), kept),
        "ids": tokens_of(probe, vocabulary, tokenizer, need, batch=probe.batch, seed=probe.seed),
        "progress": call.progress,
    }
    if len(models) == 1:
        report = verify_model(models[0], **run)
        report.findings = [finding.to_json() for finding in lint(checkpoint, models[0].config)]
        return report
    model, other = models
    run["thresholds"] = Thresholds(logits=check.max_logit, layer=check.max_layer, kl=check.max_kl)
    of_teacher = isinstance(model.config, StudentConfig) and isinstance(other.config, TeacherConfig)
    if check.expect in STAGES and not of_teacher:
        raise HxaconvError(
            f"--expect {check.expect} is about a student and its teacher",
            hint="Name the student as SOURCE and the teacher with --against.",
        )
    if of_teacher and check.expect in (None, *STAGES, "report"):
        return check_against(model, other, expect=check.expect, history=History.read(history_of(checkpoint)), **run)
    return compare_models(model, other, expect=check.expect, **run)


def _inconsistent(checkpoint: Checkpoint, other: Checkpoint | None, error: HxaconvError) -> Report:
    """The report on a checkpoint that is no model at all: what does not fit, and what loaders do with it."""
    from hxaconv.verification.lint import lint
    from hxaconv.verification.report import Report

    report = Report(source=checkpoint.label, other=other.label if other else None)
    report.check("names, shapes and config", False, str(error))
    if other is None:
        report.findings = [finding.to_json() for finding in lint(checkpoint)]
        report.notes.append(
            "loaders are checked by files and names alone here: what failed above makes them stop, or compute wrongly"
        )
    return report
