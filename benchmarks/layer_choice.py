"""Which layers should stay attention: every strategy against evenly spaced and random sets, on SmolLM2.

    python benchmarks/layer_choice.py real [STRATEGY ...]     choose 4 and 8 of 30 layers and judge them
    python benchmarks/layer_choice.py planted [SEEDS]         how often each finds the planted layers of a small teacher
    python benchmarks/layer_choice.py table                   results/layer_choice.jsonl as Markdown

On the real model (real_model.py builds it) a set of layers is judged as a calibration on 1024 tokens that keeps them
leaves it: RWKV layers of the case "fit", attention, trained to do without RoPE, of the case "kept".
Layers are ranked on 1024 tokens that were not fitted, the gates on half of them.

    KL        KL(teacher || student) on 2048 held-out tokens, nats per token
    repeat    random words said again 64 and 256 tokens later: NLL of the second time
    lookup    "The WORD is WORD." asked again: NLL of the second word

The planted teacher is that of tests/selection_models.py: 8 layers, two of which look up what followed a token.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import real_model
import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "layer_choice.jsonl"
COUNTS, RANDOM_SETS = (4, 8), 5
STRATEGIES = (
    *("uniform", "last", "random", "gates", "nll", "retrieval", "kl", "kl convert"),
    *("distance", "entropy", "mse", "influence"),
)
GAIN = "gain of attention"
"""No strategy of the command line: what attention, fitted, is nearer to the teacher's than RWKV, fitted, by the reports
of both students."""
FIGURES = ("kl", "repeat 64", "repeat 256", "lookup 64", "lookup 256")
ROWS = slice(0, None, 2)
"""One held-out passage of 512 tokens of each of the four texts."""


class Judge:
    """Teacher and student in memory, and the student's streams before every layer, which all sets share."""

    def __init__(self) -> None:
        from hxaconv.load import load_student, load_teacher

        teacher = load_teacher(str(real_model.BUILD / "teacher"))
        students = [load_student(str(real_model.BUILD / "students" / name)) for name in ("fit", "kept")]
        self.theirs, (self.mine, self.kept) = real_model._Weights(teacher), map(real_model._Weights, students)
        held_out = torch.from_numpy(np.load(real_model.BUILD / "held_out.npy"))[ROWS]
        self.asked: list[tuple[str, Tensor, Tensor]] = [("kl", row, torch.arange(len(row))) for row in held_out]
        limits = {"repeat 64": 4, "repeat 256": 1, "lookup 64": 4, "lookup 256": 2}
        for name, rows, places in real_model.needles():
            some = list(zip(rows, places, strict=True))[: limits.get(name, 0)]
            self.asked += [(name, row, where - 1) for row, where in some]
        path = real_model.BUILD / "layer_choice.pt"
        if not path.exists():
            torch.save([self._known(row, where) for _, row, where in self.asked], path)
        self.known: list[Any] = torch.load(path, mmap=True)

    @torch.no_grad()
    def _known(self, row: Tensor, where: Tensor) -> tuple[Tensor, list[Tensor], tuple[Tensor | None, Tensor | None]]:
        """(what the teacher says, the student's streams before every layer and after the last, v_first and k_first)."""
        from hxaconv.forward import hxa079, llama

        num_layers, hidden = self.mine.config.num_hidden_layers, llama.embed(row[None], self.theirs.get)
        carry, streams = hxa079.Carry(), [llama.embed(row[None], self.mine.get)]
        for i in range(num_layers):
            hidden = llama.layer(hidden, self.theirs.get, self.theirs.config, i)
            streams.append(self._layer(streams[-1], i, carry, kept=False))
        return self._head(hidden[:, where], self.theirs), streams, (carry.v_first, carry.k_first)

    def _layer(self, x: Tensor, i: int, carry: Any, *, kept: bool) -> Tensor:
        from hxaconv.forward import hxa079
        from hxaconv.forward.chunked import chunked

        config = self.mine.config
        normed = hxa079.input_norm(x, self.mine.get, config, i)
        if kept:
            x = x + hxa079.attention(normed, self.kept.get, config, i, hxa079.Carry())
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
        for (name, row, where), (said, streams, first) in zip(self.asked, self.known, strict=True):
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


def sets_of(strategy: str) -> Iterable[tuple[int, tuple[int, ...], float]]:
    """(how many layers, which, CPU seconds that choosing took)."""
    from hxaconv.load import load_student, load_teacher
    from hxaconv.options import Choice
    from hxaconv.selection.advice import advise, pick
    from hxaconv.selection.strategies import Given

    teacher = load_teacher(str(real_model.BUILD / "teacher"))
    student = load_student(str(real_model.BUILD / "students" / "fit"))
    num_layers = teacher.config.num_hidden_layers
    if strategy == "random":
        random = np.random.default_rng(0)
        for count in COUNTS:
            for _ in range(RANDOM_SETS):
                yield count, tuple(sorted((random.permutation(num_layers - 1)[:count] + 1).tolist())), 0.0
        return
    if strategy == GAIN:
        rwkv, kept = map(errors, ("fit", "kept"))
        best = sorted(kept, key=lambda layer: kept[layer] - rwkv[layer])
        for count in COUNTS:
            yield count, tuple(sorted(best[:count])), 0.0
        return
    name, _, mode = strategy.partition(" ")
    ids = np.load(real_model.BUILD / "fit.npy")[2 : 3 if name == "gates" else 4]
    given = Given(num_layers=num_layers, teacher=teacher, student=student, ids=ids, kl_mode=mode or "restore")
    spent, scores = real_model.BUILD / "scoring.json", {}
    for count in COUNTS:
        choice, key = Choice(strategy=name, count=count), f"{strategy} {count if name == 'gates' else ''}".strip()
        if key not in scores:
            seconds, began = json.loads(spent.read_text()) if spent.exists() else {}, time.process_time()
            cache = real_model.BUILD / f"scores-{key.replace(' ', '-')}.safetensors"
            try:
                scores[key] = advise(choice, replace(given, cache=cache, check=_in_time)).columns
            finally:
                seconds[key] = seconds.get(key, 0.0) + time.process_time() - began
                spent.write_text(json.dumps(seconds))
            print(strategy, *([round(x or 0.0, 3) for x in column.values] for column in scores[key][:1]))
        picked = pick(choice, num_layers, scores[key][0] if scores[key] else None)
        yield count, picked.layers, round(seconds[key])


def errors(student: str) -> dict[int, float]:
    """Layer -> the error of its fit, of all but the first layer."""
    record = json.loads((real_model.BUILD / "students" / student / "hxaconv.json").read_text())
    return {one["layer"]: one["error_after"] for one in record["calibration"]["layers"] if one["layer"]}


LIMIT = float("inf")


def _in_time() -> None:
    """CPU seconds of this process; scoring is kept, and goes on in the next."""
    if time.process_time() > LIMIT:
        raise KeyboardInterrupt


def results() -> list[dict[str, Any]]:
    """What is known."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def record(row: dict[str, Any]) -> None:
    """Add a line to the results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }
    print(row, flush=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row | about) + "\n")


def real(strategies: Iterable[str]) -> None:
    """Choose and judge; a line of the results for each set."""
    torch.set_num_threads(1)
    judge = Judge()
    done = {(row["strategy"], row["count"], *row["layers"]) for row in results() if "strategy" in row}
    for strategy in strategies:
        for count, layers, seconds in [(0, (), 0.0)] if strategy == "none" else sets_of(strategy):
            if (strategy, count, *layers) in done:
                continue
            _in_time()
            record({"strategy": strategy, "count": count, "layers": layers, "cpu": seconds, **judge.figures(layers)})


def planted(seeds: int) -> None:
    """What every strategy picks of planted teachers; a line of the results for each seed."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from selection_models import advised, calibrated_student, induction_ids, induction_teacher

    torch.set_num_threads(1)
    known = results()
    for seed in sorted(set(range(seeds)) - {row.get("seed") for row in known}):
        teacher, layers = induction_teacher(seed)
        student, ids = calibrated_student(teacher, seed), induction_ids(seed)
        picked = {}
        for strategy in STRATEGIES:
            name, _, mode = strategy.partition(" ")
            if name != "random":
                more = {"kl_mode": mode or "restore"}
                found = advised(teacher, student, ids, num_layers=8, strategy=name, count=2, more=more)
                picked[strategy] = found.pick.layers
        record({"seed": seed, "planted": layers, "picked": picked})
        _in_time()


def table() -> str:
    """The results as Markdown."""
    rows = results()
    lines = [f"| kept | by | layers | {' | '.join(FIGURES)} | CPU s |", "|--:|---|---|" + "--:|" * (len(FIGURES) + 1)]
    for count in (0, *COUNTS):
        mine = [row for row in rows if row.get("count") == count]
        random = [row for row in mine if row["strategy"] == "random"]
        shown = [row for row in mine if row["strategy"] != "random"]
        for what, of in (("mean", np.mean), ("best", min)) if random else ():
            figures = {name: float(of([row[name] for row in random])) for name in FIGURES}
            shown.append({"strategy": f"random, {what} of {len(random)}", "layers": [], "cpu": "", **figures})
        for row in sorted(shown, key=lambda row: row["kl"]):
            numbers = " | ".join(f"{row[name]:.2f}" for name in FIGURES)
            lines.append(
                f"| {count} | {row['strategy']} | {' '.join(map(str, row['layers']))} | {numbers} | {row['cpu']} |"
            )
    seeds = [row for row in rows if "seed" in row]
    hits = {
        name: sum(row["planted"] == row["picked"][name] for row in seeds)
        for name in (seeds[0]["picked"] if seeds else ())
    }
    lines += ["", "| strategy | finds both planted layers |", "|---|--:|"]
    lines += [f"| {name} | {hits[name]} of {len(seeds)} |" for name in sorted(hits, key=lambda name: -hits[name])]
    return "\n".join(lines)


def main() -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("real", "planted", "table"))
    parser.add_argument("names", nargs="*", metavar="STRATEGY or SEEDS", help=", ".join(STRATEGIES))
    parser.add_argument("--seconds", type=float, default=LIMIT, help="Stop after so much CPU; the next call goes on.")
    options = parser.parse_args()
    globals()["LIMIT"] = options.seconds
    if options.what == "real":
        real(options.names or ("none", *STRATEGIES, GAIN))
    elif options.what == "planted":
        planted(int(options.names[0]) if options.names else 20)
    else:
        print(table())


if __name__ == "__main__":
    main()
