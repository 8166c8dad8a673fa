"""What a variant is: the record that every other file of this folder fills in once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.forward.hxa079 import TimeMix
    from hxaconv.model.config import StudentConfig

MODEL_TYPE = "hxa079"
"""`model_type` in the config.json of every variant: that of the modelling code, which serves them all."""

Shapes = dict[str, tuple[int, ...]]
RANK_KEYS = {
    "decay": "lora_rank_decay",
    "iclr": "lora_rank_iclr",
    "value": "lora_rank_value_residual_mix",
    "key": "lora_rank_key_residual_mix",
    "gate": "lora_rank_gate",
    "own_value": "lora_rank_own_value",
}
"""Rank -> its key in config.json. The last is ours: no published config.json of hxa07e names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Inner widths of the low-rank pairs of an RWKV layer: Rw Ra Rv Rk Rg, and dv1's; 0 where there is no such pair."""

    decay: int
    iclr: int
    value: int = 0
    key: int = 0
    gate: int
    own_value: int = 0


@dataclass(frozen=True, slots=True)
class Orthogonal:
    """A semi-orthogonal matrix times `gain`, and times sqrt(rows/columns) where rows > columns; random by seed."""

    gain: float = 0.1


Formula = Callable[["StudentConfig", int], "Tensor"]
"""(config, layer) -> the initial values of a tensor."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor of an RWKV layer beside its projections and norms.

    `shape` is written in C hidden_size, A = H * N, K = G * N, H and N, and in the names of ranks.
    """

    name: str
    shape: tuple[int | str, ...]
    initial: float | Orthogonal | Formula | None
    """Its published initial value; None where none is published."""
    optional: bool = False
    """Whether it is there only where `layer_records` is true."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Everything that is particular to one variant of the RWKV layer; the rest of a model all variants share."""

    name: str
    """`rwkv_architecture` in config.json."""
    summary: str
    """One line for people."""
    parameters: tuple[Parameter, ...]
    """In the order in which they are stored."""
    ranks: Callable[[int], Ranks] | None
    """A -> the published ranks; None where none are published, so that no teacher can be turned into this variant."""
    time_mix: Callable[[TimeMix], Tensor]
    """The reference forward of the mixer: a normed input (B, T, C) -> (B, T, C)."""
    key_by_decay: bool = False
    """Whether k is scaled by 1 - decay + a, instead of 1 - w + a: for the calibration, with its own formula."""
    own_value_scale: float = 0.0
    """Of (x v1) v2 in v, for the calibration likewise."""
    loaders: dict[str, str]
    """Programs that do not run this variant -> why; those that are not named do."""

    def shapes(self, config: StudentConfig) -> Shapes:
        """Name -> shape of `parameters`."""
        sizes = {name: getattr(config.ranks, name) for name in RANK_KEYS}
        sizes |= {"C": config.hidden_size, "A": config.attention_size, "K": config.key_value_size}
        sizes |= {"H": config.num_attention_heads, "N": config.head_dim}
        return {
            parameter.name: tuple(size if isinstance(size, int) else sizes[size] for size in parameter.shape)
            for parameter in self.parameters
            if config.layer_records or not parameter.optional
        }

    @property
    def required(self) -> frozenset[str]:
        """The names that every RWKV layer has."""
        return frozenset(parameter.name for parameter in self.parameters if not parameter.optional)

    @property
    def rank_names(self) -> tuple[str, ...]:
        """The ranks it has, in the order of RANK_KEYS."""
        used = {size for parameter in self.parameters for size in parameter.shape}
        return tuple(name for name in RANK_KEYS if name in used)


def round32(value: float) -> int:
    """To the nearest multiple of 32, as the published code rounds (Python's round: ties to even)."""
    return 32 * round(value / 32)


def zigzag(width: int, head_dim: int) -> Tensor:
    """z * |z| with z from -1 to 1 over each head, (width)."""
    import torch

    middle = (head_dim - 1) / 2
    z = (torch.arange(width, dtype=torch.float64) % head_dim - middle) / middle
    return z * z.abs()


def decay_ramp(config: StudentConfig, layer: int) -> Tensor:
    """w0, (1, 1, A): -6 + 6*(n/(A-1))**(1 + q**0.3) + 0.5 + 2.5*zigzag, q = layer/(L-1)."""
    import torch

    width, q = config.attention_size, layer / max(1, config.num_hidden_layers - 1)
    ramp: Tensor = (torch.arange(width, dtype=torch.float64) / (width - 1)) ** (1 + q**0.3)
    return (-6 + 6 * ramp + 0.5 + 2.5 * zigzag(width, config.head_dim)).view(1, 1, width)


def iclr_ramp(config: StudentConfig, layer: int) -> Tensor:
    """a0, (1, 1, A): -0.19 + 0.3*zigzag + 0.4*(n/(A-1) - 0.5)."""
    import torch

    width = config.attention_size
    line = torch.arange(width, dtype=torch.float64) / (width - 1) - 0.5
    return (-0.19 + 0.3 * zigzag(width, config.head_dim) + 0.4 * line).view(1, 1, width)


def head_size(config: StudentConfig, layer: int) -> Tensor:
    """head_size_record, (): N."""
    import torch

    return torch.tensor(float(config.head_dim))
