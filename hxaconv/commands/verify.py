"""`verify`: one checkpoint against its own config, two against each other, or one against its digests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.commands.common import checked_device, one_of, scaling_warnings, useless
from hxaconv.errors import HxaconvError, Inconsistent, raise_all
from hxaconv.forward.tokens import TokenOptions, tokens_of
from hxaconv.load import load_model, open_checkpoint
from hxaconv.load.models import may_be_student, tells_nothing
from hxaconv.load.student import MissingSettings
from hxaconv.model.config import StudentConfig, TeacherConfig
from hxaconv.model.model import Checkpoint, Model
from hxaconv.options import Settings
from hxaconv.save.records import history_of, record_of
from hxaconv.verification.digests import DigestReport, check_digests
from hxaconv.verification.lint import lint

if TYPE_CHECKING:
    from hxaconv.progress import Progress
    from hxaconv.verification.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """How to run the forward, and what to expect of it."""

    tokens: TokenOptions | int = 64
    """Where they come from, or how many random ones."""
    dtype: str = "float32"
    device: str = "cpu"
    expect: str | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    logits_out: str | None = None
    overwrite: bool = False
    """Whether `logits_out` may replace a file."""
    progress: Progress | None = None


def run(
    source: str,
    *,
    against: str | None = None,
    teacher: str | None = None,
    layer_map: str | None = None,
    revision: str | None = None,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    tie_word_embeddings: bool | None = None,
    options: VerifyOptions | None = None,
) -> Report:
    """Verify `source` alone, or compare it with `against`, whatever their containers and names.

    What is wrong with the checkpoint is in the report: see its `passed`, or call its `raise_if_failed`.

    Args:
        source: Folder, file or Hub id (`org/name@revision`) of a teacher or a student.
        against: The checkpoint to compare with.
        teacher: Completes a checkpoint that holds attention only, and tells settings.
        layer_map: Name or TOML file of a layer map that tells settings.
        revision: Branch, tag or commit of a Hub `source`.
        rope_theta, rms_norm_eps, tie_word_embeddings: Settings that no source tells, or that overrule it.
        options: Tokens, dtype, device, and what is expected of a comparison.

    Raises:
        HxaconvError: when a setting is known from no source, or the two cannot be fed the same input.
    """
    from hxaconv.verification.compare import compare_models
    from hxaconv.verification.contracts import check_against, made_by
    from hxaconv.verification.expectations import Thresholds
    from hxaconv.verification.report import EXPECTATIONS
    from hxaconv.verification.single import verify_model
    from hxaconv.verification.written import check_own

    options = options or VerifyOptions()
    one_of("--dtype", options.dtype, ("float32", "float64"))
    checked_device(options.device)
    if options.expect is not None:
        one_of("--expect", options.expect, EXPECTATIONS)
    limits = {f"--max-{key.removesuffix('s')}": value for key, value in options.thresholds.items()}
    raise_all("limits are 0 or more:", [f"{name} {value}" for name, value in limits.items() if not value >= 0])
    if against is None:
        about = [*(["--expect"] if options.expect is not None else []), *limits]
        if about:
            raise HxaconvError(f"{', '.join(about)}: for comparisons only", hint="Add --against OTHER.")
    logits_out = Path(options.logits_out) if options.logits_out else None
    if logits_out is not None:
        refuse_logits_path(logits_out, [source, against, teacher], overwrite=options.overwrite)
    settings = Settings(
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        layer_map=layer_map,
    )
    checkpoint = open_checkpoint(source, revision=revision, progress=options.progress)
    beside = open_checkpoint(against, progress=options.progress) if against else None
    opened = [found for found in (checkpoint, beside) if found is not None]
    if not any(may_be_student(found) for found in opened):
        tied = tie_word_embeddings or None
        _refuse_for_teachers(source, {"--teacher": teacher, "--layer-map": layer_map, "--tie-word-embeddings": tied})
    try:
        model, other = _both(checkpoint, beside, teacher, settings)
        for found in (model, other):
            if found is not None and found.tied_head is not None:
                found.tied_head.check()
    except Inconsistent as error:
        return inconsistent(checkpoint, beside, error)
    except MissingSettings as error:
        if checkpoint.config is None:
            raise
        return inconsistent(checkpoint, beside, error)
    vocabulary = min(m.config.vocab_size for m in (model, other) if m is not None)
    tokens = TokenOptions(tokens=options.tokens) if isinstance(options.tokens, int) else options.tokens
    ids = tokens_of(tokens, vocabulary, next((c for c in opened if "tokenizer.json" in c.companions), checkpoint))
    if other is None:
        report = verify_model(
            model,
            ids=ids,
            dtype=options.dtype,
            device=options.device,
            logits_out=logits_out,
            progress=options.progress,
        )
        report.findings = [finding.to_json() for finding in lint(checkpoint, model.config)]
    else:
        how: dict[str, Any] = {
            "ids": ids,
            "thresholds": Thresholds(**options.thresholds),
            "dtype": options.dtype,
            "device": options.device,
            "logits_out": logits_out,
            "progress": options.progress,
        }
        student = isinstance(model.config, StudentConfig) and isinstance(other.config, TeacherConfig)
        if options.expect in ("untrained", "calibrated", "attention-trained") and not student:
            raise HxaconvError(
                f"--expect {options.expect} is about a student and its teacher",
                hint="Name the student as SOURCE and the teacher with --against.",
            )
        if student and options.expect in (None, "untrained", "calibrated", "attention-trained", "report"):
            made, folded = made_by(history_of(checkpoint))
            report = check_against(model, other, expect=options.expect, made=made, folded=folded, **how)
        else:
            report = compare_models(model, other, expect=options.expect, **how)
    if isinstance(model.config, StudentConfig):
        check_own(report, checkpoint, record_of(checkpoint))
    for one, two in ((checkpoint, beside), (beside, checkpoint)):
        if one is not None and two is not None and teacher is None and tells_nothing(one):
            report.notes.append(f"{one.label} says nothing of rope_theta, rms_norm_eps and tying: as in {two.label}")
    report.notes += scaling_warnings(opened)
    return report


def check_options(given: set[str]) -> None:
    """Refuse options of the command line that would be ignored; `given` are their names.

    Raises:
        HxaconvError: listing everything at once.
    """
    if "digests" in given:
        others = sorted(given - {"digests", "revision", "json", "quiet"})
        problems = useless(given, others, "--digests only re-reads the tensors of SOURCE")
    else:
        problems = [] if "against" in given else useless(given, ("plot",), "it draws a comparison; add --against OTHER")
        if "input_ids" in given:
            problems += useless(given, ("tokens", "batch", "seed"), "all ids of --input-ids are used, as they are")
        elif "text" in given:
            problems += useless(given, ("seed",), "nothing is random with --text")
        if not given & {"plot", "logits_out"}:
            problems += useless(given, ("overwrite",), "there is no --plot or --logits-out to write")
    raise_all("this cannot be done as asked for:", problems)


def refuse_logits_path(path: Path, sources: Sequence[str | None], *, overwrite: bool) -> None:
    """Stop before anything is put into a checkpoint, or anything that exists is replaced unasked.

    Raises:
        HxaconvError: listing what is wrong with the path.
    """
    problems = []
    if path.suffix != ".safetensors":
        problems.append("it is written as safetensors; name it NAME.safetensors")
    if path.is_dir():
        problems.append("it is a folder")
    elif path.exists() and not overwrite:
        problems.append("it exists; --overwrite replaces it")
    if not path.absolute().parent.is_dir():
        problems.append(f"{path.absolute().parent} is not a folder")
    inside = [s for s in sources if s and Path(s).exists() and Path(s).resolve() in path.resolve().parents]
    problems += [f"it lies inside the checkpoint {source}" for source in inside]
    raise_all(f"--logits-out {path}:", problems)


def digests(source: str, *, revision: str | None = None, progress: Progress | None = None) -> DigestReport:
    """Re-check the digests recorded for `source`, without a forward and without torch.

    Raises:
        HxaconvError: when none were recorded.
        CheckFailed: when a tensor is not what was written.
    """
    checkpoint = open_checkpoint(source, revision=revision, progress=progress)
    report = check_digests(checkpoint, record_of(checkpoint), progress)
    report.raise_if_failed(checkpoint.label)
    return report


def inconsistent(checkpoint: Checkpoint, other: Checkpoint | None, error: HxaconvError) -> Report:
    """The report on a checkpoint that is no model at all: what does not fit, and what loaders would say."""
    from hxaconv.verification.report import Report

    report = Report(source=checkpoint.label, other=other.label if other else None)
    report.check("names, shapes and config", False, str(error))
    if other is None:
        report.findings = [finding.to_json() for finding in lint(checkpoint)]
        report.notes.append(
            "loaders are judged by files and names alone here: what failed above makes them stop, or compute wrongly"
        )
    return report


def _both(
    checkpoint: Checkpoint, beside: Checkpoint | None, teacher: str | None, settings: Settings
) -> tuple[Model, Model | None]:
    """Both models; one of them may say what the other cannot."""
    if beside is None:
        return load_model(checkpoint, settings, teacher=teacher), None
    if tells_nothing(checkpoint) and not tells_nothing(beside):
        other = load_model(beside, settings, teacher=teacher)
        return load_model(checkpoint, settings, teacher=teacher, like=other.config), other
    model = load_model(checkpoint, settings, teacher=teacher)
    return model, load_model(beside, settings, teacher=teacher, like=model.config)


def _refuse_for_teachers(source: str, given: Mapping[str, Any]) -> None:
    raise_all(
        f"{source} is a teacher itself:",
        [f"{option} has no use" for option, value in given.items() if value is not None],
        hint="To verify a student, name it as SOURCE or --against.",
    )
