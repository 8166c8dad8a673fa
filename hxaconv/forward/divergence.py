"""KL(p || q) over a vocabulary that is never held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

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
