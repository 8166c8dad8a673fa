"""Advice on GQA layers: the numbers of every strategy that can be had, and the choice by one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError
from hxaconv.model.layer_choice import default_count
from hxaconv.model.layer_maps import LayerMap, dump, of_config
from hxaconv.progress import Result
from hxaconv.selection.schedule import Rules
from hxaconv.selection.strategies import SPACED, STRATEGIES, Column, Pick, check_finite, check_request, pick, reasons

if TYPE_CHECKING:
    import numpy as np

    from hxaconv.forward.state import StateFile
    from hxaconv.model.config import ModelConfig
    from hxaconv.model.model import Model
    from hxaconv.progress import Progress

BY_THE_WAY = ("mse", "influence", "entropy", "distance")
"""Columns that come almost free with another one of the same pass."""

CONVERT_MEANING = "how far the teacher's distribution moves when this layer alone becomes RWKV"
RANDOM_TOKENS = "scores were taken on random tokens, which no model was trained on: real text ranks layers better"
CALIBRATE = (
    "Calibrate first: `hxaconv init-from-teacher TEACHER all-rwkv/ --gqa-layers none --init calibrated --text FILE`,"
    " then score all-rwkv/ with --teacher TEACHER"
)
UNCALIBRATED = {
    "kl": (
        "{count} of {total} layers, scored as RWKV, hold their initial values, and KL scores of such a student"
        " MISLEAD: in a small study of other students the rank correlation of restore-one KL with the outcome after"
        f" training was negative before calibration, +0.94 after it. {CALIBRATE}"
    ),
    "mse": (
        "{count} of {total} layers, scored as RWKV, hold their initial values: mse shows what the initial"
        f" values lose, not what training would leave. {CALIBRATE}"
    ),
}
HARMFUL = (
    "putting attention back makes the student worse in {count} of {total} layers: its RWKV layers compensate for"
    " each other, so that restore-one KL says little. {remedy}"
)
NOT_PLAIN = (
    "No layer is plain any more, so calibrating is no way out: score with --kl-mode convert, on more text (--tokens),"
    " or score a student that was trained. (The +0.94 that speaks for KL after calibration was measured on other"
    " students)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to choose, and by what. `student` in `advise` must have every layer RWKV."""

    strategy: str = "uniform"
    count: int | None = None
    rules: Rules | None = None
    """None: the strategy's own."""
    kl_mode: str = "restore"
    allow_layer_0: bool = False
    tokens_are_text: bool = True
    device: str = "cpu"
    seed: int = 0
    cache: Path | None = None
    """Where an interrupted pass leaves its state, and a finished one its scores; the caller removes it."""
    check: Callable[[], None] = lambda: None
    """Called between steps; raises KeyboardInterrupt when somebody asks to stop."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Advice(Result):
    """The choice, every column of numbers (the deciding one first), and what to be wary of."""

    num_layers: int
    pick: Pick
    columns: tuple[Column, ...] = ()
    facts: Mapping[str, float] | None = None
    """Single numbers: `kl total`, the KL of the student without attention."""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    heads: tuple[tuple[float, ...], ...] = ()
    """Retrieval: share of copied positions per layer and head."""

    @property
    def headline(self) -> str:
        """The choice."""
        layers = ", ".join(map(str, self.pick.layers))
        return f"{len(self.pick.layers)} of {self.num_layers} layers stay attention by {self.pick.strategy}: {layers}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, plain."""
        pick = self.pick
        result: dict[str, Any] = {
            "num_layers": self.num_layers,
            "strategy": pick.strategy,
            "gqa_layers": list(pick.layers),
            "uniform": list(pick.uniform),
            "overlap_with_uniform": pick.overlap,
            "scores": {column.strategy: list(column.values) for column in self.columns},
            "parts": {column.strategy: {k: list(v) for k, v in column.parts.items()} for column in self.columns},
            "meanings": {column.strategy: STRATEGIES[column.strategy].meaning for column in self.columns},
            "facts": dict(self.facts or {}),
            "why": reasons(pick),
            "warnings": list(self.warnings),
        }
        if pick.choice:
            result["decided_by"] = list(pick.scores)
            result["value"] = pick.choice.value
            result["margins"] = [None if margin == float("inf") else margin for margin in pick.choice.margins]
        if self.heads:
            result["heads"] = [list(row) for row in self.heads]
        return result

    @property
    def decider(self) -> Column | None:
        """The column that the choice is made by."""
        return next((column for column in self.columns if column.strategy == self.pick.strategy), None)


def needs(strategy: str) -> frozenset[str]:
    """What a strategy asks for: `teacher`, `student` (all RWKV), `tokens`, `log`.

    Raises:
        HxaconvError: when there is no such strategy.
    """
    if strategy not in STRATEGIES:
        raise HxaconvError(f"unknown strategy {strategy!r}", hint=f"Strategies: {', '.join(STRATEGIES)}.")
    return STRATEGIES[strategy].needs


def advise(
    num_layers: int,
    request: Request,
    *,
    teacher: Model | None = None,
    student: Model | None = None,
    ids: np.ndarray | None = None,
    log: Path | None = None,
    progress: Progress | None = None,
) -> Advice:
    """Score all layers and choose. `ids` (sequences, tokens) are calibration tokens.

    With a teacher and tokens at hand, the other scores of the same pass are taken along for the table.

    Raises:
        HxaconvError: when something that the strategy needs is missing, or does not fit the model.
    """
    have = {"teacher": teacher, "student": student, "tokens": ids, "log": log}
    missing = sorted(name for name in needs(request.strategy) if have[name] is None)
    if missing:
        raise HxaconvError(f"--strategy {request.strategy} needs: {', '.join(missing)}")
    count = default_count(num_layers) if request.count is None else request.count
    check_request(request.strategy, num_layers, count, request.rules, allow_layer_0=request.allow_layer_0)
    columns: list[Column] = []
    facts: dict[str, float] = {}
    heads: tuple[tuple[float, ...], ...] = ()
    warnings: list[str] = []
    if request.strategy == "log" and log is not None:
        columns.append(_log_column(log, num_layers))
    elif request.strategy not in SPACED:
        assert teacher is not None and ids is not None
        if not request.tokens_are_text:
            warnings.append(RANDOM_TOKENS)
        if request.strategy == "retrieval":
            found, heads = _retrieval_column(teacher, ids, request, progress)
            columns.append(found)
        else:
            columns, facts, heard = _swept(teacher, student, ids, request, progress)
            warnings += heard
    warnings += [warning for column in columns for warning in column.warnings]
    decider = next((check_finite(column) for column in columns if column.strategy == request.strategy), None)
    result = pick(request.strategy, num_layers, count, decider, request.rules, allow_layer_0=request.allow_layer_0)
    converts = request.strategy == "kl" and request.kl_mode == "convert"
    return Advice(
        num_layers=num_layers,
        pick=replace(result, meaning=CONVERT_MEANING) if converts else result,
        columns=tuple(columns),
        facts=facts,
        warnings=tuple(warnings),
        heads=heads,
    )


def _log_column(path: Path, num_layers: int) -> Column:
    from hxaconv.selection.log import read_log, score_log

    found = score_log(read_log(path), num_layers)
    return Column("log", found.values, found.parts, found.warnings)


def _retrieval_column(
    teacher: Model, ids: np.ndarray, request: Request, progress: Progress | None
) -> tuple[Column, tuple[tuple[float, ...], ...]]:
    from hxaconv.selection.attention import retrieval, separator_of, sequences

    text = ids if request.tokens_are_text else None
    separator = separator_of(teacher)
    asked, expected = sequences(teacher.config.vocab_size, text, separator=separator, seed=request.seed)
    kept = _kept(request, {"teacher": teacher}, asked.numpy(), ["retrieval"])
    found = retrieval(teacher, asked, expected, device=request.device, kept=kept, progress=progress)
    return Column("retrieval", found.scores, warnings=found.warnings), found.heads


def _kept(request: Request, models: Mapping[str, Model], ids: np.ndarray, names: list[str]) -> StateFile:
    from hxaconv.forward.state import StateFile, fingerprint

    settings = {"strategies": names, "kl_mode": request.kl_mode}
    return StateFile(request.cache, fingerprint(models, ids, settings) if request.cache else "", request.check)


def _swept(
    teacher: Model, student: Model | None, ids: np.ndarray, request: Request, progress: Progress | None
) -> tuple[list[Column], dict[str, float], list[str]]:
    import torch

    from hxaconv.selection.sweep import Sweep
    from hxaconv.verification.claims import untouched_layers

    along = {name for name in BY_THE_WAY if student is not None or "student" not in needs(name)}
    names = sorted(along | {request.strategy}, key=lambda name: (name != request.strategy, name))
    sweep = Sweep(
        teacher=teacher,
        student=student,
        strategies=frozenset(names),
        kl_mode=request.kl_mode,
        device=request.device,
    )
    models = {"teacher": teacher} | ({"student": student} if student is not None else {})
    untouched = untouched_layers(student) if student is not None and request.strategy in UNCALIBRATED else ()
    warnings = []
    if student is not None and untouched:
        total = student.config.num_hidden_layers
        warnings.append(UNCALIBRATED[request.strategy].format(count=len(untouched), total=total))
    scores = sweep.run(torch.as_tensor(ids, dtype=torch.int64), _kept(request, models, ids, names), progress)
    columns = [Column(name, tuple(scores[name])) for name in names]
    facts = {"kl total": scores["kl total"][0]} if "kl total" in scores else {}
    if facts:
        harmful = sum(value < 0 for value in scores["kl"])
        if harmful * 2 > len(scores["kl"]):
            remedy = CALIBRATE if untouched else NOT_PLAIN
            warnings.append(HARMFUL.format(count=harmful, total=len(scores["kl"]), remedy=remedy))
    return columns, facts, warnings


def figure_text(value: float | None) -> str:
    if value is None or value == float("inf"):
        return "-"
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"
    return text.lstrip("-") if float(text) == 0 else text


def fact_lines(advice: Advice) -> list[str]:
    pick = advice.pick
    overlap = f"{pick.overlap} of {len(pick.layers)} in common"
    return [
        f"uniform would take {', '.join(map(str, pick.uniform))}: {overlap}",
        *(f"{name}: {value:.4f} nats per token" for name, value in (advice.facts or {}).items()),
    ]


def layer_map(advice: Advice, config: ModelConfig, *, name: str, model: str, model_ids: Sequence[str] = ()) -> LayerMap:
    """The choice as a layer map for models like `config`; `model` is what its title calls them."""
    pick = advice.pick
    return of_config(
        name,
        config,
        pick.layers,
        title=f"{model}, {len(pick.layers)} of {advice.num_layers} layers by {pick.strategy}",
        model_ids=tuple(model_ids),
        source=f"hxaconv, strategy {pick.strategy}",
    )


def layer_map_text(advice: Advice, chosen: LayerMap, *, date: str, settings: Sequence[str] = ()) -> str:
    """The TOML of `--save`: strategy, figures and `date` (as the caller writes it) in comments."""
    columns = {column.strategy: column.values for column in advice.columns}
    columns |= advice.decider.parts if advice.decider else {}
    comments = [
        f"{len(advice.pick.layers)} of {advice.num_layers} layers stay attention, chosen on {date}",
        *settings,
        *fact_lines(advice),
        *reasons(advice.pick),
        *(f"warning: {warning}" for warning in advice.warnings),
        "",
        ", ".join(["layer", *columns]) if columns else "",
        *(
            ", ".join([str(layer), *(figure_text(values[layer]) for values in columns.values())])
            + (" G" if layer in advice.pick.layers else "")
            for layer in range(advice.num_layers if columns else 0)
        ),
    ]
    return dump(chosen, _trimmed(comments))


def _trimmed(lines: list[str]) -> list[str]:
    while lines and not lines[-1]:
        lines = lines[:-1]
    return lines
