"""Results for people, as tables and lines."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hxaconv.cli.console import WIDTH, human_bytes, human_count, strip_lines, table, visible
from hxaconv.errors import shortened
from hxaconv.model.names import SPLIT, TABLE

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hxaconv.calibration.report import CalibrationReport
    from hxaconv.commands.demo import Demo
    from hxaconv.commands.inspect import Inspection
    from hxaconv.commands.maps import Maps
    from hxaconv.model.layer_maps import LayerMap
    from hxaconv.results import Result
    from hxaconv.save.outcome import Outcome


def shown(result: Result, width: int, *, plan: bool = True) -> list[RenderableType]:
    """What the command line shows of a result, for `width` columns; `plan`: of an outcome, its plan as well."""
    from hxaconv.cli import advice_tables, report_tables

    tables: dict[str, Callable[[Any], list[RenderableType]]] = {
        "Outcome": lambda outcome: [*(plan_tables(outcome) if plan else []), *done_tables(outcome, width)],
        "Report": report_tables.render,
        "Advice": lambda advice: advice_tables.shown(advice, width),
        "Inspection": inspection_tables,
        "Maps": maps_tables,
        "Step": lambda step: [f"\n# {step.title}", f"$ {step.line}"],
        "Demo": demo_lines,
    }
    show = tables.get(type(result).__name__)
    return show(result) if show else [result.headline]


def html(result: Result) -> str:
    """A result for a notebook: what the command line shows, in the same columns."""
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=WIDTH)
    for renderable in shown(result, WIDTH):
        console.print(visible(renderable) if isinstance(renderable, str) else renderable, markup=False)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def plan_tables(outcome: Outcome) -> list[RenderableType]:
    """The plan of an output for people: layers, parts, files."""
    ranks = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in outcome.ranks.items())
    parts = [
        (
            part.name,
            part.tensors,
            human_count(part.parameters),
            human_bytes(part.nbytes),
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
        f"{len(outcome.plan)} tensors, {outcome.nbytes:,} bytes of weights ({human_bytes(outcome.nbytes)})",
    ]


def done_tables(outcome: Outcome, width: int) -> list[RenderableType]:
    """What came of a plan: the choice of layers, the calibration, the verification, and where it stands."""
    from hxaconv.cli import advice_tables

    shown: list[RenderableType] = []
    if outcome.advice is not None:
        shown += advice_tables.shown(outcome.advice, width)
    if outcome.calibration is not None:
        shown += _calibrated(outcome.calibration)
    if outcome.report is not None:
        rows = [("ok" if check.passed else "FAILED", check.name, check.detail) for check in outcome.report.checks]
        shown += [table("", ("", "verified", "found"), rows, right=3), *outcome.report.notes]
    return shown


def _calibrated(report: CalibrationReport) -> list[RenderableType]:
    """How the fit of every layer went, on tokens that were not fitted."""

    def spread(values: tuple[float, ...]) -> str:
        return f"{min(values):.3g} .. {max(values):.3g}" if values else ""

    rows = [
        (
            layer.layer,
            layer.kind + (" (kept plain)" if layer.kept_plain else ""),
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


def _strip_block(letters: str) -> list[str]:
    return ["", "Layers (R = RWKV, G = GQA):", *strip_lines(letters), ""]


def inspection_tables(inspection: Inspection) -> list[RenderableType]:
    """What `inspect` shows."""
    report = inspection.facts
    rows = [
        (part, entry["tensors"], human_count(entry["parameters"]), human_bytes(entry["bytes"]))
        for part, entry in report["parts"].items()
    ]
    known = report["dimensions"]
    settings = [(key, "not known" if value is None else value) for key, value in known.items()]
    lines: list[RenderableType] = [f"{report['path']}: {report['kind']}", *report["advice"]]
    if not report["files"]:
        return lines
    lines += [
        f"{report['format']}, {report['dialect']} names, {report['variant']}",
        f"{report['tensors']} tensors, {human_count(report['parameters'])} parameters,"
        f" {report['bytes']:,} bytes ({human_bytes(report['bytes'])}), "
        + ", ".join(f"{count} x {dtype}" for dtype, count in report["dtypes"].items()),
        *_strip_block(report["layers"]),
        table("", ("part", "tensors", "parameters", "size"), rows),
        table("", ("setting", "value"), settings),
    ]
    memory = report["memory"]
    if memory:
        lines.append(
            f"KV cache {memory['kv_cache_bytes_per_token']:,} bytes per token in bf16"
            f" (teacher: {memory['teacher_kv_cache_bytes_per_token']:,}),"
            f" recurrent state {human_bytes(memory['state_bytes_per_sequence'])} per sequence in float32"
        )
    if report["left_behind"]:
        lines.append(f"Known and left behind: {len(report['left_behind'])} rotary buffers or layers of no use here")
    if report["not_opened"]:
        lines.append(f"Other weight files, not opened: {', '.join(report['not_opened'])}")
    if report["unknown_names"]:
        lines.append(f"Names that are not known: {len(report['unknown_names'])}, such as {report['unknown_names'][0]}")
    if report["nested_under"]:
        lines.append(f"The tensors are nested under {report['nested_under']!r}")
    if report["not_tensors"]:
        lines.append(f"No tensors, and left behind: {shortened(report['not_tensors'])}")
    lines += [f"One tensor under {len(names)} names: {' = '.join(names)}" for names in report["one_tensor"]]
    if report["problem"]:
        lines += ["", f"Remark: {report['problem']}"]
    if "statistics" in report:
        lines.append(_statistics_table(report["statistics"]))
    return lines


def _statistics_table(statistics: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    rows = [
        (name, s["dtype"], number(s["min"]), number(s["mean"]), number(s["max"]), s["nan"], s["inf"])
        for name, s in statistics.items()
    ]
    return table("", ("tensor", "dtype", "min", "mean", "max", "NaN", "Inf"), rows, right=2)


def maps_tables(result: Maps) -> list[RenderableType]:
    """The shipped layer maps, one of them whole, or the table of names."""
    if result.names:
        # The longest of the three columns follows a rule, and is said as one.
        return [
            table(
                "",
                ("HF safetensors", "RWKV .pth"),
                [(row.hf, row.rwkv or ("split on opening" if row.hf in SPLIT else "in no .pth")) for row in TABLE],
                right=2,
            ),
            "Training checkpoints: model. before the HF name, and student_attn. (older: time_mixer.) after self_attn.",
        ]
    if result.name is not None:
        return _map_lines(result.maps[result.name])
    found_maps = [
        (name, found.model.get("num_hidden_layers", "?"), len(found.gqa_layers), ",".join(map(str, found.gqa_layers)))
        for name, found in result.maps.items()
    ]
    return [table("", ("layer map", "of", "GQA", "GQA layers"), found_maps, right=3)]


def _map_lines(found: LayerMap) -> list[RenderableType]:
    """One layer map, whole."""
    count = found.num_hidden_layers
    letters = "".join("G" if i in found.gqa_layers else "R" for i in range(count or 0))
    return [
        f"{found.name}: {found.title or 'without a title'}",
        f"For {', '.join(found.model_ids) or 'no named model'}. Source: {found.source or 'not given'}",
        *(_strip_block(letters) if count else ["How many layers its model has, it does not say."]),
        f"GQA layers: {', '.join(map(str, found.gqa_layers))}",
        *([table("", ("setting", "value"), list(found.model.items()))] if found.model else []),
    ]


def demo_lines(demo: Demo) -> list[RenderableType]:
    """Where the files of a demo are, what was left out, what to try next."""
    return [
        f"\nEverything is in {demo.folder}.",
        *(f"Left out: {line}" for line in demo.left_out),
        "What to try next:",
        *(f"  {line}" for line in demo.next),
    ]
