"""Attention in a layer: the teacher's output, and the fit of a layer that stays attention to losing RoPE.

What a head loses with its positions, its weights can make up for in part: teacher's hidden states know where they
stand. So the layer starts as the teacher's, and everything in it is trained as an RWKV layer's projections are, by
`descent`. From a temperature and a gain for each head, or from the mean rotation of its queries, the same steps end no
nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from hxaconv.calibration import descent
from hxaconv.calibration.report import LayerReport
from hxaconv.calibration.time_mix import Attention, LayerFit
from hxaconv.forward import llama
from hxaconv.forward.pool import Pool
from hxaconv.model.config import ModelConfig

Projected = tuple[Tensor, Tensor, Tensor]
"""q (B, H, T, N), k and v (B, G, T, N) after norms, before RoPE."""


def project(x: Tensor, weights: Mapping[str, Tensor], config: ModelConfig, product: Callable[..., Tensor]) -> Projected:
    """From the normed input (B, T, C); `weights` by short name (`q_proj.weight`), `product` a pool's or torch's."""

    def one(part: str) -> Tensor:
        found = product(x, weights[f"{part}_proj.weight"], weights.get(f"{part}_proj.bias"))
        found = found.view(*found.shape[:2], -1, config.head_dim).transpose(1, 2)
        if config.qk_norm and part != "v":
            found = llama.rmsnorm(found, weights[f"{part}_norm.weight"], config.rms_norm_eps)
        return found

    return one("q"), one("k"), one("v")


def _placed(x: Tensor, config: ModelConfig) -> Tensor:
    """With RoPE, (B, heads, T, N)."""
    return llama.rotate(x, torch.arange(x.shape[2], device=x.device), config.rope)


def attend(projected: Projected, config: ModelConfig, pool: Pool, *, rope: bool = True) -> Tensor:
    """Causal attention before the output matrix, (B, T, A)."""
    q, k, v = projected
    if rope:
        q, k = _placed(q, config), _placed(k, config)
    groups = k.shape[1]
    q = q.view(q.shape[0], groups, -1, *q.shape[2:])

    def one(place: tuple[int, int]) -> Tensor:
        b, g = place
        return llama.attend(q[b : b + 1, g], k[b : b + 1, g : g + 1], v[b : b + 1, g : g + 1])[0]

    places = [(b, g) for b in range(q.shape[0]) for g in range(groups)]
    found = torch.cat(pool.map(one, places)).view(q.shape[0], -1, *q.shape[3:])
    return found.transpose(1, 2).flatten(2)


def values(projected: Projected) -> Tensor:
    """What attention gives of a token that sees itself alone, before the output matrix: its values, (B, T, A)."""
    q, _, v = projected
    return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(1, 2).flatten(2)


def fit_kept(
    seen: Attention,
    text: int,
    weights: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
    config: ModelConfig,
    layer: int,
    steps: int,
    pool: Pool,
) -> LayerFit:
    """The fit of one layer that stays attention, where it is better on the validation tokens, as stored.

    `text`: how many sequences are text. `weights` is its mixer by short name, in float32.
    """

    def output(i: int, values: Mapping[str, Tensor]) -> Tensor:
        q, k, v = project(seen.x[i : i + 1], values, config, linear)
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        # Where there are gradients: it keeps no scores, (H, T, T).
        y = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return linear(y[0], values["o_proj.weight"], values.get("o_proj.bias"))

    def error(weights: Mapping[str, Tensor]) -> float:
        y = attend(project(asked.x, weights, config, pool.linear), config, pool, rope=False)
        return asked.missed(pool.linear(y, weights["o_proj.weight"], weights.get("o_proj.bias")))

    asked = seen.rows(text)
    moved = descent.descend(output, weights, seen.with_bias, seen.training, config.head_dim, steps, pool)
    tensors = {name: values.to(dtypes[name]).contiguous() for name, values in moved.items()}
    before, after = error(weights), error(weights | {name: values.float() for name, values in tensors.items()})
    # Not >=: a comparison with NaN is false.
    fell_back = not after < before
    if fell_back:
        tensors, after = {}, before
    return LayerFit(
        tensors, LayerReport(layer=layer, kind="gqa", error_before=before, error_after=after, fell_back=fell_back)
    )
