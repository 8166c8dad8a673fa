"""Which layers should stay attention: every strategy against evenly spaced and random sets, on SmolLM2.

    python benchmarks/layer_choice.py score [STRATEGY ...]    rank the layers, for results/layer_choice.jsonl
    python benchmarks/layer_choice.py judge                   what the sets are worth that no line there has judged yet
    python benchmarks/layer_choice.py table                   the results as Markdown
    python benchmarks/layer_choice.py planted [SEEDS]         a small teacher with an induction circuit in known layers

A set of layers is judged as `pick-gqa-layers` writes it: the teacher's attention, without RoPE, put back into the
student that is RWKV throughout and calibrated on 1024 tokens (case "fit" of real_model.py).

    KL        KL(teacher || student) on 2048 held-out tokens, nats per token
    repeat    random words said again 64 and 256 tokens later: NLL of the second time
    lookup    "The WORD is WORD." asked again: NLL of the second word
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import real_model
import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "layer_choice.jsonl"
COUNTS = (4, 8)
RANDOM_SETS = 5
TOKENS = 1024
ROWS = slice(0, None, 2)
"""One held-out passage of 512 tokens of each of the four texts."""


class Judge:
    """Teacher and student in memory, and the student's streams before every layer, which all sets share."""

    def __init__(self) -> None:
        from hxaconv.forward import hxa079, llama
        from hxaconv.load import load_student, load_teacher

        teacher = load_teacher(str(real_model.BUILD / "teacher"))
        student = load_student(str(real_model.BUILD / "students" / "fit"))
        self.theirs, self.mine = real_model._Weights(teacher), real_model._Weights(student)
        held_out = torch.from_numpy(np.load(real_model.BUILD / "held_out.npy"))[ROWS]
        self.asked: list[tuple[str, Tensor, Tensor]] = [("kl", row, torch.arange(len(row))) for row in held_out]
        limits = {"repeat 64": 4, "repeat 256": 1, "lookup 64": 4, "lookup 256": 2}
        for name, rows, places in real_model.needles():
            some = list(zip(rows, places, strict=True))[: limits.get(name, 0)]
            self.asked += [(name, row, where - 1) for row, where in some]
        self.said, self.streams, self.firsts = [], [], []
        with torch.no_grad():
            for _, row, where in self.asked:
                hidden = llama.embed(row[None], self.theirs.get)
                for i in range(self.theirs.config.num_hidden_layers):
                    hidden = llama.layer(hidden, self.theirs.get, self.theirs.config, i)
                self.said.append(self._head(hidden[:, where], self.theirs))
                carry, x = hxa079.Carry(), llama.embed(row[None], self.mine.get)
                streams = [x]
                for i in range(self.mine.config.num_hidden_layers):
                    x = self._layer(x, i, carry, kept=False)
                    streams.append(x)
                self.streams.append(streams)
                self.firsts.append((carry.v_first, carry.k_first))

    def _layer(self, x: Tensor, i: int, carry: Any, *, kept: bool) -> Tensor:
        from hxaconv.forward import hxa079
        from hxaconv.forward.chunked import chunked

        config = self.mine.config
        normed = hxa079.input_norm(x, self.mine.get, config, i)
        if kept:
            x = x + hxa079.attention(normed, self.theirs.get, config, i, hxa079.Carry())
        else:
            x = x + hxa079.time_mix(normed, self.mine.get, config, i, carry, chunked)
            carry.states.clear()
        return hxa079.feed_forward(x, self.mine.get, config, i)

    @staticmethod
    def _head(x: Tensor, weights: Any) -> Tensor:
        from hxaconv.forward import llama

        return llama.logits(x, weights.get, weights.config)[0].log_softmax(dim=-1)

    @torch.no_grad()
    def figures(self, kept: Iterable[int]) -> dict[str, float]:
        """KL, and NLL of what recall gives away, teacher's beside it."""
        from hxaconv.forward import hxa079

        kept, found = set(kept), {}
        start = min(kept, default=self.mine.config.num_hidden_layers)
        for (name, row, where), said, streams, first in zip(
            self.asked, self.said, self.streams, self.firsts, strict=True
        ):
            x, carry = streams[start], hxa079.Carry(*first)
            for i in range(start, self.mine.config.num_hidden_layers):
                x = self._layer(x, i, carry, kept=i in kept)
            mine = self._head(x[:, where], self.mine)
            if name == "kl":
                values = [float((said.exp() * (said - mine)).sum(dim=-1).mean())]
                found.setdefault("kl", []).extend(values)
                continue
            wanted = row[where + 1, None]
            found.setdefault(name, []).append(-float(mine.gather(1, wanted).mean()))
            found.setdefault(f"{name} teacher", []).append(-float(said.gather(1, wanted).mean()))
        return {name: round(float(np.mean(values)), 4) for name, values in found.items()}
