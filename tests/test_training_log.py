"""Scores from training logs: by definition, from faulty files, and from those that cannot be read."""

import numpy as np
import pytest
from selection_models import advised

from hxaconv.errors import HxaconvError
from hxaconv.selection.log import read_log, score_log

NUM_LAYERS = 5


def log_rows(seed=0, num_rows=12):
    rng = np.random.default_rng(seed)
    decay = rng.uniform(0.01, 0.2, NUM_LAYERS)
    steps = np.arange(num_rows) * 10
    raw = np.exp(-decay * np.arange(num_rows)[:, None]) * rng.uniform(0.5, 2, NUM_LAYERS) + rng.normal(
        0, 0.01, (num_rows, 5)
    )
    return steps, np.abs(raw), rng.uniform(0.5, 2, (num_rows, NUM_LAYERS))


def header(order=range(NUM_LAYERS)):
    return ["step", *(f"layer_{i}_{kind}" for kind in ("rawMSE", "scaledMSE", "scale") for i in order)]


def write_log(path, rows, names=None):
    lines = [",".join(names or header()), *(",".join(f"{cell:.9g}" for cell in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def sound_log(path, seed=0):
    steps, raw, scale = log_rows(seed)
    return write_log(path, [[s, *r, *(r * c), *c] for s, r, c in zip(steps, raw, scale, strict=True)])


def min_max(x):
    return (x - x.min()) / (x.max() - x.min())


def test_log_score_by_definition(tmp_path):
    steps, raw, scale = log_rows()
    slope = np.array([np.polyfit(steps, np.log(np.maximum(raw[:, i], 1e-8)), 1)[0] for i in range(NUM_LAYERS)])
    expected = (
        0.30 * min_max(raw[-1])
        + 0.25 * (1 - min_max(-slope))
        + 0.20 * (1 - min_max((raw[0] - raw[-1]) / (raw[0] + 1e-8)))
        + 0.15 * min_max(scale[-1])
        + 0.10 * min_max(np.var(np.diff(raw, axis=0), axis=0))
    )
    found, _, warnings = score_log(read_log(sound_log(tmp_path / "log.csv")), NUM_LAYERS)
    assert found == pytest.approx(expected, abs=1e-7)  # the file has nine digits
    assert warnings == ()


def test_the_known_fault_is_detected_mapped_and_told(tmp_path):
    """Rows of 2L+1 numbers under 3L+1 names: read by position, the scales become scaled errors."""
    steps, raw, scale = log_rows()
    rows = [[s, *r, *c] for s, r, c in zip(steps, raw, scale, strict=True)]
    faulty = score_log(read_log(write_log(tmp_path / "faulty.csv", rows)), NUM_LAYERS)
    sound = score_log(read_log(sound_log(tmp_path / "sound.csv")), NUM_LAYERS)
    assert faulty[0] == sound[0]
    assert "known fault" in faulty[2][0]
    # Spreadsheets pad the short rows with empty cells.
    padded = "\n".join(
        line if line.startswith("step") else line + "," * NUM_LAYERS
        for line in (tmp_path / "faulty.csv").read_text().splitlines()
    )
    (tmp_path / "padded.csv").write_text(padded)
    assert score_log(read_log(tmp_path / "padded.csv"), NUM_LAYERS)[0] == sound[0]


def test_columns_go_by_the_layer_in_their_name(tmp_path):
    """Layers as text sort 10 before 2; a log written in that order gives the same scores."""
    order, (steps, raw, scale) = [3, 0, 4, 2, 1], log_rows()
    rows = [[s, *r[order], *(r * c)[order], *c[order]] for s, r, c in zip(steps, raw, scale, strict=True)]
    shuffled = read_log(write_log(tmp_path / "a.csv", rows, header(order)))
    by_position = read_log(write_log(tmp_path / "b.csv", rows, header()))
    sound = score_log(read_log(sound_log(tmp_path / "c.csv")), NUM_LAYERS)
    assert score_log(shuffled, NUM_LAYERS)[0] == sound[0]
    assert score_log(by_position, NUM_LAYERS)[0] != pytest.approx(sound[0], abs=1e-3)


def test_resumed_partial_and_unfit_logs(tmp_path):
    steps, raw, scale = log_rows()
    rows = [[s, *r, *(r * c), *c] for s, r, c in zip(steps, raw, scale, strict=True)]
    text = sound_log(tmp_path / "log.csv").read_text()
    lines = text.splitlines()
    resumed = [*lines[:5], lines[0], *lines[5:], lines[7], "300,1,2", lines[6].replace(lines[6].split(",")[1], "nan")]
    (tmp_path / "resumed.csv").write_text("\n".join(resumed))
    log = read_log(tmp_path / "resumed.csv")
    assert len(log.steps) == len(rows) + 1
    assert (np.diff(log.steps) >= 0).all()
    assert len(log.warnings) == 3  # a row cut short, a row with NaN, steps that go back: each told once
    with pytest.raises(HxaconvError, match="layers up to 4, the model has 3"):
        score_log(log, 3)
    part = score_log(log, 7)
    assert part[0][5:] == (None, None)
    assert "layers [5, 6]" in part[2][-1]
    (tmp_path / "no.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(HxaconvError, match=r"no column layer_\{i\}_rawMSE"):
        read_log(tmp_path / "no.csv")
    (tmp_path / "one.csv").write_text("\n".join(lines[:2]))
    with pytest.raises(HxaconvError, match="at least 2"):
        read_log(tmp_path / "one.csv")


def test_log_advice(tmp_path):
    advice = advised(num_layers=7, strategy="log", count=2, log=sound_log(tmp_path / "log.csv"))
    assert set(advice.pick.layers) <= {1, 2, 3, 4}  # never layer 0, never one without columns
    assert advice.pick.rules.max_consecutive == 2
    assert advice.pick.rules.wide_gap == 8
    assert advised(num_layers=7, strategy="log", count=2, log=tmp_path / "log.csv") == advice


def test_empty_columns_at_the_end_are_nobodys(tmp_path):
    sound = sound_log(tmp_path / "log.csv")
    expected = score_log(read_log(sound), NUM_LAYERS)
    lines = sound.read_text().splitlines()
    for name, ends in {"header": (",", ""), "rows": ("", ","), "both": (", ,", ",,")}.items():
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join([lines[0] + ends[0], *(line + ends[1] for line in lines[1:])]))
        assert score_log(read_log(path), NUM_LAYERS) == expected


def test_scales_that_a_table_program_wrote_as_nan(tmp_path):
    """pandas reads the faulty rows, fills them up with NaN, and writes those down as text."""
    steps, raw, scale = log_rows()
    rows = [[s, *r, *c] for s, r, c in zip(steps, raw, scale, strict=True)]
    faulty = score_log(read_log(write_log(tmp_path / "faulty.csv", rows)), NUM_LAYERS)
    filled = write_log(tmp_path / "filled.csv", [[*row, *[float("nan")] * NUM_LAYERS] for row in rows])
    assert score_log(read_log(filled), NUM_LAYERS)[0] == faulty[0]
    assert "known fault" in read_log(filled).warnings[0]
    nowhere = write_log(tmp_path / "no.csv", [[*row[:6], *[float("nan")] * 2 * NUM_LAYERS] for row in rows])
    with pytest.raises(HxaconvError, match=r"no layer has a finite scale in any row; layer_0_scale is 'nan'"):
        read_log(nowhere)


def test_a_layer_without_numbers_does_not_cost_the_others(tmp_path):
    steps, raw, scale = log_rows()
    raw[:, 2] = np.nan
    rows = [[s, *r, *(r * c), *c] for s, r, c in zip(steps, raw, scale, strict=True)]
    log = read_log(write_log(tmp_path / "log.csv", rows))
    assert log.layers == (0, 1, 3, 4)
    assert len(log.steps) == len(rows)
    assert log.warnings == ("layers [2] have no finite rawMSE or scale in any row: they cannot be picked",)
    assert score_log(log, NUM_LAYERS)[0][2] is None


def test_short_rows_under_names_that_go_layer_by_layer_are_refused(tmp_path):
    steps, raw, scale = log_rows()
    names = ["step", *(f"layer_{i}_{kind}" for i in range(NUM_LAYERS) for kind in ("rawMSE", "scaledMSE", "scale"))]
    whole = [[s, *np.stack([r, r * c, c], axis=1).ravel()] for s, r, c in zip(steps, raw, scale, strict=True)]
    sound = score_log(read_log(sound_log(tmp_path / "sound.csv")), NUM_LAYERS)
    assert score_log(read_log(write_log(tmp_path / "whole.csv", whole, names)), NUM_LAYERS)[0] == sound[0]
    rows = [[s, *r, *c] for s, r, c in zip(steps, raw, scale, strict=True)]
    with pytest.raises(HxaconvError, match="which field is which is unknown"):
        read_log(write_log(tmp_path / "short.csv", rows, names))


def test_one_layer_under_two_spellings_of_its_number_is_refused(tmp_path):
    names = [name.replace("layer_1_rawMSE", "layer_01_rawMSE") for name in header()]
    names.insert(2, "layer_1_rawMSE")
    steps, raw, scale = log_rows()
    rows = [[s, 1.0, *r, *(r * c), *c] for s, r, c in zip(steps, raw, scale, strict=True)]
    with pytest.raises(HxaconvError, match="layer 1 has its rawMSE twice"):
        read_log(write_log(tmp_path / "log.csv", rows, names))
