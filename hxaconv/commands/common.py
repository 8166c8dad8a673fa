"""What the writing commands share: options of the writer, sizes, and the run itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError
from hxaconv.formats.json_files import plain_data
from hxaconv.model import layer_choice
from hxaconv.model.config import StudentConfig, dropped_scaling
from hxaconv.model.model import Model
from hxaconv.save.command_line import option_name
from hxaconv.save.interruption import interruptible
from hxaconv.save.output import Job, build_output
from hxaconv.save.target import WriteSettings

if TYPE_CHECKING:
    from hxaconv.calibration import CalibrationReport
    from hxaconv.formats.files import SourceFile
    from hxaconv.model.model import Checkpoint
    from hxaconv.progress import Progress
    from hxaconv.save.target import Output, WriteResult
    from hxaconv.verification.report import Report

Verify = Callable[[Model, "Progress | None"], "Report"]
"""Checks the student that was written, and shows how far it is."""

VERDICT_DIGITS = 3
"""Significant digits of what a verification measured in hxaconv.json: beyond them, sums depend on the machine."""

SHOWN = 3
"""Names of oversized tensors that a warning lists; the plan shows their files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions(WriteSettings):
    """How a command writes: what concerns the writer, and what is done before and after."""

    dry_run: bool = False
    verify: bool = True
    push_to: str | None = None
    progress: Progress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a writing command did, or with `dry_run` would do."""

    job: Job
    output: Output
    written: WriteResult | None
    report: Report | None = None
    """What the verification of the output found."""
    calibration: CalibrationReport | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pushed_to: str | None = None


def one_of(option: str, value: str, choices: Sequence[str]) -> str:
    """`value`, if it is one of the choices.

    Raises:
        HxaconvError: naming the option and what it takes.
    """
    if value not in choices:
        raise HxaconvError(f"{option} {value!r} is not known", hint=f"It takes {', '.join(choices)}.")
    return value


def checked_device(text: str) -> str:
    """`cpu`, `cuda` or `cuda:1`, if this machine has it.

    Raises:
        HxaconvError: for other names, and for a GPU that is not there.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise HxaconvError(f"--device {text!r} is not known", hint="It takes cpu, cuda or cuda:1.")
    if text != "cpu":
        import torch

        count = torch.cuda.device_count()
        if int(text.partition(":")[2] or 0) >= count:
            raise HxaconvError(f"--device {text}: torch sees {count} GPUs here", hint="Use --device cpu.")
    return text


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """`5GB` (decimal, as the Hub counts), `4GiB`, `500MB` -> bytes.

    Raises:
        HxaconvError: for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise HxaconvError(f"{text!r} is not a size", hint="Examples: 5GB, 500MB, 4GiB.")
    unit = match[2].lower().removesuffix("b")
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match[1]) * base ** " kmgt".index(unit.removesuffix("i") or " "))


def perform(job: Job, write: WriteOptions, verify: Verify | None, warnings: list[str], notes: list[str]) -> Outcome:
    """Write a job's output, verify it before it gets its name, and upload it where asked.

    Raises:
        HxaconvError: when the plan or the target is refused.
        CheckFailed: when the output did not pass; it is left beside the target for inspection.
    """
    from hxaconv.save.writer import write as write_output

    output = build_output(job)
    warnings += oversized(output, job.max_shard_bytes)
    if write.dry_run:
        return Outcome(job=job, output=output, written=None, warnings=warnings, notes=notes)
    reports: list[Report] = []
    check = _staged_check(job, verify, reports, write) if verify is not None and write.verify else None

    def prepare(needed: Sequence[SourceFile]) -> None:
        download(job.sources.values(), needed, [job.student], write.progress)

    written = write_output(output, write, verify=check, prepare=prepare, progress=write.progress)
    notes += [
        f"{path} is left from an interrupted run with other options or sources; delete it if nobody will resume it."
        for path in written.leftovers
    ]
    pushed = None
    if write.push_to and written.published:
        from hxaconv.save.hub_push import push_folder

        kept = f"{written.path} is complete; `hf upload {write.push_to} {written.path}` sends it as well."
        with interruptible(lambda: kept):
            try:
                pushed = push_folder(written.path, write.push_to)
            except HxaconvError as error:
                error.hint = f"{error.hint} {kept}".strip()
                raise
    return Outcome(
        job=job,
        output=output,
        written=written,
        report=reports[-1] if reports else None,
        warnings=warnings,
        notes=notes,
        pushed_to=pushed,
    )


def download(
    checkpoints: Iterable[Checkpoint],
    needed: Sequence[SourceFile],
    models: Iterable[Model],
    progress: Progress | None,
) -> None:
    """Have these files of the checkpoints here, where they come from the Hub, and compare heads that waited for it.

    Raises:
        Inconsistent: when a model's tied head is not its embedding.
    """
    from hxaconv.load.checkpoint import download_weights

    heads = [model.tied_head for model in models if model.tied_head is not None]
    files = [*needed, *(file for head in heads for file in head.files)]
    for checkpoint in checkpoints:
        if checkpoint.repo is not None:
            download_weights(checkpoint, progress, needed=files)
    for head in heads:
        head.check()


def check_target(job: Job, write: WriteOptions) -> None:
    """Refuse now what would be refused after hours of computing: the target, its disk, the options.

    Raises:
        HxaconvError: listing every problem.
    """
    from hxaconv.save.writer import check

    check(build_output(job), write)


def layers_text(layers: str | Iterable[int]) -> str:
    """A choice of layers as the command line has it; from Python it may be numbers."""
    return layers if isinstance(layers, str) else ",".join(map(str, layers)) or "none"


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Argument -> default of a command's function."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def given_options(function: Callable[..., Any], values: Mapping[str, Any]) -> set[str]:
    """Names of a command's options that do not have their defaults."""
    return {name for name, default in defaults_of(function).items() if values[name] != default}


def useless(given: Collection[str], names: Iterable[str], reason: str) -> list[str]:
    """A line that tells why those of `names` that were given have no use, if there are any."""
    options = [f"--{option_name(name)}" for name in names if name in given]
    return [f"{', '.join(options)}: {reason}"] if options else []


def oversized(output: Output, max_shard_bytes: int) -> list[str]:
    """Tensors that no file of the size asked for can hold."""
    if output.container != "safetensors":
        return []
    names = [name for name, recipe in output.tensors.items() if recipe.nbytes > max_shard_bytes]
    if not names:
        return []
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"larger than --max-shard-size, in files of their own: {', '.join(names[:SHOWN])}{rest}"]


def let_nonfinite_pass(report: Report) -> None:
    """Turn checks that NaN and Inf alone make fail into passed ones that say so; those of bits still count."""
    numeric = {"finite", "finite weights", "finite logits", "logits", "layers", "GQA layers"}
    if any(not check.passed and check.name.startswith("finite") for check in report.checks):
        report.checks = [
            replace(check, passed=True, detail=f"allowed by --allow-nonfinite: {check.detail}")
            if not check.passed and check.name in numeric
            else check
            for check in report.checks
        ]


def _staged_check(
    job: Job, verify: Verify, reports: list[Report], write: WriteOptions
) -> Callable[[Path], Mapping[str, Any]]:
    def check(staged: Path) -> Mapping[str, Any]:
        from hxaconv.load.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(staged)
        student = Model(job.student.config, dict(checkpoint.plan), str(job.target), job.student.raw)
        report = verify(student, write.progress)
        if write.allow_nonfinite:
            let_nonfinite_pass(report)
        report.raise_if_failed()
        reports.append(report)
        verdict: Mapping[str, Any] = plain_data(report.verdict(), VERDICT_DIGITS)
        return verdict

    return check


def base_model_name(checkpoint: Checkpoint) -> str:
    """A Hub id, or the bare name of a folder."""
    return str(checkpoint.repo or Path(checkpoint.label).resolve().name)


def scaling_warnings(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """What the configs of teachers say of RoPE that is not followed."""
    return [line for checkpoint in checkpoints for line in dropped_scaling(checkpoint.config or {})]


def format_by_suffix(out: str) -> str:
    """The format of an output where nobody says it."""
    return "pth" if Path(out).suffix == ".pth" else "hf"


def layer_0_warning(config: StudentConfig) -> list[str]:
    """The sentence about layer 0 as GQA, where it is and RWKV layers follow."""
    return [layer_choice.LAYER_0_REASON] if 0 in config.gqa_layers and config.rwkv_layers else []
