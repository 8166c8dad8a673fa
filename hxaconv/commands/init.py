"""`init-from-teacher`: a teacher becomes an hxa079 student."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.commands.common import (
    Outcome,
    WriteOptions,
    base_model_name,
    defaults_of,
    layer_0_warning,
    layers_text,
    one_of,
    parse_size,
    perform,
)
from hxaconv.commands.fitting import CalibrateOptions, perform_calibrated, prepare
from hxaconv.errors import HxaconvError
from hxaconv.formats.dtypes import parse_dtype
from hxaconv.load import load_teacher
from hxaconv.model import layer_choice, layer_maps
from hxaconv.model.config import TeacherConfig, student_of
from hxaconv.model.model import Model
from hxaconv.options import Settings
from hxaconv.save.card import UNTRAINED
from hxaconv.save.output import FORMATS, Record, lay_out
from hxaconv.save.records import init_record
from hxaconv.surgery.init import InitSettings, init_from_teacher, parse_scale

if TYPE_CHECKING:
    from hxaconv.progress import Progress
    from hxaconv.verification.report import Report

COMMAND = "init-from-teacher"
INITS = ("openmose", "calibrated")


def run(
    teacher: str,
    out: str,
    *,
    revision: str | None = None,
    layer_map: str | None = None,
    gqa_layers: str | Iterable[int] | None = None,
    preset: str = "openmose-stage1",
    scale: str | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    format: str = "hf",
    max_shard_size: str = "5GB",
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    tie_word_embeddings: bool | None = None,
    allow_gqa_layer_0: bool = False,
    allow_output_bias: bool = False,
    drop_rope_scaling: bool = False,
    copy_code: bool = False,
    init: str = "openmose",
    calibration: CalibrateOptions | Mapping[str, Any] | None = None,
    write: WriteOptions | None = None,
) -> Outcome:
    """Make an hxa079 student of `teacher`: RWKV layers initialised from its attention, the rest copied bit for bit.

    Args:
        teacher: Folder or Hub id (`org/name@revision`).
        out: The folder to create, or with another `format` the file.
        revision: Branch, tag or commit of a Hub id.
        layer_map: Name or TOML file of a layer map: which layers stay GQA.
        gqa_layers: The same as numbers, or as text: `8,15-17,-1`, `none`, `all`. Without either: the shipped
            map of that teacher, else evenly spaced, anchored at the last layer.
        preset: `openmose-stage1` or `openmose-stage2` (all factors 1): what q, k, v and o are multiplied by.
        scale: Changes to the preset: `receptance=0.5,key=0.5,value=0.3,output=0.5`.
        seed: Of the random matrices; each depends on it and on its own name alone.
        dtype: Of the output: `bfloat16`, `float16` or `float32`.
        format: `hf` (folder), `pth` (for RWKV-Infer) or `training` (attention alone, named as trainers load it).
        max_shard_size: Of a weight file of a folder, such as `5GB` or `500MB`.
        rope_theta, rms_norm_eps, tie_word_embeddings: Where the teacher's config does not say, or says it wrong.
        allow_gqa_layer_0, allow_output_bias, drop_rope_scaling: What is refused otherwise, with the reason.
        copy_code: Copy the `.py` files of the teacher along.
        init: `openmose` (published initial values) or `calibrated` (fitted to the teacher).
        calibration: How to fit, for `calibrated`.
        write: Overwriting, resuming, verification, progress.

    Returns:
        What was written, what the verification found, and how the calibration went.

    Raises:
        HxaconvError: for a teacher that hxa079 cannot carry, or options that do not fit it.
        CheckFailed: when the output does not pass its verification; it is left beside `out`.
    """
    if gqa_layers is not None:
        gqa_layers = layers_text(gqa_layers)
    options = {key: value for key, value in locals().items() if key not in ("write", "calibration")}
    write = write or WriteOptions()
    one_of("--format", format, tuple(FORMATS))
    one_of("--init", init, INITS)
    factors = parse_scale(scale, preset)
    settings = InitSettings(factors, seed, parse_dtype(dtype))
    named = Settings(
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        allow_output_bias=allow_output_bias,
        drop_rope_scaling=drop_rope_scaling,
        revision=revision,
    )
    model = load_teacher(teacher, named, progress=write.progress)
    checkpoint = model.checkpoint
    assert checkpoint is not None
    layers, reason = choose_layers(model.teacher, teacher, layer_map, gqa_layers, allow_gqa_layer_0)
    config = student_of(model.config, layers)
    warnings = [*model.teacher.warnings, *layer_0_warning(config)]
    tied = model.tied_head if format != "training" else None
    student = Model(config, init_from_teacher(model.plan, config, settings), out, model.raw, tied)
    notes = [f"GQA layers: {reason}"]
    fit = calibration if isinstance(calibration, CalibrateOptions) else CalibrateOptions(**(calibration or {}))
    if init == "calibrated":
        options["calibration"] = asdict(fit)
    else:
        fit.refuse_without_calibration()
    shard_bytes = parse_size(max_shard_size)
    record = Record(
        command=COMMAND,
        options=options,
        defaults=defaults_of(run) | defaults_of(CalibrateOptions),
        sources={"teacher": checkpoint},
        base_model=base_model_name(checkpoint),
        purpose=UNTRAINED,
        extra={
            "init": init_record(config.rwkv_layers, init, preset, settings),
            "layer_choice": reason,
        },
    )
    output = lay_out(
        student,
        Path(out),
        format=format,
        dtype=settings.dtype,
        record=record,
        max_shard_bytes=shard_bytes,
        copy_code=copy_code,
    )
    if init == "calibrated":
        task = prepare(model, student, fit, seed, checkpoint, write)
        return perform_calibrated(task, output, write, factors, warnings, notes)

    def verify(output: Model, progress: Progress | None) -> Report:
        from hxaconv.verification.contracts import check_initialised

        return check_initialised(model, output, factors=factors, progress=progress)

    return perform(output, write, verify, warnings, notes, shard_bytes)


def choose_layers(
    config: TeacherConfig, teacher: str, layer_map: str | None, gqa_layers: str | None, allow_layer_0: bool
) -> tuple[tuple[int, ...], str]:
    """The GQA layers and why: as asked for, else the teacher's shipped map, else evenly spaced.

    Raises:
        HxaconvError: for both options at once, and for layers that the model does not have.
    """
    count = config.num_hidden_layers
    if layer_map is not None and gqa_layers is not None:
        raise HxaconvError("--layer-map and --gqa-layers both choose the layers", hint="Give one of them.")
    if gqa_layers is not None:
        return layer_choice.parse_layers(
            gqa_layers, count, allow_layer_0=allow_layer_0, option="--gqa-layers"
        ), "as asked for"
    if layer_map is not None:
        asked = layer_choice.load_for(layer_map, count, allow_layer_0=allow_layer_0)
        return asked.gqa_layers, f"layer map {asked.name}"
    chosen = layer_maps.match(config, [teacher])
    if chosen is not None:
        layers = layer_choice.from_map(chosen, count, allow_layer_0=allow_layer_0)
        return layers, f"layer map {chosen.name}"
    return layer_choice.uniform(count), f"evenly spaced, {layer_choice.default_count(count)} of {count}"
