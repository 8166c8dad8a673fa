"""From a student model to everything its output will hold: names, documents, provenance."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError
from hxaconv.formats.json_files import as_bytes
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD, is_attention, stored_name
from hxaconv.model.plan import Plan, with_origin
from hxaconv.save.card import model_card
from hxaconv.save.command_line import command_line, version
from hxaconv.save.records import history_of
from hxaconv.save.student_json import loadmodel_body, student_json
from hxaconv.save.target import Output

if TYPE_CHECKING:
    from hxaconv.formats.files import SourceFile
    from hxaconv.formats.safetensors_layout import Shard
    from hxaconv.model.model import Checkpoint

FORMATS = {"hf": "hf", "pth": "rwkv", "training": "training"}
"""Output format -> dialect of its names."""

CODE_FILES = ("configuration_hxa079.py", "modeling_hxa079.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a command wants written: the student, where, how, and the story of it."""

    command: str
    options: Mapping[str, Any]
    """The command's own arguments, as JSON: recorded for --resume, published with bare names for paths."""
    defaults: Mapping[str, Any]
    """What the command takes for an argument that is not given."""
    student: Model
    target: Path
    format: str
    dtype: str
    max_shard_bytes: int
    sources: Mapping[str, Checkpoint]
    """Role (teacher, source, ...) -> the checkpoint opened for it."""
    base_model: str | None
    purpose: str
    section: str = ""
    """One more section of the model card, Markdown."""
    all_tensors: bool = False
    """Whether a `training` output holds all tensors, not attention alone."""
    copy_code: bool = False
    shards: Sequence[Shard] | None = None
    """For hf: a sharding to keep; None: by size."""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def everything(self) -> bool:
        """Whether all of the student's tensors are written."""
        return self.all_tensors or self.format != "training"

    @property
    def command_line(self) -> str:
        """The command as one could type it again, without local folders."""
        return command_line(self.command, self.options, self.defaults)


def build_output(job: Job) -> Output:
    """The output of a job, complete but for the bytes.

    Raises:
        HxaconvError: for a target that does not fit the format.
    """
    if job.format not in FORMATS:
        raise HxaconvError(f"--format {job.format!r} is not known", hint=f"It takes {', '.join(FORMATS)}.")
    folder = job.format == "hf"
    # RWKV-Infer takes a path for a file only where its name says .pth; trainers are not so particular.
    if not folder and job.target.suffix not in ((".pth",) if job.format == "pth" else (".pth", ".pt", ".bin")):
        raise HxaconvError(f"{job.target}: a {job.format} output is one file", hint="Name it OUT.pth.")
    if folder and job.target.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        other = "`hxaconv to-pth`" if job.command == "to-hf" else "--format pth"
        raise HxaconvError(f"{job.target}: an hf output is a folder", hint=f"Leave the suffix off, or use {other}.")
    for word in (*shlex.split(job.command_line), job.target.name):
        if not _is_text(word):
            raise HxaconvError(
                f"{os.fsencode(word)!r} in the command is not UTF-8, and could not be recorded",
                hint="Rename that file or folder first.",
            )
    config = job.student.student
    document = student_json(config, job.student.raw, job.dtype)
    return Output(
        target=job.target,
        container="safetensors" if folder else "pth",
        tensors=stored_plan(job.student.plan, job.format, everything=job.everything),
        max_shard_bytes=job.max_shard_bytes,
        documents=_folder_documents(job, document) if folder else _sidecar(job, config, document),
        copied_files=_companions(job) if folder else {},
        provenance=_provenance(job),
        command=job.command,
        options=job.options,
        shards=job.shards if folder else None,
        ordered_dict=job.format != "training",
        source_roots=[source.root for source in job.sources.values() if source.root is not None],
    )


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def stored_plan(plan: Plan, format: str, *, everything: bool = True) -> Plan:
    """The plan under the names of its output format; a `.pth` always gets an explicit head."""
    dialect = FORMATS[format]
    if format == "training" and not everything:
        plan = {name: recipe for name, recipe in plan.items() if is_attention(name)}
    if format == "pth" and HEAD not in plan:
        plan = plan | {HEAD: with_origin(plan[EMBEDDING], f"{plan[EMBEDDING].origin} (tied head written out)")}
    return {stored_name(name, dialect): recipe for name, recipe in plan.items()}


def _folder_documents(job: Job, document: Mapping[str, Any]) -> dict[str, bytes]:
    code = resources.files("hxaconv") / "model" / "hf"
    documents = {name: (code / name).read_bytes() for name in CODE_FILES}
    documents["README.md"] = model_card(
        job.student.student,
        base_model=job.base_model,
        taught="teacher" in job.sources,
        purpose=job.purpose,
        section=job.section,
        how=f"`{job.command_line}` with hxaconv {version()}.",
        raw=job.student.raw,
    )
    return documents | {"config.json": as_bytes(document)}


def _sidecar(job: Job, config: StudentConfig, document: Mapping[str, Any]) -> dict[str, bytes]:
    facts = {key: value for key, value in document.items() if key not in ("auto_map", "architectures")}
    if job.format == "pth":
        facts |= {"rwkv_infer_loadmodel": loadmodel_body(config, job.target.name)}
    return {f"{job.target.stem}.json": as_bytes(facts)}


def _companions(job: Job) -> dict[str, SourceFile]:
    """Tokenizer and generation files of the sources, the first that has one wins; code only on request."""
    found: dict[str, SourceFile] = {}
    for checkpoint in job.sources.values():
        for name, file in checkpoint.companions.items():
            found.setdefault(name, file)
        if job.copy_code:
            for name, file in checkpoint.code_files.items():
                if name not in CODE_FILES:
                    found.setdefault(name, file)
    return found


def _provenance(job: Job) -> dict[str, Any]:
    config = job.student.student
    return {
        "hxaconv": version(),
        "command_line": job.command_line,
        "sources": {role: _source(checkpoint) for role, checkpoint in job.sources.items()},
        "format": job.format,
        "variant": config.rwkv_architecture,
        "gqa_layers": list(config.gqa_layers),
        **job.extra,
    }


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    files = [{"name": f.name, "bytes": f.size, "header_sha256": f.header_digest} for f in checkpoint.files]
    name = checkpoint.repo or Path(checkpoint.label).name
    story: dict[str, Any] = {"name": name, "revision": checkpoint.revision, "files": files}
    history = history_of(checkpoint)
    return story | {"history": history} if history else story
