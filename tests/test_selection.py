"""Scores of layers: against brute force, on planted heads, from training logs; and the advice built on them."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hxaconv import layer_maps
from hxaconv.architecture import expected_tensors
from hxaconv.arithmetic import tensor
from hxaconv.checkpoint import open_checkpoint
from hxaconv.config import TeacherConfig, student_of
from hxaconv.errors import HxaconvError
from hxaconv.model import Model
from hxaconv.plan import Literal, Recipe
from hxaconv.reference import hxa079, llama
from hxaconv.selection import cache as cache_module
from hxaconv.selection import report, retrieval, streaming, weights
from hxaconv.selection.advice import Request, advise, needs
from hxaconv.selection.cache import Cache, fingerprint
from hxaconv.selection.log import read_log, score_log
from hxaconv.selection.schedule import Rules
from hxaconv.selection.scores import Column, check_finite, pick
from hxaconv.selection.streaming import Sweep, untouched_layers
from hxaconv.selection.weights import Compute
from hxaconv.surgery import PRESETS, InitSettings, init_from_teacher
from hxaconv.teacher import open_teacher

TEACHER = Path(__file__).resolve().parent.parent / "hxaconv" / "demo" / "teacher"
GOLDEN = Path(__file__).resolve().parent / "golden"
EXACT = Compute(torch.float64)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def literal(values, dtype="F32"):
    values = values.to(torch.float32).contiguous()
    return Recipe(dtype, tuple(values.shape), Literal(values.numpy().tobytes()), "made for a test")


@pytest.fixture(scope="module")
def teacher():
    return open_teacher(open_checkpoint(TEACHER))


def as_if_trained(teacher, moved=("w1", "a1", "v1", "k1", "g1", "r_k")):
    """An all-RWKV student, trained a little: parameters that start at zero, or all, are moved."""
    config = student_of(teacher.config, ())
    plan = init_from_teacher(teacher.plan, config, InitSettings(PRESETS["openmose-stage2"], 0, "BF16"))
    generator = torch.Generator().manual_seed(7)
    for name, recipe in plan.items():
        if moved is None or name.rsplit(".", 1)[-1] in moved:
            noise = torch.randn(recipe.shape, generator=generator)
            plan[name] = literal(tensor(recipe, dtype=torch.float32) + 0.05 * noise)
    return Model(config, plan, "student")


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


def sweep(teacher, student, ids, *strategies, compute=EXACT, **more):
    run = Sweep(teacher=teacher, student=student, strategies=frozenset(strategies), compute=compute, **more)
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
    teacher = open_teacher(open_checkpoint(GOLDEN / case / "teacher"))
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
    mix = streaming.time_mix

    def always_layer_0(normed, get, config, layer, first):
        return mix(normed, get, replace(config, gqa_layers=()), layer, first or shared[-1])

    shared = []

    def remember(normed, get, config, layer, first):
        if config.gqa_layers == (0,):
            return always_layer_0(normed, get, config, layer, first)
        result = mix(normed, get, config, layer, first)
        shared.append(result[1])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "time_mix", remember)
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
    single = sweep(teacher, student, ids, "kl", "mse", "influence", "entropy", "distance", compute=Compute())
    for name, values in exact.items():
        # float32 through six layers; scores of different layers differ by 1e-3 and more
        assert single[name] == pytest.approx(values, abs=2e-5), name


def test_scores_do_not_depend_on_what_is_computed_along(teacher, student, ids):
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
    once, again = (sweep(teacher, student, ids, "kl", "mse", compute=Compute()) for _ in range(2))
    assert once == again
    asked = Request(strategy="retrieval", count=2)
    assert advise(6, asked, teacher=teacher, ids=ids.repeat(4, 1)) == advise(
        6, asked, teacher=teacher, ids=ids.repeat(4, 1)
    )


def test_head_in_blocks_equals_head_whole(teacher, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 192, generator=generator, dtype=torch.float64) * 30 for _ in range(2))
    whole = tensor(teacher.plan["lm_head.weight"], dtype=torch.float64)
    monkeypatch.setattr(weights, "LOGITS_AT_ONCE", 5 * 37)  # blocks of 37 rows, the last one shorter
    head = weights.Head(teacher, EXACT)
    assert weights.divergences(p, head, [q, p], head) == pytest.approx([kl(p @ whole.T, q @ whole.T), 0.0], abs=1e-9)


class StopAt:
    """A progress that interrupts the work like Ctrl-C."""

    def __init__(self, call):
        self.call, self.total, self.done = call, 0, 0

    def start(self, title, total):
        self.total = total

    def advance(self, n, what=""):
        self.done += n
        if what == self.call:
            raise KeyboardInterrupt

    def stop(self):
        pass


@pytest.mark.parametrize("mode", ["restore", "convert"])
def test_interrupted_scoring_goes_on_where_it_stopped(teacher, student, ids, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(cache_module, "SECONDS_BETWEEN_SAVES", 0.0)
    run = Sweep(teacher=teacher, student=student, strategies=frozenset({"kl", "mse", "entropy"}), kl_mode=mode)
    key, path = fingerprint({"teacher": teacher, "student": student}, ids, {"mode": mode}), tmp_path / "scores.npz"
    expected = run.run(torch.from_numpy(ids))
    with pytest.raises(KeyboardInterrupt):
        run.run(torch.from_numpy(ids), Cache(path, key), StopAt("layer 3"))
    assert path.is_file()
    layers = []
    monkeypatch.setattr(
        Sweep, "_layer", lambda self, state, real=Sweep._layer: (layers.append(state.layer), real(self, state))
    )
    whole = StopAt(None)
    assert run.run(torch.from_numpy(ids), Cache(path, key), whole) == expected
    assert layers == [3, 4, 5]  # layer 3 itself was interrupted before it was saved
    assert whole.done == whole.total
    assert not path.exists()


def test_a_cache_of_other_inputs_is_not_used(teacher, student, ids, tmp_path):
    keys = {
        fingerprint({"teacher": teacher, "student": student}, ids, {"mode": "restore"}),
        fingerprint({"teacher": teacher, "student": student}, ids, {"mode": "convert"}),
        fingerprint({"teacher": teacher, "student": student}, ids[:, ::-1], {"mode": "restore"}),
        fingerprint({"teacher": teacher}, ids, {"mode": "restore"}),
        fingerprint({"teacher": replace(teacher, config=replace(teacher.config, rope_theta=2.0))}, ids, {}),
        fingerprint({"teacher": teacher}, ids, {}),
    }
    assert len(keys) == 6
    path = tmp_path / "cache.npz"
    Cache(path, "a").save({"layer": np.array(3)})
    assert Cache(path, "a").load() is not None
    assert Cache(path, "b").load() is None
    path.write_bytes(b"half a file")
    assert Cache(path, "a").load() is None


LENGTH, VOCAB, HEAD_DIM = 24, 40, 96


def copying_teacher(*, plant=True):
    """Two layers of two heads. Layer 0's head 0 looks one token back and writes what stands there into a
    second half of the stream; layer 1's head 0 looks for the current token there: an induction head.
    All other heads are random. Channels: current token, previous token, a constant."""
    width = 2 * VOCAB + 8
    config = TeacherConfig(
        num_hidden_layers=2,
        hidden_size=width,
        intermediate_size=8,
        vocab_size=VOCAB,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-6,
        # Pairs 0..2 turn with the position, pairs from 4 on stand still over a hundred tokens.
        rope_theta=1e36,
        tie_word_embeddings=False,
        attention_bias=True,
        model_type="qwen2",
    )
    generator = torch.Generator().manual_seed(1)
    values = {
        name: torch.randn(shape, generator=generator) * 0.3 if ".self_attn." in name else torch.zeros(shape)
        for name, shape in expected_tensors(config).items()
    }
    for name in values:
        if name.endswith(("layernorm.weight", "norm.weight")):
            values[name] = torch.ones_like(values[name])
        if ".o_proj." in name:
            values[name] = torch.zeros_like(values[name])
    embedding = values["model.embed_tokens.weight"]
    embedding[:, :VOCAB] = torch.eye(VOCAB)
    values["lm_head.weight"] = embedding.clone()
    if plant:
        _plant_previous_token(values)
        _plant_lookup(values)
    return Model(config, {name: literal(x) for name, x in values.items()}, "planted", {"bos_token_id": VOCAB - 1})


def _plant_previous_token(values):
    name, half = "model.layers.0.self_attn", HEAD_DIM // 2
    for part in ("q", "k", "v"):
        values[f"{name}.{part}_proj.weight"][:HEAD_DIM] = 0
        values[f"{name}.{part}_proj.bias"][:HEAD_DIM] = 0
    # The query is the key turned one position back, so that q.k is highest at distance 1.
    for pair in range(3):
        angle = torch.tensor(1e36 ** (-pair / half))
        values[f"{name}.k_proj.bias"][pair] = 20.0
        values[f"{name}.q_proj.bias"][pair] = 20.0 * angle.cos()
        values[f"{name}.q_proj.bias"][pair + half] = -20.0 * angle.sin()
    for token in range(VOCAB):
        values[f"{name}.v_proj.weight"][token, token] = 1.0
        values[f"{name}.o_proj.weight"][VOCAB + token, token] = 1.0


def _plant_lookup(values):
    name, half = "model.layers.1.self_attn", HEAD_DIM // 2
    for part in ("q", "k"):
        values[f"{name}.{part}_proj.weight"][:HEAD_DIM] = 0
        values[f"{name}.{part}_proj.bias"][:HEAD_DIM] = 0
    for token in range(VOCAB):
        channel = 6 + token if token < 40 else 6 + half + token - 40
        values[f"{name}.q_proj.weight"][channel, token] = 5.0
        values[f"{name}.k_proj.weight"][channel, VOCAB + token] = 5.0


def test_retrieval_finds_a_planted_copying_head():
    found = retrieval.retrieval(copying_teacher(), None, length=LENGTH)
    assert found.heads[1][0] > 0.95
    chance = 1 / LENGTH
    others = [found.heads[0][0], found.heads[0][1], found.heads[1][1]]
    assert max(others) < 4 * chance
    assert found.scores[1] > 0.95
    assert found.scores[0] < 4 * chance
    assert found.warnings == ()


def test_retrieval_without_the_planted_head_is_at_chance_and_says_so():
    found = retrieval.retrieval(copying_teacher(plant=False), None, length=LENGTH)
    assert max(max(row) for row in found.heads) < 0.1
    assert "no head copies" in found.warnings[0]


def test_retrieval_sequences():
    text = np.arange(500) % 17
    ids, expected = retrieval.sequences(VOCAB, text, separator=39, seed=3, length=LENGTH, count=4)
    assert ids.shape == (4, 2 * LENGTH + 1)
    assert (ids[:, LENGTH] == 39).all()
    assert torch.equal(ids[:, :LENGTH], ids[:, LENGTH + 1 :])
    assert (ids[:2, :LENGTH] != 39).all()
    assert all(len(set(row.tolist())) == LENGTH for row in ids[:2, :LENGTH])  # random halves repeat nothing
    assert (expected[:, : LENGTH + 1] == -1).all()
    for row, wanted in zip(ids, expected, strict=True):
        for t in range(LENGTH + 1, 2 * LENGTH + 1):
            seen = [i for i in range(LENGTH) if row[i] == row[t]]
            assert int(wanted[t]) == (seen[0] + 1 if len(seen) == 1 else -1)
    assert (expected[2:] == -1).sum() > (expected[:2] == -1).sum()  # text repeats tokens
    again = retrieval.sequences(VOCAB, text, separator=39, seed=3, length=LENGTH, count=4)
    assert torch.equal(ids, again[0])
    with pytest.raises(HxaconvError, match="at least 24"):
        retrieval.sequences(VOCAB, text[:9], separator=39, length=LENGTH)


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
    found = score_log(read_log(sound_log(tmp_path / "log.csv")), NUM_LAYERS)
    assert found.values == pytest.approx(expected, abs=1e-7)  # the file has nine digits
    assert found.warnings == ()


def test_the_known_fault_is_detected_mapped_and_told(tmp_path):
    """Rows of 2L+1 numbers under 3L+1 names: read by position, the scales become scaled errors."""
    steps, raw, scale = log_rows()
    rows = [[s, *r, *c] for s, r, c in zip(steps, raw, scale, strict=True)]
    faulty = score_log(read_log(write_log(tmp_path / "faulty.csv", rows)), NUM_LAYERS)
    sound = score_log(read_log(sound_log(tmp_path / "sound.csv")), NUM_LAYERS)
    assert faulty.values == sound.values
    assert "known fault" in faulty.warnings[0]
    # Spreadsheets pad the short rows with empty cells.
    padded = "\n".join(
        line if line.startswith("step") else line + "," * NUM_LAYERS
        for line in (tmp_path / "faulty.csv").read_text().splitlines()
    )
    (tmp_path / "padded.csv").write_text(padded)
    assert score_log(read_log(tmp_path / "padded.csv"), NUM_LAYERS).values == sound.values


def test_columns_go_by_the_layer_in_their_name(tmp_path):
    """Layers as text sort 10 before 2; a log written in that order gives the same scores."""
    order, (steps, raw, scale) = [3, 0, 4, 2, 1], log_rows()
    rows = [[s, *r[order], *(r * c)[order], *c[order]] for s, r, c in zip(steps, raw, scale, strict=True)]
    shuffled = read_log(write_log(tmp_path / "a.csv", rows, header(order)))
    by_position = read_log(write_log(tmp_path / "b.csv", rows, header()))
    sound = score_log(read_log(sound_log(tmp_path / "c.csv")), NUM_LAYERS)
    assert score_log(shuffled, NUM_LAYERS).values == sound.values
    assert score_log(by_position, NUM_LAYERS).values != pytest.approx(sound.values, abs=1e-3)


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
    assert len(log.warnings) == 3
    with pytest.raises(HxaconvError, match="layers up to 4, the model has 3"):
        score_log(log, 3)
    part = score_log(log, 7)
    assert part.values[5:] == (None, None)
    assert "layers [5, 6]" in part.warnings[-1]
    (tmp_path / "no.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(HxaconvError, match=r"no column layer_\{i\}_rawMSE"):
        read_log(tmp_path / "no.csv")
    (tmp_path / "one.csv").write_text("\n".join(lines[:2]))
    with pytest.raises(HxaconvError, match="at least 2"):
        read_log(tmp_path / "one.csv")


def test_log_advice(tmp_path):
    advice = advise(7, Request(strategy="log", count=2), log=sound_log(tmp_path / "log.csv"))
    assert set(advice.pick.layers) <= {1, 2, 3, 4}  # never layer 0, never one without columns
    assert advice.pick.rules.max_consecutive == 2
    assert advice.pick.rules.wide_gap == 8
    assert advise(7, Request(strategy="log", count=2), log=tmp_path / "log.csv") == advice


def test_uncalibrated_students_are_found_and_warned_about(teacher, student, ids):
    config = student_of(teacher.config, ())
    settings = InitSettings(PRESETS["openmose-stage1"], 0, "BF16")
    fresh = Model(config, init_from_teacher(teacher.plan, config, settings), "fresh")
    assert untouched_layers(fresh) == (0, 1, 2, 3, 4, 5)
    assert untouched_layers(student) == ()
    asked = Request(strategy="kl", count=2)
    warned = advise(6, asked, teacher=teacher, student=fresh, ids=ids)
    assert any("MISLEAD" in w and "hxaconv calibrate" in w for w in warned.warnings)
    assert not any("initial values" in w for w in advise(6, asked, teacher=teacher, student=student, ids=ids).warnings)


def test_random_tokens_are_warned_about(teacher, ids):
    asked = Request(strategy="influence", count=2)
    assert advise(6, asked, teacher=teacher, ids=ids).warnings == ()
    assert "real text" in advise(6, replace(asked, tokens_are_text=False), teacher=teacher, ids=ids).warnings[0]


def test_what_strategies_need(teacher):
    assert needs("uniform") == frozenset()
    assert needs("kl") == {"teacher", "student", "tokens"}
    with pytest.raises(HxaconvError, match="kl needs: student, tokens"):
        advise(6, Request(strategy="kl"), teacher=teacher)
    with pytest.raises(HxaconvError, match="unknown strategy 'best'"):
        advise(6, Request(strategy="best"))


def test_pick_uniform_and_last():
    assert advise(44, Request()).pick.layers == (8, 15, 22, 29, 36, 43)
    assert advise(44, Request(strategy="last", count=3)).pick.layers == (41, 42, 43)
    with pytest.raises(HxaconvError, match="has no scores"):
        advise(44, Request(rules=Rules(min_gap=3)))
    with pytest.raises(HxaconvError, match="between 1 and 43"):
        advise(44, Request(count=44))


def test_scores_of_layers_that_cannot_be_picked_do_not_count():
    column = Column("kl", (100.0, 1.0, 2.0, 3.0))
    found = pick("kl", 4, 1, column)
    assert found.scores == (None, 0.0, 0.5, 1.0)
    assert pick("kl", 4, 1, column, allow_layer_0=True).layers == (0,)
    assert pick("entropy", 4, 1, Column("entropy", (0.0, 0.2, 0.9, 0.4))).layers == (1,)  # sharp heads stay
    with pytest.raises(HxaconvError, match="layers 2 is not a finite number"):
        check_finite(Column("kl", (0.0, 1.0, float("nan"))))


def test_report(teacher, student, ids, tmp_path):
    advice = advise(6, Request(strategy="kl", count=2), teacher=teacher, student=student, ids=ids)
    text = "\n".join(report.summary(advice))
    assert f"GQA layers (2 of 6): {', '.join(map(str, advice.pick.layers))}" in text
    assert "of 2 in common" in text
    assert "kl total" in text
    bars, letters = report.strip(advice)
    assert letters[6:] == "".join("G" if i in advice.pick.layers else "R" for i in range(6))
    assert len(bars) == len(letters)
    data = json.loads(json.dumps(report.to_json(advice)))
    assert data["gqa_layers"] == list(advice.pick.layers)
    assert set(data["scores"]) == {"kl", "mse", "influence", "entropy", "distance"}
    chosen = report.layer_map(advice, teacher.config, name="mine")
    (tmp_path / "mine.toml").write_text(report.layer_map_text(advice, chosen, date="2025-01-31"), encoding="utf-8")
    assert layer_maps.parse_layers(str(tmp_path / "mine.toml"), 6) == advice.pick.layers
    assert "2025-01-31" in (tmp_path / "mine.toml").read_text()
    assert layer_maps.fits(layer_maps.load(tmp_path / "mine.toml"), teacher.config)


def test_table_shows_every_layer_and_fits(teacher, ids):
    from rich.console import Console

    advice = advise(6, Request(strategy="influence", count=2), teacher=teacher, ids=ids)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.table(advice))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.strip()[:1].isdigit() for line in lines) == 6


def test_plot(teacher, ids, tmp_path):
    pytest.importorskip("matplotlib")
    advice = advise(6, Request(strategy="influence", count=2), teacher=teacher, ids=ids)
    for name in ("a.png", "b.png"):
        report.plot(advice, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(HxaconvError, match="cannot be written"):
        report.plot(advice, tmp_path / "no" / "folder.png")
