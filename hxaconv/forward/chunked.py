"""The recurrence of hxa079 over chunks of tokens: the same numbers as `hxa079.loop`, for long inputs.

Inside a chunk, with P_t the product of the decays of its tokens up to t, alpha = -kk and beta = kk * a:

    u_t = S_{t-1} alpha_t           what token t removes, (N_v)
    S_t = S_0 P_t + sum_{s<=t} (u_s beta_s' + v_s k_s') P_t / P_s

so that u solves a unit lower-triangular system and everything else is matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 32
"""Tokens. P_t is at least exp(-0.61 t): up to 128 tokens, P and 1/P stay inside float32."""


def chunked(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """As `hxa079.loop`: r, w, k, v, kk, a (B, T, H, N), state (B, H, N_v, N_k) -> y (B, T, H, N), state."""
    answers = []
    r, log_decay, k, v, alpha, beta = (x.transpose(1, 2) for x in (r, -torch.exp(w), k, v, -kk, kk * a))
    for start in range(0, r.shape[2], chunk):
        r_, d_, k_, v_, alpha_, beta_ = (x[:, :, start : start + chunk] for x in (r, log_decay, k, v, alpha, beta))
        y, state = _chunk(r_, d_, k_, v_, alpha_, beta_, state)
        answers.append(y.transpose(1, 2))
    return torch.cat(answers, dim=1), state


def _chunk(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    # All (B, H, T, N), `state` (B, H, N_v, N_k).
    log_product = log_decay.cumsum(dim=2)
    product, inverse = log_product.exp(), (-log_product).exp()
    alpha_then = alpha * (log_product - log_decay).exp()  # alpha_t P_{t-1}
    r_then, beta_then, k_then = r * product, beta * inverse, k * inverse
    before = alpha_then @ state.transpose(2, 3) + (alpha_then @ k_then.transpose(2, 3)).tril(-1) @ v
    correction = (alpha_then @ beta_then.transpose(2, 3)).tril(-1)
    identity = torch.eye(r.shape[2], dtype=r.dtype, device=r.device)
    u = torch.linalg.solve_triangular(identity - correction, before, upper=False, unitriangular=True)
    y = r_then @ state.transpose(2, 3)
    y = y + (r_then @ beta_then.transpose(2, 3)).tril() @ u + (r_then @ k_then.transpose(2, 3)).tril() @ v
    last = product[:, :, -1:, :]
    state = state * last + u.transpose(2, 3) @ (beta_then * last) + v.transpose(2, 3) @ (k_then * last)
    return y, state
