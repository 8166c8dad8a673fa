"""Scores of layers: against brute force, and the advice built on them."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from selection_models import TEACHER, advised, as_if_trained, copying_teacher, literal

from hxaconv.cli import tables
from hxaconv.commands.plots import draw_advice
from hxaconv.errors import HxaconvError
from hxaconv.forward import hxa079, llama
from hxaconv.forward.logits import Divergence
from hxaconv.load import load_teacher
from hxaconv.model import layer_maps
from hxaconv.model.config import student_of
from hxaconv.model.model import Model
from hxaconv.options import STRATEGIES as NAMED
from hxaconv.options import Choice
from hxaconv.selection import sweep as sweep_module
from hxaconv.selection.advice import pick
from hxaconv.selection.strategies import STRATEGIES, Column
from hxaconv.selection.sweep import Sweep
from hxaconv.surgery.arithmetic import tensor
from hxaconv.surgery.init import PRESETS, InitSettings, init_from_teacher
from hxaconv.verification.claims import untouched_layers

GOLDEN = Path(__file__).resolve().parent / "golden"
EXACT = torch.float64


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(TEACHER)


@pytest.fixture(scope="module")
def student(teacher):
    return as_if_trained(teacher)


@pytest.fixture(scope="module")
def ids():
    return np.load(TEACHER / "calibration_tokens.npy")[:2, :48].astype(np.int64)


def getter(model, layer_from=None, layer=None):
    """All weights in float64; the mixer of `layer` from another model."""
    plan = dict(model.plan)
    if layer_from is not None:
        inside = f"model.layers.{layer}.self_attn."
        plan = {n: r for n, r in plan.items() if not n.startswith(inside)}
        plan |= {n: r for n, r in layer_from.plan.items() if n.startswith(inside)}
    made = {name: tensor(recipe, dtype=torch.float64) for name, recipe in plan.items()}
    return made.__getitem__


def kl(p_logits, q_logits):
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def brute_force_restore(teacher, student, ids):
    """One full forward per candidate, over the token loop, with a whole model's weights in memory."""
    ids, num_layers = torch.from_numpy(ids), teacher.config.num_hidden_layers
    target = llama.forward(ids, getter(teacher), teacher.config)[0]
    total = kl(target, hxa079.forward(ids, getter(student), student.config)[0])
    found = []
    for layer in range(num_layers):
        config = replace(student.config, gqa_layers=(layer,))
        found.append(total - kl(target, hxa079.forward(ids, getter(student, teacher, layer), config)[0]))
    return found, total


def brute_force_convert(teacher, student, ids):
    ids, found = torch.from_numpy(ids), []
    target = llama.forward(ids, getter(teacher), teacher.config)[0]
    for layer in range(teacher.config.num_hidden_layers):
        get, x = getter(teacher, student, layer), llama.embed(ids, getter(teacher))
        num_layers = teacher.config.num_hidden_layers
        alone = replace(student.config, gqa_layers=tuple(i for i in range(num_layers) if i != layer))
        for i in range(num_layers):
            if i != layer:
                x = llama.layer(x, get, teacher.config, i)
                continue
            x = x + hxa079.mixer(llama.input_norm(x, get, teacher.config, i), get, alone, i, hxa079.Carry())
            x = llama.feed_forward(x, get, teacher.config, i)
        found.append(kl(target, llama.logits(x, get, teacher.config)))
    return found


def sweep(teacher, student, ids, *strategies, dtype=EXACT, **more):
    mode = more.pop("kl_mode", "restore") if {"kl", "nll"} & {*strategies} else None
    measures = {name: STRATEGIES[name].score for name in strategies if STRATEGIES[name].score}
    run = Sweep(teacher=teacher, student=student, measures=measures, mode=mode, dtype=dtype, **more)
    return run.run(torch.from_numpy(ids))


def test_restore_one_kl_equals_full_forwards(teacher, student, ids):
    expected, total = brute_force_restore(teacher, student, ids)
    found = sweep(teacher, student, ids, "kl")
    assert found["kl total"][0] == pytest.approx(total, abs=1e-6)
    assert found["kl"] == pytest.approx(expected, abs=1e-6)
    # Negative controls: layers differ by far more than the tolerance, and RoPE left on in the restored
    # layers would show.
    assert min(abs(a - b) for a in expected for b in expected if a is not b) > 1e-4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hxa079, "attention", lambda x, get, config, i, carry: llama.attention(x, get, teacher.config, i))
        assert sweep(teacher, student, ids, "kl")["kl"] != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("case", ["qwen3_tiny", "reka_tiny"])
def test_kl_of_a_student_that_shares_nothing_with_its_teacher(case):
    """Norms, MLPs, embedding and head are trained too; qwen3_tiny has q/k norms, A != C and a tied head."""
    teacher = load_teacher(GOLDEN / case / "teacher")
    student = as_if_trained(teacher, moved=None)
    ids = np.random.default_rng(0).integers(0, teacher.config.vocab_size, (2, 21))
    expected, total = brute_force_restore(teacher, student, ids)
    found = sweep(teacher, student, ids, "kl", "mse")
    assert found["kl total"][0] == pytest.approx(total, abs=1e-6)
    assert found["kl"] == pytest.approx(expected, abs=1e-6)
    assert sweep(teacher, student, ids, "kl", kl_mode="convert")["kl"] == pytest.approx(
        brute_force_convert(teacher, student, ids), abs=1e-6
    )


def test_layer_0_as_gqa_hands_v_first_to_layer_1(teacher, student, ids):
    """Negative control of the forked v_first: with layer 0's own, candidate 0 alone comes out differently."""
    right = sweep(teacher, student, ids, "kl")["kl"]
    mix = sweep_module.time_mix

    def always_layer_0(normed, get, config, layer, first, each):
        return mix(normed, get, replace(config, gqa_layers=()), layer, first or shared[-1], each)

    shared = []

    def remember(normed, get, config, layer, first, each):
        if config.gqa_layers == (0,):
            return always_layer_0(normed, get, config, layer, first, each)
        result = mix(normed, get, config, layer, first, each)
        shared.append(result[1])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "time_mix", remember)
        wrong = sweep(teacher, student, ids, "kl")["kl"]
    assert abs(wrong[0] - right[0]) > 1e-4
    assert wrong[1:] == pytest.approx(right[1:], abs=1e-12)


def test_convert_kl_equals_full_forwards(teacher, student, ids):
    expected = brute_force_convert(teacher, student, ids)
    found = sweep(teacher, student, ids, "kl", kl_mode="convert")
    assert found["kl"] == pytest.approx(expected, abs=1e-6)
    assert "kl total" not in found


def test_float32_is_near_enough_to_rank_by(teacher, student, ids):
    exact = sweep(teacher, student, ids, "kl", "mse", "influence", "entropy", "distance")
    single = sweep(teacher, student, ids, "kl", "mse", "influence", "entropy", "distance", dtype=torch.float32)
    for name, values in exact.items():
        # float32 through six layers; scores of different layers differ by 1e-3 and more
        assert single[name] == pytest.approx(values, abs=2e-5), name


@pytest.mark.parametrize("all_moved", [False, True])
def test_scores_do_not_depend_on_what_is_computed_along(teacher, student, ids, all_moved):
    # With all tensors moved, the student's first layer makes something else of its own stream than of the teacher's.
    student = as_if_trained(teacher, moved=None) if all_moved else student
    together = sweep(teacher, student, ids, "kl", "mse", "entropy")
    for name in ("kl", "mse", "entropy"):
        assert sweep(teacher, student, ids, name)[name] == together[name]


def test_single_layer_scores_by_definition(teacher, student, ids):
    found = sweep(teacher, student, ids, "mse", "influence", "entropy", "distance")
    get, both = getter(teacher), getter(student)
    x, carry = llama.embed(torch.from_numpy(ids), get), hxa079.Carry()
    for layer in range(6):
        normed = llama.input_norm(x, get, teacher.config, layer)
        attended = llama.attention(normed, get, teacher.config, layer)
        mixed = hxa079.mixer(normed, both, student.config, layer, carry)
        assert found["mse"][layer] == pytest.approx(
            float(((mixed - attended) ** 2).sum() / (attended**2).sum()), rel=1e-9
        )
        after = llama.layer(x, get, teacher.config, layer)
        cosine = (x * after).sum(-1) / (x.norm(dim=-1) * after.norm(dim=-1))
        assert found["influence"][layer] == pytest.approx(1 - float(cosine.mean()), rel=1e-9)
        x = after
    for name in ("entropy", "distance"):
        assert all(0 < value < 1 for value in found[name])


def test_entropy_and_distance_of_known_attention():
    """Keys of zero: every position looks everywhere alike, so entropy is 1 and distance one half."""
    model = copying_teacher(plant=False)
    plan = dict(model.plan)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        plan[name] = literal(torch.zeros(plan[name].shape))
        plan[name.replace("weight", "bias")] = literal(torch.zeros(plan[name].shape[0]))
    even = Model(model.config, plan, "even")
    found = sweep(even, None, np.arange(20)[None], "entropy", "distance")
    assert found["entropy"] == pytest.approx([1.0, 1.0], abs=1e-12)
    assert found["distance"] == pytest.approx([0.5, 0.5], abs=1e-12)


def test_deterministic(teacher, student, ids):
    once, again = (sweep(teacher, student, ids, "kl", "mse", dtype=torch.float32) for _ in range(2))
    assert once == again
    once, again = (advised(teacher, ids=ids.repeat(4, 1), strategy="retrieval", count=2) for _ in range(2))
    assert once == again


def test_kl_in_blocks_equals_kl_whole():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 256, generator=generator, dtype=torch.float64) * 30 for _ in range(2))
    divergence = Divergence()
    for start in range(0, 256, 37):  # the last one shorter
        some = slice(start, start + 37)
        divergence.add(p[:, some], 2, [q[:, some], p[:, some]].__getitem__)
    assert [float(found.mean()) for found in divergence.result()] == pytest.approx([kl(p, q), 0.0], abs=1e-9)


def test_uncalibrated_students_are_found_and_warned_about(teacher, student, ids):
    config = student_of(teacher.config, ())
    settings = InitSettings(PRESETS["openmose-stage1"], 0, "BF16")
    fresh = Model(config, init_from_teacher(teacher.plan, config, settings), "fresh")
    assert untouched_layers(fresh) == (0, 1, 2, 3, 4, 5)
    assert untouched_layers(student) == ()
    warned = advised(teacher, fresh, ids, strategy="kl", count=2)
    assert any("MISLEAD" in w and "--init calibrated" in w for w in warned.warnings)
    assert not any("initial values" in w for w in advised(teacher, student, ids, strategy="kl", count=2).warnings)


def test_calibration_is_advised_only_where_layers_are_plain(teacher, student, ids, monkeypatch):
    config = student_of(teacher.config, ())
    settings = InitSettings(PRESETS["openmose-stage1"], 0, "BF16")
    fresh = Model(config, init_from_teacher(teacher.plan, config, settings), "fresh")
    monkeypatch.setattr(
        Sweep,
        "run",
        lambda self, *_: {name: [-1.0] * 6 for name in ("kl", "nll", *self.measures)} | {"kl total": [1.0]},
    )

    def harmful(model):
        warned = advised(teacher, model, ids, strategy="kl", count=2).warnings
        return next(text for text in warned if "putting attention back makes the student worse" in text)

    assert "--init calibrated" in harmful(fresh)
    assert "--init calibrated" not in harmful(student)
    assert "--kl-mode convert" in harmful(student)


def test_random_tokens_are_warned_about(teacher, ids):
    asked = {"strategy": "influence", "count": 2}
    assert advised(teacher, ids=ids, **asked).warnings == ()
    assert "real text" in advised(teacher, ids=ids, are_text=False, **asked).warnings[0]


def test_what_strategies_need(teacher):
    assert STRATEGIES["uniform"].needs == frozenset()
    assert STRATEGIES["kl"].needs == {"teacher", "student", "tokens"}
    with pytest.raises(HxaconvError, match="kl needs: student, tokens"):
        advised(teacher, strategy="kl")
    assert set(STRATEGIES) == set(NAMED)
    with pytest.raises(HxaconvError, match=r"'influense' is not known \(did you mean influence\?\), it takes uniform"):
        Choice(strategy="influense")


def test_pick_uniform_and_last():
    assert advised(num_layers=44).pick.layers == (8, 15, 22, 29, 36, 43)
    assert advised(num_layers=44, strategy="last", count=3).pick.layers == (41, 42, 43)
    with pytest.raises(HxaconvError, match="has no scores"):
        advised(num_layers=44, min_gap=3)
    with pytest.raises(HxaconvError, match="between 1 and 43"):
        advised(num_layers=44, count=44)


def test_scores_of_layers_that_cannot_be_picked_do_not_count():
    column, one = Column("kl", (100.0, 1.0, 2.0, 3.0)), Choice(strategy="kl", count=1)
    assert pick(one, 4, column).scores == (None, 0.0, 0.5, 1.0)
    assert pick(replace(one, allow_gqa_layer_0=True), 4, column).layers == (0,)
    sharp = pick(replace(one, strategy="entropy"), 4, Column("entropy", (0.0, 0.2, 0.9, 0.4)))
    assert sharp.layers == (1,)  # sharp heads stay
    with pytest.raises(HxaconvError, match="layer 2 is not a finite number"):
        pick(one, 3, Column("kl", (0.0, 1.0, float("nan"))))


def test_report(teacher, student, ids, tmp_path):
    advice = advised(teacher, student, ids, strategy="kl", count=2)
    text = "\n".join(tables.summary(advice))
    assert f"GQA layers (2 of 6): {', '.join(map(str, advice.pick.layers))}" in text
    assert "of 2 in common" in text
    assert "kl total" in text
    bars, letters = tables.strip(advice)
    assert letters[6:] == "".join("G" if i in advice.pick.layers else "R" for i in range(6))
    assert len(bars) == len(letters)
    data = json.loads(json.dumps(advice.to_dict()))
    assert data["gqa_layers"] == list(advice.pick.layers)
    assert set(data["scores"]) == {"kl", "nll", "mse", "influence", "entropy", "distance"}
    chosen = layer_maps.of_config("mine", teacher.config, advice.pick.layers)
    (tmp_path / "mine.toml").write_text(advice.layer_map_text(chosen, date="2025-01-31"), encoding="utf-8")
    assert layer_maps.parse_layers(str(tmp_path / "mine.toml"), 6) == advice.pick.layers
    assert "2025-01-31" in (tmp_path / "mine.toml").read_text()
    assert layer_maps.fits(layer_maps.load(tmp_path / "mine.toml"), teacher.config)


def shown(advice, width=100):
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(*tables.advice_tables(advice, width), sep="\n")
    return console.export_text().splitlines()


def rows_of(advice, width=100):
    """The lines of the table: its names and a line for each layer."""
    lines = shown(advice, width)
    first = next(i for i, line in enumerate(lines) if line.startswith(" layer"))
    return [line for line in lines[first:] if line.startswith(" layer") or line[:6].strip().isdigit()]


def long_log(path, num_layers, size=1.0):
    rng = np.random.default_rng(0)
    names = [f"layer_{i}_{kind}" for kind in ("rawMSE", "scale") for i in range(num_layers)]
    rows = [[step, *rng.random(2 * num_layers) * size] for step in range(9)]
    path.write_text("\n".join([",".join(["step", *names]), *(",".join(map(str, row)) for row in rows)]))
    return path


def test_table_shows_every_layer_and_fits(teacher, ids, tmp_path):
    advice = advised(teacher, ids=ids, strategy="influence", count=2)
    from_log = advised(num_layers=44, strategy="log", count=6, log=long_log(tmp_path / "log.csv", 44))
    for found in (advice, from_log):
        for width in (100, 80, 50):
            lines = shown(found, width)
            assert max(map(len, lines)) <= width
            names, *rows = rows_of(found, width)
            assert [int(row.split()[0]) for row in rows] == list(range(found.num_layers))
            # Nothing is folded or cut: where a name stands, all of its figures do.
            assert {"layer", "even", found.pick.strategy, "margin"} <= set(names.split())
            assert "…" not in "".join(lines)
            assert all(f"{value:.3f} " in f"{row} " for row, value in zip(rows, found.columns[0].values, strict=True))
    for name in ("layer", "even", "log", "residue", "conv", "align", "scale", "unstable", "margin"):
        assert name in rows_of(from_log)[0].split()


def test_scores_that_do_not_fit_are_left_out_and_named(teacher, ids):
    advice = advised(teacher, ids=ids, strategy="influence", count=2)
    wide = replace(advice, columns=(*advice.columns, *(Column(f"number{i}", (1e20,) * 6) for i in range(20))))
    names = rows_of(wide)[0].split()
    assert {"number1", "margin", "0..1"} <= set(names)
    assert "number19" not in names
    told = " ".join(" ".join(shown(wide)).split())
    assert "Too wide for 100 columns, left out:" in told
    assert "number19; --json has all." in told
    assert "left out" not in " ".join(shown(advice))
    assert "left out" in " ".join(shown(advice, 50))


def test_a_figure_that_rounds_to_zero_has_no_sign(teacher, ids):
    advice = advised(teacher, ids=ids, strategy="entropy", count=2)
    tiny = replace(advice, columns=(replace(advice.columns[0], values=(-1e-9, *advice.columns[0].values[1:])),))
    assert "-0.000" not in " ".join(shown(tiny))
    assert "-0.000" not in tiny.layer_map_text(layer_maps.of_config("x", teacher.config, tiny.pick.layers), date="")


def test_plot(teacher, ids, tmp_path):
    pytest.importorskip("matplotlib")
    advice = advised(teacher, ids=ids, strategy="influence", count=2)
    for name in ("a.png", "b.png"):
        draw_advice(advice, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(HxaconvError, match="is not a folder"):
        draw_advice(advice, tmp_path / "no" / "folder.png")
