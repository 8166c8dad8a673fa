"""Plans, outcomes and inspections as tables, and as the plain data that --json prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.cli.console import human_bytes, human_count, result_width, strip_lines, table
from hxaconv.commands.common import Outcome
from hxaconv.errors import shortened
from hxaconv.load.inspection import part_of, parts
from hxaconv.model.names import SPLIT, TABLE, is_attention, layer_kinds
from hxaconv.model.plan import Plan, total_bytes
from hxaconv.model.variants.base import RANK_KEYS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hxaconv.cli.console import Talk
    from hxaconv.model.layer_maps import LayerMap
    from hxaconv.selection.advice import Advice
    from hxaconv.verification.report import Report


def outcome_json(outcome: Outcome, *, tensors: bool) -> dict[str, Any]:
    """An outcome as plain data; with `tensors`, every tensor's shape, dtype and origin."""
    output, student = outcome.output, outcome.output.student
    assert student is not None
    data: dict[str, Any] = {
        "command": output.record.command,
        "target": str(output.target),
        "format": output.format,
        "dtype": output.dtype,
        "layers": student.student.strip,
        "gqa_layers": list(student.student.gqa_layers),
        "ranks": {RANK_KEYS[name]: getattr(student.student.ranks, name) for name in student.student.variant.rank_names},
        "tensors": len(outcome.output.tensors),
        "bytes": total_bytes(outcome.output.tensors),
        "files": [{"name": layout.name, "bytes": layout.size} for layout in output.files],
        "written": outcome.written is not None,
        "published": outcome.written is not None,
        "notes": outcome.notes,
        "warnings": outcome.warnings,
        "calibration": outcome.calibration.json() if outcome.calibration else None,
        "verification": outcome.report.verdict() if outcome.report else None,
        "pushed_to": outcome.pushed_to,
    }
    if tensors:
        data["plan"] = {
            name: {"shape": list(r.shape), "dtype": r.dtype, "how": r.make.kind, "origin": r.origin}
            for name, r in outcome.output.tensors.items()
        }
    return data


def outcome_tables(outcome: Outcome) -> list[RenderableType]:
    """The plan of an outcome for people: layers, parts, files."""
    output, student = outcome.output, outcome.output.student
    assert student is not None
    config = student.student
    ranks, weights = config.ranks, total_bytes(outcome.output.tensors)
    sizes = ", ".join(f"{name.replace('_', ' ')} {getattr(ranks, name)}" for name in config.variant.rank_names)
    plan = {name: recipe for name, recipe in student.plan.items() if output.whole or is_attention(name)}
    return [
        f"{output.record.command}: {output.target} ({output.format}, {output.dtype})",
        *_strip_block(config.strip),
        f"Low-rank sizes: {sizes}",
        _parts_table(plan),
        table("", ("file", "tensors", "bytes"), [(f.name, len(f.fills), f"{f.size:,}") for f in output.files]),
        f"{len(outcome.output.tensors)} tensors, {weights:,} bytes of weights ({human_bytes(weights)})",
        *_calibrated(outcome),
        *_verified(outcome),
    ]


def _calibrated(outcome: Outcome) -> list[RenderableType]:
    """How the fit of every layer went, on tokens that were not fitted."""
    if outcome.calibration is None:
        return []

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
        for layer in outcome.calibration.layers
    ]
    columns = ("layer", "", "error before", "after", "decay by head", "a by head", "clamped")
    return ["Mixer error on held-out tokens, as a share of the teacher's energy:", table("", columns, rows, right=2)]


def _verified(outcome: Outcome) -> list[RenderableType]:
    if outcome.written is None or outcome.report is None:
        return []
    rows = [("ok" if check.passed else "FAILED", check.name, check.detail) for check in outcome.report.checks]
    return [table("", ("", "verified", "found"), rows, right=3), *outcome.report.notes]


def _strip_block(letters: str) -> list[str]:
    return ["", "Layers (R = RWKV, G = GQA):", *strip_lines(letters), ""]


def _parts_table(plan: Plan) -> RenderableType:
    """Parts of the model by how their tensors come about."""
    kinds = layer_kinds(plan)
    how: dict[str, dict[str, int]] = {}
    for name, recipe in plan.items():
        counts = how.setdefault(part_of(name, kinds), {})
        counts[recipe.make.kind] = counts.get(recipe.make.kind, 0) + 1
    rows = [
        (
            part,
            entry["tensors"],
            human_count(entry["parameters"]),
            human_bytes(entry["bytes"]),
            ", ".join(f"{count} {kind}" for kind, count in sorted(how[part].items())),
        )
        for part, entry in parts(plan).items()
    ]
    return table("", ("part", "tensors", "parameters", "size", "made by"), rows)


def inspection_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """What `inspect` shows."""
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


def maps_table(maps: Mapping[str, LayerMap]) -> RenderableType:
    """The shipped layer maps."""
    rows = [
        (name, found.model.get("num_hidden_layers", "?"), len(found.gqa_layers), ",".join(map(str, found.gqa_layers)))
        for name, found in maps.items()
    ]
    return table("", ("layer map", "of", "GQA", "GQA layers"), rows, right=3)


def map_lines(found: LayerMap) -> list[RenderableType]:
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


def names_table() -> list[RenderableType]:
    """The name table, as `names.py` has it; the longest of the three columns as the rule that it follows."""
    never = {row.hf: "split on opening" if row.hf in SPLIT else "in no .pth" for row in TABLE}
    rows = [(row.hf, row.rwkv or never[row.hf]) for row in TABLE]
    return [
        table("", ("HF safetensors", "RWKV .pth"), rows, right=2),
        "Training checkpoints: model. before the HF name, and student_attn. (older: time_mixer.) after self_attn.",
    ]


def advice_json(advice: Advice | None) -> dict[str, Any]:
    """Advice beside an outcome as plain data, where there was any."""
    if advice is None:
        return {}
    from hxaconv.selection.report import to_json

    return {"advice": to_json(advice)}


def show_advice(advice: Advice, talk: Talk, *, json: bool) -> None:
    """Advice on stdout: strip, table and reasons; as JSON only where it is the whole result."""
    from hxaconv.selection import report

    for warning in advice.warnings:
        talk.warn(warning)
    if json or not talk.json_output:
        talk.result(report.to_json(advice), *report.shown(advice, result_width()))


def show_report(report: Report, talk: Talk, plot: str | None) -> None:
    """A verification on stdout, and as a picture where asked for.

    Raises:
        CheckFailed: when it did not pass.
    """
    from hxaconv.verification.render import render

    try:
        if plot is not None and report.layers:
            from hxaconv.verification.plot import plot as draw

            draw(report, Path(plot))
    finally:
        talk.result(report.to_json(), *render(report))
    report.raise_if_failed()


def map_json(found: LayerMap) -> dict[str, Any]:
    """A layer map as plain data."""
    return {
        "name": found.name,
        "title": found.title,
        "model_ids": list(found.model_ids),
        "gqa_layers": list(found.gqa_layers),
        "source": found.source,
        "model": dict(found.model),
    }
