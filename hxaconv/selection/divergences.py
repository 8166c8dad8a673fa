"""How far students' distributions are from their teacher's, over a vocabulary that is never held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hxaconv.forward.layer_weights import Compute
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING, HEAD
from hxaconv.model.plan import has_rows, rows, same_ranges
from hxaconv.surgery.arithmetic import tensor

LOGITS_AT_ONCE = 2**20
"""Elements of a block of logits: in float64, and with its temporaries, some 50 MB."""


class Head:
    """The output matrix of a model, (V, C), in blocks of rows."""

    def __init__(self, model: Model, compute: Compute) -> None:
        name = EMBEDDING if model.config.tie_word_embeddings else HEAD
        self.recipe, self.compute = model.plan[name], compute
        self.size = self.recipe.shape[0]
        self._whole = None if has_rows(self.recipe) else tensor(self.recipe)

    def block(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), or as many of them as there are."""
        stop = min(self.size, stop)
        if self._whole is not None:
            return self._whole[start:stop].to(self.compute.device, self.compute.dtype)
        return self.compute.make(rows(self.recipe, start, stop, self.recipe.origin))


def divergences(
    teacher: Tensor,
    teacher_head: Head,
    students: Iterable[Tensor],
    student_head: Head,
    step: Callable[[float], None] = lambda share: None,
) -> list[float]:
    """KL(teacher || student) per token in nats for every student, from normed hidden states (tokens, C).

    Over blocks of the vocabulary, in one pass and float64: no logits of a whole vocabulary are ever held.
    `step` is called after each with its share of the work.
    """
    others = list(students)
    shared = same_ranges(teacher_head.recipe, student_head.recipe)
    tokens = teacher.shape[0]
    log_p = torch.full((tokens,), -torch.inf, dtype=torch.float64, device=teacher.device)
    log_q = [log_p.clone() for _ in others]
    moved = [torch.zeros_like(log_p) for _ in others]
    height = max(1, LOGITS_AT_ONCE // tokens)
    for start in range(0, teacher_head.size, height):
        block = teacher_head.block(start, start + height)
        other_block = block if shared else student_head.block(start, start + height)
        z = (teacher @ block.T).double()
        before, log_p = log_p, torch.logaddexp(log_p, z.logsumexp(dim=-1))
        shrink, p = (before - log_p).exp(), (z - log_p[:, None]).exp()
        for i, hidden in enumerate(others):
            y = (hidden @ other_block.T).double()
            log_q[i] = torch.logaddexp(log_q[i], y.logsumexp(dim=-1))
            # sum_v p_v (z_v - y_v) under the normaliser known so far
            moved[i] = moved[i] * shrink + (p * (z - y)).sum(dim=-1)
        step(len(block) / teacher_head.size)
    return [float((m - log_p + q).mean()) for m, q in zip(moved, log_q, strict=True)]
