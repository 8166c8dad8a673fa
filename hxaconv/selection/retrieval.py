"""Which heads of a teacher copy: on [u, separator, u], who looks right behind a token's first occurrence?"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hxaconv.errors import HxaconvError
from hxaconv.forward import llama
from hxaconv.forward.state import State, StateFile
from hxaconv.forward.walk import Walk
from hxaconv.model.model import Model
from hxaconv.model.plan import layer_bytes
from hxaconv.progress import Progress, bar
from hxaconv.selection.attention import copying

LENGTH = 128
"""Tokens of u."""
SEQUENCES = 8
FAINT = 0.1
"""A head that copies less often than this is not a copying head."""


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Shares of copied positions per layer and head, (L, H), and the layers' scores from them."""

    heads: tuple[tuple[float, ...], ...]
    scores: tuple[float, ...]
    warnings: tuple[str, ...]


def sequences(
    vocab_size: int,
    text: np.ndarray | None,
    *,
    separator: int,
    seed: int = 0,
    length: int = LENGTH,
    count: int = SEQUENCES,
) -> tuple[Tensor, Tensor]:
    """(ids, expected), both (count, 2*length+1): half of random vocabulary, half of real text where there is any.

    `expected` is the position right behind the token's first occurrence, -1 outside the second copy.
    """
    rng = np.random.default_rng(seed)
    pool = np.setdiff1d(np.arange(vocab_size), [separator])
    real = _windows(text, length, count // 2 if text is not None else 0)
    drawn = [rng.choice(pool, length, replace=len(pool) < length) for _ in range(count - len(real))]
    rows, expected = [], []
    for u in [*drawn, *real]:
        rows.append(np.concatenate([u, [separator], u]))
        _, first, inverse = np.unique(u, return_index=True, return_inverse=True)
        expected.append(np.concatenate([np.full(length + 1, -1), first[inverse] + 1]))
    return torch.from_numpy(np.stack(rows).astype(np.int64)), torch.from_numpy(np.stack(expected))


def _windows(text: np.ndarray | None, length: int, count: int) -> list[np.ndarray]:
    if text is None or count == 0:
        return []
    flat = np.asarray(text).reshape(-1)
    if len(flat) < length:
        raise HxaconvError(
            f"the calibration text has {len(flat)} tokens, retrieval needs at least {length}",
            hint=f"Pass --tokens {length} or more, with a --text or --input-ids that has as many.",
        )
    starts = np.linspace(0, len(flat) - length, count).astype(int)
    return [flat[start : start + length] for start in starts]


def separator_of(model: Model) -> int:
    """The token between the copies: the one that begins or ends texts, where the config names one, else 0."""
    for key in ("bos_token_id", "eos_token_id"):
        value = model.raw.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < model.config.vocab_size:
            return value
    return 0


def retrieval(
    teacher: Model,
    ids: Tensor,
    expected: Tensor,
    *,
    device: str = "cpu",
    kept: StateFile | None = None,
    progress: Progress | None = None,
) -> Retrieval:
    """A layer scores the sum of its best max(1, H // 16) heads; one layer's weights at a time.

    Args:
        ids, expected: as `sequences` makes them.
        kept: where an interrupted pass goes on.
    """
    kept = kept or StateFile(None)
    config, sizes = teacher.config, [layer_bytes(teacher.plan, i) for i in range(teacher.config.num_hidden_layers)]
    saved, expected = kept.load(device), expected.to(device)
    with (
        torch.no_grad(),
        Walk({"teacher": teacher}, device=device) as walk,
        bar(progress, "looking for copying heads", sum(sizes)) as advance,
    ):
        shares = list(saved[0]["shares"].cpu()) if saved else []
        x, get = saved[0]["x"] if saved else walk["teacher"].start(ids).x, walk["teacher"].weight

        def state() -> State:
            return {"shares": torch.stack(shares), "x": x}, {}

        advance(sum(sizes[: len(shares)]), "resumed" if saved else "")
        for layer in walk.layers(range(len(shares), config.num_hidden_layers)):
            found = copying(llama.input_norm(x, get, config, layer), get, config, layer, expected)
            x = walk.each(functools.partial(llama.layer, get=get, config=config, index=layer), x)
            shares.append(found)
            advance(sizes[layer], f"layer {layer}")
            kept.pause(state)
    kept.save(*state())
    return _summary(torch.stack(shares), config.num_attention_heads)


def _summary(shares: Tensor, num_heads: int) -> Retrieval:
    best = shares.topk(max(1, num_heads // 16), dim=-1).values.sum(dim=-1)
    warnings = []
    if float(shares.max()) <= FAINT:
        warnings.append(
            f"no head copies more than {FAINT:.0%} of the positions (the best: {float(shares.max()):.1%}):"
            " this teacher has no clear copying heads, the retrieval scores are noise"
        )
    return Retrieval(tuple(tuple(map(float, row)) for row in shares), tuple(map(float, best)), tuple(warnings))
