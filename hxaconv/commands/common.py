"""What the writing commands share: options of the writer, sizes, and the run itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError
from hxaconv.model import layer_choice
from hxaconv.model.config import StudentConfig, dropped_scaling
from hxaconv.options import Write
from hxaconv.save.command_line import option_name
from hxaconv.save.run import Verify, save

if TYPE_CHECKING:
    from hxaconv.calibration import CalibrationReport
    from hxaconv.model.model import Checkpoint
    from hxaconv.progress import Progress
    from hxaconv.save.output import Output
    from hxaconv.save.writer import WriteResult
    from hxaconv.verification.report import Report

SHOWN = 3
"""Names of oversized tensors that a warning lists; the plan shows their files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How a command writes, and who hears of its progress."""

    overwrite: bool = False
    resume: bool = False
    workers: int | None = None
    digest: str = "crc32"
    allow_nonfinite: bool = False
    dry_run: bool = False
    verify: bool = True
    push_to: str | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        _ = self.group

    @property
    def group(self) -> Write:
        """The same without the progress."""
        return Write(**{f.name: getattr(self, f.name) for f in fields(self) if f.name != "progress"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a writing command did, or with `dry_run` would do."""

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


def perform(
    output: Output,
    write: WriteOptions,
    verify: Verify | None,
    warnings: list[str],
    notes: list[str],
    max_shard_bytes: int = 0,
) -> Outcome:
    """Write an output, verify it before it gets its name, and upload it where asked.

    Raises:
        HxaconvError: when the plan or the target is refused.
        CheckFailed: when the output did not pass; it is left beside the target for inspection.
    """
    if max_shard_bytes:
        warnings += oversized(output, max_shard_bytes)
    saved = save(output, write.group, verify=verify, progress=write.progress)
    notes += [
        f"{path} is left from an interrupted run with other options or sources; delete it if nobody will resume it."
        for path in (saved.written.leftovers if saved.written else ())
    ]
    return Outcome(
        output=output,
        written=saved.written,
        report=saved.report,
        warnings=warnings,
        notes=notes,
        pushed_to=saved.pushed_to,
    )


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
    if not output.is_folder:
        return []
    names = [name for name, recipe in output.tensors.items() if recipe.nbytes > max_shard_bytes]
    if not names:
        return []
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"larger than --max-shard-size, in files of their own: {', '.join(names[:SHOWN])}{rest}"]


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
