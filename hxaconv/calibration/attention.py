"""Attention in a layer: what the teacher's says, and the fit of a layer that stays attention to losing RoPE.

Without positions a head attends too evenly and says too much. Two numbers for each head undo the larger part: a
temperature, by which rows of q_proj are multiplied, and a gain, by which columns of o_proj are. More freedom
(rotations, mixes of channels) lowers the error of the tokens that were fitted and raises that of all others.

On request, the teacher's mean rotation is folded into q before that: at lag t-s RoPE turns the pair of frequency f by
(t-s) f, and what stays of it without positions is its mean under the teacher's own attention: c = E cos, s = E sin for
each head and pair, rows (a, b) of q_proj becoming (c a - s b, c b + s a).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hxaconv.calibration import output_matrix
from hxaconv.calibration.heads import rotation
from hxaconv.calibration.report import LayerReport
from hxaconv.calibration.time_mix import Attention, Fit, mixed_rows
from hxaconv.forward import llama
from hxaconv.forward.llama import frequencies
from hxaconv.forward.pool import Pool
from hxaconv.model.config import ModelConfig

TEMPERATURES = tuple(2 ** (i / 4) for i in range(-4, 11))


@dataclass(frozen=True, slots=True)
class Projected:
    """q (B, H, T, N), k and v (B, G, T, N) after norms, before RoPE."""

    q: Tensor
    k: Tensor
    v: Tensor


def project(x: Tensor, weights: Mapping[str, Tensor], config: ModelConfig, pool: Pool) -> Projected:
    """From the normed input (B, T, C); `weights` by short name (`q_proj.weight`)."""

    def one(name: str, norm: str | None) -> Tensor:
        found = pool.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        found = found.view(*found.shape[:2], -1, config.head_dim).transpose(1, 2)
        if norm is not None and config.qk_norm:
            found = llama.rmsnorm(found, weights[f"{norm}.weight"], config.rms_norm_eps)
        return found

    return Projected(one("q_proj", "q_norm"), one("k_proj", "k_norm"), one("v_proj", None))


def placed(x: Tensor, config: ModelConfig) -> Tensor:
    """With RoPE, (B, heads, T, N)."""
    return llama.rotate(x, torch.arange(x.shape[2], device=x.device), config.rope)


def attend(projected: Projected, config: ModelConfig, pool: Pool, *, rope: bool = True) -> Tensor:
    """Causal attention before the output matrix, (B, T, A)."""
    q, k, v = projected.q, projected.k, projected.v
    if rope:
        q, k = placed(q, config), placed(k, config)
    groups = k.shape[1]
    q = q.view(q.shape[0], groups, -1, *q.shape[2:])

    def one(place: tuple[int, int]) -> Tensor:
        b, g = place
        return llama.attend(q[b : b + 1, g], k[b : b + 1, g : g + 1], v[b : b + 1, g : g + 1])[0]

    places = [(b, g) for b in range(q.shape[0]) for g in range(groups)]
    found = torch.cat(pool.map(one, places)).view(q.shape[0], -1, *q.shape[3:])
    return found.transpose(1, 2).flatten(2)


def fit_kept(
    seen: Attention,
    weights: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
    config: ModelConfig,
    layer: int,
    pool: Pool,
    *,
    fold: bool = False,
) -> Fit:
    """Fit q_proj and o_proj of one layer that stays attention; `weights` is its mixer by short name, in float32.

    With q/k norm, which takes a scale of q away again, all heads share a temperature, that of q_norm.
    """
    fitted, held = seen.fitted.bool(), dict(weights)

    def said(held: Mapping[str, Tensor]) -> Tensor:
        return attend(project(seen.x, held, config, pool), config, pool, rope=False)

    def error(held: Mapping[str, Tensor]) -> float:
        wanted = seen.output[~fitted]
        missed = (wanted - pool.linear(said(held)[~fitted], held["o_proj.weight"])).square().sum()
        # A layer that says nothing on these tokens cannot be missed by a share of it.
        return float(missed / wanted.square().sum().clamp_min(1e-30))

    def store(name: str, values: Tensor) -> None:
        if name in weights:
            tensors[name] = values.to(dtypes[name])
            held[name] = tensors[name].float()

    tensors: dict[str, Tensor] = {}
    if fold:
        turn = rotation(mean_rotation(project(seen.x, weights, config, pool), config, pool, seen.fitted))
        for name in ("q_proj.weight", "q_proj.bias"):
            if name in weights:
                store(name, mixed_rows(weights[name], turn))
    temperature, gain = fit_heads(seen, held, config, pool)
    for name in ("q_norm.weight",) if config.qk_norm else ("q_proj.weight", "q_proj.bias"):
        if name in weights:
            scaled = held[name].view(-1, config.head_dim, *held[name].shape[1:])
            factor = temperature[:1] if config.qk_norm else temperature
            store(name, (scaled * factor.view(-1, *[1] * (scaled.dim() - 1))).view_as(held[name]))
    name = "o_proj.weight"
    store(name, held[name] * gain.repeat_interleave(config.head_dim))
    refitted = fold and int(fitted.sum()) >= output_matrix.TOKENS_PER_COLUMN * held[name].shape[1]
    if refitted:
        store(name, output_matrix.fit_output(said(held)[fitted], seen.output[fitted], held[name], pool)[0])
    before, after = error(weights), error(held)
    fell_back = not after < before
    report = LayerReport(
        layer=layer,
        kind="gqa",
        error_before=before,
        error_after=before if fell_back else after,
        fell_back=fell_back,
        output_refitted=refitted and not fell_back,
    )
    return Fit({} if fell_back else tensors, report)


def fit_heads(seen: Attention, weights: Mapping[str, Tensor], config: ModelConfig, pool: Pool) -> tuple[Tensor, Tensor]:
    """Of each head (H), the temperature and the gain with which it comes nearest to the teacher's without positions."""
    projected, fitted = project(seen.x, weights, config, pool), seen.fitted.bool()
    columns = weights["o_proj.weight"].view(config.hidden_size, -1, config.head_dim)
    metric = torch.einsum("chn,chm->hnm", columns, columns)
    wanted = seen.heads[fitted].view(-1, config.num_attention_heads, config.head_dim)
    weighed = torch.einsum("thn,hnm->thm", wanted, metric)
    errors, gains = [], []
    for temperature in TEMPERATURES:
        warmer = replace(projected, q=projected.q * temperature)
        y = attend(warmer, config, pool, rope=False)[fitted].view_as(wanted)
        own = (torch.einsum("thn,hnm->thm", y, metric) * y).sum(dim=(0, 2)).double()
        shared = (weighed * y).sum(dim=(0, 2)).double()
        gains.append((shared / own.clamp_min(1e-30)).clamp_min(0.0).float())
        errors.append((-gains[-1].double() * shared).nan_to_num(nan=torch.inf))
    table = torch.stack(errors)
    best = table.sum(dim=1).argmin().expand(table.shape[1]) if config.qk_norm else table.argmin(dim=0)
    gain = torch.stack(gains).gather(0, best[None])[0]
    return torch.tensor(TEMPERATURES, device=gain.device)[best], gain


def mean_rotation(projected: Projected, config: ModelConfig, pool: Pool, fitted: Tensor) -> Tensor:
    """(2, H, N/2): mean cos and sin of the angle between query and attended key, for each head and pair."""
    q, k = placed(projected.q, config), placed(projected.k, config)
    batch, count, tokens, size = q.shape
    shared = count // k.shape[1]
    lags = torch.arange(tokens, dtype=torch.float64, device=q.device)
    angles = lags[:, None] * frequencies(config.rope, size // 2, q.device)[0]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    # [t, i] is lag i: the key at t - i; where there is none, the weight is 0 anyway.
    back = (lags[:, None] - lags[None, :]).long()

    def share_of_lags(head: int) -> Tensor:
        found = torch.zeros(tokens, dtype=torch.float64, device=q.device)
        for b in range(batch):
            scores = q[b, head] @ k[b, head // shared].T * size**-0.5
            weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
            by_lag = weights.gather(1, back.clamp_min(0)).masked_fill(back < 0, 0.0)
            found += (by_lag * fitted[b][:, None]).double().sum(dim=0)
        return found

    shares = torch.stack(pool.map(share_of_lags, range(count)))
    shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return torch.stack([shares @ angles.cos(), shares @ angles.sin()]).float()
