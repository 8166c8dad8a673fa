"""`init-from-teacher`: a teacher becomes a student with RWKV layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hxaconv.calls import Call
from hxaconv.commands.plots import check_plot
from hxaconv.errors import HxaconvError
from hxaconv.formats.dtypes import parse_dtype
from hxaconv.load import load_teacher
from hxaconv.model import layer_maps
from hxaconv.model.config import DEFAULT_VARIANT, student_of
from hxaconv.model.model import Model
from hxaconv.options import Argument, Fit, Init, Layers, NewDtype, OutAny, Settings, Shown, Write, option_words
from hxaconv.save.documents import UNTRAINED, init_record
from hxaconv.save.output import Record, lay_out
from hxaconv.save.run import Outcome, save
from hxaconv.surgery.init import init_settings, new_student
from hxaconv.verification.written import OutputCheck

if TYPE_CHECKING:
    from hxaconv.progress import Progress
    from hxaconv.verification.report import Report

Teacher = Annotated[str, Argument("Folder or Hub id (org/name@revision) of the teacher.")]
OfTeacher = Annotated[Settings, Shown(without=("layer_map", "gqa_layers", "weights"))]
BETTER = (
    "; `hxaconv pick-gqa-layers TEACHER --text FILE --save map.toml` looks for the layers that recall, and --layer-map"
    " map.toml takes them"
)


def init_from_teacher(
    teacher: Teacher,
    out: OutAny,
    *,
    choice: Layers = Layers(),
    settings: OfTeacher = Settings(),
    values: Init = Init(),
    calibration: Fit = Fit(),
    dtype: NewDtype = "bfloat16",
    write: Write = Write(),
    call: Call,
) -> Outcome:
    """Make an hxa079 student of a teacher: RWKV layers initialised from its attention, the rest copied.

    Without a choice, the layers that stay attention are those of the map shipped for that teacher, else evenly
    spaced and anchored at the last one. With --init calibrated, the RWKV layers are then fitted to text.

    Command line:
        hxaconv init-from-teacher RekaAI/reka-flash-3 student/ --dry-run
        hxaconv init-from-teacher ./teacher student.pth --gqa-layers 8,15,22,29,36,43

    Raises:
        HxaconvError: for a teacher that hxa079 cannot carry, or options that do not fit it.
        CheckFailed: when the output does not pass its verification; it is left beside `out`.
    """
    calibrated = values.init == "calibrated"
    if not calibrated and calibration.differing():
        raise HxaconvError(
            f"{option_words(calibration.differing())}: for a calibration only", hint="Add --init calibrated."
        )
    check_plot(calibration.plot, overwrite=write.overwrite)
    initial = init_settings(values, parse_dtype(dtype))
    source = load_teacher(teacher, settings, progress=call.progress)
    variant = settings.variant or DEFAULT_VARIANT
    layers, reason = layer_maps.choose(source.teacher, teacher, choice, variant)
    format = write.format_of(out)
    student = new_student(source, student_of(source.config, layers, variant=variant), initial, label=out)
    if format == "training":  # which holds attention alone
        student = replace(student, tied_head=None)
    output = lay_out(
        student,
        Path(out),
        write,
        format=format,
        record=Record(
            call=call,
            sources={"teacher": source.opened},
            purpose=UNTRAINED,
            extra={"init": init_record(student.student.rwkv_layers, values, initial), "layer_choice": reason},
        ),
    )
    warnings = [*source.teacher.warnings, *layer_maps.layer_0_warning(student.student)]
    notes = [f"GQA layers: {reason}{BETTER if reason.startswith('evenly') else ''}"]
    if calibrated:
        from hxaconv.calibration.task import prepare
        from hxaconv.commands.calibrated import save_calibrated

        task = prepare(source, student, calibration, values.seed, write.workers)
        return save_calibrated(
            task, output, write, plot=calibration.plot, factors=initial.factors, warnings=warnings, notes=notes
        )

    def verify(written: Model, progress: Progress | None) -> Report:
        from hxaconv.verification.invariants import check_initialised

        return check_initialised(source, written, factors=initial.factors, seed=initial.seed, progress=progress)

    return save(output, write, check=OutputCheck(verify), warnings=warnings, notes=notes)
