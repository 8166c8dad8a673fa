"""Teachers and students for the tests of layer selection."""

from pathlib import Path

import torch

from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import TeacherConfig, student_of
from hxaconv.model.model import Model
from hxaconv.model.plan import Literal, Recipe
from hxaconv.options import Choice
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
