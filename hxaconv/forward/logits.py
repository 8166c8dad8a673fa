"""Logits over a vocabulary that is never held whole: KL(p || q), and -log q, block by block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hxaconv.forward.pool import ROWS

if TYPE_CHECKING:
    from hxaconv.forward.walk import Walk


LOGITS_AT_ONCE = 2**18
"""Elements of a block of logits: in float64, and with its temporaries, some 12 MB."""


class Divergence:
    """KL(p || q) per token in nats for several q, from logits that come in blocks of the vocabulary, in float64."""

    def __init__(self) -> None:
        self._log_p = torch.empty(0)
        self._log_q: list[Tensor] = []
        self._moved: list[Tensor] = []
        """sum of p (z - y) over the blocks so far, z and y the logits of p and q, p by the normaliser so far."""

    def add(
        self, p: Tensor, count: int, logits: Callable[[int], Tensor], each: Callable[..., Iterable[None]] = map
    ) -> None:
        """Logits (tokens, block) of p over the next block; `logits(i)` gives those of q number i of `count`."""
        z = p.double()
        if not self._log_q:
            self._log_p = z.new_full(z.shape[:1], -torch.inf)
            self._log_q = [self._log_p.clone() for _ in range(count)]
            self._moved = [torch.zeros_like(self._log_p) for _ in range(count)]
        before, self._log_p = self._log_p, torch.logaddexp(self._log_p, z.logsumexp(dim=-1))
        shrink, share = (before - self._log_p).exp(), (z - self._log_p[:, None]).exp()

        def one(i: int) -> None:
            y = logits(i).double()
            self._log_q[i] = torch.logaddexp(self._log_q[i], y.logsumexp(dim=-1))
            self._moved[i] = self._moved[i] * shrink + (share * (z - y)).sum(dim=-1)

        list(each(one, range(count)))

    def result(self) -> list[Tensor]:
        """(tokens) for every q."""
        return [m - self._log_p + q for m, q in zip(self._moved, self._log_q, strict=True)]


class Likelihood:
    """-log q of given tokens (T,) in nats, from logits that come in blocks of the vocabulary, in float64."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self._log_q = torch.full(tokens.shape, -torch.inf, device=tokens.device, dtype=torch.float64)
        self._logit = torch.zeros_like(self._log_q)

    def add(self, start: int, logits: Tensor) -> None:
        """The logits (T, block) of the vocabulary from `start` on."""
        y = logits.double()
        self._log_q = torch.logaddexp(self._log_q, y.logsumexp(dim=-1))
        here = (self._tokens >= start) & (self._tokens < start + y.shape[1])
        self._logit[here] = y[here, self._tokens[here] - start]

    def result(self) -> Tensor:
        """(T,)."""
        return self._log_q - self._logit


TOKENS_AT_ONCE = 64


def kl_and_gradient(walk: Walk, role: str, hidden: Tensor, other: str, wanted: Tensor) -> tuple[float, Tensor]:
    """(mean KL in nats per token, its gradient with respect to `hidden`) of what the heads of two models see, (T, C).

    The KL is from the distribution that model `other` has of `wanted` to that which model `role` has of `hidden`.
    Whole logits of both are held, (T, V).
    """
    seen = {role: hidden, other: wanted}
    heads = {name: walk[name].head for name in seen}
    logits = {name: wanted.new_empty(len(wanted), head.shape[0]) for name, head in heads.items()}
    for start, stop in walk.slices(heads, "head"):
        for name, x in seen.items():
            logits[name][:, start:stop] = walk.product(x, walk.held(name)["head"].values)
    kl = []
    # Two matrices of logits are enough: some tokens at a time, the model's become the gradient.
    for mine, theirs in zip(*(torch.split(logits[name], TOKENS_AT_ONCE) for name in seen), strict=True):
        q, p = mine.log_softmax(dim=-1), theirs.log_softmax(dim=-1)
        kl.append((p.exp() * (p - q)).sum(dim=-1))
        mine.copy_(q.exp_().sub_(p.exp_()).div_(len(wanted)))
    gradient = torch.zeros_like(hidden)
    for start, stop in walk.slices({role: walk[role].head}, "head"):
        block = walk.held(role)["head"].values.to(walk.device, gradient.dtype)
        columns = torch.split(logits[role][:, start:stop], ROWS)
        gradient += torch.cat(walk.pool.map(functools.partial(torch.mm, mat2=block), columns))
    return float(torch.cat(kl).double().mean()), gradient
