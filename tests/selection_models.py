"""Teachers and students for the tests of layer selection."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from models import Literal

from hxaconv.calibration.streaming import calibrate
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import TeacherConfig, student_of
from hxaconv.model.model import Model
from hxaconv.model.plan import Recipe
from hxaconv.options import Choice, Fit
from hxaconv.selection.advice import advise
from hxaconv.selection.strategies import Given
from hxaconv.surgery.arithmetic import tensor
from hxaconv.surgery.init import PRESETS, InitSettings, init_from_teacher

TEACHER = Path(__file__).resolve().parent.parent / "hxaconv" / "commands" / "embedded" / "teacher"


def literal(values, dtype="F32"):
    values = values.to(torch.float32).contiguous()
    return Recipe(dtype, tuple(values.shape), Literal(values.numpy().tobytes()), "made for a test")


def advised(teacher=None, student=None, ids=None, *, num_layers=6, log=None, are_text=True, more=(), **choice):
    """Advice; `more` are further fields of Given."""
    found = {"teacher": teacher, "student": student, "ids": ids, "are_text": are_text, "log": log, **dict(more)}
    given = Given(num_layers=num_layers, **found)
    return advise(Choice(**choice), given)


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


LENGTH, VOCAB, HEAD_DIM = 24, 40, 96


def planted_config(num_layers, hidden_size):
    return TeacherConfig(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
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


def copying_teacher(*, plant=True):
    """Two layers of two heads. Layer 0's head 0 looks one token back and writes what stands there into a
    second half of the stream; layer 1's head 0 looks for the current token there: an induction head.
    All other heads are random. Channels: current token, previous token, a constant."""
    config = planted_config(2, 2 * VOCAB + 8)
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


def induction_teacher(seed, num_layers=8):
    """(a teacher with induction circuits, the layers that look up): layers drawn, all other heads random.

    One layer writes the previous token beside each token. Two later ones look up what followed the current token, one
    for even and one for odd tokens, and say it. What the other heads write goes to channels of its own, and moves the
    distribution but not what is copied. Channels: current token, previous token, the answer, noise.
    """
    random, noise = torch.Generator().manual_seed(seed), 32
    first, *lookups = sorted((torch.randperm(num_layers - 1, generator=random)[:3] + 1).tolist())
    config = planted_config(num_layers, 3 * VOCAB + noise)
    values = {name: torch.zeros(shape) for name, shape in expected_tensors(config).items()}
    for name, value in values.items():
        if name.endswith("norm.weight"):
            value.fill_(1.0)
        elif ".o_proj.weight" in name:
            value[-noise:] = torch.randn(noise, value.shape[1], generator=random) * 0.05
        elif ".self_attn." in name:
            value.copy_(torch.randn(value.shape, generator=random) * 0.1)
    values["model.embed_tokens.weight"][:, :VOCAB] = torch.eye(VOCAB)
    values["lm_head.weight"][:, 2 * VOCAB : 3 * VOCAB] = torch.eye(VOCAB) * 2
    values["lm_head.weight"][:, -noise:] = torch.randn(VOCAB, noise, generator=random) * 0.1
    _plant_previous_token(values, first)
    for start, layer in enumerate(lookups):
        _plant_lookup(values, layer, range(start, VOCAB, 2))
        name = f"model.layers.{layer}.self_attn"
        values[f"{name}.v_proj.weight"][:HEAD_DIM] = 0
        values[f"{name}.v_proj.bias"][:HEAD_DIM] = 0
        for token in range(VOCAB):
            values[f"{name}.v_proj.weight"][token, token] = 1.0
            values[f"{name}.o_proj.weight"][2 * VOCAB + token, token] = 1.0
    plan = {name: literal(value) for name, value in values.items()}
    return Model(config, plan, f"planted {seed}", {"bos_token_id": VOCAB - 1}), tuple(lookups)


def induction_ids(seed, rows=4):
    """Random tokens, said twice in every row of 64."""
    once = np.random.default_rng(seed).integers(0, VOCAB, (rows, 32))
    return np.concatenate([once, once], axis=1)


def calibrated_student(teacher, seed, steps=5):
    """Every layer RWKV, fitted in a moment."""
    config = student_of(teacher.config, ())
    plan = init_from_teacher(teacher.plan, config, InitSettings(PRESETS["openmose-stage2"], 0, "F32"))
    student, ids = Model(config, plan, "student"), torch.from_numpy(induction_ids(seed + 1000, 8))
    return replace(student, plan={**plan, **calibrate(teacher, student, ids, Fit(refine_steps=steps)).replaced})


def _plant_previous_token(values, layer=0):
    name, half = f"model.layers.{layer}.self_attn", HEAD_DIM // 2
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


def _plant_lookup(values, layer=1, tokens=range(VOCAB)):
    name, half = f"model.layers.{layer}.self_attn", HEAD_DIM // 2
    for part in ("q", "k"):
        values[f"{name}.{part}_proj.weight"][:HEAD_DIM] = 0
        values[f"{name}.{part}_proj.bias"][:HEAD_DIM] = 0
    for token in tokens:
        channel = 6 + token if token < 40 else 6 + half + token - 40
        values[f"{name}.q_proj.weight"][channel, token] = 5.0
        values[f"{name}.k_proj.weight"][channel, VOCAB + token] = 5.0
