"""One RWKV layer fitted to the teacher's attention on the teacher's own hidden states.

1. v0 = k0 = -2: the published 0.73 mixes two thirds of the first layer's k and v into every layer.
2. Each group of heads: decay and iclr by grid, the bonus by least squares, then a few gradient steps on
   these, on the gain and on what the channels of r and k give to each other.
3. The gate in the output's metric; with enough tokens the output matrix; the teacher's energy restored.
4. The held-out tokens decide between the result, as stored, and the plain initialisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hxaconv.calibration import heads, output_matrix
from hxaconv.calibration.report import LayerReport, Settings
from hxaconv.forward.pool import Pool
from hxaconv.forward.walk import First, time_mix
from hxaconv.model.config import StudentConfig
from hxaconv.model.names import mixer_prefix

FIRST_LAYER_SHARE = -2.0
FEW_TOKENS_PER_CHANNEL = 4
"""Below that many fitted tokens per channel of a head, a warning is due."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The teacher's attention in one layer: what it saw and what it said."""

    x: Tensor
    """Normed input, (B, T, C)."""
    heads: Tensor
    """Before the output matrix, (B, T, A)."""
    output: Tensor
    """After it, without a bias, (B, T, C)."""
    output_weight: Tensor
    output_bias: Tensor | None
    fitted: Tensor
    """1.0 for tokens to fit, 0.0 for those to judge by, (B, T)."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What became of a layer: tensors to replace by short name, and v_first, k_first to hand on."""

    tensors: dict[str, Tensor]
    report: LayerReport
    first: First = None


def fit_layer(
    seen: Attention,
    weights: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
    first: First,
    config: StudentConfig,
    layer: int,
    settings: Settings,
    pool: Pool,
) -> Fit:
    """Fit one RWKV layer. `weights` is its plain mixer by short name (`w0`, `key.weight`), in float32."""
    fitting = _Fitting(seen, weights, dtypes, first, config, layer, settings, pool)
    warnings = _warnings(seen, config)
    tensors: dict[str, Tensor] = {}
    if not bool(torch.isfinite(seen.output).all() and torch.isfinite(seen.x).all()):
        warnings.append("the teacher's attention is not finite here: not calibrated")
    elif bool(seen.fitted.any()):
        tensors = fitting.fit()
    stored = {name: values.float() for name, values in tensors.items()}
    versions = [weights, {**weights, **stored}]
    (before, plain_first), (after, fitted_first) = pool.map(fitting.judge, versions)
    # Not >=: a comparison with NaN is false.
    fell_back = not after < before
    if fell_back:
        tensors, after, fitted_first = {}, before, plain_first
    report = LayerReport(
        layer=layer,
        kind="rwkv",
        error_before=before,
        error_after=after,
        fell_back=fell_back,
        output_refitted="output.weight" in tensors,
        warnings=tuple(warnings),
        **_described({**weights, **tensors}, config),
    )
    return Fit(tensors, report, first or fitted_first)


def _warnings(seen: Attention, config: StudentConfig) -> list[str]:
    found, tokens = [], int(seen.fitted.sum())
    if tokens < FEW_TOKENS_PER_CHANNEL * config.head_dim:
        found.append(f"{tokens} tokens to fit are few for heads of {config.head_dim} channels")
    energy = seen.heads.square().sum(dim=(0, 1)).view(config.num_attention_heads, -1).sum(dim=1)
    reach = seen.output_weight.square().sum(dim=0).view(config.num_attention_heads, -1).sum(dim=1)
    dead = [str(i) for i in ((energy == 0) | (reach == 0)).nonzero()[:, 0].tolist()]
    if dead:
        found.append(f"the teacher's attention is zero in head {', '.join(dead)}")
    return found


def _described(weights: dict[str, Tensor], config: StudentConfig) -> dict[str, Any]:
    def by_head(x: Tensor) -> tuple[float, ...]:
        return tuple(x.view(config.num_attention_heads, -1).mean(dim=1).tolist())

    clamped = 0.0
    if "r_k" in weights:
        clamped = float((weights["r_k"].float().abs() >= heads.BONUS_LIMIT).float().mean())
    return {
        "decay": by_head(heads.decay_of(weights["w0"].float())),
        "iclr": by_head(weights["a0"].float().sigmoid()),
        "clamped": clamped,
    }


@dataclass(frozen=True, slots=True)
class _Fitting:
    seen: Attention
    weights: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    first: First
    config: StudentConfig
    layer: int
    settings: Settings
    pool: Pool

    def judge(self, weights: dict[str, Tensor]) -> tuple[float, First]:
        """(relative error on held-out tokens, v_first and k_first), by the reference forward."""
        prefix = mixer_prefix(self.layer)
        found, first = time_mix(
            self.seen.x, lambda name: weights[name.removeprefix(prefix)], self.config, self.layer, self.first
        )
        wanted = self.seen.output if self.seen.output_bias is None else self.seen.output + self.seen.output_bias
        judged = (1 - self.seen.fitted)[:, :, None]
        missed = ((found - wanted) * judged).double().square().sum()
        # A layer that says nothing on these tokens cannot be missed by a share of it.
        return float(missed / (wanted * judged).double().square().sum().clamp_min(1e-30)), first

    def fit(self) -> dict[str, Tensor]:
        weights = dict(self.weights)
        tensors: dict[str, Tensor] = {}

        def store(name: str, values: Tensor) -> None:
            tensors[name] = values.to(self.dtypes[name]).contiguous()
            weights[name] = tensors[name].float()

        for name in ("v0", "k0"):
            if name not in weights:
                continue
            store(name, torch.full_like(weights[name], FIRST_LAYER_SHARE))
        found = self.pool.map(self._fit_group, self._groups(weights))
        store("w0", torch.stack([p.decay_bias for p in found]).view(1, 1, -1))
        store("a0", torch.stack([p.iclr_bias for p in found]).view(1, 1, -1))
        if "r_k" in weights:
            store("r_k", torch.cat([p.bonus for p in found]))
        matrices = {
            "receptance": torch.cat([p.matrix_q() for p in found]),
            "key": torch.cat([p.matrix_k() for p in found]),
        }
        for name, matrix in matrices.items():
            for part in ("weight", "bias"):
                if f"{name}.{part}" in weights:
                    store(f"{name}.{part}", mixed_rows(weights[f"{name}.{part}"], matrix))
        y = torch.cat(self.pool.map(lambda pair: heads.with_bonus(*pair), self._as_stored(weights)), dim=2).flatten(2)
        self._fit_output(y, weights, store)
        if self.seen.output_bias is not None:
            store("output.bias", self.seen.output_bias)
        return tensors

    def _fit_output(self, y: Tensor, weights: dict[str, Tensor], store: Callable[[str, Tensor], None]) -> None:
        fitted = self.seen.fitted.bool()
        judged, wanted = y[~fitted], self.seen.output[~fitted]
        y, target, matrix = y[fitted], self.seen.output[fitted], weights["output.weight"]
        gain = output_matrix.fit_gate(y, target, matrix, self.pool)

        def missed(weight: Tensor) -> float:
            return float((wanted - self.pool.linear(judged * gain, weight)).square().sum())

        always = self.settings.refit_output == "always"
        enough = y.shape[0] >= output_matrix.TOKENS_PER_COLUMN * y.shape[1]
        if always or (self.settings.refit_output == "auto" and enough):
            refitted, _ = output_matrix.fit_output(y * gain, target, matrix, self.pool)
            if always or missed(refitted) < missed(matrix):
                store("output.weight", refitted)
        said = self.pool.linear(y * gain, weights["output.weight"])
        gain = gain * output_matrix.restoring(said, target)
        store("g2", output_matrix.gate_weights(weights["g2"], gain, self.dtypes["g2"]))

    def _fit_group(self, group: heads.Group) -> heads.Parameters:
        begin = heads.fit_bonus(group, heads.fit_grid(group))
        return heads.refine(group, begin, self.settings.refine_steps, self.pool.check)

    def _groups(self, weights: dict[str, Tensor]) -> list[heads.Group]:
        """The inputs of every group of heads that share a key, from these weights."""
        config, x, matrix = self.config, self.seen.x, weights["output.weight"]

        def projected(name: str) -> Tensor:
            found = self.pool.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
            return found.view(*found.shape[:2], -1, config.head_dim)

        q, k, v = projected("receptance"), projected("key"), projected("value")
        k_mix, own_value = None, self._own_value(weights)
        if self.first is not None and "v0" in weights:
            v = v + (self.first[0] - v) * weights["v0"].sigmoid().view(-1, config.head_dim)
        if self.first is not None and "k0" in weights:
            k_mix = weights["k0"].sigmoid().view(-1, config.head_dim)
        decay_shift = self._from_input("w", weights, torch.tanh)
        iclr_shift = self._from_input("a", weights, lambda narrow: narrow)
        # In units of the student's output matrix, which is the teacher's times some factor.
        unit = (self.seen.output_weight * matrix).sum() / matrix.square().sum().clamp_min(1e-30)
        target = self.seen.heads.view_as(q) * unit
        columns = matrix.view(config.hidden_size, -1, config.head_dim)
        shared, groups = config.num_attention_heads // config.num_key_value_heads, []
        for g in range(config.num_key_value_heads):
            mine = slice(g * shared, (g + 1) * shared)
            groups.append(
                heads.Group(
                    q=q[:, :, mine],
                    k=k[:, :, g],
                    v=v[:, :, g] if own_value is None else v[:, :, g, None] + own_value[:, :, mine],
                    target=target[:, :, mine],
                    metric=torch.einsum("crn,crm->rnm", columns[:, mine], columns[:, mine]),
                    fitted=self.seen.fitted,
                    rope=config.rope,
                    eps=config.rms_norm_eps,
                    norms=(weights["r_norm.weight"], weights["k_norm.weight"]) if config.qk_norm else None,
                    k_first=None if self.first is None else self.first[1][:, :, g],
                    k_mix=None if k_mix is None else k_mix[g],
                    decay_shift=None if decay_shift is None else decay_shift[:, :, mine],
                    iclr_shift=None if iclr_shift is None else iclr_shift[:, :, mine],
                    by_decay=config.variant.key_by_decay,
                    has_bonus="r_k" in weights,
                )
            )
        return groups

    def _from_input(self, letter: str, weights: dict[str, Tensor], inner: Callable[[Tensor], Tensor]) -> Tensor | None:
        """What a low-rank pair makes of the input, (B, T, H, N); None where it starts at zero."""
        first = weights[f"{letter}1"]
        if not bool(first.any()):
            return None
        found = inner(self.seen.x @ first) @ weights[f"{letter}2"]
        return found.view(*found.shape[:2], -1, self.config.head_dim)

    def _own_value(self, weights: dict[str, Tensor]) -> Tensor | None:
        """The term of the input in v, (B, T, H, N), where the variant has one."""
        scale = self.config.variant.own_value_scale
        found = self._from_input("v", weights, lambda narrow: narrow) if scale else None
        return None if found is None else found * scale

    def _as_stored(self, weights: dict[str, Tensor]) -> list[tuple[heads.Group, heads.Parameters]]:
        size, pairs = self.config.head_dim, []
        for g, group in enumerate(self._groups(weights)):
            p, shared = heads.start(group), group.q.shape[2]
            mine = slice(g * shared, (g + 1) * shared)
            w0, a0 = (weights[name].view(-1, size)[mine] for name in ("w0", "a0"))
            bonus = weights["r_k"][mine] if "r_k" in weights else p.bonus
            pairs.append((group, replace(p, decay_bias=w0, iclr_bias=a0, bonus=bonus)))
        return pairs


def mixed_rows(weight: Tensor, matrix: Tensor) -> Tensor:
    """A projection (heads * N, C), or its bias (heads * N), whose heads are multiplied by matrix (heads, N, N)."""
    return (matrix @ weight.view(*matrix.shape[:2], -1)).view(weight.shape)
