"""`to-hf`, `to-pth` and `to-training`: the same student in another container and key format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hxaconv.calls import Call
from hxaconv.load import load_student
from hxaconv.model.layer_maps import layer_0_warning
from hxaconv.model.model import Model
from hxaconv.model.plan import attention_of
from hxaconv.options import Dtype, OfStudent, Option, OutFile, OutFolder, Settings, Shown, Source, TeacherToo, Write
from hxaconv.save.documents import CONVERTED
from hxaconv.save.output import Record, dtype_warnings, lay_out
from hxaconv.save.run import Outcome, save
from hxaconv.surgery.reshape import reshape
from hxaconv.verification.written import OutputCheck

if TYPE_CHECKING:
    from hxaconv.progress import Progress
    from hxaconv.verification.report import Report

PadFfn = Annotated[int | None, Option("256 or 512: widen MLPs with zeros to a multiple.", panel="Output")]
All = Annotated[bool, Option("Write every tensor, not only the attention.", panel="Output", names=("--all",))]
WriteFolder = Annotated[Write, Shown(without=("format",))]
WriteFile = Annotated[Write, Shown(without=("format", "max_shard_size", "copy_code", "keep_shell", "push_to"))]


def to_hf(
    source: Source,
    out: OutFolder,
    *,
    teacher: TeacherToo = None,
    settings: OfStudent = Settings(),
    dtype: Dtype = None,
    pad_ffn: PadFfn = None,
    write: WriteFolder = Write(),
    call: Call,
) -> Outcome:
    """Write a student as a Hugging Face folder that transformers and RWKV-Infer load.

    Bits are copied unless --dtype (every float tensor is cast, rounded once) or --pad-ffn (which changes no result)
    is given. --teacher completes a checkpoint that holds attention alone.

    Command line:
        hxaconv to-hf student.pth student-hf/ --layer-map reka-flash-3
        hxaconv to-hf trainable_only_weights.pth student-hf/ --teacher RekaAI/reka-flash-3

    Raises:
        HxaconvError: when a setting is known from no source, a tensor is missing or would be unused.
        CheckFailed: when the output does not pass its verification; it is left beside `out`.
    """
    student = load_student(source, settings, teacher=teacher, progress=call.progress)
    return _write(call, out, "hf", student, reshape(student, dtype, pad_ffn), write)


def to_pth(
    source: Source,
    out: OutFile,
    *,
    teacher: TeacherToo = None,
    settings: OfStudent = Settings(),
    dtype: Dtype = None,
    pad_ffn: PadFfn = None,
    write: WriteFile = Write(),
    call: Call,
) -> Outcome:
    """Write a student as a .pth for RWKV-Infer, with a sidecar of the settings it cannot carry.

    The options are those of to-hf; OUT is a file, NAME.pth, and the sidecar becomes NAME.json.

    Command line:
        hxaconv to-pth student-hf/ student.pth
        hxaconv to-pth pytorch_model.bin student.pth --teacher RekaAI/reka-flash-3 --dtype bfloat16

    Raises:
        HxaconvError: when a setting is known from no source, a tensor is missing or would be unused.
        CheckFailed: when the output does not pass its verification; it is left beside `out`.
    """
    student = load_student(source, settings, teacher=teacher, progress=call.progress)
    return _write(call, out, "pth", student, reshape(student, dtype, pad_ffn), write)


def to_training(
    source: Source,
    out: OutFile,
    *,
    all_tensors: All = False,
    teacher: TeacherToo = None,
    settings: OfStudent = Settings(),
    dtype: Dtype = None,
    write: WriteFile = Write(),
    call: Call,
) -> Outcome:
    """Write a student under the names that published trainers load, to train it further.

    The options are those of to-hf; OUT is a file. Without --all, only attention is written.

    Command line:
        hxaconv to-training student-hf/ student-attention.pth

    Raises:
        HxaconvError: when a setting is known from no source, a tensor is missing or would be unused.
        CheckFailed: when the output does not pass its verification; it is left beside `out`.
    """
    student = load_student(source, settings, teacher=teacher, whole=all_tensors, progress=call.progress)
    return _write(call, out, "training", student, reshape(student, dtype), write, everything=all_tensors)


def _write(
    call: Call,
    out: str,
    format: str,
    student: Model,
    changed: Model,
    write: Write,
    *,
    everything: bool = True,
) -> Outcome:
    """Write `changed`, which is the student padded and cast, and compare it with the student that was read."""
    output = lay_out(
        changed,
        Path(out),
        write,
        format=format,
        record=Record(call=call, sources=student.sources, purpose=CONVERTED),
        all_tensors=everything,
    )
    before = student if everything else replace(student, plan=attention_of(student.plan))

    def verify(written: Model, progress: Progress | None) -> Report:
        from hxaconv.verification.invariants import check_converted

        return check_converted(before, written, progress=progress)

    warnings = [*student.source_warnings, *dtype_warnings(changed.plan, call.command)]
    warnings += layer_0_warning(changed.student)
    if format == "pth" and changed.student.rope_scaling is not None:
        kind = changed.student.rope_scaling.rope_type
        warnings.append(
            f"rope_scaling {kind!r} stands in the sidecar, but RWKV-Infer computes default frequencies, which is"
            " another model (`hxaconv init-from-teacher --drop-rope-scaling` begins one without it)"
        )
    return save(output, write, check=OutputCheck(verify), warnings=warnings, notes=student.notes)
