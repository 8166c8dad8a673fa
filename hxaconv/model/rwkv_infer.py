"""Which stored release of RWKV-Infer takes what, and with which strategy: one table, for the lint and for `/loadmodel`.

Source: `benchmarks/rwkv_infer.py` ran every commit below on small models, in both strategies, a prompt at once and its
last token after the others: the release's own Python, on a CPU, its kernels replaced by torch of the same contract,
tensors that it leaves on the CPU beside a GPU refused. So "takes" means that its loader and its formulas give the
logits of the modelling code; how its kernels behave on a GPU was not tried. https://github.com/OpenMOSE/RWKV-Infer
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hxaconv.model.config import StudentConfig
from hxaconv.model.names import HEAD, is_expert, layer_kinds
from hxaconv.model.plan import Plan

FOLDER, PTH = "folder", ".pth"

WIDE, BIASES, TIED, FIRST, EXPERTS, MIXED = "wide heads", "biases", "tied", "attention first", "experts", "mixed"
TRAITS = {
    WIDE: "heads x head_dim is not hidden_size",
    BIASES: "q, k and v have biases, and attention layers stand between RWKV layers",
    TIED: "the head is not stored, being the embedding",
    FIRST: "layer 0 is attention",
    EXPERTS: "it has experts",
    MIXED: "some layers have experts, others one MLP",
    "hxa07a": "it is hxa07a",
}
"""What a model may have that some releases fail on."""


@dataclass(frozen=True, slots=True)
class Releases:
    """Commits that behave alike."""

    commits: tuple[str, ...]
    days: str
    takes: Mapping[str, tuple[str, ...]]
    """FOLDER or PTH -> the strategies that work, the one to prefer first."""
    fails: frozenset[str] = frozenset()
    """The traits that it fails on."""
    why: str = ""
    """What is wrong where a kind of file is not taken at all."""

    @property
    def name(self) -> str:
        """`7684d07 to 4e29bea (2025-08-25 to 2025-09-06)`."""
        return " to ".join(dict.fromkeys((self.commits[0], self.commits[-1]))) + f" ({self.days})"


NEVER = frozenset({EXPERTS, MIXED, "hxa07a"})
_NO_FOLDER = "folders end in KeyError: 'emb.weight'"
_NO_BF16 = "strategy bf16 ends in ValueError: not enough values to unpack"
_NO_PTH = "a .pth ends in AttributeError: no attribute 'tie_word_embeddings'"
_NO_CONTEXT = "attention leaves out the tokens of the call at hand; folders end in a KeyError"
_OTHER_LOGITS = "int8 gives other logits (its log calls that an attention numerical issue), bf16 ends in a ValueError"
_INT8, _BOTH = ("int8",), ("bf16", "int8")
_EARLY, _LATE = NEVER | {WIDE, FIRST}, NEVER | {WIDE, BIASES, TIED}
_AUGUST = frozenset({WIDE, BIASES, TIED, MIXED, "hxa07a"})
TABLE = (
    Releases(("309d06e", "f222cc2", "1146ed2", "9274f0f"), "2025-07-06 to 2025-07-13", {}, why=_NO_CONTEXT),
    Releases(("ca5d432",), "2025-07-14", {PTH: ("bf16",)}, _EARLY, _NO_FOLDER),
    Releases(("c46bbbf", "d1e2cfa", "b53f9a5"), "2025-07-15 to 2025-07-27", {PTH: _BOTH}, _EARLY, _NO_FOLDER),
    Releases(("a1e7fab", "9f65f1c"), "2025-08-12 to 2025-08-14", {PTH: _INT8, FOLDER: _INT8}, _AUGUST, _NO_BF16),
    Releases(("7a56c15", "7464a50", "c7baba7"), "2025-08-18 to 2025-08-21", {}, why=_OTHER_LOGITS),
    Releases(
        ("7684d07", "6b8ca03", "4e29bea"), "2025-08-25 to 2025-09-06", {PTH: _INT8, FOLDER: _INT8}, _LATE, _NO_BF16
    ),
    Releases(("dc98a2a", "c7f82d9"), "2025-09-16", {FOLDER: _BOTH}, _LATE, _NO_PTH),
    Releases(("4947a78", "e45f11c"), "2025-10-17", {FOLDER: _BOTH}, frozenset({EXPERTS, MIXED}), _NO_PTH),
    Releases(
        *(("5baa490",), "2025-10-22", {FOLDER: ("bf16",)}, frozenset({EXPERTS, MIXED})),
        f"{_NO_PTH}; int8 leaves MLPs on the CPU",
    ),
)
"""All stored releases that know hxa079 and take rope_theta, the oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A folder of `rwkvengine/` with a tokenizer and a chat template."""

    name: str
    endtoken: str
    vocab_size: int
    hidden_size: int | None = None
    qk_norm: bool | None = None


TEMPLATES = (
    Template(name="rekaflash3", endtoken="\n <sep>", vocab_size=100352, hidden_size=6144),
    Template(name="phi4", endtoken="<|im_end|>", vocab_size=100352, hidden_size=5120),
    Template(name="qwen3", endtoken="<|im_end|>", vocab_size=151936, qk_norm=True),
    Template(name="qwen", endtoken="<|im_end|>", vocab_size=151936, qk_norm=False),
    Template(name="qwen", endtoken="<|im_end|>", vocab_size=152064, qk_norm=False),
    Template(name="mistralsmall3", endtoken="</s>", vocab_size=131072, hidden_size=5120),
    Template(name="seed-oss", endtoken="<seed:eos>", vocab_size=155136),
)
"""Tokenizers that come with RWKV-Infer, by what their models have; Reka's end token is that of its own script."""


def traits_of(plan: Plan, rwkv_architecture: str | None) -> tuple[str, ...]:
    """The traits of a student, read off its tensors; canonical names."""
    kinds = layer_kinds(plan)
    gqa = [layer for layer, kind in kinds.items() if kind == "gqa"]
    rwkv = [layer for layer, kind in kinds.items() if kind == "rwkv"]
    wide = any(name.endswith(".receptance.weight") and r.shape[0] != r.shape[1] for name, r in plan.items())
    biased = any(name.endswith((".receptance.bias", ".q_proj.bias")) for name in plan)
    experts = any(map(is_expert, plan))
    found = {
        WIDE: wide,
        BIASES: biased and bool(gqa) and bool(rwkv) and min(gqa) < max(rwkv),
        TIED: HEAD not in plan,
        FIRST: kinds.get(0) == "gqa",
        EXPERTS: experts,
        MIXED: experts and any(name.endswith(".mlp.up_proj.weight") for name in plan),
        "hxa07a": rwkv_architecture == "hxa07a",
    }
    return tuple(trait for trait, there in found.items() if there)


def working(kind: str, traits: Iterable[str]) -> list[tuple[Releases, tuple[str, ...]]]:
    """The releases that take such a model in such a file, with their strategies; the newest last."""
    return [(r, r.takes[kind]) for r in TABLE if kind in r.takes and r.fails.isdisjoint(traits)]


def loadmodel_body(config: StudentConfig, plan: Plan, kind: str, path: str) -> dict[str, Any]:
    """The `/loadmodel` request for a student, with what its file cannot carry.

    Where no tokenizer of RWKV-Infer's is known to be the student's, `template` and `endtoken` are null, at which the
    server stops; without the keys it would go on with RWKV's own vocabulary. The same with `model_strategy` where no
    release takes the model.
    """
    releases = working(kind, traits_of(plan, config.rwkv_architecture))
    keys = ("vocab_size", "hidden_size", "qk_norm")
    of_its_size = (t for t in TEMPLATES if all(getattr(t, key) in (None, getattr(config, key)) for key in keys))
    template = next(of_its_size, None)
    settings = {"rope_theta": config.rope_theta, "rms_norm_eps": config.rms_norm_eps} if kind == PTH else {}
    return {
        "model_filename": path,
        "model_viewname": path.removesuffix(".pth"),
        "model_strategy": releases[-1][1][0] if releases else None,
        **settings,
        "template": template.name if template else None,
        "endtoken": template.endtoken if template else None,
    }
