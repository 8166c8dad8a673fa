"""One RWKV layer fitted to the teacher's attention on the teacher's own hidden states.

1. v0 = k0 = -2: the published 0.73 mixes two thirds of the first layer's k and v into every layer.
2. Each group of heads by itself, see `heads`.
3. The gate in the output's metric; with enough tokens the output matrix; the teacher's energy restored.
4. Steps of the whole mixer, see `descent`.
5. The validation tokens decide between the result, as stored, and the plain initialisation.

M training tokens    Y (M, A) the heads' answers before the gate      O (M, C) the teacher's output
                     W (C, A) the student's output matrix             gain (A) the gate
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hxaconv.calibration import descent, heads
from hxaconv.calibration.report import LayerReport
from hxaconv.forward import hxa079
from hxaconv.forward.chunked import chunked, first_token
from hxaconv.forward.pool import Pool
from hxaconv.forward.walk import First, time_mix
from hxaconv.model.config import StudentConfig
from hxaconv.model.names import mixer_prefix
from hxaconv.options import Fit

FIRST_LAYER_SHARE = -2.0
BEGINNINGS = 128
"""Tokens of each sequence that are, in layer 0, fitted as the first of a sequence as well, with the same weight as the
whole of it. Its first token is one of a thousand in the loss, but trained models give it a stream a hundred times as
long as all others', to which their attention looks where it looks for nothing. That comes of the first layer's output;
without it, layers that stay attention do more harm than good."""
BEGINNING_STEPS = 2
"""Times as many steps as in other layers where there are such tokens: half of their error."""
FEW_TOKENS_PER_CHANNEL = 4
"""Below that many training tokens per channel of a head, a warning is due."""
FEW = 2048
"""Tokens, in whole sequences, that groups of heads are fitted to: more make their few parameters no better."""
TOKENS_PER_COLUMN = 24
"""Below that many tokens per column, a fitted output matrix learns the tokens by heart: with 16, each layer's error
on validation tokens falls a little and the divergence of the whole rises."""
RIDGES = (1e-3, 1e-2, 0.1, 1.0)
MAX_RESTORE = 2.0


@dataclass(frozen=True, slots=True)
class Attention:
    """The teacher's attention in one layer: its input and its output."""

    x: Tensor
    """Normed input, (B, T, C)."""
    heads: Tensor
    """Before the output matrix, (B, T, A)."""
    output: Tensor
    """After it, without a bias, (B, T, C)."""
    output_weight: Tensor
    output_bias: Tensor | None
    training: Tensor
    """1.0 for training tokens, 0.0 for validation tokens, (B, T)."""
    alone: Tensor | None = None
    """The output, without a bias, of each token as the first of a sequence, (B, T, C); in layer 0 alone, whose input
    tells nothing of the tokens before."""

    @property
    def with_bias(self) -> Tensor:
        """The output with its bias."""
        return self.output if self.output_bias is None else self.output + self.output_bias

    def missed(self, output: Tensor) -> float:
        """The relative error of a mixer's output on the validation tokens."""
        wanted, validation = self.with_bias, (1 - self.training)[:, :, None]
        missed = ((output - wanted) * validation).double().square().sum()
        # A layer that is silent on these tokens cannot be missed by a share of it.
        return float(missed / (wanted * validation).double().square().sum().clamp_min(1e-30))

    def rows(self, count: int) -> Attention:
        """The first so many sequences alone."""
        parts = {name: getattr(self, name)[:count] for name in ("x", "heads", "output", "training")}
        return replace(self, **parts)


@dataclass(frozen=True, slots=True)
class LayerFit:
    """What became of a layer: tensors to replace by short name, and v_first, k_first to hand on."""

    tensors: dict[str, Tensor]
    report: LayerReport
    first: First = None


@dataclass(frozen=True, slots=True)
class RwkvLayer:
    """An RWKV layer to be fitted."""

    seen: Attention
    text: int
    """How many sequences are text; those after them are made of it."""
    weights: dict[str, Tensor]
    """Its plain mixer by short name (`w0`, `key.weight`), in float32."""
    dtypes: dict[str, torch.dtype]
    first: First
    """v_first and k_first; None in the first RWKV layer."""
    config: StudentConfig
    layer: int
    steps: int
    """Of `descent`."""
    settings: Fit
    pool: Pool

    def fit(self) -> LayerFit:
        """The fit where it is better on the validation tokens, as stored, than the plain values; else those."""
        seen, warnings = self.seen, self._warnings()
        tensors: dict[str, Tensor] = {}
        refitted = False
        if not bool(torch.isfinite(seen.output).all() and torch.isfinite(seen.x).all()):
            warnings.append("the teacher's attention is not finite here: not calibrated")
        elif bool(seen.training.any()):
            tensors, refitted = self._fitted()
        stored = {name: values.float() for name, values in tensors.items()}
        versions = [self.weights, {**self.weights, **stored}]
        (before, plain_first), (after, fitted_first) = self.pool.map(self.validated, versions)
        # Not >=: a comparison with NaN is false.
        fell_back = not after < before
        if fell_back:
            tensors, after, fitted_first = {}, before, plain_first
        report = LayerReport(
            layer=self.layer,
            kind="rwkv",
            error_before=before,
            error_after=after,
            fell_back=fell_back,
            output_refitted=refitted and not fell_back,
            warnings=tuple(warnings),
            **self._described({**self.weights, **tensors}),
        )
        return LayerFit(tensors, report, self.first or fitted_first)

    def validated(self, weights: dict[str, Tensor]) -> tuple[float, First]:
        """(relative error on the validation tokens, v_first and k_first), by the reference forward."""
        seen, prefix = self.seen, mixer_prefix(self.layer)
        found, first = time_mix(
            seen.x, lambda name: weights[name.removeprefix(prefix)], self.config, self.layer, self.first
        )
        return seen.missed(found), first

    def _warnings(self) -> list[str]:
        seen, count = self.seen, self.config.num_attention_heads
        found, tokens = [], int(seen.rows(self.text).training.sum())
        if tokens < FEW_TOKENS_PER_CHANNEL * self.config.head_dim:
            found.append(f"{tokens} tokens to fit are few for heads of {self.config.head_dim} channels")
        energy = seen.heads.square().sum(dim=(0, 1)).view(count, -1).sum(dim=1)
        reach = seen.output_weight.square().sum(dim=0).view(count, -1).sum(dim=1)
        dead = [str(i) for i in ((energy == 0) | (reach == 0)).nonzero()[:, 0].tolist()]
        if dead:
            found.append(f"the teacher's attention is zero in head {', '.join(dead)}")
        return found

    def _described(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        def by_head(x: Tensor) -> tuple[float, ...]:
            return tuple(x.view(self.config.num_attention_heads, -1).mean(dim=1).tolist())

        found: dict[str, Any] = {
            "decay": by_head(heads.decay_of(weights["w0"].float())),
            "iclr": by_head(weights["a0"].float().sigmoid()),
        }
        if "r_k" in weights:
            found["clamped"] = float((weights["r_k"].float().abs() >= heads.BONUS_LIMIT).float().mean())
        return found

    def _fitted(self) -> tuple[dict[str, Tensor], bool]:
        """Tensors to replace, and whether least squares have made the output matrix."""
        weights = dict(self.weights)
        tensors: dict[str, Tensor] = {}

        def store(name: str, values: Tensor) -> None:
            if name in self.weights:
                tensors[name] = values.to(self.dtypes[name]).contiguous()
                weights[name] = tensors[name].float()

        for name in ("v0", "k0"):
            if name in weights:
                store(name, torch.full_like(weights[name], FIRST_LAYER_SHARE))
        text = self.seen.rows(self.text)
        few = text.rows(-(-FEW // text.x.shape[1]))
        steps, check = self.settings.refine_steps, self.pool.check
        found = self.pool.map(lambda group: heads.fit(group, steps, check), self._groups(few, weights))
        store("w0", torch.stack([p.decay_bias for p in found]).view(1, 1, -1))
        store("a0", torch.stack([p.iclr_bias for p in found]).view(1, 1, -1))
        store("r_k", torch.cat([p.bonus for p in found]))
        for name, matrix in (
            ("receptance", torch.cat([p.matrix_q() for p in found])),
            ("key", torch.cat([p.matrix_k() for p in found])),
        ):
            for part in (f"{name}.weight", f"{name}.bias"):
                if part in weights:
                    store(part, heads.mixed_rows(weights[part], matrix))
        y = torch.cat(
            self.pool.map(lambda pair: heads.with_bonus(*pair), self._as_stored(text, weights)), dim=2
        ).flatten(2)
        self._fit_output(text, y, weights, store)
        if self.seen.output_bias is not None:
            store("output.bias", self.seen.output_bias)
        refitted = "output.weight" in tensors
        for name, values in self._descended(weights).items():
            store(name, values.clamp(-heads.BONUS_LIMIT, heads.BONUS_LIMIT) if name == "r_k" else values)
        return tensors, refitted

    def _descended(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `descent` replaces of the mixer: of its projections, w0, a0 and r_k."""
        seen, first, prefix, narrow = self.seen, self.first, mixer_prefix(self.layer), _narrowed(weights)

        def output(i: int, values: Mapping[str, Tensor]) -> Tensor:
            def get(name: str) -> Tensor:
                short = name.removeprefix(prefix)
                return values[short] if short in values else narrow[short]

            carry = hxa079.Carry(first[0][i : i + 1], first[1][i : i + 1]) if first else hxa079.Carry()
            found = hxa079.time_mix(seen.x[i : i + 1], get, self.config, self.layer, carry, chunked)[0]
            if seen.alone is None:
                return found
            # Contiguous: torch would else repeat every matrix for each of them.
            single, carry = seen.x[i, some, None].contiguous(), hxa079.Carry()
            beginnings = hxa079.time_mix(single, get, self.config, self.layer, carry, first_token)
            return torch.cat([found, beginnings[:, 0] * share])

        wanted, training, share, steps = seen.with_bias, seen.training, 1.0, self.steps
        some = slice(None, None, -(-wanted.shape[1] // BEGINNINGS))
        if seen.alone is not None:
            alone = seen.alone[:, some] + (0.0 if seen.output_bias is None else seen.output_bias)
            share = float((wanted.square().sum() / alone.square().sum().clamp_min(1e-30)).sqrt())
            wanted = torch.cat([wanted, alone * share], dim=1)
            training = torch.cat([training, training[:, some]], dim=1)
            steps *= BEGINNING_STEPS
        free = {name: weights[name] for name in (*descent.MATRICES, *descent.RATES) if name in weights}
        return descent.descend(output, free, wanted, training, self.config.head_dim, steps, self.pool)

    def _as_stored(self, seen: Attention, weights: dict[str, Tensor]) -> list[tuple[heads.Group, heads.Parameters]]:
        """The groups with their parameters as they stand in the weights: projections have the rotations in them."""
        size, pairs = self.config.head_dim, []
        for g, group in enumerate(self._groups(seen, weights)):
            p, shared = heads.start(group), group.q.shape[2]
            mine = slice(g * shared, (g + 1) * shared)
            w0, a0 = (weights[name].view(-1, size)[mine] for name in ("w0", "a0"))
            bonus = weights["r_k"][mine] if "r_k" in weights else p.bonus
            pairs.append((group, replace(p, decay_bias=w0, iclr_bias=a0, bonus=bonus)))
        return pairs

    def _fit_output(
        self, seen: Attention, y: Tensor, weights: dict[str, Tensor], store: Callable[[str, Tensor], None]
    ) -> None:
        training, pool = seen.training.bool(), self.pool
        others, wanted = y[~training], seen.output[~training]
        y, target, matrix = y[training], seen.output[training], weights["output.weight"]
        gain = fit_gate(y, target, matrix, pool)

        def missed(weight: Tensor) -> float:
            return float((wanted - pool.linear(others * gain, weight)).square().sum())

        if output_is_free(self.settings, self.config, y.shape[0]):
            refitted = fit_output(y * gain, target, matrix, pool)
            if self.settings.refit_output == "always" or missed(refitted) < missed(matrix):
                store("output.weight", refitted)
        gain = gain * restoring(pool.linear(y * gain, weights["output.weight"]), target)
        store("g2", gate_weights(weights["g2"], gain, self.dtypes["g2"]))

    def _groups(self, seen: Attention, weights: dict[str, Tensor]) -> list[heads.Group]:
        """The inputs of every group of heads that share a key, from these weights."""
        config, x, matrix = self.config, seen.x, weights["output.weight"]

        def projected(name: str) -> Tensor:
            found = self.pool.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
            return found.view(*found.shape[:2], -1, config.head_dim)

        q, k, v = projected("receptance"), projected("key"), projected("value")
        k_mix, own_value = None, None
        if self.first is not None and "v0" in weights:
            v = v + (self.first[0][: len(v)] - v) * weights["v0"].sigmoid().view(-1, config.head_dim)
        if self.first is not None and "k0" in weights:
            k_mix = weights["k0"].sigmoid().view(-1, config.head_dim)
        decay_shift = self._from_input("w", x, weights, torch.tanh)
        iclr_shift = self._from_input("a", x, weights)
        if config.variant.own_value_scale and (found := self._from_input("v", x, weights)) is not None:
            own_value = found * config.variant.own_value_scale
        # In units of the student's output matrix, which is the teacher's times some factor.
        unit = (self.seen.output_weight * matrix).sum() / matrix.square().sum().clamp_min(1e-30)
        target = seen.heads.view_as(q) * unit
        columns = matrix.view(config.hidden_size, -1, config.head_dim)
        positions = heads.positions_of(x.shape[1], config, x.device)
        shared, groups = config.num_attention_heads // config.num_key_value_heads, []
        for g in range(config.num_key_value_heads):
            mine = slice(g * shared, (g + 1) * shared)
            groups.append(
                heads.Group(
                    config=config,
                    q=q[:, :, mine],
                    k=k[:, :, g],
                    v=v[:, :, g] if own_value is None else v[:, :, g, None] + own_value[:, :, mine],
                    target=target[:, :, mine],
                    metric=torch.einsum("crn,crm->rnm", columns[:, mine], columns[:, mine]),
                    training=seen.training,
                    positions=positions,
                    norms=(weights["r_norm.weight"], weights["k_norm.weight"]) if config.qk_norm else None,
                    k_first=None if self.first is None else self.first[1][: len(x), :, g],
                    k_mix=None if k_mix is None else k_mix[g],
                    decay_shift=None if decay_shift is None else decay_shift[:, :, mine],
                    iclr_shift=None if iclr_shift is None else iclr_shift[:, :, mine],
                    has_bonus="r_k" in weights,
                )
            )
        return groups

    def _from_input(
        self,
        letter: str,
        x: Tensor,
        weights: dict[str, Tensor],
        inner: Callable[[Tensor], Tensor] = lambda narrow: narrow,
    ) -> Tensor | None:
        """What a low-rank pair makes of the input, (B, T, H, N); None where it starts at zero."""
        first = weights[f"{letter}1"]
        if not bool(first.any()):
            return None
        found = inner(x @ first) @ weights[f"{letter}2"]
        return found.view(*found.shape[:2], -1, self.config.head_dim)


def output_is_free(settings: Fit, config: StudentConfig, tokens: int) -> bool:
    """Whether so many training tokens may fit the output matrix too."""
    enough = tokens >= TOKENS_PER_COLUMN * config.attention_size
    return settings.refit_output == "always" or (settings.refit_output == "auto" and enough)


def fit_gate(y: Tensor, target: Tensor, weight: Tensor, pool: Pool) -> Tensor:
    """The gain that minimises |O - (Y diag(gain)) W'|^2, damped: all heads at once, (A).

    Its normal equations are ((W'W) * (Y'Y)) gain = sum over tokens of Y * (O W), * elementwise.
    """
    columns = weight.T.contiguous()
    gram = pool.linear(columns, columns)
    gram *= pool.linear(y.T, y.T)
    right = (y * pool.linear(target, columns)).sum(dim=0).double()
    gram = gram.double()
    gram.diagonal().add_(float(gram.diagonal().mean()) * heads.DAMPING + 1e-30)
    return _solve_definite(gram, right[:, None])[:, 0].float()


def fit_output(gated: Tensor, target: Tensor, weight: Tensor, pool: Pool) -> Tensor:
    """W nearest to the given one that explains O from the gated Y.

    The ridge, in units of the mean energy of a column, is the one that predicts the last quarter best.
    """
    cut = gated.shape[0] * 3 // 4

    def refitted(tokens: int, ridge: float) -> Tensor:
        z, missing = gated[:tokens], target[:tokens] - pool.linear(gated[:tokens], weight)
        gram = pool.linear(z.T, z.T).double()
        gram.diagonal().add_(float(gram.diagonal().mean()) * ridge + 1e-30)
        change = _solve_definite(gram, pool.linear(z.T, missing.T).double())
        return weight + change.T.float()

    def missed(ridge: float) -> float:
        # A ridge that gives no numbers must not win.
        value = float((target[cut:] - pool.linear(gated[cut:], refitted(cut, ridge))).square().sum())
        return value if value == value else float("inf")

    return refitted(gated.shape[0], min(RIDGES, key=missed))


def _solve_definite(gram: Tensor, right: Tensor) -> Tensor:
    """gram (n, n) symmetric and damped, right (n, k), float64; NaN where gram holds something not finite."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        return torch.full_like(right, torch.nan)
    return torch.cholesky_solve(right, factor)


def restoring(output: Tensor, target: Tensor) -> float:
    """By how much to amplify a fitted output so that it has the teacher's energy.

    Least squares shrinks what it cannot explain. The following layers and the head expect the usual size:
    on trained models the KL falls although the layer's own error rises.
    """
    energy, found = float(target.square().sum()), float(output.square().sum())
    if not 0 < found < float("inf") or not 0 < energy < float("inf"):
        return 1.0
    return min(MAX_RESTORE, float((energy / found) ** 0.5))


def gate_weights(g2: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """g2 (rows, A) moved so that the gate is `gain` after storage in `dtype`; g1 must be zero.

    With g1 = 0 the gate is the sum of g2's rows over 2. All rows take an equal part, so that they stay the
    distinct directions that training needs; what rounding leaves goes to one of them.
    """
    rows = g2.shape[0]
    stored = (g2 + (2 * gain - g2.sum(dim=0)) / rows).to(dtype).float()
    for _ in range(2):
        residue = 2 * gain.double() - stored.double().sum(dim=0)
        # The smallest number of a column has the finest neighbours.
        row = stored.abs().argmin(dim=0, keepdim=True)
        moved = (stored.gather(0, row).double() + residue).to(dtype).float()
        stored.scatter_(0, row, moved)
    return stored.to(dtype)


def _narrowed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same mixer where low-rank pairs that are zero have rank 1: most of their work is to multiply by zero."""
    found = dict(weights)
    for name, first in weights.items():
        second = f"{name[:-1]}2"
        if name.endswith("1") and second in weights and not bool(first.any()):
            found[name] = first[:, :1]
            # The gate's inner function makes 1/2 of 0, the others' 0.
            found[second] = weights[second].sum(dim=0, keepdim=True) if name == "g1" else weights[second][:1]
    return found
