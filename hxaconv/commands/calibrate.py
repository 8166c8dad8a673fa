"""`calibrate`: fit the RWKV layers of an untrained student to its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from hxaconv.calls import Call
from hxaconv.commands.calibrated import save_calibrated
from hxaconv.commands.plots import check_plot
from hxaconv.load import load_student
from hxaconv.model.layer_maps import layer_0_warning
from hxaconv.model.model import checked_here
from hxaconv.options import LARGEST_SEED, Fit, OfStudent, Option, OutAny, Settings, Shown, Source, Write
from hxaconv.save.documents import UNTRAINED
from hxaconv.save.output import Record, dtype_warnings, lay_out
from hxaconv.save.run import Outcome

Teacher = Annotated[str, Option("Folder or Hub id of the teacher.", panel="Teacher and settings")]
Seed = Annotated[int, Option("Seed of random tokens.", panel="Calibration", least=0, most=LARGEST_SEED)]


def calibrate(
    source: Source,
    out: OutAny,
    *,
    teacher: Teacher,
    calibration: Fit = Fit(),
    settings: OfStudent = Settings(),
    seed: Seed = 0,
    write: Annotated[Write, Shown(without=("copy_code",))] = Write(),
    call: Call,
) -> Outcome:
    """Fit the RWKV layers of an untrained student to its teacher, layer by layer, on a few hundred tokens of text.

    Command line:
        hxaconv calibrate student/ student-calibrated/ --teacher RekaAI/reka-flash-3 --text sample.txt

    Raises:
        HxaconvError: for a student that was trained, or does not belong to the teacher.
        CheckFailed: when the output does not pass its verification; it is left beside `out`.
    """
    from hxaconv.calibration.task import prepare

    check_plot(calibration.plot, overwrite=write.overwrite)
    plain = load_student(source, settings, teacher=teacher, continued=False, progress=call.progress)
    assert plain.base is not None
    task = prepare(checked_here(plain.base), plain, calibration, seed, write.workers)
    output = lay_out(
        plain,
        Path(out),
        write,
        format=write.format_of(out),
        record=Record(call=call, sources=plain.sources, purpose=UNTRAINED),
    )
    warnings = [*plain.source_warnings, *dtype_warnings(plain.plan), *layer_0_warning(plain.student)]
    return save_calibrated(task, output, write, plot=calibration.plot, warnings=warnings, notes=plain.notes)
