"""Wrong checkpoints: each kind changes one thing in a student that is right, its tensors or its config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass
class Case:
    """A student in memory, for a mutation to change in place."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    changed: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, folder: Path) -> Case:
        """A folder of one file."""
        return cls(load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()))

    def write(self, folder: Path) -> None:
        """Over the files of a folder."""
        held = {name: values.clone().contiguous() for name, values in self.tensors.items()}
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @property
    def gqa(self) -> list[int]:
        """Layers."""
        return list(self.config["transformer_layers"])

    @property
    def rwkv(self) -> list[int]:
        """Layers; the second one mixes in what the first hands on."""
        return [i for i in range(self.config["num_hidden_layers"]) if i not in self.gqa]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.full(name)]

    def __setitem__(self, name: str, values: Tensor) -> None:
        self.tensors[self.full(name)] = values

    def __contains__(self, name: str) -> bool:
        return self.full(name) in self.tensors

    def full(self, name: str) -> str:
        """`R.w0`, `G.q_proj.weight`, `R/mlp.up_proj.weight`: of the second RWKV layer, of the first GQA layer."""
        layer = {"R": self.rwkv[1], "S": self.rwkv[0], "G": self.gqa[0]}.get(name[:1])
        if layer is None or name[1:2] not in (".", "/"):
            return name
        return f"model.layers.{layer}.{'self_attn.' if name[1] == '.' else ''}{name[2:]}"


Change = Callable[[Case], bool | None]
"""False where a model has nothing of that kind."""


@dataclass(frozen=True)
class Kind:
    """One kind of wrong checkpoint."""

    name: str
    change: Change
    unknowable: str = ""
    """Why a check after a conversion or an initialisation cannot know it, where none can."""


KINDS: list[Kind] = []


def kind(name: str, unknowable: str = "") -> Callable[[Change], Change]:
    """Add a function to the list."""

    def added(change: Change) -> Change:
        KINDS.append(Kind(name, change, unknowable))
        return change

    return added


def on(name: str, what: str, change: Callable[[Tensor], Tensor], unknowable: str = "") -> None:
    """A kind that changes one tensor."""

    def apply(case: Case) -> bool:
        if name not in case:
            return False
        case[name] = change(case[name])
        return True

    KINDS.append(Kind(f"{what}: {name}", apply, unknowable))


def swap(one: str, two: str, what: str) -> None:
    """A kind that exchanges two tensors of the same shape."""

    def apply(case: Case) -> bool:
        if one not in case or two not in case or case[one].shape != case[two].shape:
            return False
        case[one], case[two] = case[two].clone(), case[one].clone()
        return not torch.equal(case[one], case[two])

    KINDS.append(Kind(f"{what}: {one} and {two}", apply))


def set_config(key: str, value: Callable[[Any], Any], what: str, unknowable: str = "") -> None:
    """A kind that changes one value of config.json."""

    def apply(case: Case) -> bool:
        before = case.config.get(key)
        case.config[key] = value(before)
        return case.config[key] != before

    KINDS.append(Kind(f"config.json: {what}", apply, unknowable))


def ulp(values: Tensor) -> Tensor:
    """One value by one unit in its last place."""
    whole = {2: torch.int16, 4: torch.int32}[values.element_size()]
    bits = values.clone().reshape(-1).view(whole)
    bits[len(bits) // 2] ^= 1
    return bits.view(values.dtype).view(values.shape)


def rows_swapped(values: Tensor) -> Tensor:
    order = list(range(len(values)))
    order[1], order[-2] = order[-2], order[1]
    return values[order]


def one(value: float) -> Callable[[Tensor], Tensor]:
    def change(values: Tensor) -> Tensor:
        values = values.clone()
        values.view(-1)[values.numel() // 3] = value
        return values

    return change


def refolded(values: Tensor) -> Tensor:
    """Transposed, in the shape of before: what a reader that mixes up rows and columns makes."""
    return values.T.contiguous().view(values.shape)


def rolled(steps: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values.roll(steps, 0)


def interleaved(heads: int) -> Callable[[Tensor], Tensor]:
    """Rows of each head from rotate-half to pairs, as in Meta's files."""

    def change(values: Tensor) -> Tensor:
        parts = values.view(heads, 2, -1, *values.shape[1:])
        return parts.transpose(1, 2).reshape(values.shape)

    return change


EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

for matrix in (EMBEDDING, HEAD):
    on(matrix, "two vocabulary rows swapped", rows_swapped)
    on(matrix, "one ulp", ulp)
    on(matrix, "times 1.01", lambda v: v * 1.01)
    on(matrix, "shifted by a row", rolled(1))
    on(matrix, "NaN in an unused row", one(float("nan")))
    on(matrix, "infinite value", one(float("inf")))
    on(matrix, "transposed", refolded)
    on(matrix, "a row of zeros", lambda v: torch.cat([v[:-1], v[-1:] * 0]))


@kind("the head is the embedding")
def _(case: Case) -> bool:
    if HEAD not in case:
        return False
    case[HEAD] = case[EMBEDDING].clone()
    return True


on(NORM, "plus 1", lambda v: v + 1)
on(NORM, "one ulp", ulp)
on(NORM, "all ones", torch.ones_like)
on(NORM, "dtype of one tensor, float32", lambda v: v.float())
swap(NORM, "R/input_layernorm.weight", "swapped")
on("R/input_layernorm.weight", "plus 1", lambda v: v + 1)
on("G/post_attention_layernorm.weight", "negated", lambda v: -v)
swap("R/input_layernorm.weight", "R/post_attention_layernorm.weight", "swapped")
swap("R/input_layernorm.weight", "G/input_layernorm.weight", "swapped between layers")

swap("R/mlp.gate_proj.weight", "R/mlp.up_proj.weight", "swapped")
swap("R/mlp.down_proj.weight", "G/mlp.down_proj.weight", "swapped between layers")
on("G/mlp.down_proj.weight", "one ulp", ulp)
on("R/mlp.down_proj.weight", "transposed", refolded)
on("R/mlp.gate_proj.weight", "rows rolled", rolled(1))
on("R/mlp.gate_proj.weight", "negated", lambda v: -v)
on("R/mlp.up_proj.weight", "columns rolled", lambda v: v.roll(1, 1))
on("R/mlp.up_proj.weight", "zeros", torch.zeros_like)
on("R/mlp.down_proj.weight", "a row of zeros", lambda v: torch.cat([v[:-1], v[-1:] * 0]))
on("R/mlp.up_proj.weight", "dtype of one tensor, float16", lambda v: v.half())
on("G/mlp.gate_proj.weight", "dtype of one tensor, float32", lambda v: v.float())
on("R/mlp.up_proj.bias", "plus 1", lambda v: v + 1)
on("R/mlp.down_proj.bias", "zeros", torch.zeros_like)


@kind("MLPs shifted by a layer")
def _(case: Case) -> bool:
    layers = case.config["num_hidden_layers"]
    before = dict(case.tensors)
    for name in before:
        if ".mlp." in name:
            layer = int(name.split(".")[2])
            case.tensors[name] = before[name.replace(f".{layer}.", f".{(layer + 1) % layers}.", 1)]
    return True


@kind("all layers shifted by one")
def _(case: Case) -> bool:
    before = dict(case.tensors)
    for layers in (case.rwkv, case.gqa):
        for i, layer in enumerate(layers):
            other = layers[(i + 1) % len(layers)]
            for name in before:
                if name.startswith(f"model.layers.{layer}."):
                    case.tensors[name] = before[name.replace(f".{layer}.", f".{other}.", 1)]
    return len(case.rwkv) > 1


@kind("two RWKV layers have exchanged their mixers")
def _(case: Case) -> bool:
    one_layer, two = case.rwkv[:2]
    before = dict(case.tensors)
    for name in before:
        if name.startswith(f"model.layers.{one_layer}.self_attn."):
            other = name.replace(f".{one_layer}.", f".{two}.", 1)
            case.tensors[name], case.tensors[other] = before[other], before[name]
    return True


for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
    on(f"G.{part}.weight", "one ulp", ulp)
    on(f"G.{part}.weight", "an initial factor on a kept layer", lambda v: v * 0.5)
    on(f"G.{part}.bias", "zeros", torch.zeros_like)
on("G.q_proj.weight", "interleaved RoPE layout", interleaved(4))
on("G.o_proj.weight", "transposed", refolded)
on("G.q_norm.weight", "plus 1", lambda v: v + 1)
on("G.k_norm.weight", "one ulp", ulp)
swap("G.k_proj.weight", "G.v_proj.weight", "swapped")


@kind("two kv heads of k_proj swapped")
def _(case: Case) -> None:
    n = case.config["head_dim"]
    case["G.k_proj.weight"] = case["G.k_proj.weight"].roll(n, 0)


@kind("two kv heads of value swapped")
def _(case: Case) -> None:
    n = case.config["head_dim"]
    case["R.value.weight"] = case["R.value.weight"].roll(n, 0)


@kind("heads of output permuted")
def _(case: Case) -> None:
    n = case.config["head_dim"]
    case["R.output.weight"] = case["R.output.weight"].roll(n, 1)


on("R.receptance.weight", "factor 1 for 0.5", lambda v: v * 2)
on("R.value.weight", "factor 0.5 for 0.3", lambda v: (v.float() * 5 / 3).to(v.dtype))
on("R.output.weight", "one ulp", ulp)
on("R.key.weight", "one ulp", ulp)
on("R.receptance.weight", "interleaved RoPE layout", interleaved(4))
on("R.receptance.weight", "rows rolled", rolled(1))
on("R.output.weight", "transposed", refolded)
swap("R.key.weight", "R.value.weight", "swapped")
swap("R.receptance.weight", "S.receptance.weight", "swapped between layers")
on("R.receptance.bias", "negated", lambda v: -v)
on("R.key.bias", "zeros", torch.zeros_like)
on("R.r_norm.weight", "plus 1", lambda v: v + 1)
on("R.k_norm.weight", "one ulp", ulp)

on("R.w0", "ramp reversed", lambda v: v.flip(-1))
on("R.w0", "minus the 0.5", lambda v: (v.float() - 0.5).to(v.dtype))
on("R.w0", "one ulp", ulp)
swap("R.w0", "S.w0", "swapped between layers")
on("R.a0", "zeros", torch.zeros_like)
on("R.a0", "one ulp", ulp)
on("R.v0", "one ulp", ulp)
on("R.k0", "0.5 everywhere", lambda v: torch.full_like(v, 0.5))
on("R.r_k", "negated", lambda v: -v)
on("R.w1", "one value that is not zero", one(0.01))
on("R.k1", "NaN", one(float("nan")))
on("R.w2", "zeros", torch.zeros_like)
on("R.a2", "a row doubled", lambda v: torch.cat([v[:1] * 2, v[1:]]))
on("R.layer_architecture", "79", lambda v: torch.full_like(v, 79))
on("R.head_size_record", "half", lambda v: v / 2)
SEED = "orthogonal as well: only its seed tells it, which `verify --against` has from the record"
on("R.g2", "rows permuted", lambda v: v.flip(0), SEED)
on("R.w2", "negated", lambda v: -v, SEED)


@kind("a tensor is missing")
def _(case: Case) -> None:
    del case.tensors[case.full("R.k2")]


@kind("a tensor too many")
def _(case: Case) -> None:
    case["R.x_r"] = case["R.a0"].clone()


@kind("a matrix stored transposed, with its new shape")
def _(case: Case) -> None:
    case["R/mlp.up_proj.weight"] = case["R/mlp.up_proj.weight"].T.contiguous()


@kind("everything float16")
def _(case: Case) -> None:
    case.tensors = {name: values.half() for name, values in case.tensors.items()}


set_config("rope_theta", lambda v: v * 2, "rope_theta doubled at top level")
set_config(
    "rope_parameters", lambda v: {**v, "rope_theta": v["rope_theta"] * 2}, "rope_theta doubled in rope_parameters"
)
set_config("rms_norm_eps", lambda v: v * 10, "rms_norm_eps times 10")
set_config("tie_word_embeddings", lambda v: not v, "tie_word_embeddings turned round")
set_config("head_dim", lambda v: v * 2, "head_dim doubled")
set_config("num_key_value_heads", lambda v: v * 2, "kv heads doubled")
set_config("num_attention_heads", lambda v: v // 2, "heads halved")
set_config("num_hidden_layers", lambda v: v - 1, "one layer fewer")
set_config("vocab_size", lambda v: v + 1, "vocabulary of one more")
set_config("intermediate_size", lambda v: v + 1, "intermediate size of one more")
set_config("transformer_layers", lambda v: [*v[:-1], v[-1] - 1], "another GQA layer")
set_config("transformer_layers", lambda v: v[:-1], "a GQA layer left out")
set_config("torch_dtype", lambda v: "float16", "torch_dtype float16 over bf16")
set_config("lora_rank_decay", lambda v: v + 32, "rank of w")
set_config("lora_rank_gate", lambda v: v // 2, "rank of g")
set_config("enable_qk_norm", lambda v: not v, "enable_qk_norm turned round")
set_config("attention_bias", lambda v: not v, "attention_bias turned round")
set_config("rwkv_architecture", lambda v: "hxa07c", "another variant")
set_config("rwkv_architecture", lambda v: "hxa07d", "the variant with the same tensors")


@kind("both spellings of rope_theta doubled")
def _(case: Case) -> None:
    case.config["rope_theta"] *= 2
    case.config["rope_parameters"]["rope_theta"] *= 2
