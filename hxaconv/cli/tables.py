"""Results for people, as tables and lines."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.filesize import decimal as human_size
from rich.filesize import pick_unit_and_suffix
from rich.table import Table
from rich.text import Text

from hxaconv.cli.console import visible
from hxaconv.errors import MAX_LISTED, shortened

if TYPE_CHECKING:
    from hxaconv.calibration.report import CalibrationReport
    from hxaconv.commands.inspect import Inspection
    from hxaconv.commands.maps import Maps
    from hxaconv.model.layer_maps import LayerMap
    from hxaconv.progress import Result
    from hxaconv.save.run import Outcome
    from hxaconv.selection.advice import Advice
    from hxaconv.verification.report import LogitResult, Report

WIDTH = 80
"""Columns that every table fits into: those of the narrowest usual terminal."""
STRIP_WIDTH = 60
"""Layers in a line of the layer strip."""
BAR = 12
LOWEST, HIGHEST = -8, -2
"""Bars start at a power of ten between these, as the smallest error asks for, and end at a relative error of 1."""
LETTERS = {"rwkv": "R", "gqa": "G", "attention": "A"}
BARS = "▁▂▃▄▅▆▇█"
SHORT = {"slow convergence": "conv", "slow alignment": "align", "scale mismatch": "scale", "instability": "unstable"}
"""What a table calls the parts of a score, where their names are too long."""


def shown(result: Result, width: int, *, plan: bool = True) -> list[RenderableType]:
    """What the command line shows of a result, for `width` columns; `plan`: of an outcome, its plan as well."""
    tables: dict[str, Callable[[Any], list[RenderableType]]] = {
        "Outcome": lambda outcome: [*(plan_tables(outcome) if plan else []), *done_tables(outcome, width)],
        "Report": report_tables,
        "Advice": lambda advice: advice_tables(advice, width),
        "Inspection": inspection_tables,
        "Maps": maps_tables,
    }
    show = tables.get(type(result).__name__)
    return show(result) if show else [getattr(result, "text", result.headline)]


def html(result: Result) -> str:
    """A result for a notebook: what the command line shows, in the same columns."""
    console = Console(record=True, file=io.StringIO(), width=WIDTH, markup=False, emoji=False)
    for part in shown(result, WIDTH):
        console.print(visible(part) if isinstance(part, str) else part)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: int = 1) -> RenderableType:
    """A plain table; columns from number `right` on are aligned to the right."""
    result = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        result.add_column(column, justify="right" if position >= right else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(visible(str(cell))) for cell in row))
    return result


def strip_lines(letters: str, width: int = STRIP_WIDTH) -> list[str]:
    """The layer strip in lines of `width`, each with the number of its first layer."""
    return [f"{start:>4}  {letters[start : start + width]}" for start in range(0, len(letters), width)]


def human_count(count: int) -> str:
    """`20.9B` parameters."""
    unit, suffix = pick_unit_and_suffix(count, ["", "K", "M", "B", "T"], 1000)
    return f"{count / unit:.1f}{suffix}" if suffix else str(count)


def plan_tables(outcome: Outcome) -> list[RenderableType]:
    """The plan of an output for people: layers, parts, files."""
    ranks = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in outcome.ranks.items())
    parts = [
        (
            part.name,
            part.tensors,
            human_count(part.parameters),
            human_size(part.nbytes),
            ", ".join(f"{count} {kind}" for kind, count in sorted(part.how.items())),
        )
        for part in outcome.parts
    ]
    files = [(file.name, file.tensors, f"{file.nbytes:,}") for file in outcome.files]
    return [
        f"{outcome.command}: {outcome.target} ({outcome.format}, {outcome.dtype})",
        *_strip_block(outcome.layers),
        f"Low-rank sizes: {ranks}",
        table("", ("part", "tensors", "parameters", "size", "made by"), parts),
        table("", ("file", "tensors", "bytes"), files),
        f"{len(outcome.plan)} tensors, {outcome.nbytes:,} bytes of weights ({human_size(outcome.nbytes)})",
    ]


def _strip_block(letters: str) -> list[str]:
    return ["", "Layers (R = RWKV, G = GQA):", *strip_lines(letters), ""]


def done_tables(outcome: Outcome, width: int) -> list[RenderableType]:
    """What came of a plan: the choice of layers, the calibration, the verification, and where it stands."""
    parts = advice_tables(outcome.advice, width) if outcome.advice else []
    if outcome.calibration is not None:
        parts += _calibrated(outcome.calibration)
    if outcome.report is not None:
        # A calibration has said how near the student is, on the same tokens.
        parts += [_checks(outcome.report, "verified"), *(() if outcome.calibration else outcome.report.notes)]
    return parts


def _calibrated(report: CalibrationReport) -> list[RenderableType]:
    """How the fit of every layer went, on validation tokens."""

    def spread(values: tuple[float, ...]) -> str:
        return f"{min(values):.2g}..{max(values):.2g}" if values else ""

    rows = [
        (
            layer.layer,
            layer.kind + (" (fell back)" if layer.fell_back else ""),
            f"{layer.error_before:.3f}",
            f"{layer.error_after:.3f}",
            spread(layer.decay),
            spread(layer.iclr),
            f"{layer.clamped:.1%}",
        )
        for layer in report.layers
    ]
    columns = ("layer", "", "error before", "after", "decay by head", "a by head", "clamped")
    return ["Mixer error on held-out tokens, as a share of the teacher's energy:", table("", columns, rows, right=2)]


def inspection_tables(inspection: Inspection) -> list[RenderableType]:
    """What `inspect` shows."""
    facts = inspection.facts
    lines: list[RenderableType] = [f"{facts['path']}: {facts['kind']}", *facts["advice"]]
    if not facts["files"]:
        return lines
    parts = [
        (part, entry["tensors"], human_count(entry["parameters"]), human_size(entry["bytes"]))
        for part, entry in facts["parts"].items()
    ]
    settings = [(key, "not known" if value is None else value) for key, value in facts["dimensions"].items()]
    size = f"{facts['bytes']:,} bytes ({human_size(facts['bytes'])})"
    dtypes = ", ".join(f"{count} x {dtype}" for dtype, count in facts["dtypes"].items())
    lines += [
        f"{facts['format']}, {facts['key_format']} names, {facts['variant']}",
        f"{facts['tensors']} tensors, {human_count(facts['parameters'])} parameters, {size}, {dtypes}",
        *_strip_block(facts["layers"]),
        table("", ("part", "tensors", "parameters", "size"), parts),
        table("", ("setting", "value"), settings),
    ]
    if memory := facts["memory"]:
        line, state = f"KV cache {memory['kv_cache_bytes_per_token']:,} bytes per token in bf16", ""
        if memory["state_bytes_per_sequence"]:
            state = f", recurrent state {human_size(memory['state_bytes_per_sequence'])} per sequence in float32"
            line += f" (teacher: {memory['teacher_kv_cache_bytes_per_token']:,})"
        lines.append(line + state)
    left, unknown = facts["left_behind"], facts["unknown_names"]
    remarks = {
        "left_behind": f"Known and left behind: {len(left)} rotary buffers or layers of no use here",
        "shell": f"Beside the text model: {facts['shell']} (--keep-shell carries them along)",
        "not_opened": f"Other weight files, not opened: {', '.join(facts['not_opened'])}",
        "unknown_names": f"Names that are not known: {len(unknown)}, such as {next(iter(unknown), '')}",
        "nested_under": f"The tensors are nested under {facts['nested_under']!r}",
        "not_tensors": f"No tensors, and left behind: {shortened(facts['not_tensors'])}",
    }
    lines += [text for fact, text in remarks.items() if facts[fact]]
    lines += [f"One tensor under {len(names)} names: {' = '.join(names)}" for names in facts["one_tensor"]]
    if facts["problem"]:
        lines += ["", f"Remark: {facts['problem']}"]
    statistics = facts.get("statistics", {})
    lines += ["", "Tensors: dtype, range, mean, and how many values are NaN or Inf"] if statistics else []
    for name, s in statistics.items():  # two lines each: a name and all its figures do not fit into one
        low, high, mean = ("-" if s[key] is None else f"{s[key]:.4g}" for key in ("min", "max", "mean"))
        lines += [name, f"    {s['dtype']} {low} .. {high}, mean {mean}, {s['nan']} NaN, {s['inf']} Inf"]
    return lines


def maps_tables(result: Maps) -> list[RenderableType]:
    """The shipped layer maps, one of them whole, or the table of names."""
    if result.names:
        from hxaconv.model.names import SPLIT, TABLE

        never = {row.hf: "split on opening" if row.hf in SPLIT else "in no .pth" for row in TABLE}
        return [
            "HF safetensors, and below each the name in an RWKV .pth",
            *(line for row in TABLE for line in (row.hf, f"    {row.rwkv or never[row.hf]}")),
            # The third column, of training checkpoints, follows a rule.
            "Training checkpoints: model. before the HF name,",
            "and student_attn. (older: time_mixer.) after self_attn.",
        ]
    if result.name is not None:
        return _map_lines(result.maps[result.name])
    found_maps = [
        (name, found.model.get("num_hidden_layers", "?"), len(found.gqa_layers), ",".join(map(str, found.gqa_layers)))
        for name, found in result.maps.items()
    ]
    return [table("", ("layer map", "of", "GQA", "GQA layers"), found_maps, right=3)]


def _map_lines(found: LayerMap) -> list[RenderableType]:
    count = found.num_hidden_layers
    letters = "".join("G" if i in found.gqa_layers else "R" for i in range(count or 0))
    return [
        f"{found.name}: {found.title or 'without a title'}",
        f"For {', '.join(found.model_ids) or 'no named model'}. Source: {found.source or 'not given'}",
        *(_strip_block(letters) if count else ["The number of its model's layers is not given."]),
        f"GQA layers: {', '.join(map(str, found.gqa_layers))}",
        *([table("", ("setting", "value"), list(found.model.items()))] if found.model else []),
    ]


def report_tables(report: Report) -> list[RenderableType]:
    """The report in parts that fit WIDTH columns, in reading order."""
    against = f" against {report.other}, expected: {report.expect}" if report.other else ""
    parts: list[RenderableType] = [f"{report.outcome.upper()}  {report.source}{against}", _checks(report, "check")]
    if report.tensors:
        parts += _tensors(report)
    if report.layers:
        parts += [*_strip(report), _layers(report)]
    if report.logits is not None:
        parts.append(_logits(report.logits))
    return [*parts, *render_loaders(report.findings), *(f"Note: {note}" for note in report.notes)]


def _checks(report: Report, title: str) -> RenderableType:
    rows = [("ok" if check.passed else "FAILED", check.name, check.detail) for check in report.checks]
    return table("", ("", title, "found"), rows, right=3)


def _tensors(report: Report) -> list[RenderableType]:
    counts = ", ".join(f"{count} {status}" for status, count in report.tensor_counts().items())
    lines: list[RenderableType] = [f"Tensors: {counts}", *(f"Config: {text}" for text in report.config_differences)]
    rows = [
        (r.name, r.status, "" if r.max_difference is None else f"{r.max_difference:.3g}")
        for r in report.tensors
        if r.status in ("different", "misshapen")
    ]
    if rows:
        title = "Tensors that differ" + (f", first {MAX_LISTED} of {len(rows)}" if len(rows) > MAX_LISTED else "")
        lines.append(table(title, ("name", "", "max |d|"), rows[:MAX_LISTED], right=2))
    return lines


def _strip(report: Report) -> list[str]:
    letters = "".join(LETTERS[result.kind] for result in report.layers)
    marks = "".join("x" if result.differs else "." for result in report.layers)
    lines = ["Layers (R RWKV, G GQA, A attention); x where one differs on equal input"]
    for kinds, differs in zip(strip_lines(letters), strip_lines(marks), strict=True):
        lines += [kinds, " " * 6 + differs[6:]]
    first = report.first_difference
    return [*lines, "No layer differs." if first is None else f"The first layer that differs is {first}."]


def _layers(report: Report) -> RenderableType:
    seen = [r.output_error for r in report.layers if math.isfinite(r.output_error) and r.output_error > 0]
    # The power of ten below all errors.
    lowest = max(LOWEST, min(HIGHEST, math.floor(math.log10(min(seen))) - 1)) if seen else LOWEST

    def number(value: float | None) -> str:
        return "" if value is None else "0" if abs(value) < 1e-15 else f"{value:.1e}"

    rows = []
    for r in report.layers:
        kinds = LETTERS[r.kind] + ("" if r.kind == r.other_kind else f"/{LETTERS[r.other_kind]}")
        errors = (r.output_error, r.mixer_error, 1 - r.cosine, r.firsts_error, r.nope_error)
        rows.append((r.layer, kinds, error_bar(r.output_error, lowest), *map(number, errors)))
    title = f"Relative error on the other's input, bar from 1e{lowest} to 1"
    columns = ("layer", "", f"{'output error':<{BAR}}", "output", "mixer", "1 - cos", "v, k", "no RoPE")
    return table(title, columns, rows, right=3)


def error_bar(error: float, lowest: int) -> str:
    """A relative error on a logarithmic scale: one cell at 10**lowest, BAR cells at 1; empty for 0."""
    if not math.isfinite(error):
        return "not finite"
    return "█" * min(BAR, max(1, round(BAR * (1 - math.log10(error) / lowest)))) if error else ""


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
        baseline = "zero-ablation baseline: KL(teacher || teacher with attention zeroed)"
        rows.append((baseline, f"{logits.kl_attention_zeroed:.4g}"))
    return table("", ("end to end", ""), rows)


def render_loaders(verdicts: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """For each verdict of the lint: whether the loader takes the checkpoint, with what settings, and why not."""
    parts: list[RenderableType] = []
    for verdict in verdicts:
        settings = f", with {', '.join(verdict['settings'])}" if verdict["settings"] else ""
        takes = "takes it" if verdict["takes"] else "does not take it"
        releases = f" ({'; '.join(verdict['releases'])})" if verdict["takes"] and verdict["releases"] else ""
        parts.append(f"{verdict['loader']}: {takes}{settings}{releases}")
        rows = [("no" if f["blocks"] else "note", f["what"], f["where"], f["do"]) for f in verdict["findings"]]
        if rows:
            parts.append(table("", ("", "what", "where", "what to do"), rows, right=4))
    return parts


def advice_tables(advice: Advice, width: int = WIDTH) -> list[RenderableType]:
    """Bars, table and reasons for a terminal of `width` columns."""
    from hxaconv.selection.advice import figure_text

    pick, layers = advice.pick, range(advice.num_layers)
    decider = advice.columns[0] if advice.columns else None
    columns: dict[str, Sequence[str]] = {
        "layer": [str(layer) for layer in layers],
        "": ["G" if layer in pick.layers else "R" for layer in layers],
        "even": ["•" if layer in pick.uniform else "" for layer in layers],
    }
    scores = {decider.strategy: decider.values} if decider else {}
    if pick.margins and pick.strategy != "log":  # whose score is within 0..1 as it is
        scores["0..1"] = pick.scores
    scores |= {column.strategy: column.values for column in advice.columns}
    scores |= {SHORT.get(part, part): values for part, values in decider.parts.items()} if decider else {}
    last = {"margin": [figure_text(margin) for margin in pick.margins]} if pick.margins else {}
    left_out = []
    for name, values in scores.items():  # the later ones are left out where it would be too wide
        figures = [figure_text(value) for value in values]
        wider = columns | {name: figures} | last
        if sum(max(map(len, (title, *cells))) + 3 for title, cells in wider.items()) <= width:
            columns[name] = figures
        else:
            left_out.append(name)
    columns |= last
    note = f"Too wide for {width} columns, left out: {', '.join(left_out)}; --json has all."
    return [
        *textwrap.wrap(advice.headline, width),
        *strip(advice, min(STRIP_WIDTH, max(1, width - 6))),
        table("", list(columns), list(zip(*columns.values(), strict=True)), right=3),
        *(textwrap.wrap(note, width) if left_out else []),
        *summary(advice, width),
    ]


def strip(advice: Advice, width: int = STRIP_WIDTH) -> list[str]:
    """Bars of the deciding scores over the layers' letters, `width` layers to a block.

    24  ▂▁▃▅▁▂▁▁▄
        RRRRRGRRR
    """
    layers = advice.pick.layers
    scores = advice.pick.scores or tuple(float(i in layers) for i in range(advice.num_layers))
    known = [score for score in scores if score is not None]
    scale = (len(BARS) - 1) / (max(known) - min(known) or 1.0)
    bars = "".join(" " if score is None else BARS[round((score - min(known)) * scale)] for score in scores)
    letters = "".join("G" if i in layers else "R" for i in range(advice.num_layers))
    numbered = zip(strip_lines(bars, width), strip_lines(letters, width), strict=True)
    return [line for over, under in numbered for line in (over, f"      {under[6:]}")]


def summary(advice: Advice, width: int = WIDTH) -> list[str]:
    """What the columns mean, the pick, its overlap with uniform, and why."""
    pick, parts = advice.pick, advice.columns and advice.columns[0].parts
    lines = [
        "G: stays attention; even: what uniform takes"
        + ("; 0..1: what decides" if pick.margins and not parts else "")
        + ("; margin: the price of overruling it" if pick.margins else ""),
        *([f"Parts of log: {', '.join(f'{short} = {part}' for part, short in SHORT.items())}"] if parts else []),
        f"GQA layers ({len(pick.layers)} of {advice.num_layers}): {', '.join(map(str, pick.layers))}",
        *advice.fact_lines,
    ]
    lines += [("why: " if i == 0 else "     ") + line for i, line in enumerate(pick.reasons)]
    return [part for line in lines for part in textwrap.wrap(line, width, subsequent_indent="       ")]
