"""`calibrate`: fit the RWKV layers of an untrained student to its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hxaconv.commands.common import (
    Outcome,
    WriteOptions,
    base_model_name,
    defaults_of,
    format_by_suffix,
    layer_0_warning,
    parse_size,
    scaling_warnings,
)
from hxaconv.commands.convert import dtype_warnings
from hxaconv.commands.fitting import CalibrateOptions, perform_calibrated, prepare
from hxaconv.load import load_student
from hxaconv.model.model import checked_here
from hxaconv.model.plan import main_dtype
from hxaconv.options import Settings
from hxaconv.save.card import UNTRAINED
from hxaconv.save.output import Record, lay_out

COMMAND = "calibrate"


def run(
    source: str,
    out: str,
    *,
    teacher: str,
    revision: str | None = None,
    layer_map: str | None = None,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    tie_word_embeddings: bool | None = None,
    calibration: CalibrateOptions | Mapping[str, Any] | None = None,
    seed: int = 0,
    format: str | None = None,
    max_shard_size: str = "5GB",
    write: WriteOptions | None = None,
) -> Outcome:
    """Write `source`, an untrained student, calibrated to `teacher`, to `out`.

    Args:
        source: Folder, file or Hub id (`org/name@revision`) of the student.
        out: The folder or NAME.pth to create.
        teacher: Folder or Hub id of the teacher it was made of.
        revision: Branch, tag or commit of a Hub `source`.
        layer_map: Name or TOML file of a layer map that tells settings.
        rope_theta, rms_norm_eps, tie_word_embeddings: Settings that no source tells, or that overrule it.
        calibration: Tokens and how to fit.
        seed: Of tokens, where they are random.
        format: `hf`, `pth` or `training` (attention alone); None: by the suffix of `out`.
        max_shard_size: Of a weight file, such as `5GB`.
        write: Overwriting, resuming, verification, progress.

    Raises:
        HxaconvError: for a student that was trained, or does not belong to the teacher.
        CheckFailed: when the output does not pass its verification; it is left beside `out`.
    """
    write = write or WriteOptions()
    options = calibration if isinstance(calibration, CalibrateOptions) else CalibrateOptions(**(calibration or {}))
    recorded = {k: v for k, v in locals().items() if k not in ("write", "options")} | {"calibration": asdict(options)}
    settings = Settings(
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        layer_map=layer_map,
        revision=revision,
    )
    plain = load_student(source, settings, teacher=teacher, progress=write.progress)
    assert plain.base is not None
    model, sources = checked_here(plain.base), plain.sources
    checkpoint = sources["teacher"]
    task = prepare(model, plain, options, seed, checkpoint, write)
    output = lay_out(
        plain,
        Path(out),
        format=format or format_by_suffix(out),
        dtype=main_dtype(plain.plan),
        record=Record(
            command=COMMAND,
            options=recorded,
            defaults=defaults_of(run) | defaults_of(CalibrateOptions),
            sources=sources,
            base_model=base_model_name(checkpoint),
            purpose=UNTRAINED,
        ),
        max_shard_bytes=parse_size(max_shard_size),
    )
    warnings = [*scaling_warnings(sources.values()), *dtype_warnings(plain.plan, ""), *layer_0_warning(plain.student)]
    return perform_calibrated(task, output, write, None, warnings, list(plain.notes))
