"""Attention in a layer: the teacher's output, and the fit of a layer that stays attention to losing RoPE.

Without positions a head attends too evenly and its output is too large. Two numbers for each head undo the larger
part: a temperature, by which rows of q_proj are multiplied, and a gain, by which columns of o_proj are. More freedom
(rotations, mixes of channels) lowers the error of the training tokens and raises that of all others.

On request, the teacher's mean rotation is folded into q before that: at lag t-s RoPE turns the pair of frequency f by
(t-s) f, and what stays of it without positions is its mean under the teacher's own attention: c = E cos, s = E sin for
each head and pair, rows (a, b) of q_proj becoming (c a - s b, c b + s a).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hxaconv.calibration.heads import mixed_rows, rotation
from hxaconv.calibration.report import LayerReport
from hxaconv.calibration.time_mix import TOKENS_PER_COLUMN, Attention, LayerFit, fit_output
from hxaconv.forward import llama
from hxaconv.forward.pool import Pool
from hxaconv.model.config import ModelConfig

TEMPERATURES = tuple(2 ** (i / 4) for i in range(-4, 11))

Projected = tuple[Tensor, Tensor, Tensor]
"""q (B, H, T, N), k and v (B, G, T, N) after norms, before RoPE."""


def project(x: Tensor, weights: Mapping[str, Tensor], config: ModelConfig, pool: Pool) -> Projected:
    """From the normed input (B, T, C); `weights` by short name (`q_proj.weight`)."""

    def one(part: str) -> Tensor:
        found = pool.linear(x, weights[f"{part}_proj.weight"], weights.get(f"{part}_proj.bias"))
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


def fit_kept(
    seen: Attention,
    weights: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
    config: ModelConfig,
    layer: int,
    pool: Pool,
    *,
    fold: bool = False,
) -> LayerFit:
    """Fit q_proj and o_proj of one layer that stays attention; `weights` is its mixer by short name, in float32.

    With q/k norm, which takes a scale of q away again, all heads share a temperature, that of q_norm.
    """
    training, fitted = seen.training.bool(), dict(weights)
    tensors: dict[str, Tensor] = {}

    def store(name: str, values: Tensor) -> None:
        tensors[name] = values.to(dtypes[name])
        fitted[name] = tensors[name].float()

    def attended(weights: Mapping[str, Tensor]) -> Tensor:
        return attend(project(seen.x, weights, config, pool), config, pool, rope=False)

    def error(weights: Mapping[str, Tensor]) -> float:
        wanted = seen.output[~training]
        missed = (wanted - pool.linear(attended(weights)[~training], weights["o_proj.weight"])).square().sum()
        # A layer that is silent on these tokens cannot be missed by a share of it.
        return float(missed / wanted.square().sum().clamp_min(1e-30))

    queries: list[str] = [name for name in ("q_proj.weight", "q_proj.bias") if name in weights]
    if fold:
        turn = rotation(mean_rotation(project(seen.x, weights, config, pool), config, pool, seen.training))
        for name in queries:
            store(name, mixed_rows(weights[name], turn))
    temperature, gain = fit_heads(seen, fitted, config, pool)
    scaled = ["q_norm.weight"] if config.qk_norm else queries
    for name in scaled:
        heads = fitted[name].view(-1, config.head_dim, *fitted[name].shape[1:])
        factor = temperature[:1] if config.qk_norm else temperature
        store(name, (heads * factor.view(-1, *[1] * (heads.dim() - 1))).view_as(fitted[name]))
    store("o_proj.weight", fitted["o_proj.weight"] * gain.repeat_interleave(config.head_dim))
    refitted = fold and int(training.sum()) >= TOKENS_PER_COLUMN * config.attention_size
    if refitted:
        y, matrix = attended(fitted)[training], fitted["o_proj.weight"]
        store("o_proj.weight", fit_output(y, seen.output[training], matrix, pool))
    before, after = error(weights), error(fitted)
    fell_back = not after < before
    report = LayerReport(
        layer=layer,
        kind="gqa",
        error_before=before,
        error_after=before if fell_back else after,
        fell_back=fell_back,
        output_refitted=refitted and not fell_back,
    )
    return LayerFit({} if fell_back else tensors, report)


def fit_heads(seen: Attention, weights: Mapping[str, Tensor], config: ModelConfig, pool: Pool) -> tuple[Tensor, Tensor]:
    """Of each head (H), the temperature and the gain with which it comes nearest to the teacher's without positions."""
    (q, k, v), training = project(seen.x, weights, config, pool), seen.training.bool()
    columns = weights["o_proj.weight"].view(config.hidden_size, -1, config.head_dim)
    metric = torch.einsum("chn,chm->hnm", columns, columns)
    wanted = seen.heads[training].view(-1, config.num_attention_heads, config.head_dim)
    weighed = torch.einsum("thn,hnm->thm", wanted, metric)
    errors, gains = [], []
    for temperature in TEMPERATURES:
        y = attend((q * temperature, k, v), config, pool, rope=False)[training].view_as(wanted)
        own = (torch.einsum("thn,hnm->thm", y, metric) * y).sum(dim=(0, 2)).double()
        shared = (weighed * y).sum(dim=(0, 2)).double()
        gains.append((shared / own.clamp_min(1e-30)).clamp_min(0.0).float())
        errors.append((-gains[-1].double() * shared).nan_to_num(nan=torch.inf))
    table = torch.stack(errors)
    best = table.sum(dim=1).argmin().expand(table.shape[1]) if config.qk_norm else table.argmin(dim=0)
    gain = torch.stack(gains).gather(0, best[None])[0]
    return torch.tensor(TEMPERATURES, device=gain.device)[best], gain


def mean_rotation(projected: Projected, config: ModelConfig, pool: Pool, training: Tensor) -> Tensor:
    """(2, H, N/2): mean cos and sin of the angle between query and attended key, for each head and pair."""
    q, k = _placed(projected[0], config), _placed(projected[1], config)
    batch, count, tokens, size = q.shape
    shared = count // k.shape[1]
    lags = torch.arange(tokens, dtype=torch.float64, device=q.device)
    angles = lags[:, None] * llama.frequencies(config.rope, size // 2, q.device)[0]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    # [t, i] is lag i: the key at t - i; where there is none, the weight is 0 anyway.
    back = (lags[:, None] - lags[None, :]).long()

    def share_of_lags(head: int) -> Tensor:
        found = torch.zeros(tokens, dtype=torch.float64, device=q.device)
        for b in range(batch):
            scores = q[b, head] @ k[b, head // shared].T * size**-0.5
            weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
            by_lag = weights.gather(1, back.clamp_min(0)).masked_fill(back < 0, 0.0)
            found += (by_lag * training[b][:, None]).double().sum(dim=0)
        return found

    shares = torch.stack(pool.map(share_of_lags, range(count)))
    shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return torch.stack([shares @ angles.cos(), shares @ angles.sin()]).float()
