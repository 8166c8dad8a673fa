"""A layer that stays attention fitted to losing RoPE: the teacher's mean rotation folded into q, o refitted.

At lag t-s RoPE turns the pair of frequency f by (t-s) f. What stays of that without positions is its mean
under the teacher's own attention: c = E cos, s = E sin for each head and pair, rows (a, b) of q_proj
becoming (c a - s b, c b + s a).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hxaconv.calibration import output_matrix, teacher
from hxaconv.calibration.heads import rotation
from hxaconv.calibration.report import LayerReport
from hxaconv.calibration.time_mix import Attention, Fit, mixed_rows
from hxaconv.forward.pool import Pool
from hxaconv.forward.rope import frequencies
from hxaconv.model.config import ModelConfig


def fold_rope(
    seen: Attention,
    weights: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
    config: ModelConfig,
    layer: int,
    pool: Pool,
) -> Fit:
    """Fit q_proj and o_proj of one attention layer; `weights` is its mixer by short name, in float32."""
    projected = teacher.project(seen.x, weights, config, pool)
    turn = mean_rotation(projected, config, pool, seen.fitted)
    tensors: dict[str, Tensor] = {
        name: mixed_rows(weights[name], rotation(turn)).to(dtypes[name])
        for name in ("q_proj.weight", "q_proj.bias")
        if name in weights
    }
    folded = {**weights, **{name: values.float() for name, values in tensors.items()}}
    plain_heads = teacher.attend(projected, config, pool, rope=False)
    fold_heads = teacher.attend(teacher.project(seen.x, folded, config, pool), config, pool, rope=False)
    fitted, name = seen.fitted.bool(), "o_proj.weight"
    refitted, _ = output_matrix.fit_output(fold_heads[fitted], seen.output[fitted], weights[name], pool)
    tensors[name] = refitted.to(dtypes[name])
    judged = ~fitted

    def error(found: Tensor, matrix: Tensor) -> float:
        wanted = seen.output[judged]
        missed = (wanted - pool.linear(found[judged], matrix)).square().sum()
        # A layer that says nothing on these tokens cannot be missed by a share of it.
        return float(missed / wanted.square().sum().clamp_min(1e-30))

    before, after = error(plain_heads, weights[name]), error(fold_heads, tensors[name].float())
    kept_plain = not after < before
    report = LayerReport(
        layer=layer,
        kind="gqa",
        error_before=before,
        error_after=before if kept_plain else after,
        kept_plain=kept_plain,
        output_refitted=not kept_plain,
    )
    return Fit({} if kept_plain else tensors, report)


def mean_rotation(projected: teacher.Projected, config: ModelConfig, pool: Pool, fitted: Tensor) -> Tensor:
    """(2, H, N/2): mean cos and sin of the angle between query and attended key, for each head and pair."""
    q, k = teacher.placed(projected.q, config), teacher.placed(projected.k, config)
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
