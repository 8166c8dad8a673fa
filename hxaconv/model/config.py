"""Teacher and student configurations: frozen, in the words of config.json, refusing what they cannot carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.model.experts import Experts, expert_facts, expert_problems, positive
from hxaconv.model.families import FAMILIES, REFUSED, Family
from hxaconv.model.rope import Rope, RopeScaling, rope_contradiction, rope_of, scaling_kind
from hxaconv.model.variants import VARIANTS
from hxaconv.model.variants.base import MODEL_TYPE, Ranks, Variant

DEFAULT_VARIANT = "hxa079"
"""What a teacher becomes by default."""


def kv_cache_bytes(num_layers: int, num_key_value_heads: int, head_dim: int) -> int:
    """Bytes of keys and values per token of attention layers, in bf16."""
    return 2 * num_layers * num_key_value_heads * head_dim * 2


def state_bytes(num_layers: int, num_attention_heads: int, head_dim: int) -> int:
    """Bytes of the recurrent state of one sequence: (H, N, N) float32 per RWKV layer."""
    return num_layers * num_attention_heads * head_dim**2 * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What teacher and student have in common. Symbols of the spec: L C F V H G N, A = H*N."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None
    nope_layers: tuple[int, ...] = ()
    """Layers of a teacher whose attention has no RoPE. In a student none of the GQA layers has, and all others do."""
    qk_norm: bool = False
    attention_bias: bool = False
    """Biases on q, k and v."""
    output_bias: bool = False
    """Bias on the attention output."""
    mlp_bias: bool = False
    experts: Experts | None = None

    def has_experts(self, layer: int) -> bool:
        """Whether this layer has a mixture of experts, not one MLP."""
        return self.experts is not None and self.experts.in_layer(layer)

    @property
    def attention_size(self) -> int:
        """A = H * N, the width inside attention; not always the hidden size."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """G * N."""
        return self.num_key_value_heads * self.head_dim

    @property
    def rope(self) -> Rope:
        """How positions turn r and k, or q and k."""
        return Rope(self.rope_theta, self.rope_scaling)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig(ModelConfig):
    """A Llama-style transformer; `raw` is its config.json."""

    model_type: str
    dtype: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig(ModelConfig):
    """A hybrid of RWKV layers of one variant and GQA layers; `gqa_layers` are those, sorted."""

    rwkv_architecture: str = DEFAULT_VARIANT
    """The name of the variant."""
    gqa_layers: tuple[int, ...]
    ranks: Ranks
    layer_records: bool = True
    """Whether RWKV layers carry the 0-dim layer_architecture and head_size_record."""

    @property
    def variant(self) -> Variant:
        """What its RWKV layers hold and compute."""
        return VARIANTS[self.rwkv_architecture]

    @property
    def rwkv_layers(self) -> tuple[int, ...]:
        """The layers that are not GQA."""
        return tuple(i for i in range(self.num_hidden_layers) if i not in self.gqa_layers)

    def layer_kind(self, layer: int) -> str:
        """`gqa` or `rwkv`."""
        return "gqa" if layer in self.gqa_layers else "rwkv"

    @property
    def strip(self) -> str:
        """One letter per layer, R or G: `RRRRRRRRGRRRRRRG...`."""
        return "".join("G" if self.layer_kind(i) == "gqa" else "R" for i in range(self.num_hidden_layers))


def _refusals(raw: Mapping[str, Any], allow_output_bias: bool, drop_rope_scaling: bool) -> list[str]:
    found, kind = [], str(raw.get("model_type"))
    family = FAMILIES.get(kind, Family(title=""))
    other_experts: tuple[str, ...] = ("n_routed_experts", "n_shared_experts", "shared_expert_intermediate_size")
    other_experts += () if family.experts else ("num_experts", "num_local_experts")
    if kind in REFUSED:
        found.append(f"{kind} is no Llama: {REFUSED[kind]}")
    elif any(raw.get(key) for key in other_experts):
        found.append(f"the mixture of experts of {kind!r}: of mixtures, that of Qwen3-MoE is known here")
    elif "text_config" in raw:
        found.append(f"{kind!r} wraps a language model in `text_config`: export the text model alone first")
    elif kind not in FAMILIES:
        found.append(f"model_type {kind!r} is not known: a teacher is one of {', '.join(FAMILIES)}")
    else:
        found += family.problems(raw)
    problem = rope_of(raw)[2]
    if problem is not None and not drop_rope_scaling:
        found.append(
            f"rope_scaling cannot be followed: {problem};"
            " --drop-rope-scaling goes on without it (long contexts will differ from the teacher's)"
        )
    factors = [settings.get("partial_rotary_factor") for settings in (raw, raw.get("rope_parameters") or {})]
    found += [
        f"partial_rotary_factor {factor}: students rotate whole heads, a teacher that does too is needed"
        for factor in dict.fromkeys(factors)
        if factor not in (None, 1, 1.0)
    ]
    if window := family.window(raw):
        found.append(
            f"sliding-window attention is in force ({window}): full attention is needed, as GQA layers have it"
        )
    usual = family.activation if kind in FAMILIES else None
    activation = raw.get("hidden_act", raw.get("hidden_activation", usual))
    if activation not in ("silu", "swish"):
        found.append(f"hidden_act is {activation!r}: the MLP of a student is SwiGLU, a teacher with silu is needed")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown method")
        found.append(f"the checkpoint is quantized ({method}): take the bf16 original")
    if not allow_output_bias and (raw.get("mlp_bias") or family.biases(raw)[1]):
        found.append("biases on o_proj or the MLP, which RWKV-Infer drops silently: --allow-output-bias keeps them")
    return found


_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")


def teacher_config(
    raw: Mapping[str, Any],
    *,
    where: str,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    allow_output_bias: bool = False,
    drop_rope_scaling: bool = False,
    tie_word_embeddings: bool | None = None,
) -> TeacherConfig:
    """Read a teacher's config.json; where it leaves open whether the head is tied, its family decides.

    Raises:
        HxaconvError: listing everything that a student cannot carry, or that the config leaves open.
    """
    if raw.get("rwkv_architecture") or raw.get("model_type") == MODEL_TYPE:
        raise HxaconvError(
            f"{where} is a student already, a teacher is needed here",
            hint="Give the transformer that it was made of; are the arguments in their order?",
        )
    problems = _refusals(raw, allow_output_bias, drop_rope_scaling)
    raise_all(f"{where} cannot become a student:", problems)
    sizes: dict[str, Any] = {key: raw.get(key) for key in _SIZES}
    problems = [f"{k} is {v!r}, expected a positive whole number" for k, v in sizes.items() if not positive(v)]
    own_theta, scaling, _ = rope_of(raw)
    theta = rope_theta if rope_theta is not None else own_theta
    eps = rms_norm_eps if rms_norm_eps is not None else raw.get("rms_norm_eps")
    if rope_theta is None and (two := rope_contradiction(raw)) is not None:
        problems.append(f"{two}; pass the right one as --rope-theta")
    elif theta is None:
        problems.append("rope_theta is not given; pass --rope-theta (10000 for Llama 1 and 2)")
    if eps is None:
        problems.append("rms_norm_eps is not given; pass --rms-norm-eps")
    problems += number_problems({"rope_theta": theta, "rms_norm_eps": eps})
    experts = expert_facts(raw)
    problems += expert_problems(experts)
    raise_all(f"{where}: config.json is not usable:", problems)
    assert theta is not None and eps is not None
    family = FAMILIES[raw["model_type"]]
    input_bias, output_bias = family.biases(raw)
    dtype = raw.get("dtype", raw.get("torch_dtype"))  # the first as transformers 5 writes it
    tied = raw.get("tie_word_embeddings") if tie_word_embeddings is None else tie_word_embeddings
    return TeacherConfig(
        **sizes,
        num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=_head_dim(raw, where),
        rms_norm_eps=float(eps),
        rope_theta=float(theta),
        tie_word_embeddings=family.ties if tied is None else tied,
        rope_scaling=None if drop_rope_scaling else scaling,
        nope_layers=family.nope_layers(raw),
        qk_norm=family.qk_norm,
        attention_bias=input_bias,
        output_bias=output_bias,
        mlp_bias=bool(raw.get("mlp_bias")),
        experts=Experts(**experts) if experts else None,
        model_type=raw["model_type"],
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        raw=dict(raw),
        warnings=tuple(_warnings(raw, output_bias, drop_rope_scaling)),
    )


def number_problems(values: Mapping[str, Any]) -> list[str]:
    """rope_theta and rms_norm_eps that are no finite numbers above 0, a line each; None is passed over."""
    return [
        f"{key} is {value!r}, expected a number above 0"
        for key, value in values.items()
        if value is not None and not (isinstance(value, float | int) and 0 < value < float("inf"))
    ]


def dropped_scaling(raw: Mapping[str, Any], dropped: bool = False) -> list[str]:
    """A warning, where a teacher's config scales RoPE in a way that is not followed, or is to be `dropped`."""
    _, scaling, problem = rope_of(raw)
    if problem is None and (scaling is None or not dropped):
        return []
    return [f"the teacher's rope_scaling {scaling_kind(raw)!r} is dropped: RoPE has its default frequencies here"]


def _warnings(raw: Mapping[str, Any], output_bias: bool, dropped: bool) -> list[str]:
    found, scaling = dropped_scaling(raw, dropped), rope_of(raw)[1]
    if not found and scaling is not None:
        found.append(
            f"the teacher's rope_scaling {scaling_kind(raw)!r} is kept: transformers follows it, RWKV-Infer computes"
            " default frequencies (--drop-rope-scaling makes a student without it)"
        )
        if scaling.cos_sin_factor != 1:
            found.append(
                f"the factor {scaling.cos_sin_factor**2:.3f} of YaRN on the attention's scores goes with RoPE:"
                " RWKV layers have it, GQA layers, which have no RoPE, do not"
            )
    if raw.get("mlp_bias") or output_bias:
        found.append("biases on o_proj or the MLP are kept, but RWKV-Infer ignores them")
    return found


def _head_dim(raw: Mapping[str, Any], where: str) -> int:
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    head_dim, groups = raw.get("head_dim"), raw.get("num_key_value_heads") or heads
    problems = []
    if not isinstance(groups, int) or groups < 1 or heads % groups:
        problems.append(f"num_key_value_heads {groups!r} does not divide num_attention_heads {heads}")
    if head_dim is None and hidden % heads:
        problems.append(f"head_dim is not given and hidden_size {hidden} is not a multiple of {heads} heads")
    head_dim = hidden // heads if head_dim is None else head_dim
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        problems.append(f"head_dim {head_dim!r} is not an even number: RoPE rotates pairs")
    raise_all(f"{where}: config.json is not usable:", problems)
    return int(head_dim)


def student_of(
    teacher: ModelConfig,
    gqa_layers: tuple[int, ...],
    ranks: Ranks | None = None,
    *,
    variant: str | None = None,
) -> StudentConfig:
    """The student's config: that of a teacher or of another student of it, with these layers kept as GQA.

    Ranks are the published ones where none are given. `variant` is the other student's, or hxa079, where none is.

    Raises:
        HxaconvError: for a variant whose ranks are not published, where none are given.
    """
    shared = {f.name: getattr(teacher, f.name) for f in fields(ModelConfig)} | {"nope_layers": ()}
    own = teacher.rwkv_architecture if isinstance(teacher, StudentConfig) else DEFAULT_VARIANT
    name = variant or own
    published = VARIANTS[name].ranks
    if ranks is None:
        if published is None:
            raise unpublished(name)
        ranks = published(teacher.attention_size)
    return StudentConfig(
        **shared,
        rwkv_architecture=name,
        gqa_layers=tuple(sorted(gqa_layers)),
        ranks=ranks,
        layer_records=getattr(teacher, "layer_records", True) and any(p.optional for p in VARIANTS[name].parameters),
    )


def unpublished(name: str) -> HxaconvError:
    """Why no RWKV layer of this variant can be begun."""
    return HxaconvError(
        f"the sizes and initial values of {name} are not published, so no RWKV layer of it can be begun",
        hint=f"Variants that can: {', '.join(v.name for v in VARIANTS.values() if v.ranks is not None)}.",
    )
