"""What every tensor is called in the three key formats: the one table, read in every direction.

The HF column is the canonical name: inside the package a plan is always keyed by it.
`{i}` stands for the layer number, `{e}` for the expert's. A tensor without a row is an error, never a silent skip.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hxaconv.errors import MAX_LISTED, HxaconvError, bullet_list
from hxaconv.model.variants import VARIANTS

KEY_FORMATS = ("hf", "rwkv", "training")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of tensor. `layer_kind` where a key format's name means different things by layer."""

    hf: str
    rwkv: str | None
    training: str
    layer_kind: str | None = None


def _outside(hf: str, rwkv: str | None) -> Row:
    return Row(hf, rwkv, f"model.{hf}")


def _attention(suffix: str, rwkv: str | None = None, layer_kind: str | None = None) -> Row:
    return Row(
        f"model.layers.{{i}}.self_attn.{suffix}",
        f"blocks.{{i}}.att.{rwkv or suffix}",
        f"model.model.layers.{{i}}.self_attn.student_attn.{suffix}",
        layer_kind,
    )


SPLIT = (
    "model.layers.{i}.self_attn.qkv_proj.weight",
    "model.layers.{i}.mlp.gate_up_proj.weight",
    "model.layers.{i}.mlp.experts.gate_up_proj",
    "model.layers.{i}.mlp.experts.down_proj",
)
"""What Phi-3, and transformers 5 with experts, store as one tensor: split on opening, and never written."""

RWKV_PARAMETERS = tuple(
    dict.fromkeys(parameter.name for variant in VARIANTS.values() for parameter in variant.parameters)
)
"""Parameters of an RWKV layer beside its projections and norms, of all variants, in the order trainers save them."""

TABLE: tuple[Row, ...] = (
    _outside("model.embed_tokens.weight", "emb.weight"),
    _outside("model.layers.{i}.input_layernorm.weight", "blocks.{i}.ln1.weight"),
    *(_attention(name) for name in RWKV_PARAMETERS),
    *(_attention(f"{name}.{kind}") for name in ("receptance", "key", "value", "output") for kind in ("weight", "bias")),
    # ln_r is the norm of r in an RWKV layer and of q in a GQA layer.
    _attention("r_norm.weight", "ln_r.weight", "rwkv"),
    *(_attention(f"{name}_proj.{kind}") for name in "qkvo" for kind in ("weight", "bias")),
    _attention("q_norm.weight", "ln_r.weight", "gqa"),
    _attention("k_norm.weight", "ln_k.weight"),
    _outside("model.layers.{i}.post_attention_layernorm.weight", "blocks.{i}.ln2.weight"),
    *(
        _outside(f"model.layers.{{i}}.mlp.{name}_proj.{kind}", f"blocks.{{i}}.ffn.{name}.{kind}")
        for name in ("gate", "up", "down")
        for kind in ("weight", "bias")
    ),
    # No .pth carries experts.
    _outside("model.layers.{i}.mlp.gate.weight", None),
    *(_outside(f"model.layers.{{i}}.mlp.experts.{{e}}.{name}_proj.weight", None) for name in ("gate", "up", "down")),
    _outside("model.norm.weight", "ln_out.weight"),
    _outside("lm_head.weight", "head.weight"),
    *(_outside(name, None) for name in SPLIT),
)

DROPPED = re.compile(
    r"(^|\.)(rotary_emb\w*|rotary_pos_emb|rope)\.\w*(inv_freq|cos_cached|sin_cached|freqs\w*)$"
    r"|(^|\.)(inv_freq|cos_cached|sin_cached)$"
    r"|^(model\.)?mtp\."
)
"""Known, and left behind: buffers of rotary embeddings, which every reader computes by itself, wherever they stand,
and the layers for predicting several tokens, which generation does not use."""

_INSIDE = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
_WRAPPERS = re.compile(
    rf"^(?:(?:module|_forward_module|base_model\.model)\.|{_INSIDE})+|(?<=\.){_INSIDE}|(?<=^lm_head\.)0\.(?=weight$)"
)
"""What DDP, FSDP, torch.compile, Lightning, PEFT and heads cast to float32 put into the names of a model that they
wrap: left off."""
_NUMBERED = re.compile(
    r"^((?:.*\.)?(?:layers|blocks)\.)(0|[1-9]\d{0,4})(\..*?)(?:(?<=\.mlp\.experts\.)(0|[1-9]\d{0,4})(\..*))?$"
)


def template_of(name: str) -> tuple[str, int | None, int | None]:
    """`model.layers.7.mlp.up_proj.weight` -> (`model.layers.{i}.mlp.up_proj.weight`, 7, None).

    The last is the number of an expert, which becomes `{e}`.
    """
    match = _NUMBERED.match(name)
    if match is None:
        return name, None, None
    start, layer, middle, expert, end = match.groups()
    if expert is None:
        return f"{start}{{i}}{middle}", int(layer), None
    return f"{start}{{i}}{middle}{{e}}{end}", int(layer), int(expert)


def is_expert(name: str) -> bool:
    """Whether a canonical name is that of one expert among several."""
    return ".mlp.experts." in name


def _numbered(template: str, layer: int | None, expert: int | None) -> str:
    return template.replace("{i}", str(layer)).replace("{e}", str(expert))


def unwrapped(name: str) -> str:
    """`module._orig_mod.model.norm.weight` -> `model.norm.weight`."""
    return _WRAPPERS.sub("", name)


def layer_index(name: str) -> int | None:
    """The layer a canonical name belongs to, None for embedding, final norm and head."""
    return template_of(name)[1]


def mixer_prefix(layer: int) -> str:
    """What the canonical names of one layer's mixer begin with."""
    return f"model.layers.{layer}.self_attn."


_BY_HF = {row.hf: row for row in TABLE}


def _reader(key_format: str) -> dict[tuple[str, str | None], Row]:
    table: dict[tuple[str, str | None], Row] = {}
    for row in TABLE:
        name = getattr(row, key_format)
        if name is not None:
            table[name, row.layer_kind if key_format == "rwkv" else None] = row
            if ".student_attn." in name:  # the name of older trainers
                table[name.replace(".student_attn.", ".time_mixer."), None] = row
    if key_format == "hf":  # base models are published without the prefix of the model with a head
        table |= {(row.hf.removeprefix("model."), None): row for row in TABLE if row.hf.startswith("model.")}
    if key_format == "training":  # teacher tensors (stage 1 keeps them frozen beside the student's)
        table |= {(f"model.{row.hf}", None): row for row in TABLE if (f"model.{row.hf}", None) not in table}
    return table


_READERS = {key_format: _reader(key_format) for key_format in KEY_FORMATS}


def detect_key_format(names: Iterable[str]) -> str:
    """`rwkv`, `training` or `hf`, from the names alone."""
    names = [unwrapped(name) for name in names]
    if any(n.startswith("blocks.") or n in ("emb.weight", "head.weight", "ln_out.weight") for n in names):
        return "rwkv"
    if any(n.startswith("model.model.") or ".student_attn." in n or ".time_mixer." in n for n in names):
        return "training"
    return "hf"


def layer_kinds(names: Iterable[str]) -> dict[int, str]:
    """Layer index -> `gqa` (has q_proj.weight) or `rwkv` (has receptance.weight), any key format."""
    kinds: dict[int, str] = {}
    for name in names:
        template, index, _ = template_of(name)
        if index is not None and template.endswith(".receptance.weight"):
            kinds[index] = "rwkv"
        elif index is not None and template.endswith((".q_proj.weight", ".qkv_proj.weight")):
            kinds.setdefault(index, "gqa")
    return kinds


def canonical_names(
    names: Iterable[str], key_format: str, where: str, *, kinds: Mapping[int, str] | None = None
) -> tuple[dict[str, str | None], list[str]]:
    """(stored name -> canonical name, or None for what is known and left behind; names that are not known).

    `kinds` are those of the layers, where the names alone do not show them.

    Raises:
        HxaconvError: where two names mean the same tensor.
    """
    names = list(names)
    reader, kinds = _READERS[key_format], kinds or layer_kinds(map(unwrapped, names))
    result: dict[str, str | None] = {}
    named: dict[str, str] = {}
    unknown, clashes = list[str](), list[str]()
    for name in names:
        plain = unwrapped(name)
        template, index, expert = template_of(plain)
        row = reader.get((template, None)) or reader.get((template, kinds.get(-1 if index is None else index)))
        if row is not None:
            canonical = result[name] = plain if row.hf == template else _numbered(row.hf, index, expert)
            if (first := named.setdefault(canonical, name)) != name:
                clashes.append(f"{first} and {name} are both {canonical}")
        elif DROPPED.search(plain):
            result[name] = None
        else:
            unknown.append(name)
    if clashes:
        raise HxaconvError(f"{where} holds the same tensor twice:\n{bullet_list(clashes)}")
    return result, unknown


def unknown_names(unknown: list[str], key_format: str, where: str) -> HxaconvError:
    """The error for names that are not in the table, with the nearest that are."""
    # Looking for the nearest name takes milliseconds: only for those that the message will show.
    problems = list(unknown)
    for i, name in enumerate(unknown[:MAX_LISTED]):
        template, index, expert = template_of(unwrapped(name))
        close = difflib.get_close_matches(template, [key[0] for key in _READERS[key_format]], n=1, cutoff=0.6)
        problems[i] += f" (nearest: {_numbered(close[0], index, expert)})" if close else ""
    return HxaconvError(
        f"{where}: {len(unknown)} tensor names are not known in the {key_format} key format:\n{bullet_list(problems)}",
        hint="Llama-style teachers and their students are converted; `hxaconv maps --names` prints the table.",
    )


def stored_name(canonical: str, key_format: str) -> str:
    """The name of a canonical tensor in `key_format`. A KeyError is ours: plans hold known names only."""
    if key_format == "hf":
        return canonical
    template, index, expert = template_of(canonical)
    name = getattr(_BY_HF[template], key_format)
    assert name is not None, f"{canonical} has no name in the {key_format} key format"
    return canonical if name == template else _numbered(str(name), index, expert)


def is_attention(canonical: str) -> bool:
    """Whether a canonical name is part of a mixer: what a training checkpoint holds."""
    return ".self_attn." in canonical
