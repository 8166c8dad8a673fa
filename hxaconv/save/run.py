"""The end of every command that writes: what it planned becomes a checkpoint, verified, and uploaded where asked."""

from __future__ import annotations

import importlib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hxaconv import ranks
from hxaconv.errors import HxaconvError, shortened
from hxaconv.formats.files import SourceFile
from hxaconv.formats.hub import explain, hub_utils, network_errors
from hxaconv.load.files import tokenizer_warnings
from hxaconv.load.inspection import PARTS, part_of
from hxaconv.load.models import download, will_download
from hxaconv.model.names import layer_kinds
from hxaconv.model.plan import Recipe, attention_of, source_files, total_bytes
from hxaconv.model.shells import summary
from hxaconv.model.variants.base import RANK_KEYS
from hxaconv.options import Write
from hxaconv.progress import Result
from hxaconv.save.interruption import interruptible
from hxaconv.save.output import Output
from hxaconv.save.staging import stagings_at
from hxaconv.save.writer import refuse, write

if TYPE_CHECKING:
    from hxaconv.calibration.report import CalibrationReport
    from hxaconv.selection.advice import Advice
    from hxaconv.verification.report import Report
    from hxaconv.verification.written import OutputCheck


class Planned(NamedTuple):
    """One tensor of an output; `how` is copy, scale, cast, ..."""

    shape: tuple[int, ...]
    dtype: str
    how: str
    origin: str


class File(NamedTuple):
    """One weight file of an output."""

    name: str
    nbytes: int
    tensors: int


class Part(NamedTuple):
    """A part of the model, such as its MLPs, summed up; `how` counts how its tensors come about."""

    name: str
    tensors: int
    parameters: int
    nbytes: int
    how: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, repr=False)
class Outcome(Result):
    """What a writing command did, or, for a dry run and before the work begins, will do."""

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
    written: bool = False
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
        state = "written" if self.written else "planned"
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
            "written": self.written,
            "published": self.written,
            "notes": self.notes,
            "warnings": self.warnings,
            "calibration": self.calibration.json() if self.calibration else None,
            "verification": self.report.verdict() if self.report else None,
            "pushed_to": self.pushed_to,
        }
        if self.advice is not None:
            data["advice"] = self.advice.to_dict()
        if not self.written:
            data["plan"] = {name: tensor._asdict() | {"shape": [*tensor.shape]} for name, tensor in self.plan.items()}
        return data


SHOWN = 3
"""Names of oversized tensors that a warning lists; the plan shows their files."""


def planned(output: Output, options: Write, warnings: Sequence[str] = (), notes: Sequence[str] = ()) -> Outcome:
    """The outcome of an output before anything is written."""
    assert output.student is not None
    config = output.student.student
    stored = output.student.plan if output.whole else attention_of(output.student.plan)
    kinds, groups = layer_kinds(stored), dict[str, list[Recipe]]()
    for name, recipe in stored.items():
        groups.setdefault(part_of(name, kinds), []).append(recipe)
    limit = options.max_shard_bytes
    oversized = [name for name, recipe in output.tensors.items() if output.is_folder and recipe.nbytes > limit]
    if oversized:
        names = shortened(oversized, most=SHOWN)
        warnings = [*warnings, f"larger than --max-shard-size, in files of their own: {names}"]
    return Outcome(
        command=output.record.call.command,
        target=output.target,
        format=output.format,
        dtype=output.dtype,
        layers=config.strip,
        gqa_layers=config.gqa_layers,
        ranks={name: getattr(config.ranks, name) for name in config.variant.rank_names},
        parts=tuple(
            Part(
                part,
                len(group),
                sum(recipe.numel for recipe in group),
                sum(recipe.nbytes for recipe in group),
                Counter(recipe.make.kind for recipe in group),
            )
            for part in PARTS
            if (group := groups.get(part))
        ),
        files=tuple(File(layout.name, layout.size, len(layout.fills)) for layout in output.files),
        plan={name: Planned(r.shape, r.dtype, r.make.kind, r.origin) for name, r in output.tensors.items()},
        nbytes=total_bytes(output.tensors),
        warnings=list(warnings),
        notes=list(notes),
    )


def save(
    output: Output,
    options: Write,
    *,
    check: OutputCheck | None = None,
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
    announce: bool = True,
) -> Outcome:
    """Write an output, verify it before it gets its name, and upload it where asked; a dry run refuses the same.

    The progress that the command was called with is shown the plan, once nothing stands in the way of it; without
    `announce` it has been shown before.

    Raises:
        HxaconvError: when the target is refused, or something fails; the target is as before then.
        CheckFailed: when the output did not pass; it is left beside the target for inspection.
    """
    progress, sources = output.record.call.progress, list(output.record.sources.values())
    warnings, notes, target = list(warnings), list(notes), output.target.absolute()
    if output.is_folder:
        warnings += tokenizer_warnings(sources, copied=options.copy_code)
    if output.whole and output.record.shell is not None and not output.shell:
        left_out = f"left out beside the text model: {summary(output.record.shell.shell)}"
        warnings.append(f"{left_out} (--keep-shell carries them into a folder)")
    if (target.parent / "config.json").is_file():
        warnings.append(f"{target.parent} is a model's folder: who loads or uploads it finds {target.name} in it too")
    if to_come := will_download(sources, source_files(output.tensors)):
        notes.append(to_come)
    if options.push_to:
        check_push(options.push_to)
    if options.dry_run:
        with ranks.together():
            refuse(output, options)
        return planned(output, options, warnings, [*notes, "Dry run: nothing was written."])
    if check is not None and options.verify:
        # It takes a second of one core, which the writing leaves idle.
        threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()

    def prepare(needed: Sequence[SourceFile]) -> None:
        if progress is not None and announce and ranks.rank() == 0:
            progress.show(planned(output, options, warnings, notes))
        download(sources, needed, [output.student] if output.student and ranks.rank() == 0 else [], progress)

    report = write(output, options, check=check, prepare=prepare, progress=progress)
    notes += [
        f"{staging.path} is left from an interrupted run with other options or sources; delete it unless you will"
        " resume it."
        for staging in stagings_at(target)
    ]
    outcome = replace(planned(output, options, warnings, notes), written=True, report=report)
    if options.push_to and ranks.rank() == 0:
        kept = f"{target} is complete; `hf upload {options.push_to} {target}` sends it as well."
        with interruptible(lambda: kept):
            try:
                outcome = replace(outcome, pushed_to=push_folder(target, options.push_to))
            except HxaconvError as error:
                error.hint = f"{error.hint} {kept}".strip()
                raise
    return outcome


def check_push(repo_id: str) -> None:
    """Refuse, before any work, what the Hub would refuse of an upload after it.

    Raises:
        HxaconvError: for a name that no repository can have, without a token, and where the token may not write.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    asked = f"--push-to {repo_id}"
    try:
        hub_utils().validate_repo_id(repo_id)
        user = HfApi().whoami() if "/" in repo_id else None
    except HFValidationError as error:
        raise HxaconvError(f"{asked}: {str(error).splitlines()[0]}", hint="It takes ORG/NAME.") from None
    except LocalTokenNotFoundError:
        raise HxaconvError(f"{asked}: nobody is logged in", hint="`hf auth login`, or set HF_TOKEN.") from None
    except network_errors() as error:
        raise explain(error, repo_id, None) from None
    if user is None:
        raise HxaconvError(f"{asked} names no owner", hint="It takes ORG/NAME.")
    owners = [str(user.get("name")), *(str(org.get("name")) for org in user.get("orgs") or [])]
    if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise HxaconvError(f"{asked}: the token of {owners[0]} may only read", hint="Use one that may write.")
    if repo_id.partition("/")[0] not in owners:
        raise HxaconvError(f"{asked}: {owners[0]} may write to {', '.join(owners)}", hint="Name one of these.")


def push_folder(path: Path, repo_id: str) -> str:
    """Upload a finished folder, or a `.pth` with its sidecar, creating a private repository where there is none.

    Returns its address. An interrupted upload is continued by the same call: what has arrived is not
    sent again.

    Raises:
        HxaconvError: when the Hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=path if path.is_dir() else path.parent,
            commit_message=f"Upload {path.name}",
            allow_patterns=None if path.is_dir() else [path.name, path.with_suffix(".json").name],
            ignore_patterns=[".*", "*.partial-*", "__pycache__/*"],
        )
    except network_errors() as error:
        raise explain(error, repo_id, None) from None
    except ValueError as error:
        raise HxaconvError(f"{repo_id!r} cannot be uploaded to: {str(error).splitlines()[0]}") from None
    return f"{api.endpoint}/{repo_id}"
