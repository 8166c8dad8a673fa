"""The recurrence of hxa079 over chunks of tokens: the same numbers as `hxa079.loop`, for long inputs and for gradients.

Inside a chunk, with P_t the product of the decays of its tokens up to t, alpha = -kk and beta = kk * a:

    u_t = S_{t-1} alpha_t           what token t removes, (N_v)
    S_t = S_0 P_t + sum_{s<=t} (u_s beta_s' + v_s k_s') P_t / P_s

so that u solves a unit lower-triangular system and everything else is matrix products. With the rows

    asked = [alpha_t P_{t-1}; r_t P_t]      written = [beta_t / P_t; k_t / P_t]      scores = asked written', masked

a chunk is, whatever stands before it,

    X = asked S_0' + scores[:, k] v         (I - scores[alpha, beta]) u = X[alpha]
    y = X[r] + scores[r, beta] u            S = (S_0 + [u; v]' written) P_T

Only the lines with S and u run chunk after chunk; the scores of all chunks are one product. The backward pass is
written out, since autograd would keep a dozen copies of every chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 32
"""Tokens. P_t is at least exp(-0.61 t): up to 128 tokens, P and 1/P stay inside float32."""
TOGETHER = 8
"""Chunks whose scores are made at once where no gradient needs them all."""


def chunked(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """As `hxa079.loop`: r, w, k, v, kk, a (B, T, H, N), state (B, H, N_v, N_k) -> y (B, T, H, N), state.

    w and a may be (1, 1, H, N) where all tokens have the same. Gradients go to everything but the states.
    """
    if any(x.requires_grad for x in (r, w, k, v, kk, a)):
        return _chunked(r, w, k, v, kk, a, state, chunk)
    answers = []
    for start in range(0, r.shape[1], TOGETHER * chunk):
        r_, w_, k_, v_, kk_, a_ = (
            x if x.shape[1] == 1 else x[:, start : start + TOGETHER * chunk] for x in (r, w, k, v, kk, a)
        )
        y, state = _chunked(r_, w_, k_, v_, kk_, a_, state, chunk)
        answers.append(y)
    return torch.cat(answers, dim=1), state


def first_token(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """As `hxa079.loop` of one token from an empty state, (B, 1, H, N): S = v k', so that no state has to be made."""
    return v * (k * r).sum(dim=-1, keepdim=True), state


def _chunked(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, size = r.shape
    chunk = min(chunk, tokens)
    count = -(-tokens // chunk)
    missing = count * chunk - tokens
    if missing:  # tokens that change nothing: without k, and without decay
        w, a = w.expand_as(r), a.expand_as(r)

    def parts(x: Tensor) -> Tensor:
        """(B, T, H, N) -> (chunks, B, H, chunk, N); what all tokens share stays (1, 1, H, 1, N)."""
        if x.shape[1] == 1 < tokens:
            return x[None].transpose(2, 3)
        if missing:
            x = torch.cat([x, x.new_zeros(batch, missing, heads, size)], dim=1)
        return x.view(x.shape[0], count, chunk, heads, size).permute(1, 0, 3, 2, 4)

    log_decay = parts(-torch.exp(w))
    steps = torch.arange(1, chunk + 1, dtype=r.dtype, device=r.device)[:, None]
    log_product = log_decay * steps if log_decay.shape[3] < chunk else log_decay.cumsum(dim=3)
    product, inverse, kk = log_product.exp(), (-log_product).exp(), parts(kk)
    whole = (count, batch, heads, chunk, size)
    removed = (kk * -(log_product - log_decay).exp()).expand(whole)
    asked = torch.cat([removed, parts(r) * product], dim=3).view(count, -1, 2 * chunk, size)
    added = (kk * (parts(a) * inverse)).expand(whole)
    written = torch.cat([added, parts(k) * inverse], dim=3).view(count, -1, 2 * chunk, size)
    last = product[:, :, :, -1:].expand(-1, batch, -1, -1, -1).reshape(-1, batch * heads, 1, size)
    values = parts(v).reshape(count, -1, chunk, size)
    y, state = _Chunks.apply(asked, written, values, last, state.reshape(-1, size, size))  # type: ignore[no-untyped-call]
    y = y.view(whole).permute(1, 0, 3, 2, 4).reshape(batch, -1, heads, size)[:, :tokens]
    return y, state.view(batch, heads, size, size)


class _Chunks(torch.autograd.Function):
    """Z sequences and heads at once: asked, written (chunks, Z, 2T, N), values (.., Z, T, N), last (.., Z, 1, N)."""

    @staticmethod
    def forward(
        ctx: Any, asked: Tensor, written: Tensor, values: Tensor, last: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        size = values.shape[2]
        scores = (asked @ written.transpose(2, 3)).mul_(_mask(size, asked))
        unit = torch.eye(size, dtype=asked.dtype, device=asked.device)
        system, ended = unit - scores[:, :, :size, :size], written * last
        held = torch.cat([torch.empty_like(values), values], dim=2)
        from_values = scores[:, :, :, size:] @ values
        states, answers = [], []
        for c in range(len(asked)):
            states.append(state)
            x = torch.baddbmm(from_values[c], asked[c], state.transpose(1, 2))
            u = torch.linalg.solve_triangular(system[c], x[:, :size], upper=False, unitriangular=True)
            held[c, :, :size] = u
            answers.append(torch.baddbmm(x[:, size:], scores[c, :, size:, :size], u))
            state = torch.baddbmm(state * last[c % len(last)], held[c].transpose(1, 2), ended[c])
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(asked, written, last, scores, system, held, torch.stack(states))
        ctx.mark_non_differentiable(state)
        return torch.stack(answers), state

    @staticmethod
    def backward(ctx: Any, d_answers: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        asked, written, last, scores, system, held, states = ctx.saved_tensors
        size = d_answers.shape[2]
        ended, transposed = written * last, system.transpose(2, 3)
        d_x = torch.cat([torch.empty_like(d_answers), d_answers], dim=2)
        d_state, d_states = torch.zeros_like(states[0]), torch.empty_like(states)
        for c in range(len(asked) - 1, -1, -1):
            d_states[c] = d_state
            asked_then = scores[c, :, size:, :size].mT
            d_u = torch.baddbmm(ended[c, :, :size] @ d_state.mT, asked_then, d_answers[c])
            d_x[c, :, :size] = torch.linalg.solve_triangular(transposed[c], d_u, upper=True, unitriangular=True)
            d_state = torch.baddbmm(d_state * last[c % len(last)], d_x[c].transpose(1, 2), asked[c])
        d_scores = (d_x @ held.transpose(2, 3)).mul_(_mask(size, asked))
        d_ended = held @ d_states
        d_asked = (d_x @ states).add_(d_scores @ written)
        d_values = (scores[:, :, :, size:].mT @ d_x).add_(ended[:, :, size:] @ d_states.mT)
        d_written = (d_scores.mT @ asked).add_(d_ended * last)
        d_last = (d_ended * written).sum(dim=2, keepdim=True) + (d_states * states).sum(dim=2, keepdim=True)
        d_last = d_last.sum(dim=0, keepdim=True) if len(last) == 1 else d_last
        return d_asked, d_written, d_values, d_last, None


def _mask(size: int, like: Tensor) -> Tensor:
    """What row t of `asked` sees of `written`: alpha the tokens before it, r its own as well, (2T, 2T)."""
    ones = torch.ones(size, size, dtype=like.dtype, device=like.device)
    return torch.cat([ones.tril(-1).repeat(1, 2), ones.tril().repeat(1, 2)])
