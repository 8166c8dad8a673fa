"""The command line: parses, calls the function behind each command, and shows what came of it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hxaconv.cli.exits import Commands, guarded
from hxaconv.cli.options import (
    LAYERS,
    OUTPUT,
    PROBE,
    TALK,
    TEACHER,
    VALUES,
    AllowLayer0,
    AllowNonfinite,
    CalDevice,
    CalIds,
    CalPlot,
    CalText,
    CalTokens,
    Chunk,
    CopyCode,
    Device,
    Digest,
    DryRun,
    Dtype,
    Eps,
    FoldRope,
    InputIds,
    Json,
    LayerMapChoice,
    LayerMapSettings,
    MaxShard,
    NoVerify,
    OutAny,
    OutFolder,
    OutPth,
    Overwrite,
    PadFfn,
    Preset,
    PushTo,
    Quiet,
    RandomTokens,
    RefineSteps,
    RefitOutput,
    Resume,
    Revision,
    RopeTheta,
    Scale,
    Seed,
    SourceArgument,
    TeacherArgument,
    TeacherOption,
    Text,
    Tied,
    TokenSeed,
    Workers,
)
from hxaconv.errors import HxaconvError

if TYPE_CHECKING:
    from hxaconv.cli.console import Talk
    from hxaconv.commands.common import Outcome, WriteOptions
    from hxaconv.commands.fitting import CalibrateOptions
    from hxaconv.selection.advice import Advice


app = typer.Typer(
    name="hxaconv",
    cls=Commands,
    help="Turn Llama-style transformers into RWKV-7/GQA hybrids (hxa079), convert them, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")] = False,
) -> None:
    """Turn Llama-style transformers into RWKV-7/GQA hybrids (hxa079), convert them, and prove it."""
    if version:
        from hxaconv.save.command_line import version as installed

        print(installed())
        raise typer.Exit


@app.command("init-from-teacher", no_args_is_help=True)
def init_from_teacher(
    teacher: TeacherArgument,
    out: OutAny,
    layer_map: LayerMapChoice = None,
    gqa_layers: Annotated[
        str | None, typer.Option(help="Layers that stay GQA: 8,15-17,-1, none, all.", rich_help_panel=LAYERS)
    ] = None,
    allow_gqa_layer_0: AllowLayer0 = False,
    revision: Revision = None,
    rope_theta: RopeTheta = None,
    rms_norm_eps: Eps = None,
    tie_word_embeddings: Tied = None,
    allow_output_bias: Annotated[
        bool, typer.Option("--allow-output-bias", help="Keep o_proj and MLP biases.", rich_help_panel=TEACHER)
    ] = False,
    drop_rope_scaling: Annotated[
        bool, typer.Option("--drop-rope-scaling", help="Go on without rope_scaling.", rich_help_panel=TEACHER)
    ] = False,
    init: Annotated[
        str, typer.Option(help="openmose (published values) or calibrated (fitted to text).", rich_help_panel=VALUES)
    ] = "openmose",
    preset: Preset = "openmose-stage1",
    scale: Scale = None,
    seed: Seed = 0,
    input_ids: CalIds = None,
    text: CalText = None,
    tokens: CalTokens = 1024,
    chunk: Chunk = 2048,
    random_tokens: RandomTokens = False,
    refit_output: RefitOutput = "auto",
    refine_steps: RefineSteps = 100,
    fold_rope: FoldRope = False,
    device: CalDevice = "cpu",
    plot: CalPlot = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the output.", rich_help_panel=OUTPUT)] = "bfloat16",
    format: Annotated[str, typer.Option(help="hf, pth or training (attention alone).", rich_help_panel=OUTPUT)] = "hf",
    max_shard_size: MaxShard = "5GB",
    copy_code: CopyCode = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    no_verify: NoVerify = False,
    workers: Workers = None,
    digest: Digest = "crc32",
    allow_nonfinite: AllowNonfinite = False,
    push_to: PushTo = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make an hxa079 student of a teacher: RWKV layers initialised from its attention, the rest copied.

    [bold]Examples[/bold]

    hxaconv init-from-teacher RekaAI/reka-flash-3 student/ --dry-run

    hxaconv init-from-teacher ./teacher student.pth --format pth --gqa-layers 8,15,22,29,36,43
    """
    from hxaconv.commands import init as command

    talk = _talk(quiet, json)
    values = dict(locals())
    if plot is not None and init != "calibrated":
        raise HxaconvError("--plot draws a calibration", hint="Add --init calibrated.")
    _check_plot(plot, overwrite=overwrite)
    outcome = command.run(
        teacher,
        out,
        revision=revision,
        layer_map=layer_map,
        gqa_layers=gqa_layers,
        preset=preset,
        scale=scale,
        seed=seed,
        dtype=dtype,
        format=format,
        max_shard_size=max_shard_size,
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        allow_gqa_layer_0=allow_gqa_layer_0,
        allow_output_bias=allow_output_bias,
        drop_rope_scaling=drop_rope_scaling,
        copy_code=copy_code,
        init=init,
        calibration=_calibration(values),
        write=_write_options(values, talk),
    )
    _plot_calibration(outcome, plot)
    _show_outcome(outcome, talk)


def _calibration(values: dict[str, Any]) -> CalibrateOptions:
    from dataclasses import fields

    from hxaconv.commands.fitting import CalibrateOptions

    return CalibrateOptions(**{field.name: values[field.name] for field in fields(CalibrateOptions)})


def _check_plot(plot: str | None, *, overwrite: bool) -> None:
    if plot is not None:
        from pathlib import Path

        from hxaconv.cli.plots import check_plot

        check_plot(Path(plot), overwrite=overwrite)


def _plot_calibration(outcome: Outcome, plot: str | None) -> None:
    if plot is not None and outcome.written is not None and outcome.calibration is not None:
        from pathlib import Path

        from hxaconv.calibration.plot import plot as draw

        draw(outcome.calibration, Path(plot))


@app.command("calibrate", no_args_is_help=True)
def calibrate(
    source: SourceArgument,
    out: OutAny,
    teacher: Annotated[str, typer.Option(help="Folder or Hub id of the teacher.", rich_help_panel=TEACHER)],
    input_ids: CalIds = None,
    text: CalText = None,
    tokens: CalTokens = 1024,
    chunk: Chunk = 2048,
    random_tokens: RandomTokens = False,
    refit_output: RefitOutput = "auto",
    refine_steps: RefineSteps = 100,
    fold_rope: FoldRope = False,
    device: CalDevice = "cpu",
    plot: CalPlot = None,
    layer_map: LayerMapSettings = None,
    rope_theta: RopeTheta = None,
    rms_norm_eps: Eps = None,
    tie_word_embeddings: Tied = None,
    revision: Revision = None,
    seed: TokenSeed = 0,
    format: Annotated[
        str | None,
        typer.Option(help="hf, pth or training (attention alone). Default: by OUT's suffix.", rich_help_panel=OUTPUT),
    ] = None,
    max_shard_size: MaxShard = "5GB",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    no_verify: NoVerify = False,
    workers: Workers = None,
    digest: Digest = "crc32",
    allow_nonfinite: AllowNonfinite = False,
    push_to: PushTo = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit the RWKV layers of an untrained student to its teacher, layer by layer, on a few hundred tokens of text.

    [bold]Example[/bold]

    hxaconv calibrate student/ student-calibrated/ --teacher RekaAI/reka-flash-3 --text sample.txt
    """
    from hxaconv.commands import calibrate as command

    talk = _talk(quiet, json)
    values = dict(locals())
    _check_plot(plot, overwrite=overwrite)
    outcome = command.run(
        source,
        out,
        teacher=teacher,
        revision=revision,
        layer_map=layer_map,
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        calibration=_calibration(values),
        seed=seed,
        format=format,
        max_shard_size=max_shard_size,
        write=_write_options(values, talk),
    )
    _plot_calibration(outcome, plot)
    _show_outcome(outcome, talk)


def _convert(convert: Callable[..., Outcome], values: dict[str, Any]) -> None:
    from hxaconv.commands.common import defaults_of

    talk = _talk(values["quiet"], values["json"])
    options = {name: values[name] for name in defaults_of(convert) if name != "write"}
    _show_outcome(convert(values["source"], values["out"], **options, write=_write_options(values, talk)), talk)


@app.command("to-hf", no_args_is_help=True)
def to_hf(
    source: SourceArgument,
    out: OutFolder,
    teacher: TeacherOption = None,
    layer_map: LayerMapSettings = None,
    rope_theta: RopeTheta = None,
    rms_norm_eps: Eps = None,
    tie_word_embeddings: Tied = None,
    revision: Revision = None,
    dtype: Dtype = None,
    pad_ffn: PadFfn = None,
    max_shard_size: MaxShard = "5GB",
    copy_code: CopyCode = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    no_verify: NoVerify = False,
    workers: Workers = None,
    digest: Digest = "crc32",
    allow_nonfinite: AllowNonfinite = False,
    push_to: PushTo = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a student as a Hugging Face folder that transformers and RWKV-Infer load.

    [bold]Examples[/bold]

    hxaconv to-hf student.pth student-hf/ --layer-map reka-flash-3

    hxaconv to-hf trainable_only_weights.pth student-hf/ --teacher RekaAI/reka-flash-3
    """
    values = dict(locals())
    from hxaconv.commands import convert

    _convert(convert.to_hf, values)


@app.command("to-pth", no_args_is_help=True)
def to_pth(
    source: SourceArgument,
    out: OutPth,
    teacher: TeacherOption = None,
    layer_map: LayerMapSettings = None,
    rope_theta: RopeTheta = None,
    rms_norm_eps: Eps = None,
    tie_word_embeddings: Tied = None,
    revision: Revision = None,
    dtype: Dtype = None,
    pad_ffn: PadFfn = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    no_verify: NoVerify = False,
    workers: Workers = None,
    digest: Digest = "crc32",
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a student as a .pth for RWKV-Infer, with a sidecar of the settings it cannot carry.

    [bold]Examples[/bold]

    hxaconv to-pth student-hf/ student.pth

    hxaconv to-pth pytorch_model.bin student.pth --teacher RekaAI/reka-flash-3 --dtype bfloat16
    """
    values = dict(locals())
    from hxaconv.commands import convert

    _convert(convert.to_pth, values)


@app.command("to-training", no_args_is_help=True)
def to_training(
    source: SourceArgument,
    out: OutPth,
    all_tensors: Annotated[
        bool, typer.Option("--all", help="Write every tensor, not only the attention.", rich_help_panel=OUTPUT)
    ] = False,
    teacher: TeacherOption = None,
    layer_map: LayerMapSettings = None,
    rope_theta: RopeTheta = None,
    rms_norm_eps: Eps = None,
    tie_word_embeddings: Tied = None,
    revision: Revision = None,
    dtype: Dtype = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    no_verify: NoVerify = False,
    workers: Workers = None,
    digest: Digest = "crc32",
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a student under the names that published trainers load, to train it further.

    [bold]Example[/bold]

    hxaconv to-training student-hf/ student-attention.pth
    """
    values = dict(locals())
    from hxaconv.commands import convert

    _convert(convert.to_training, values)


@app.command("pick-gqa-layers", no_args_is_help=True)
def pick_gqa_layers(
    source: SourceArgument,
    out: Annotated[str | None, typer.Argument(help="Folder or NAME.pth to create. Without it: advice only.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="The layers that become GQA: 8,15-17,-1, a layer map or file.", rich_help_panel=LAYERS),
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="How many to choose. Default: L//7.", rich_help_panel=LAYERS)
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            help="uniform, last, log, mse, influence, entropy, distance, kl or retrieval.", rich_help_panel=LAYERS
        ),
    ] = "uniform",
    min_gap: Annotated[int | None, typer.Option(help="Least distance of two.", rich_help_panel=LAYERS)] = None,
    max_gap: Annotated[int | None, typer.Option(help="Greatest distance of two.", rich_help_panel=LAYERS)] = None,
    max_consecutive: Annotated[
        int | None, typer.Option(help="Longest run of adjacent ones.", rich_help_panel=LAYERS)
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Layers never chosen: 0,5-7.", rich_help_panel=LAYERS)] = None,
    kl_mode: Annotated[
        str,
        typer.Option(
            help="restore (one layer of the student) or convert (one of the teacher).", rich_help_panel=LAYERS
        ),
    ] = "restore",
    log: Annotated[
        str | None, typer.Option(help="Stage-1 training log (CSV), for --strategy log.", rich_help_panel=LAYERS)
    ] = None,
    save: Annotated[
        str | None,
        typer.Option(
            help="Write the choice as a layer map; interrupted scoring resumes beside it.", rich_help_panel=LAYERS
        ),
    ] = None,
    plot: Annotated[
        str | None, typer.Option(help="Draw the scores: NAME.png, .svg or .pdf.", rich_help_panel=TALK)
    ] = None,
    allow_gqa_layer_0: AllowLayer0 = False,
    teacher: TeacherOption = None,
    from_: Annotated[
        str | None,
        typer.Option("--from", help="Trained checkpoint to take changed layers from.", rich_help_panel=TEACHER),
    ] = None,
    layer_map: LayerMapSettings = None,
    rope_theta: RopeTheta = None,
    rms_norm_eps: Eps = None,
    tie_word_embeddings: Tied = None,
    revision: Revision = None,
    input_ids: InputIds = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.", rich_help_panel=PROBE)] = 1024,
    device: Device = "cpu",
    preset: Preset = "openmose-stage1",
    scale: Scale = None,
    seed: Seed = 0,
    max_shard_size: MaxShard = "5GB",
    format: Annotated[
        str | None,
        typer.Option(help="hf, pth or training (attention alone). Default: by OUT's suffix.", rich_help_panel=OUTPUT),
    ] = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    no_verify: NoVerify = False,
    workers: Workers = None,
    digest: Digest = "crc32",
    allow_nonfinite: AllowNonfinite = False,
    push_to: PushTo = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose the layers that stay attention: change the choice, or get advice on it.

    [bold]Examples[/bold]

    hxaconv pick-gqa-layers student/ student-2/ --layers 8,15,22,29,36,43 --teacher RekaAI/reka-flash-3

    hxaconv pick-gqa-layers RekaAI/reka-flash-3 --count 6 --strategy influence --text sample.txt --save map.toml
    """
    talk = _talk(quiet, json)
    values = dict(locals())
    from hxaconv.cli.tables import show_advice
    from hxaconv.commands import advise, pick
    from hxaconv.commands.advice_options import check_options
    from hxaconv.commands.common import defaults_of, given_options

    check_options(values, given_options(pick_gqa_layers, values))
    options = {name: values[name] for name in defaults_of(pick.run) if name in values}

    def apply(chosen: str, write: WriteOptions) -> Outcome:
        assert out is not None
        return pick.run(source, out, **{**options, "layers": chosen, "other": from_, "write": write})

    if layers is not None:
        _show_outcome(apply(layers, _write_options(values, talk)), talk)
        return
    rehearse = None if out is None or resume else functools.partial(_rehearse, apply, _write_options(values, talk))
    advised = advise.run(values, rehearse=rehearse, say=talk.say, progress=talk.progress())
    # All is written before anything is shown: whoever reads the output may stop reading.
    if out is None:
        advised.save(save, plot)
        advised.forget()
        show_advice(advised.advice, talk, json=json)
        return
    outcome = apply(",".join(map(str, advised.advice.pick.layers)), _write_options(values, talk))
    if outcome.written is not None:
        advised.save(save, plot)
        advised.forget()
    show_advice(advised.advice, talk, json=False)
    kept = "" if advised.cache is None else f" but the scores, in {advised.cache} for the run itself"
    _show_outcome(outcome, talk, advised.advice, kept=kept)


def _rehearse(apply: Callable[[str, WriteOptions], Outcome], write: WriteOptions, layers: str) -> None:
    """Refuse before hours of scoring what would be refused after them."""
    from dataclasses import replace

    apply(layers, replace(write, dry_run=True))


@app.command("verify", no_args_is_help=True)
def verify(
    source: SourceArgument,
    against: Annotated[
        str | None, typer.Option(help="Checkpoint to compare with: any container, student or teacher.")
    ] = None,
    digests: Annotated[
        bool, typer.Option("--digests", help="Only re-check the digests in hxaconv.json, without a forward.")
    ] = False,
    expect: Annotated[
        str | None,
        typer.Option(
            help="untrained, calibrated, attention-trained, identical, close or report. Default: identical for the same"
            " architecture; for a student and its teacher what its record says, else attention-trained."
        ),
    ] = None,
    max_logit: Annotated[float | None, typer.Option(help="Largest difference of a logit (identical: 0).")] = None,
    max_layer: Annotated[float | None, typer.Option(help="Largest relative error of a layer (close: 0.01).")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Largest KL, in nats per token (close: 0.001).")] = None,
    teacher: TeacherOption = None,
    layer_map: LayerMapSettings = None,
    rope_theta: RopeTheta = None,
    rms_norm_eps: Eps = None,
    tie_word_embeddings: Tied = None,
    revision: Revision = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per sequence.", rich_help_panel=PROBE)] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.", rich_help_panel=PROBE)] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random tokens.", rich_help_panel=PROBE)] = 0,
    input_ids: InputIds = None,
    text: Text = None,
    dtype: Annotated[str, typer.Option(help="float32 or float64.", rich_help_panel=PROBE)] = "float32",
    device: Device = "cpu",
    logits_out: Annotated[
        str | None, typer.Option(help="Write input_ids, logits and hidden.{i} as safetensors.", rich_help_panel=PROBE)
    ] = None,
    plot: Annotated[
        str | None, typer.Option(help="Draw errors and cosine by depth: NAME.png, .svg or .pdf.", rich_help_panel=TALK)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of --logits-out and --plot.", rich_help_panel=TALK)
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a checkpoint with an independent reference forward, alone or against another.

    [bold]Examples[/bold]

    hxaconv verify student/

    hxaconv verify student.pth --against student-hf/ --expect identical

    hxaconv verify student/ --against RekaAI/reka-flash-3 --text sample.txt --plot depth.png
    """
    values = dict(locals())
    from hxaconv.cli.tables import show_report
    from hxaconv.commands import verify as command
    from hxaconv.commands.common import given_options
    from hxaconv.forward.tokens import TokenOptions

    talk = _talk(quiet, json)
    command.check_options(given_options(verify, values))
    _check_plot(plot, overwrite=overwrite)
    if digests:
        checked = command.digests(source, revision=revision, progress=talk.progress())
        talk.result(checked.to_json(), f"{checked.checked} tensors, {checked.nbytes:,} bytes: digests agree")
        return
    limits = {"logits": max_logit, "layer": max_layer, "kl": max_kl}
    report = command.run(
        source,
        against=against,
        teacher=teacher,
        layer_map=layer_map,
        revision=revision,
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        options=command.VerifyOptions(
            tokens=TokenOptions(input_ids=input_ids, text=text, tokens=tokens, batch=batch, seed=seed),
            dtype=dtype,
            device=device,
            expect=expect,
            thresholds={key: value for key, value in limits.items() if value is not None},
            logits_out=logits_out,
            overwrite=overwrite,
            progress=talk.progress(),
        ),
    )
    show_report(report, talk, plot)


@app.command("demo")
def demo(
    out: Annotated[str, typer.Argument(help="Folder for what the demo writes.")] = "hxaconv-demo",
) -> None:
    """Run the whole main job on a small embedded teacher, every step an ordinary command; no network needed."""
    from pathlib import Path

    from hxaconv.commands import demo as command

    def call(words: Sequence[str]) -> int:
        sys.argv = ["hxaconv", *words]
        return guarded(app)

    code = command.run(Path(out), call, lambda line: print(line, flush=True))
    if code:
        raise typer.Exit(code)


@app.command("inspect", no_args_is_help=True)
def inspect(
    path: SourceArgument,
    stats: Annotated[bool, typer.Option("--stats", help="Read every weight: ranges, NaN and Inf.")] = False,
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a checkpoint is, from its headers alone.

    [bold]Examples[/bold]

    hxaconv inspect RekaAI/reka-flash-3

    hxaconv inspect student.pth --stats --json
    """
    from hxaconv.cli.tables import inspection_tables
    from hxaconv.commands import inspect as command

    talk = _talk(quiet, json)
    report = command.run(path, revision=revision, stats=stats, progress=talk.progress())
    talk.result(report, *inspection_tables(report))


@app.command("maps")
def maps(
    name: Annotated[str | None, typer.Argument(help="A map to show: its name or a TOML file.")] = None,
    names: Annotated[bool, typer.Option("--names", help="Print the table of tensor names instead.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the shipped layer maps, or show one.

    [bold]Examples[/bold]

    hxaconv maps

    hxaconv maps reka-flash-3
    """
    from dataclasses import asdict

    from hxaconv.cli import tables
    from hxaconv.model import layer_maps
    from hxaconv.model.names import TABLE

    talk = _talk(quiet, json)
    if names:
        talk.result({"names": [asdict(row) for row in TABLE]}, *tables.names_table())
    elif name is not None:
        found = layer_maps.load(name)
        talk.result(tables.map_json(found), *tables.map_lines(found))
    else:
        shipped = layer_maps.shipped()
        talk.result({key: tables.map_json(found) for key, found in shipped.items()}, tables.maps_table(shipped))


def _talk(quiet: bool, json: bool) -> Talk:
    from hxaconv.cli.console import Talk

    return Talk(quiet=quiet, json_output=json)


def _write_options(values: dict[str, Any], talk: Talk) -> WriteOptions:
    from hxaconv.commands.common import WriteOptions

    return WriteOptions(
        dry_run=values["dry_run"],
        overwrite=values["overwrite"],
        resume=values["resume"],
        workers=values["workers"],
        digest=values["digest"],
        allow_nonfinite=values["allow_nonfinite"],
        verify=not values["no_verify"],
        push_to=values.get("push_to"),
        progress=talk.progress(),
    )


def _show_outcome(outcome: Outcome, talk: Talk, advice: Advice | None = None, *, kept: str = "") -> None:
    from hxaconv.cli.tables import advice_json, outcome_json, outcome_tables

    for warning in outcome.warnings:
        talk.warn(warning)
    for note in outcome.notes:
        talk.say(note)
    dry = outcome.written is None
    data = outcome_json(outcome, tensors=dry) | advice_json(advice)
    talk.result(data, *outcome_tables(outcome))
    if dry:
        talk.say(f"Dry run: nothing was written{kept}.")
