"""Every variant's formula against vectors that its published code computed; where they are from: docs/variants.md."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hxaconv.forward import hxa079 as student
from hxaconv.model.architecture import expected_tensors
from hxaconv.model.config import StudentConfig
from hxaconv.model.rope import RopeScaling
from hxaconv.model.variants import VARIANTS, hxa07b, hxa07e
from hxaconv.model.variants.base import Ranks
from hxaconv.save.documents import student_json

GOLDEN = Path(__file__).parent / "variants"
NAMES = ("hxa079", "hxa07a", "hxa07b", "hxa07c", "hxa07d", "hxa07e")
LAYERS = 3


def config_of(variant: str) -> StudentConfig:
    """That of the vectors: 4 heads over 2 kv heads of 6 channels, A = 24 in a model of width 20, norms, biases."""
    return StudentConfig(
        num_hidden_layers=LAYERS,
        hidden_size=20,
        intermediate_size=32,
        vocab_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=False,
        qk_norm=True,
        attention_bias=True,
        rwkv_architecture=variant,
        gqa_layers=(),
        ranks=Ranks(decay=5, iclr=4, value=3, key=4, gate=7, own_value=3),
        layer_records=False,
    )


def mixed(config: StudentConfig, vectors: dict[str, Tensor]) -> list[Tensor]:
    """What the reference forward makes of the inputs of every layer."""
    carry = student.Carry()

    def get(name: str) -> Tensor:
        return vectors[name.removeprefix("model.").replace("self_attn.", "")].double()

    return [student.mixer(vectors[f"x.{i}"], get, config, i, carry) for i in range(LAYERS)]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NAMES)
def test_the_formula_is_the_published_one(name: str) -> None:
    vectors = load_file(GOLDEN / f"{name}.safetensors")
    for layer, found in enumerate(mixed(config_of(name), vectors)):
        # float64 on both sides; sums differ in order only, and 1e-12 stands beside a norm or below it.
        assert relative(found, vectors[f"y.{layer}"]) <= 1e-9
    shapes = config_of(name).variant.shapes(config_of(name))
    stored = {key.removeprefix("layers.0."): tuple(value.shape) for key, value in vectors.items() if "layers.0." in key}
    assert shapes == {key: shape for key, shape in stored.items() if key in shapes}


NEIGHBOURS = [("hxa079", "hxa07d"), ("hxa07a", "hxa07b"), ("hxa07b", "hxa07c"), ("hxa07a", "hxa07c")]


@pytest.mark.parametrize(("name", "other"), [*NEIGHBOURS, *((b, a) for a, b in NEIGHBOURS)])
def test_a_neighbours_formula_gives_something_else(name: str, other: str) -> None:
    vectors = load_file(GOLDEN / f"{name}.safetensors")
    needed = {f"layers.{i}.{key}" for i in range(LAYERS) for key in VARIANTS[other].required}
    # A low-rank term that a variant lacks is given it as its neighbour's vectors have it.
    lent = load_file(GOLDEN / f"{other}.safetensors")
    found = mixed(config_of(other), {key: lent[key] for key in needed - vectors.keys()} | vectors)
    assert min(relative(y, vectors[f"y.{i}"]) for i, y in enumerate(found)) > 1e-3


def test_hxa07e_is_not_hxa07b_in_its_own_term_of_v(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = load_file(GOLDEN / "hxa07e.safetensors")
    monkeypatch.setattr(hxa07e, "VALUE_SCALE", hxa07b.VALUE_SCALE)
    found = mixed(config_of("hxa07e"), vectors)
    assert min(relative(y, vectors[f"y.{i}"]) for i, y in enumerate(found)) > 1e-3


def test_published_ranks_are_those_of_the_trainer() -> None:
    for name, by_width in json.loads((GOLDEN / "ranks.json").read_text()).items():
        ranks = VARIANTS[name].ranks
        assert ranks is not None
        for width, expected in by_width.items():
            found = ranks(int(width))
            assert {key: getattr(found, key) for key in VARIANTS[name].rank_names} == expected


@pytest.mark.parametrize("name", [name for name in NAMES if VARIANTS[name].ranks is not None])
def test_initial_biases_are_those_of_the_trainer(name: str) -> None:
    vectors, config = load_file(GOLDEN / f"{name}.safetensors"), config_of(name)
    initial = {parameter.name: parameter.initial for parameter in VARIANTS[name].parameters}
    for layer, key in itertools.product(range(LAYERS), ("w0", "a0")):
        formula = initial[key]
        assert isinstance(formula, Callable)
        # The trainer adds float32 numbers up.
        assert torch.allclose(formula(config, layer).float(), vectors[f"initial.{layer}.{key}"], atol=1e-5)
    assert not torch.allclose(initial["w0"](config, 0), initial["w0"](config, 1))
    assert replace(config, gqa_layers=(0,)).rwkv_layers == (1, 2)


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SCALINGS = {
    "default": None,
    "linear": RopeScaling(rope_type="linear", factor=3.0),
    "llama3": RopeScaling(rope_type="llama3", factor=8.0, **LLAMA3),  # type: ignore[arg-type]
    "yarn": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
}


def random_student(name: str, scaling: RopeScaling | None = None) -> tuple[StudentConfig, dict[str, Tensor]]:
    """A whole model with a GQA layer, and float64 weights of which none is zero."""
    config = replace(config_of(name), gqa_layers=(1,), rope_scaling=scaling, layer_records=name == "hxa079")
    generator = torch.Generator().manual_seed(3)
    weights = {
        key: torch.randn(shape, generator=generator, dtype=torch.float64) * (0.3 if len(shape) == 2 else 1.0)
        for key, shape in expected_tensors(config).items()
    }
    return config, weights


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "default") for name in NAMES), *(("hxa079", kind) for kind in SCALINGS)]
)
def test_the_modelling_code_agrees(name: str, kind: str) -> None:
    pytest.importorskip("transformers")
    from hxaconv.model.hf.configuration_hxa079 import Hxa079Config
    from hxaconv.model.hf.modeling_hxa079 import Hxa079ForCausalLM

    config, weights = random_student(name, SCALINGS[kind])
    raw = student_json(config, {}, "F32")
    model = Hxa079ForCausalLM(Hxa079Config(**raw)).double().eval()
    model.load_state_dict(weights)
    ids = torch.randint(config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids).logits
    expected, _ = student.forward(ids, weights.__getitem__, config)
    assert relative(found, expected) <= 1e-6  # RMSNorm and states stand in float32 or better there
    again = Hxa079Config.from_dict(json.loads(model.config.to_json_string()))
    assert again.rope_stretch == (SCALINGS[kind].to_dict() if SCALINGS[kind] else None)  # type: ignore[union-attr]
    if kind != "default":
        plain, _ = student.forward(ids, weights.__getitem__, replace(config, rope_scaling=None))
        assert relative(plain, expected) > 1e-3
