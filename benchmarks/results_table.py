"""RESULTS.md from the JSON lines in results/.

python benchmarks/results_table.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Result = Mapping[str, Any]
MEMORY_NOTE = """Peak RSS and, in brackets, its anonymous part, in MiB; the rest is code mapped from files."""


def load(name: str) -> list[Result]:
    """Results of one script; of several for the same row, size and limit the last counts."""
    path = HERE / "results" / name
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    latest = {(r["row"], round(r.get("bytes", 0) / 5e8), r.get("limit_mib")): r for r in results}
    return list(latest.values())


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table; columns after the first to the right."""
    rule = "|---" + "|--:" * (len(columns) - 1) + "|"
    return [f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def gigabytes(result: Result) -> str:
    return f"{result['bytes'] / 1e9:.1f} GB"


def memory(result: Result) -> str:
    return f"{result['rss_mib']:.0f} ({result['anonymous_mib']:.0f})"


def speed(results: Iterable[Result]) -> list[str]:
    """Commands beside cp."""
    columns = (
        *("command", "bytes", "time / cp", "s", "cp s", "best s", "cp best s"),
        *("CPU s", "cp CPU s", "RSS (anon.) MiB", "load"),
    )
    rows = []
    for r in results:
        rows.append(
            (
                r["title"],
                gigabytes(r),
                f"**{r['ratio']:.2f}** ({min(r['ratios']):.2f}-{max(r['ratios']):.2f}, {r['pairs']})",
                f"{r['seconds']:.1f}",
                f"{r['cp_seconds']:.1f}",
                f"{r['best_seconds']:.1f}",
                f"{r['cp_best_seconds']:.1f}",
                f"{r['cpu_seconds']:.1f}",
                f"{r['cp_cpu_seconds']:.1f}",
                memory(r),
                r["load"],
            )
        )
    return table(columns, rows)


def naive(results: Iterable[Result]) -> list[str]:
    """What people run without the package."""
    columns = ("what people run", "bytes", "time / cp", "s", "cp s", "CPU s", "RSS (anon.) MiB", "load")
    return table(
        columns,
        (
            (
                r["title"],
                gigabytes(r),
                f"**{r['ratio']:.1f}** ({min(r['ratios']):.1f}-{max(r['ratios']):.1f}, {r['pairs']})",
                f"{r['seconds']:.1f}",
                f"{r['cp_seconds']:.1f}",
                f"{r['cpu_seconds']:.1f}",
                memory(r),
                r["load"],
            )
            for r in results
        ),
    )


def flatness(results: Iterable[Result]) -> list[str]:
    """Peak memory by size."""
    results = list(results)
    sizes = sorted({round(r["bytes"] / 1e9) for r in results})
    titles = list(dict.fromkeys(r["title"] for r in results))
    by_place = {(r["title"], round(r["bytes"] / 1e9)): r for r in results}
    columns = ("RSS (anon.) MiB", *(f"{size} GB" for size in sizes))
    rows = []
    for title in titles:
        found = [by_place.get((title, size)) for size in sizes]
        rows.append((title, *("" if r is None else memory(r) for r in found)))
    return table(columns, rows)


def confined(results: Iterable[Result]) -> list[str]:
    """Runs in a small memory cgroup."""
    columns = ("command", "bytes", "cgroup", "time / cp there", "s", "cp s", "RSS (anon.) MiB", "load")
    return table(
        columns,
        (
            (
                r["title"],
                gigabytes(r),
                f"{r['limit_mib']} MiB",
                f"**{r['ratio']:.2f}** ({min(r['ratios']):.2f}-{max(r['ratios']):.2f}, {r['pairs']})",
                f"{r['seconds']:.1f}",
                f"{r['cp_seconds']:.1f}",
                memory(r),
                r["load"],
            )
            for r in results
        ),
    )


def reka(results: Iterable[Result]) -> list[str]:
    """Reka-sized, sparse."""
    columns = ("command", "bytes", "s", "best s", "CPU s", "RSS (anon.) MiB", "layout", "load")
    rows = []
    for r in results:
        best = r.get("best_seconds", "")
        size = gigabytes(r) if "bytes" in r else ""
        layout = f"{r['tensors']} tensors, {r['layout']}" if "layout" in r else ""
        rows.append((r["row"], size, r["seconds"], best, r["cpu_seconds"], memory(r), layout, r["load"]))
    return table(columns, rows)


def machine(results: Sequence[Result]) -> str:
    """What the last figures were measured on."""
    m = results[-1]["machine"]
    versions = ", ".join(f"{name} {m[name]}" for name in ("python", "hxaconv", "torch", "numpy", "safetensors"))
    place = f"{m['cores']} cores ({m['cpu']}), {m['memory_gib']} GiB, {m['system']}, {m['file_system']}"
    return f"{m['date']}; {place}; {versions}."


def main() -> None:
    throughput, sparse = load("throughput.jsonl"), load("reka_sparse.jsonl")
    ours = [r for r in throughput if not r.get("naive")]
    free = [r for r in ours if not r["limit_mib"]]
    lines = ["# Results", "", machine(throughput), "", (HERE / "results" / "notes.md").read_text().strip(), ""]
    lines += ["## As people run it, verification included", "", *speed(r for r in free if r.get("verified"))]
    plain = [r for r in free if not r.get("verified")]
    lines += ["## With `--no-verify`", "", *speed(r for r in plain if r["pairs"] >= 3)]
    lines += ["## What people run without it", "", *naive(r for r in throughput if r.get("naive"))]
    lines += ["## Memory by size", "", MEMORY_NOTE, "", *flatness(plain)]
    lines += ["## In a small memory cgroup", "", *confined(r for r in ours if r["limit_mib"])]
    lines += ["## Reka-sized, sparse", "", *reka(sparse)]
    (HERE / "RESULTS.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
