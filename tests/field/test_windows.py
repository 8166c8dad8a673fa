"""What each family's class of transformers makes of a window and of tying: ours is refused where its logits change."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from hxaconv.model.families import FAMILIES

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
FULL, SLIDING = "full_attention", "sliding_attention"
KEYS: list[dict[str, Any]] = [
    {},
    {"sliding_window": None},
    {"sliding_window": 4},
    {"sliding_window": 64},
    {"sliding_window": 4, "use_sliding_window": False},
    {"sliding_window": 4, "use_sliding_window": True},
    {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0},
    {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2},
    {"sliding_window": 4, "max_window_layers": 28},
    {"sliding_window": 4, "layer_types": [FULL, FULL]},
    {"sliding_window": 4, "use_sliding_window": True, "layer_types": [FULL, FULL]},
    {"sliding_window": 4, "use_sliding_window": True, "layer_types": [FULL, SLIDING]},
    {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": None},
]


def logits(family: str, keys: dict[str, Any]) -> torch.Tensor | None:
    """The last logits of a small random model at 24 tokens; None where transformers cannot run it."""
    config = transformers.AutoConfig.for_model(family, **SIZES, **keys)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        try:
            return model(torch.arange(24)[None] % 31 + 1).logits[0, -1]
        except (TypeError, ValueError):
            return None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_is_in_force_exactly_where_transformers_obeys_it(family: str) -> None:
    wide = {"sliding_window": 64} if family in ("mistral", "phi3") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        full = logits(family, wide)
        assert full is not None
        for keys in KEYS:
            found, raw = logits(family, keys), {"model_type": family, **SIZES, **keys}
            obeyed = found is None or not torch.equal(found, full)
            assert (FAMILIES[raw["model_type"]].window(raw) is not None) == obeyed, keys


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_tied_without_a_word_exactly_where_transformers_ties_it(family: str) -> None:
    assert transformers.AutoConfig.for_model(family).tie_word_embeddings == FAMILIES[family].ties


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("keys", [{}, {"sliding_window": 4}, {"sliding_window": 4, "use_sliding_window": False}])
def test_transformers_runs_no_model_whose_layer_types_name_a_window_that_is_off(family: str, keys: Any) -> None:
    keys = keys | {"layer_types": [FULL, SLIDING]}
    assert logits(family, keys) is None
    assert "use_sliding_window is not true" in str(FAMILIES[family].window({**SIZES, **keys}))
    assert logits(family, keys | {"layer_types": [FULL, FULL]}) is not None


def test_mistral_has_a_window_where_config_json_has_no_such_key() -> None:
    raw = {"model_type": "mistral", "max_position_embeddings": 8192}
    assert transformers.AutoConfig.for_model("mistral").sliding_window == 4096
    assert "4096" in str(FAMILIES[raw["model_type"]].window(raw))
    assert FAMILIES[raw["model_type"]].window({**raw, "sliding_window": None}) is None
