"""`pick-gqa-layers`, the advice: score the layers of a teacher or student, and choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv import layer_maps
from hxaconv.commands.common import checked_device, one_of, open_teacher_source
from hxaconv.commands.convert import complete, main_dtype, open_student
from hxaconv.commands.tokens import TokenOptions, calibration_tokens
from hxaconv.config import student_of
from hxaconv.dtypes import FLOATS
from hxaconv.errors import HxaconvError, raise_all
from hxaconv.model import Model
from hxaconv.student import looks_like_student
from hxaconv.surgery import InitSettings, init_from_teacher, parse_scale, repick

if TYPE_CHECKING:
    from hxaconv.checkpoint import Checkpoint
    from hxaconv.console import Progress
    from hxaconv.selection.advice import Advice, Request
    from hxaconv.selection.schedule import Rules


@dataclass(frozen=True, slots=True)
class Advised:
    """The advice, and the model it is about."""

    advice: Advice
    model: Model
    checkpoint: Checkpoint


def run(
    source: str,
    request: Request,
    tokens: TokenOptions,
    *,
    teacher: str | None = None,
    log: str | None = None,
    revision: str | None = None,
    layer_map: str | None = None,
    flags: dict[str, Any] | None = None,
    preset: str = "openmose-stage1",
    scale: str | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    applies: bool = False,
    progress: Progress | None = None,
) -> Advised:
    """Score the layers of `source`: a teacher (its plain initialisation is scored), or a student with `teacher`.

    Raises:
        HxaconvError: when the strategy needs something that is not given.
    """
    from hxaconv.checkpoint import open_checkpoint
    from hxaconv.selection.advice import advise, needs

    wanted = needs(request.strategy)
    checked_device(request.device)
    one_of("--kl-mode", request.kl_mode, ("restore", "convert"))
    checkpoint = open_checkpoint(source, revision=revision)
    factors = parse_scale(scale, preset)
    student: Model | None = None
    teacher_model: Model | None
    if looks_like_student(checkpoint.plan):
        opened = open_student(source, revision=revision, teacher=teacher, layer_map=layer_map, flags=flags)
        model, _, _ = complete(opened, need_all=bool(wanted & {"teacher", "student"}))
        teacher_model = opened.teacher
        if wanted & {"teacher", "student"} and teacher_model is None:
            raise HxaconvError(f"--strategy {request.strategy} compares with the teacher", hint="Pass --teacher.")
        if "student" in wanted and teacher_model is not None:
            student = _all_rwkv(model, teacher_model, InitSettings(factors, seed, main_dtype(model.plan)))
    elif applies:
        raise HxaconvError(
            f"{source} is a teacher, whose layers are all attention: there is no choice to change",
            hint="Make a student of it: hxaconv init-from-teacher, with --layer-map for a saved choice.",
        )
    else:
        model = open_teacher_source(source, revision=revision, allow_output_bias=True)[1]
        teacher_model = model
        if "student" in wanted:
            student = _initialised(model, InitSettings(factors, seed, main_dtype(model.plan)))
    ids = calibration_tokens(tokens, model.config.vocab_size, checkpoint).numpy() if "tokens" in wanted else None
    if options is not None:
        request = replace(request, rules=rules(request.strategy, options, model.config.num_hidden_layers))
    advice = advise(
        model.config.num_hidden_layers,
        request,
        teacher=teacher_model,
        student=student,
        ids=ids,
        log=Path(log) if log else None,
        progress=progress,
    )
    return Advised(advice, model, checkpoint)


def _all_rwkv(student: Model, teacher: Model, settings: InitSettings) -> Model:
    """The student with its GQA layers initialised as RWKV, so that every layer can be scored."""
    config = student_of(student.config, (), student.student.ranks)
    plan = repick(student.plan, teacher.plan, student.student, config, settings)
    return Model(config, plan, f"{student.label}, every layer RWKV")


def _initialised(teacher: Model, settings: InitSettings) -> Model:
    assert settings.dtype in FLOATS
    config = student_of(teacher.config, ())
    return Model(config, init_from_teacher(teacher.plan, config, settings), f"plain student of {teacher.label}")


def rules(strategy: str, values: Mapping[str, Any], num_layers: int) -> Rules | None:
    """The strategy's own rules with the options over them; None where no option is given.

    Raises:
        HxaconvError: for --exclude that names no layers of the model.
    """
    from hxaconv.selection.scores import STRATEGIES

    given = {key: values[key] for key in ("min_gap", "max_gap", "max_consecutive") if values[key] is not None}
    if values["exclude"]:
        given["exclude"] = frozenset(layer_maps.parse_numbers(values["exclude"], num_layers, "--exclude"))
    return replace(STRATEGIES[strategy].rules, **given) if given and strategy in STRATEGIES else None


def check_results(values: Mapping[str, Any]) -> None:
    """Refuse, before anything is scored, results that could not be written afterwards.

    Raises:
        HxaconvError: listing every file that exists already, or cannot be made.
    """
    problems = []
    for option in ("save", "plot", "out"):
        path = Path(values[option]) if values[option] else None
        if path is None:
            continue
        if path.exists() and not values["overwrite"]:
            problems.append(f"{path} exists; --overwrite replaces it")
        if not path.absolute().parent.is_dir():
            problems.append(f"{path.absolute().parent} is not a folder")
    if values["plot"] and Path(values["plot"]).suffix not in (".png", ".svg", ".pdf"):
        problems.append(f"--plot {values['plot']}: a plot is a .png, .svg or .pdf file")
    if values["log"] and values["strategy"] != "log":
        problems.append("--log is read by --strategy log only")
    raise_all("the advice could not be given as asked for:", problems)


def cache_path(beside: str | None) -> Path | None:
    """Where an interrupted sweep keeps its state: beside what will be written, if anything is."""
    return Path(f"{beside.rstrip('/')}.scores.npz") if beside else None


def save(advised: Advised, path: str | None, plot: str | None) -> None:
    """Write the layer map and the picture that were asked for.

    Raises:
        HxaconvError: when a file cannot be written, or matplotlib is missing.
    """
    from hxaconv.selection import report

    if path is not None:
        name = advised.checkpoint.repo
        chosen = report.layer_map(
            advised.advice, advised.model.config, name=Path(path).stem, model_ids=[name] if name else []
        )
        text = report.layer_map_text(advised.advice, chosen, date=date.today().isoformat())
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise HxaconvError(f"{path}: {error.strerror}") from None
    if plot is not None:
        report.plot(advised.advice, Path(plot))
