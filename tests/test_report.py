"""A report as a table, a picture and JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from models import changed, fresh, ids, student
from rich.console import Console

from hxaconv.cli.tables import error_bar as bar
from hxaconv.cli.tables import report_tables as render
from hxaconv.errors import HxaconvError
from hxaconv.verification.compare import compare_models, verify_model
from hxaconv.verification.report import Report


def text_of(report: Report, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for part in render(report):
        console.print(part, **({"markup": False} if isinstance(part, str) else {}))
    return console.export_text()


def test_the_report_fits_eighty_columns_and_names_the_layer() -> None:
    model = student("reka_tiny")
    wrong = changed(model, "model.layers.3.mlp.up_proj.weight", lambda values: values * 2)
    report = compare_models(wrong, model, ids=ids(model))
    text = text_of(report)
    assert max(len(line) for line in text.splitlines()) <= 80
    layers = [line for line in text.splitlines() if line.lstrip().startswith(("0 ", "1 ", "2 ", "3 ", "4 "))]
    wide = text_of(report, 200).splitlines()
    assert len(layers) >= 5 and all(line in wide for line in layers), "a line of a layer is folded"
    assert "RRGRG" in text and "...x." in text
    assert "The first layer that differs is 3." in text
    assert "FAILED" in text
    fine = text_of(compare_models(model, model, ids=ids(model)))
    assert "No layer differs." in fine and "PASSED" in fine and "█" not in fine


def test_bars_grow_with_the_error() -> None:
    lengths = [len(bar(error, -8)) for error in (0.0, 1e-9, 1e-6, 1e-3, 1.0, 50.0)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0 and lengths[-1] == 12
    assert bar(float("nan"), -8) == "not finite"


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_is_drawn_and_is_the_same_each_time(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from hxaconv.commands.plots import draw_report as plot

    base, made = fresh()
    report = compare_models(made, base, ids=ids(base))
    paths = [tmp_path / f"{number}{suffix}" for number in range(2)]
    for path in paths:
        plot(report, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_size > 5000
    with pytest.raises(HxaconvError, match="nothing was compared"):
        plot(verify_model(base, ids=ids(base)), paths[0])
    with pytest.raises(HxaconvError, match="its name ends in"):
        plot(report, tmp_path / "plot.bmp")


def test_json_carries_numbers_that_are_not_finite() -> None:
    model = student("reka_tiny")
    name = "model.norm.weight"
    report = compare_models(changed(model, name, lambda values: values * float("nan")), model, ids=ids(model))
    content: dict[str, Any] = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["logits"]["max_difference"] == "nan"
    assert set(report.verdict()) == {"passed", "reason", "expect", "settings", "checks", "logits"}
