"""A report for people: the verdict, every check, the layers as a strip with a bar each, the logits."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hxaconv.cli.console import WIDTH, strip_lines, table
from hxaconv.errors import MAX_LISTED
from hxaconv.verification.report import LayerResult, LogitResult, Report

if TYPE_CHECKING:
    from rich.console import RenderableType

BAR = 12
LOWEST, HIGHEST = -8, -2
"""Bars start at a power of ten between these, as the smallest error asks for, and end at a relative error of 1."""

LETTERS = {"rwkv": "R", "gqa": "G", "attention": "A"}


def render(report: Report) -> list[RenderableType]:
    """The report in parts that fit WIDTH columns, in reading order."""
    parts: list[RenderableType] = [_headline(report), _checks(report)]
    parts += _tensors(report)
    if report.layers:
        parts += [_strip(report), _layers(report)]
    if report.logits is not None:
        parts.append(_logits(report.logits))
    parts += render_loaders(report.findings)
    parts += [_wrapped(f"Note: {note}") for note in report.notes]
    return parts


def render_loaders(verdicts: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """For each verdict of the lint: whether the loader takes the checkpoint, with what settings, and why not."""
    parts: list[RenderableType] = []
    for verdict in verdicts:
        settings = f", with {', '.join(verdict['settings'])}" if verdict["settings"] else ""
        takes = "takes it" if verdict["takes"] else "does not take it"
        releases = f" ({'; '.join(verdict['releases'])})" if verdict["takes"] and verdict["releases"] else ""
        parts.append(_wrapped(f"{verdict['loader']}: {takes}{settings}{releases}"))
        rows = [("no" if f["blocks"] else "note", f["what"], f["where"], f["do"]) for f in verdict["findings"]]
        if rows:
            parts.append(table("", ("", "what", "where", "what to do"), rows, right=4))
    return parts


def bar(error: float, lowest: int) -> str:
    """A relative error on a logarithmic scale: one cell at 10**lowest, BAR cells at 1; empty for 0."""
    if not math.isfinite(error):
        return "not finite"
    if error == 0:
        return ""
    cells = round(BAR * (1 - math.log10(error) / lowest))
    return "█" * min(BAR, max(1, cells))


def bar_start(errors: list[float]) -> int:
    """The power of ten below all errors, within LOWEST and HIGHEST."""
    seen = [error for error in errors if math.isfinite(error) and error > 0]
    return max(LOWEST, min(HIGHEST, math.floor(math.log10(min(seen))) - 1)) if seen else LOWEST


def _headline(report: Report) -> str:
    against = f" against {report.other}" if report.other else ""
    verdict = "PASSED" if report.passed else "FAILED"
    expected = f", expected: {report.expect}" if report.other else ""
    return _wrapped(f"{verdict}  {report.source}{against}{expected}")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")


def _checks(report: Report) -> RenderableType:
    rows = [("ok" if check.passed else "FAILED", check.name, check.detail) for check in report.checks]
    return table("", ("", "check", "found"), rows, right=3)


def _tensors(report: Report) -> list[RenderableType]:
    if not report.tensors:
        return []
    counts = ", ".join(f"{count} {status}" for status, count in report.tensor_counts().items())
    lines: list[RenderableType] = [_wrapped(f"Tensors: {counts}")]
    lines += [_wrapped(f"Config: {text}") for text in report.config_differences]
    changed = [r for r in report.tensors if r.status in ("different", "misshapen")]
    if changed:
        rows = [(r.name, r.status, "" if r.max_difference is None else f"{r.max_difference:.3g}") for r in changed]
        title = "Tensors that differ" + (f", first {MAX_LISTED} of {len(rows)}" if len(rows) > MAX_LISTED else "")
        lines.append(table(title, ("name", "", "max |d|"), rows[:MAX_LISTED], right=2))
    return lines


def _strip(report: Report) -> str:
    letters = "".join(LETTERS[result.kind] for result in report.layers)
    marks = "".join("x" if result.differs else "." for result in report.layers)
    lines = ["Layers (R RWKV, G GQA, A attention); below, x where a layer differs on equal input"]
    for kinds, differs in zip(strip_lines(letters), strip_lines(marks), strict=True):
        lines += [kinds, " " * 6 + differs[6:]]
    first = report.first_difference
    lines.append("No layer differs." if first is None else f"The first layer that differs is {first}.")
    return "\n".join(lines)


def _layers(report: Report) -> RenderableType:
    lowest = bar_start([result.output_error for result in report.layers])
    title = f"Each layer on the other's input: relative error, bar from 1e{lowest} to 1 (logarithmic)"
    columns = ("layer", "", f"{'output error':<{BAR}}", "output", "mixer", "1 - cos", "v, k", "no RoPE")
    return table(title, columns, [_layer(result, lowest) for result in report.layers], right=3)


def _layer(result: LayerResult, lowest: int) -> tuple[object, ...]:
    kinds = LETTERS[result.kind] + ("" if result.kind == result.other_kind else f"/{LETTERS[result.other_kind]}")
    apart = 1 - result.cosine
    numbers = (result.output_error, result.mixer_error, apart, result.handed_on_error, result.nope_error)
    return (result.layer, kinds, bar(result.output_error, lowest), *(_number(number) for number in numbers))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if abs(value) < 1e-15 else f"{value:.1e}"


def _logits(logits: LogitResult) -> RenderableType:
    rows = [
        ("tokens", f"{logits.tokens:,}"),
        ("largest |d| of a logit", f"{logits.max_difference:.3g}"),
        ("mean |d|", f"{logits.mean_difference:.3g}"),
        ("KL(other || source), nats per token", f"{logits.kl_other_source:.4g}"),
        ("KL(source || other)", f"{logits.kl_source_other:.4g}"),
        ("same most likely token", f"{logits.top1_agreement:.1%}"),
    ]
    if logits.kl_attention_zeroed is not None:
        rows.append(("yardstick: KL(teacher || teacher with attention zeroed)", f"{logits.kl_attention_zeroed:.4g}"))
    return table("", ("end to end", ""), rows)
