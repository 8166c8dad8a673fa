"""From a student to everything its output will hold: stored names, files laid out, documents, provenance."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.calls import Call
from hxaconv.errors import HxaconvError
from hxaconv.formats import FileLayout, safetensors, torchzip
from hxaconv.formats.dtypes import FLOATS
from hxaconv.formats.files import SourceFile
from hxaconv.formats.safetensors import Shard
from hxaconv.model.experts import PTH_REASON
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD, is_attention, stored_name
from hxaconv.model.plan import Plan, Recipe, main_dtype, source_files, total_bytes, with_origin
from hxaconv.options import Write
from hxaconv.save.documents import CODE_FILES, documents, provenance

if TYPE_CHECKING:
    from hxaconv.model.model import Checkpoint

FORMATS = {"hf": "hf", "pth": "rwkv", "training": "training"}
"""Output format -> key format of its names."""
FILE_SUFFIXES = (".pth", ".pt", ".bin")
"""Of targets that are one file; others are folders."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is recorded of how an output was made: in hxaconv.json, in the model card, and for --resume."""

    call: Call
    """The command as it was called: recorded for --resume, published with bare names for paths."""
    sources: Mapping[str, Checkpoint] = field(default_factory=dict)
    """Role (teacher, source, ...) -> the checkpoint opened for it."""
    purpose: str = ""
    section: str = ""
    """One more section of the model card, Markdown."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More of hxaconv.json."""

    @property
    def shell(self) -> Checkpoint | None:
        """The first source that has tensors beside its text model."""
        return next((source for source in self.sources.values() if source.shell), None)


@dataclass(frozen=True, kw_only=True)
class Output:
    """Everything that a finished target will hold, decided before its first byte."""

    target: Path
    """The folder (hf) or the file that will appear."""
    format: str
    """One of FORMATS."""
    tensors: Plan
    """Names as stored, in order on disk."""
    files: tuple[FileLayout, ...]
    """The weight files, laid out."""
    documents: Mapping[str, bytes]
    """Small files by name: in the folder, or, for a file, beside it."""
    copied_files: Mapping[str, SourceFile] = field(default_factory=dict)
    """Files taken over from the source as they are (tokenizer); folders only."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Published as hxaconv.json, or under the key `hxaconv` of the sidecar; no times, no run options."""
    record: Record
    student: Model | None = None
    """None where tensors are written that are no model's."""
    dtype: str = ""
    """The float dtype that its config names."""
    whole: bool = True
    """Whether all of the student's tensors are written, not attention alone."""
    shell: Plan = field(default_factory=dict)
    """Tensors that wrap a text model, under their own names; folders only."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of safetensors files; else one zip file."""
        return self.format == "hf"

    @property
    def sidecar_name(self) -> str:
        """The JSON file beside a `.pth`."""
        return f"{self.target.stem}.json"

    def sources(self) -> list[SourceFile]:
        """Every file that will be read."""
        return list(dict.fromkeys([*source_files(self.tensors), *self.copied_files.values()]))

    def refilled(self, student: Model, record: Record) -> Output:
        """The same files with the values of another student: of the same names, shapes and dtypes."""
        tensors = stored_plan(student.plan, self.format, whole=self.whole) | self.shell
        assert {n: (r.dtype, r.shape) for n, r in tensors.items()} == {
            n: (r.dtype, r.shape) for n, r in self.tensors.items()
        }
        files = tuple(
            replace(layout, fills=tuple(replace(fill, recipe=tensors[fill.name]) for fill in layout.fills))
            for layout in self.files
        )
        return _described(replace(self, student=student, record=record, tensors=tensors, files=files))


def lay_out(
    student: Model,
    target: Path,
    write: Write,
    *,
    format: str,
    record: Record,
    all_tensors: bool = False,
    shards: Sequence[Shard] | None = None,
) -> Output:
    """The output of a student, complete but for the bytes.

    `all_tensors` are written to a `training` output only where requested;
    `shards` is a sharding of a folder to keep, None one by size.

    Raises:
        HxaconvError: for a target that does not fit the format, and tensors that the container cannot hold.
    """
    _check_target(target, format, record)
    if format == "pth" and student.config.experts is not None:
        raise HxaconvError(PTH_REASON, hint="Write a folder: `hxaconv to-hf`, or --format hf.")
    whole = all_tensors or format != "training"
    shell = _shell(record, format) if write.keep_shell else {}
    tensors = stored_plan(student.plan, format, whole=whole) | shell
    output = Output(
        target=target,
        format=format,
        tensors=tensors,
        files=layouts(target, format, tensors, write.max_shard_bytes, None if shell else shards),
        documents={},
        record=record,
        student=student,
        dtype=main_dtype(student.plan),
        whole=whole,
        shell=shell,
    )
    # Tokenizer and generation files of the sources, the first that has one wins; code only on request.
    copied: dict[str, SourceFile] = {}
    for source in record.sources.values() if output.is_folder else ():
        wrapping = source.shell_files if shell else {}
        code = {name: file for name, file in source.code_files.items() if write.copy_code and name not in CODE_FILES}
        for name, file in {**source.companions, **wrapping, **code}.items():
            copied.setdefault(name, file)
    return _described(replace(output, copied_files=copied))


def _described(output: Output) -> Output:
    return replace(output, documents=documents(output), provenance=provenance(output))


def dtype_warnings(plan: Plan, command: str = "") -> list[str]:
    """Mixed dtypes, and a `.pth` that RWKV-Infer would not expect."""
    dtypes = sorted({recipe.dtype for recipe in plan.values() if recipe.dtype in FLOATS})
    if len(dtypes) > 1:
        how = "--dtype bfloat16" if command.startswith("to-") else "`hxaconv to-hf --dtype bfloat16`"
        return [f"the output mixes {' and '.join(dtypes)}; {how} makes it uniform"]
    if command == "to-pth" and dtypes != ["BF16"]:
        return [f"RWKV-Infer expects bf16 in a .pth, this one holds {dtypes[0]}; --dtype bfloat16 casts"]
    return []


def layouts(
    target: Path, format: str, tensors: Plan, max_shard_bytes: int, shards: Sequence[Shard] | None = None
) -> tuple[FileLayout, ...]:
    """The weight files of an output.

    Raises:
        HxaconvError: when the container cannot hold the tensors.
    """
    if format != "hf":
        # Trainers save a plain dict; what RWKV-Infer loads is an OrderedDict.
        return (torchzip.file_layout(target.name, tensors, ordered=format != "training"),)
    if shards is not None:
        return safetensors.given_layouts(tensors, shards)
    return safetensors.shard_layouts(tensors, max_shard_bytes)


def stored_plan(plan: Plan, format: str, *, whole: bool = True) -> Plan:
    """The plan under the names of its output format; a `.pth` always gets an explicit head."""
    if format == "training" and not whole:
        plan = {name: recipe for name, recipe in plan.items() if is_attention(name)}
    if format == "pth" and HEAD not in plan:
        plan = plan | {HEAD: with_origin(plan[EMBEDDING], f"{plan[EMBEDDING].origin} (tied head written out)")}
    return {stored_name(name, FORMATS[format]): recipe for name, recipe in plan.items()}


def _check_target(target: Path, format: str, record: Record) -> None:
    # RWKV-Infer takes a path for a file only where its name has .pth; trainers are not so particular.
    if format != "hf" and target.suffix not in ((".pth",) if format == "pth" else FILE_SUFFIXES):
        raise HxaconvError(f"{target}: a {format} output is one file", hint="Name it OUT.pth.")
    if format == "hf" and target.suffix in (*FILE_SUFFIXES, ".safetensors"):
        other = "`hxaconv to-pth`" if record.call.command == "to-hf" else "--format pth"
        raise HxaconvError(f"{target}: an hf output is a folder", hint=f"Leave the suffix off, or use {other}.")
    for word in (*shlex.split(record.call.line), target.name):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise HxaconvError(
                f"{os.fsencode(word)!r} in the command is not UTF-8, and could not be recorded",
                hint="Rename that file or folder first.",
            ) from None


def _shell(record: Record, format: str) -> Plan:
    """The tensors that wrap the text model of a source."""
    if format != "hf":
        raise HxaconvError("--keep-shell: only a folder (--format hf) can hold what wraps the text model")
    if record.shell is None:
        raise HxaconvError(
            "--keep-shell: no source has tensors beside its text model",
            hint="Leave it out; it is for sources such as Mistral 3 and Qwen3-VL.",
        )
    return record.shell.shell


def kept_shards(source: Checkpoint, before: Plan, after: Plan, max_shard_bytes: int) -> list[Shard] | None:
    """The source's own sharding for the new plan, so that shards without a change need not be written again.

    A shard that became larger than allowed is split. None where the source is no local safetensors folder.
    """
    ours = all(file in source.files for recipe in before.values() for file in recipe.make.sources())
    if source.container != "safetensors" or source.repo is not None or not ours:
        return None
    groups: dict[str, Plan] = {file.name: {} for file in source.files}
    for name, recipe in after.items():
        groups[_home(name, recipe, before)][name] = recipe
    shards = []
    for file in source.files:
        group = groups[file.name]
        held = {name for name, recipe in source.plan.items() if _file_of(recipe) is file}
        same = set(group) == held and all(after[name] is before[name] for name in group)
        if group and same and total_bytes(group) <= max_shard_bytes:
            linkable = file.path is not None and not file.path.is_symlink()
            shards.append(Shard(tuple(group), file if linkable else None))
        elif group:
            layouts = safetensors.shard_layouts(group, max_shard_bytes)
            shards += [Shard(tuple(fill.name for fill in layout.fills)) for layout in layouts]
    return shards


def _home(name: str, recipe: Recipe, before: Plan) -> str:
    """The source file whose successor a tensor goes into: its own, or, where it is new, its layer's."""
    if before.get(name) is not recipe:
        prefix = name[: name.index("self_attn.")]
        recipe = next(found for known, found in before.items() if known.startswith(prefix))
    return _file_of(recipe).name


def _file_of(recipe: Recipe) -> SourceFile:
    return next(iter(recipe.make.sources()))
