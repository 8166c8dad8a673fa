"""What a writing command did, or with a dry run would do: plain data, made of the plan and of what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.load.inspection import part_of, parts
from hxaconv.model.names import layer_kinds
from hxaconv.model.plan import attention_of, total_bytes
from hxaconv.model.variants.base import RANK_KEYS
from hxaconv.progress import Result

if TYPE_CHECKING:
    from hxaconv.calibration.report import CalibrationReport
    from hxaconv.save.output import Output
    from hxaconv.save.writer import WriteResult
    from hxaconv.selection.advice import Advice
    from hxaconv.verification.report import Report


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of an output."""

    shape: tuple[int, ...]
    dtype: str
    how: str
    """copy, scale, cast, ..."""
    origin: str


@dataclass(frozen=True, slots=True)
class File:
    """One weight file of an output."""

    name: str
    nbytes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model, such as its MLPs, summed up."""

    name: str
    tensors: int
    parameters: int
    nbytes: int
    how: Mapping[str, int]
    """How its tensors come about, counted."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Outcome(Result):
    """What a writing command did; `written` is None for a dry run, and before the work begins."""

    command: str
    target: Path
    format: str
    dtype: str
    layers: str
    """A letter for each: R RWKV, G GQA."""
    gqa_layers: tuple[int, ...]
    ranks: Mapping[str, int]
    parts: tuple[Part, ...]
    files: tuple[File, ...]
    plan: Mapping[str, Planned]
    """Every tensor by its stored name, in order on disk."""
    nbytes: int
    """Of all tensors."""
    written: WriteResult | None = None
    report: Report | None = None
    """What the verification of the output found."""
    calibration: CalibrationReport | None = None
    advice: Advice | None = None
    """What the layers were chosen by, where a strategy did."""
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pushed_to: str | None = None

    @property
    def headline(self) -> str:
        """What stands where."""
        state = "planned" if self.written is None else "written"
        verified = f", verification {'passed' if self.report.passed else 'FAILED'}" if self.report else ""
        layers = f"{len(self.gqa_layers)} of {len(self.layers)} layers GQA"
        return f"{self.target} ({self.format}, {self.dtype}) {state}, {layers}, {self.nbytes:,} bytes{verified}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it; every tensor of the plan only where nothing was written."""
        data: dict[str, Any] = {
            "command": self.command,
            "target": str(self.target),
            "format": self.format,
            "dtype": self.dtype,
            "layers": self.layers,
            "gqa_layers": list(self.gqa_layers),
            "ranks": {RANK_KEYS[name]: size for name, size in self.ranks.items()},
            "tensors": len(self.plan),
            "bytes": self.nbytes,
            "files": [{"name": file.name, "bytes": file.nbytes} for file in self.files],
            "written": self.written is not None,
            "published": self.written is not None,
            "notes": self.notes,
            "warnings": self.warnings,
            "calibration": self.calibration.json() if self.calibration else None,
            "verification": self.report.verdict() if self.report else None,
            "pushed_to": self.pushed_to,
        }
        if self.advice is not None:
            data["advice"] = self.advice.to_dict()
        if self.written is None:
            data["plan"] = {
                name: {"shape": list(tensor.shape), "dtype": tensor.dtype, "how": tensor.how, "origin": tensor.origin}
                for name, tensor in self.plan.items()
            }
        return data


SHOWN = 3
"""Names of oversized tensors that a warning lists; the plan shows their files."""


def planned(output: Output, max_shard_bytes: int, warnings: Sequence[str], notes: Sequence[str]) -> Outcome:
    """The outcome of an output before anything is written."""
    assert output.student is not None
    config = output.student.student
    stored = output.student.plan if output.whole else attention_of(output.student.plan)
    kinds = layer_kinds(stored)
    how: dict[str, Counter[str]] = {}
    for name, recipe in stored.items():
        how.setdefault(part_of(name, kinds), Counter())[recipe.make.kind] += 1
    return Outcome(
        command=output.record.call.command,
        target=output.target,
        format=output.format,
        dtype=output.dtype,
        layers=config.strip,
        gqa_layers=config.gqa_layers,
        ranks={name: getattr(config.ranks, name) for name in config.variant.rank_names},
        parts=tuple(
            Part(name, found["tensors"], found["parameters"], found["bytes"], dict(how[name]))
            for name, found in parts(stored).items()
        ),
        files=tuple(File(layout.name, layout.size, len(layout.fills)) for layout in output.files),
        plan={
            name: Planned(recipe.shape, recipe.dtype, recipe.make.kind, recipe.origin)
            for name, recipe in output.tensors.items()
        },
        nbytes=total_bytes(output.tensors),
        warnings=[*warnings, *_oversized(output, max_shard_bytes)],
        notes=list(notes),
    )


def _oversized(output: Output, max_shard_bytes: int) -> list[str]:
    """Tensors that no file of that size can hold."""
    names = [name for name, recipe in output.tensors.items() if output.is_folder and recipe.nbytes > max_shard_bytes]
    if not names:
        return []
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"larger than --max-shard-size, in files of their own: {', '.join(names[:SHOWN])}{rest}"]
