"""The recipe for the heads that share one key and value: what is free, where it starts, the loss, the steps.

B batch      R = H/G heads of the group      N head_dim      T tokens

q      (B, T, R, N)   receptance(x) before norm and RoPE
k, v   (B, T, N)      key(x), value(x); v with the first layer's already mixed in, (B, T, R, N) where heads have own
A      (B, T, R, N)   the teacher's attention of these heads, before its output matrix
Y      (B, T, R, N)   the student's answer before the gate
gain   (R, N)         what multiplies Y so that it becomes A: the gate
turn   (2, .., N/2)   x and y of a rotation with scale, one for each pair of channels that RoPE rotates
mix    (.., N, N)     what the channels of a head give to each other beside that: q becomes turn((1 + mix) q).
                      Both act before norm and RoPE, where the weights of receptance and key absorb them.

Everything is fitted to A in the metric of the output matrix, head by head: |(A - gain * Y) W_h'|^2.

    fit     1. `start`        no rotation, no bonus, gain 1, one decay and iclr for all channels
            2. `choose`       the best decay for each head, then the best iclr, of a few
            3. `fit_bonus`    bonus and gain by least squares
            4. `refine`       Adam on everything in STEPS, kept where the validation tokens agree
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from hxaconv.forward.chunked import chunked
from hxaconv.forward.hxa079 import rmsnorm, rotate
from hxaconv.model.config import StudentConfig

DECAYS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.996)
LONG_DECAYS = (0.998, 0.9995)
"""Tried beside the others when sequences are at least 1024 tokens long."""
ICLRS = (0.02, 0.1, 0.3, 0.6, 0.9)
FIRST_DECAY = 0.9
FIRST_ICLR = 0.1
BONUS_LIMIT = 4.0
MIN_GAIN = 1e-4
DAMPING = 1e-4
"""Of the mean diagonal, in every least-squares system: dead channels give 0, not infinity."""
STEPS = {
    "decay_bias": 1.0,
    "iclr_bias": 1.0,
    "bonus": 1.0,
    "gain": 1.0,
    "turn_q": 1.0,
    "turn_k": 1.0,
    "mix_q": 0.1,
    "mix_k": 0.1,
}
"""The parameters that `refine` moves, and how far a step goes, in units of STEP_SIZE; the gain's is of its own mean,
whose size depends on the factors of the projections."""
STEP_SIZE = 0.1
STEPS_OF_GROUPS = 1.5
"""Steps of a group for each step of the whole mixer that follows: they cost less."""
MIX_PER_TOKEN = 1.5
"""Where a head's mix has more elements (N^2) for each training token, a group takes no steps: the text would be learnt
by heart, and `descent` comes out worse from there."""
LAST_STEP_SIZE = 0.05
"""Of STEP_SIZE, where the cosine schedule ends."""
MIX_PENALTY = 8.0
"""Of a head's squared mix, in units of its value on one token: keeps it small where tokens are few."""


@dataclass(frozen=True, slots=True)
class Group:
    """What the fit of one group of heads starts from."""

    config: StudentConfig
    q: Tensor
    k: Tensor
    v: Tensor
    target: Tensor
    """A, in units of the student's output matrix."""
    metric: Tensor
    """W_h' W_h, (R, N, N)."""
    training: Tensor
    """1.0 for training tokens, 0.0 for validation tokens, (B, T)."""
    positions: Tensor
    """RoPE as a turn for each token, (2, T, 1, N/2); see `positions_of`."""
    norms: tuple[Tensor, Tensor] | None = None
    """Weights of r_norm and k_norm, (N) each."""
    k_first: Tensor | None = None
    """k of the first RWKV layer, (B, T, N); None in that layer."""
    k_mix: Tensor | None = None
    """Its share, (N)."""
    decay_shift: Tensor | None = None
    """What the input adds to w0, (B, T, R, N); None where the low-rank pair is zero."""
    iclr_shift: Tensor | None = None
    """The same of a0."""
    has_bonus: bool = True
    """Whether there is an r_k to fit."""

    def values(self) -> Tensor:
        """v, (B, T, 1 or R, N)."""
        return self.v if self.v.dim() == 4 else self.v[:, :, None]


@dataclass(frozen=True, slots=True)
class Parameters:
    """What is fitted for one group of heads."""

    decay_bias: Tensor
    """w0, (R, N)."""
    iclr_bias: Tensor
    """a0, (R, N)."""
    bonus: Tensor
    """r_k, (R, N)."""
    gain: Tensor
    turn_q: Tensor
    """(2, R, N/2)."""
    turn_k: Tensor
    """(2, 1, N/2)."""
    mix_q: Tensor
    """(R, N, N)."""
    mix_k: Tensor
    """(1, N, N)."""

    def matrix_q(self) -> Tensor:
        """What the heads' rows of receptance are multiplied by, (R, N, N)."""
        return rotation(self.turn_q, self.mix_q)

    def matrix_k(self) -> Tensor:
        """What the rows of key are multiplied by, (1, N, N)."""
        return rotation(self.turn_k, self.mix_k)


def positions_of(tokens: int, config: StudentConfig, device: torch.device) -> Tensor:
    """RoPE of the first tokens, as `turned` takes it: made once, since its angles are float64."""
    half = config.head_dim // 2
    unit = torch.cat([torch.ones(half, device=device), torch.zeros(half, device=device)]).expand(1, tokens, 1, -1)
    found = rotate(unit, torch.arange(tokens, device=device), config.rope)
    return found.view(tokens, 1, 2, half).permute(2, 0, 1, 3).contiguous()


def start(group: Group) -> Parameters:
    """No rotation, no bonus, gain 1 and one decay and iclr for everybody."""
    heads, size = group.q.shape[2:]
    zeros = torch.zeros(heads, size, device=group.q.device)
    still = torch.tensor([1.0, 0.0], device=group.q.device).view(2, 1, 1)
    return Parameters(
        decay_bias=zeros + decay_bias_of(FIRST_DECAY),
        iclr_bias=zeros + _logit(FIRST_ICLR),
        bonus=zeros,
        gain=zeros + 1.0,
        turn_q=still.repeat(1, heads, size // 2),
        turn_k=still.repeat(1, 1, size // 2),
        mix_q=zeros.new_zeros(heads, size, size),
        mix_k=zeros.new_zeros(1, size, size),
    )


def fit(group: Group, steps: int, check: Callable[[], None]) -> Parameters:
    """The whole recipe, for so many steps of the mixer that follow.

    `check` is called before each step, and raises where the work is to end.
    """
    p = start(group)
    decays = DECAYS + LONG_DECAYS * (group.q.shape[1] >= 1024)
    p = replace(p, decay_bias=choose(group, p, "decay_bias", [decay_bias_of(decay) for decay in decays]))
    p = replace(p, iclr_bias=choose(group, p, "iclr_bias", [_logit(iclr) for iclr in ICLRS]))
    few = group.q.shape[3] ** 2 > MIX_PER_TOKEN * float(group.training.sum())
    return refine(group, fit_bonus(group, p), 0 if few else round(STEPS_OF_GROUPS * steps), check)


def choose(group: Group, p: Parameters, name: str, candidates: list[float]) -> Tensor:
    """The best of a few biases for each head, (R, N); all heads share each recurrence."""
    errors = []
    for candidate in candidates:
        y, _ = answer(group, replace(p, **{name: torch.full_like(p.bonus, candidate)}))
        errors.append(error(group, fit_gain(group, y) * y, group.training))
    # A head whose errors are not numbers takes the first candidate; its layer is validated later.
    best = torch.stack(errors).nan_to_num(nan=torch.inf).argmin(dim=0)
    return torch.tensor(candidates, device=best.device)[best][:, None].expand_as(p.bonus).clone()


def fit_bonus(group: Group, p: Parameters) -> Parameters:
    """A ~ gamma*Y + (rk.rho) v for each head, then the gain that goes with the bonus r_k = rho/gamma."""
    y, rk = answer(group, p)
    if not group.has_bonus:
        return replace(p, gain=fit_gain(group, y))
    tokens = group.training[:, :, None]
    v = group.values().expand_as(y)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (torch.einsum("btrn,rnm->btrm", a, group.metric) * b).sum(dim=3) * tokens

    vv, yv = dot(v, v), dot(y, v)
    heads, size = p.bonus.shape
    gram = y.new_zeros(heads, size + 1, size + 1)
    gram[:, 0, 0] = dot(y, y).sum(dim=(0, 1))
    gram[:, 0, 1:] = gram[:, 1:, 0] = torch.einsum("btr,btrn->rn", yv, rk)
    gram[:, 1:, 1:] = torch.einsum("btr,btrn,btrm->rnm", vv, rk, rk)
    right = y.new_zeros(heads, size + 1)
    right[:, 0] = dot(y, group.target).sum(dim=(0, 1))
    right[:, 1:] = torch.einsum("btr,btrn->rn", dot(v, group.target), rk)
    # The two parts have unlike units: to diagonal 1, so that damping means the same for both.
    scale = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-30).rsqrt()
    found = solve(gram * scale[:, :, None] * scale[:, None, :], right * scale) * scale
    gamma = found[:, :1]
    gamma = torch.where(gamma < 0, -1.0, 1.0) * gamma.abs().clamp_min(MIN_GAIN)
    p = replace(p, bonus=(found[:, 1:] / gamma).clamp(-BONUS_LIMIT, BONUS_LIMIT))
    return replace(p, gain=fit_gain(group, with_bonus(group, p)))


def refine(group: Group, begin: Parameters, steps: int, check: Callable[[], None]) -> Parameters:
    """Adam on all parameters of the group, on its own error alone; the start where that came out no better."""
    scale = error(group, torch.zeros_like(group.target), group.training).sum()
    if not bool(scale > 0) or steps == 0:
        return begin
    penalty = MIX_PENALTY / float(group.training.sum()) / group.q.shape[2]
    units = STEPS | {"gain": STEPS["gain"] * float(begin.gain.abs().mean().clamp_min(MIN_GAIN))}
    if not group.has_bonus:
        del units["bonus"]
    moved = {name: torch.zeros_like(getattr(begin, name)).requires_grad_() for name in units}

    def current() -> Parameters:
        return replace(begin, **{name: getattr(begin, name) + x * units[name] for name, x in moved.items()})

    def loss(p: Parameters) -> Tensor:
        missing = error(group, p.gain * with_bonus(group, p), group.training).sum() / scale
        return missing + penalty * (p.mix_q.square().sum() + p.mix_k.square().sum())

    optimizer = torch.optim.Adam(moved.values(), lr=STEP_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, STEP_SIZE * LAST_STEP_SIZE)
    with torch.enable_grad():
        for _ in range(steps):
            check()
            optimizer.zero_grad()
            loss(current()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        p = current()
    p = replace(p, bonus=p.bonus.clamp(-BONUS_LIMIT, BONUS_LIMIT))
    errors = [float(error(group, q.gain * with_bonus(group, q), 1 - group.training).sum()) for q in (p, begin)]
    # Not <: a comparison with NaN is false.
    return p if errors[0] <= errors[1] else begin


def answer(group: Group, p: Parameters) -> tuple[Tensor, Tensor]:
    """Y without the bonus, and the bonus' r*k, (B, T, R, N) each."""
    norm_q, norm_k = group.norms or (None, None)
    r = _placed(group.q, p.matrix_q(), norm_q, group)
    k = _placed(group.k[:, :, None], p.matrix_k(), norm_k, group)
    if group.k_first is not None and group.k_mix is not None:
        k = k + (group.k_first[:, :, None] - k) * group.k_mix
    w = -softplus(-_shifted(p.decay_bias, group.decay_shift)) - 0.5
    iclr = _shifted(p.iclr_bias, group.iclr_shift).sigmoid()
    kk = normalize(k, dim=-1, eps=1e-12).expand_as(r)
    k = k * (1 - (torch.exp(-torch.exp(w)) if group.config.variant.key_by_decay else w) + iclr)
    v = group.values().expand_as(r)
    state = r.new_zeros(r.shape[0], r.shape[2], r.shape[3], r.shape[3])
    y, _ = chunked(r, w, k, v, kk, iclr, state)
    return y * r.shape[3] ** -0.5, r * k


def with_bonus(group: Group, p: Parameters) -> Tensor:
    """Y, (B, T, R, N)."""
    y, rk = answer(group, p)
    return y + (rk * p.bonus).sum(dim=-1, keepdim=True) * group.values()


def error(group: Group, gained: Tensor, tokens: Tensor) -> Tensor:
    """|A - gained|^2 in the metric, over the tokens (B, T) that count, for each head (R)."""
    missing = (group.target - gained) * tokens[:, :, None, None]
    return (torch.einsum("btrn,rnm->btrm", missing, group.metric) * missing).sum(dim=(0, 1, 3))


def fit_gain(group: Group, y: Tensor) -> Tensor:
    """The gain (R, N) that brings Y nearest to A in the metric."""
    kept = y * group.training[:, :, None, None]
    gram = group.metric * torch.einsum("btrn,btrm->rnm", kept, kept)
    # A sum over a product: one einsum of all three goes a way 100 times as long.
    right = (kept * torch.einsum("btrm,rnm->btrn", group.target, group.metric)).sum(dim=(0, 1))
    return solve(gram, right)


def solve(gram: Tensor, right: Tensor) -> Tensor:
    """Damped least squares in float64: (..., n, n), (..., n) -> (..., n); zeros where there is nothing to fit."""
    gram, right = gram.double(), right.double()
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    damped = gram + torch.diag_embed((mean * DAMPING + 1e-30)[..., None].expand_as(right))
    found: Tensor = torch.linalg.solve(damped, right)
    return found.float()


def rotation(turn: Tensor, mix: Tensor | None = None) -> Tensor:
    """The matrix (heads, N, N) that mixes channels, then turns pairs of them."""
    columns = torch.eye(2 * turn.shape[2], device=turn.device).expand(turn.shape[1], -1, -1)
    if mix is not None:
        columns = columns + mix
    return turned(columns.permute(2, 0, 1), turn).permute(1, 2, 0)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Pairs of channels (n, n + N/2) rotated and scaled; x (..., heads, N), turn (2, ..., heads, N/2)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * turn[0] - second * turn[1], second * turn[0] + first * turn[1]], dim=-1)


def mixed_rows(weight: Tensor, matrix: Tensor) -> Tensor:
    """A projection (heads * N, C), or its bias (heads * N), whose heads are multiplied by matrix (heads, N, N)."""
    return (matrix @ weight.view(*matrix.shape[:2], -1)).view(weight.shape)


def decay_bias_of(decay: float) -> float:
    """The w0 whose decay, with nothing added, is this one, 0.5453 < decay < 1."""
    log_neg_log_decay = math.log(-math.log(decay))
    return -math.log(math.exp(-log_neg_log_decay - 0.5) - 1)


def decay_of(decay_bias: Tensor) -> Tensor:
    """The inverse of `decay_bias_of`, elementwise."""
    return torch.exp(-torch.exp(-softplus(-decay_bias) - 0.5))


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _shifted(bias: Tensor, shift: Tensor | None) -> Tensor:
    """(1, 1, R, N), or what it is for every token, (B, T, R, N)."""
    return bias[None, None] if shift is None else bias + shift


def _placed(x: Tensor, matrix: Tensor, norm: Tensor | None, group: Group) -> Tensor:
    x = torch.einsum("btrn,rmn->btrm", x, matrix)
    if norm is not None:
        x = rmsnorm(x, norm, group.config.rms_norm_eps)
    return turned(x, group.positions)
