"""Negative controls: the mistakes this architecture invites, each made on purpose in one of two students."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

from models import expected, student

from hxaconv.forward import hxa079, walk
from hxaconv.model.model import Model
from hxaconv.model.variants import hxa079 as formula
from hxaconv.surgery.arithmetic import computed, tensor
from hxaconv.verification.compare import Compute, compare_models

R, K = 'm.rope(m.heads("receptance", "r_norm"))', 'm.rope(m.heads("key", "k_norm"))'
KEEP_FIRST = "m.first(v, k)  # k after norm and RoPE"
FORMULA = "config.variant.time_mix("


@dataclass(frozen=True)
class Fault:
    """A mistake: in the forward's or the formula's text, the config, or a weight; `layer` is the first that differs."""

    name: str
    case: str
    layer: int
    edits: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, float], ...] = ()
    swapped: str = ""
    """A kv projection whose first two heads change places."""

    def module(self) -> ModuleType:
        """The reference forward with the mistake in it."""
        texts = [Path(str(module.__file__)).read_text() for module in (hxa079, formula)]
        for old, new in ((FORMULA, "time_mix_of_variant("), *self.edits):
            assert sum(text.count(old) for text in texts) == 1, f"{old!r} does not stand once in {texts}"
            texts = [text.replace(old, new) for text in texts]
        forward, mixer = types.ModuleType("faulty"), types.ModuleType("faulty_formula")
        sys.modules["faulty"] = forward  # dataclasses look their module up
        for module, text in zip((forward, mixer), texts, strict=True):
            exec(compile(text, module.__name__, "exec"), vars(module))
        vars(forward)["time_mix_of_variant"] = mixer.time_mix
        return forward

    def model(self, model: Model) -> Model:
        """The model with the mistake in its config or weights."""
        config = dataclasses.replace(model.student, **dict(self.settings))
        plan = dict(model.plan)
        if self.swapped:
            recipe, size = plan[self.swapped], config.head_dim
            order = [*range(size, 2 * size), *range(size), *range(2 * size, recipe.shape[0])]
            make: Callable[[], object] = lambda: tensor(recipe)[order]  # noqa: E731
            plan[self.swapped] = computed(make, recipe.dtype, recipe.shape, "two kv heads swapped")  # type: ignore[arg-type]
        return Model(config, plan, f"{model.label}, {self.name}")


REKA, QWEN = "reka_tiny", "qwen3_tiny"
"""RWKV layers 0, 1, 3 of 5; RWKV layers 0, 2 of 4, with q/k norm."""

ROPE_IN_GQA = (
    "    if index in carry.caches:\n",
    """\
    seats = torch.arange(q.shape[1])
    q, k = rotate(q, seats, config.rope), rotate(k, seats, config.rope)
    if index in carry.caches:
""",
)
HXA07C = ("scale = (-w.exp()).exp() if by_decay else w", "scale = (-w.exp()).exp()")
WRONG_FIRST = (
    "        v = v + (v_first",
    (
        "        m.carry.v_first = v_first = v if m.index == m.config.rwkv_layers[1] else v_first\n"
        "        v = v + (v_first"
    ),
)
TILED = (
    "        return x.repeat_interleave(self.config.num_attention_heads // self.config.num_key_value_heads, dim=2)\n",
    "        return x.repeat(1, 1, self.config.num_attention_heads // self.config.num_key_value_heads, 1)\n",
)
NO_ROPE = ((R, 'm.heads("receptance", "r_norm")'), (K, 'm.heads("key", "k_norm")'))

FAULTS = (
    Fault("RoPE left on in GQA layers", REKA, 2, (ROPE_IN_GQA,)),
    Fault("RoPE left on in GQA layers", QWEN, 1, (ROPE_IN_GQA,)),
    Fault("RoPE off in RWKV layers", REKA, 0, NO_ROPE),
    Fault("RoPE off in RWKV layers", QWEN, 0, NO_ROPE),
    Fault(
        "k_first taken before norm",
        QWEN,
        0,
        ((KEEP_FIRST, 'm.first(v, m.rope(m.heads("key")))'),),
    ),
    Fault(
        "k_first taken before RoPE",
        REKA,
        0,
        ((KEEP_FIRST, 'm.first(v, m.heads("key", "k_norm"))'),),
    ),
    Fault("v_first from the second RWKV layer", REKA, 1, (WRONG_FIRST,)),
    Fault("v_first from the second RWKV layer", QWEN, 2, (WRONG_FIRST,)),
    Fault("k scaled with the decay (hxa07c)", REKA, 0, (HXA07C,)),
    Fault("k scaled with the decay (hxa07c)", QWEN, 0, (HXA07C,)),
    Fault("kv heads tiled, not interleaved", REKA, 0, (TILED,)),
    Fault("bonus scaled by head_dim**-0.5", REKA, 0, (("+ bonus  #", "+ bonus * m.config.head_dim**-0.5  #"),)),
    Fault("two kv heads swapped in key of layer 3", REKA, 3, swapped="model.layers.3.self_attn.key.weight"),
    Fault("two kv heads swapped in v_proj of layer 2", REKA, 2, swapped="model.layers.2.self_attn.v_proj.weight"),
    Fault("rms_norm_eps 1e-6 for 1e-5", REKA, 0, settings=(("rms_norm_eps", 1e-6),)),
    Fault("rms_norm_eps 1e-5 for 1e-6", QWEN, 0, settings=(("rms_norm_eps", 1e-5),)),
    Fault("rope_theta 1e6 for 8e6", REKA, 0, settings=(("rope_theta", 1e6),)),
)


@dataclass(frozen=True)
class Effect:
    """What a mistake does: largest difference from the golden logits, KL in nats per token, layer that is named."""

    max_difference: float
    kl: float
    first_layer: int | None


def measure(fault: Fault) -> Effect:
    """Verify the faulty student against the right one on the golden tokens, in float64."""
    right = student(fault.case)
    wrong, ids = fault.model(right), expected(fault.case)["input_ids"]
    plain = walk.reference_of
    with mock.patch.object(walk, "reference_of", lambda m: fault.module() if m is wrong else plain(m)):
        report = compare_models(wrong, right, ids=ids, expect="report", how=Compute("float64"))
    assert report.logits is not None
    return Effect(report.logits.max_difference, report.logits.kl_other_source, report.first_difference)
