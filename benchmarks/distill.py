"""Does a calibrated start last? Distil a teacher into all-RWKV students from several initialisations.

    python benchmarks/distill.py [--tokens 153600] [--out benchmarks/results]      the small teacher of the package
    python benchmarks/distill.py --real --tokens 200704 [--device cuda]            the one of real_model.py

Only the mixers are trained, on KL(teacher || student); the curves are KL on held-out text. The small teacher's text is
what it wrote itself (begun with 64 bytes of the calibration text), the real one's are the rows that real_model.py has
for fitting, over again where they do not suffice; its students are those that `real_model.py make` made.
Writes distill.csv and distill.svg, or distill_real.csv and distill_real.svg. The same batches in the same order for
every run, AdamW, cosine schedule; each start has its best learning rate.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import real_model
import torch
from torch import Tensor

from hxaconv.calibration.streaming import calibrate
from hxaconv.forward import hxa079, llama
from hxaconv.forward.chunked import chunked
from hxaconv.load import load_student, load_teacher
from hxaconv.model.config import StudentConfig, student_of
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention
from hxaconv.model.plan import Plan
from hxaconv.options import Fit
from hxaconv.surgery.arithmetic import tensor
from hxaconv.surgery.init import PRESETS, InitSettings, init_from_teacher

TEACHER = Path(__file__).parents[1] / "hxaconv" / "commands" / "embedded" / "teacher"
BATCH, LENGTH, PROMPT = 4, 512, 64
JUDGED = 6
POINTS = 8
INITS: dict[str, tuple[int, Fit] | None] = {
    "published": None,
    "closed form, 1024 tokens": (2, Fit(refine_steps=0)),
    "calibrated, 1024 tokens": (2, Fit()),
    "calibrated, 8192 tokens": (16, Fit()),
}
STUDENTS = {"published": "plain", "calibrated, 1024 tokens": "fit", "polished, 16k tokens": "fit+polish-16k"}
"""Initialisation -> case of real_model.py."""
STYLES = {
    "published": "k:s",
    "closed form, 1024 tokens": "k-.^",
    "calibrated, 1024 tokens": "k-o",
    "polished, 16k tokens": "k--d",
}
Get = Callable[[str], Tensor]


def loaded(plan: Plan) -> dict[str, Tensor]:
    """All tensors, float32."""
    return {name: tensor(recipe, dtype=torch.float32) for name, recipe in plan.items()}


def read(name: str) -> Tensor:
    """Token ids of the demo teacher's text, (16, 512)."""
    return torch.from_numpy(np.load(TEACHER / f"{name}_tokens.npy").astype(np.int64))


@torch.no_grad()
def written_by(teacher: Model, get: Get, rows: int, seed: int = 0) -> Tensor:
    """Text that the teacher writes, (rows, LENGTH), at temperature 1, after prompts from its calibration text."""
    generator = torch.Generator().manual_seed(seed)
    source = read("calibration")
    starts = torch.randint(0, LENGTH - PROMPT, (rows,), generator=generator)
    prompts = [source[i % len(source), start : start + PROMPT] for i, start in enumerate(starts.tolist())]
    ids, cache = torch.stack(prompts), {}
    new = ids
    while ids.shape[1] < LENGTH:
        logits, _ = llama.forward(new, get, teacher.config, cache=cache)
        new = torch.multinomial(logits[:, -1].softmax(dim=-1), 1, generator=generator)
        ids = torch.cat([ids, new], dim=1)
    return ids


def student_logits(ids: Tensor, get: Get, config: StudentConfig) -> Tensor:
    """(B, T) -> (B, T, V), chunked so that it can be differentiated in reasonable time."""
    x, carry = hxa079.embed(ids, get), hxa079.Carry()
    for i in range(config.num_hidden_layers):
        x = x + hxa079.mixer(hxa079.input_norm(x, get, config, i), get, config, i, carry, chunked)
        x = hxa079.feed_forward(x, get, config, i)
    return hxa079.logits(x, get, config)


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Mean KL(wanted || found) in nats per token, from logits."""
    p, q = wanted.log_softmax(dim=-1), found.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1).mean()


def train(
    weights: dict[str, Tensor], config: StudentConfig, teacher: Model, text: Tensor, judged: Tensor, rate: float
) -> list[tuple[int, float]]:
    """[(tokens seen, held-out KL)], starting with none; where the text (rows, LENGTH) lies, all is computed."""
    get_teacher = {name: weight.to(text.device) for name, weight in loaded(teacher.plan).items()}.__getitem__
    trained = [n for n, w in weights.items() if is_attention(n) and w.dim() > 0]
    for name, weight in weights.items():
        weights[name] = weight.to(text.device, copy=True).requires_grad_(name in trained)

    @torch.no_grad()
    def held_out() -> float:
        pairs = [
            (llama.forward(row, get_teacher, teacher.config)[0], student_logits(row, weights.__getitem__, config))
            for row in judged.split(1)
        ]
        return float(np.mean([float(divergence(*pair)) for pair in pairs]))

    optimizer = torch.optim.AdamW([weights[n] for n in trained], lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    batches = text.split(BATCH)
    warm_up = max(1, len(batches) // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches) - warm_up, rate * 0.05),
        ],
        [warm_up],
    )
    points = sorted({0, *(round(len(batches) * (i / POINTS) ** 2) for i in range(1, POINTS + 1))})
    curve = []
    for step in range(len(batches) + 1):
        if step in points:
            curve.append((step * BATCH * LENGTH, held_out()))
        if step == len(batches):
            break
        with torch.no_grad():
            target = llama.forward(batches[step], get_teacher, teacher.config)[0]
        loss = divergence(target, student_logits(batches[step], weights.__getitem__, config))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weights[n] for n in trained], 1.0)
        optimizer.step()
        schedule.step()
    return curve


def start(init: str, teacher: Model) -> tuple[dict[str, Tensor], StudentConfig]:
    """The weights of one initialisation of the all-RWKV student."""
    config = student_of(teacher.config, ())
    settings = InitSettings(PRESETS["openmose-stage1"], 0, "BF16")
    student = Model(config, init_from_teacher(teacher.plan, config, settings), "student")
    plan, recipe = student.plan, INITS[init]
    if recipe is not None:
        sequences, how = recipe
        plan = plan | calibrate(teacher, student, read("calibration")[:sequences], how).replaced
    return loaded(plan), config


def made(init: str) -> tuple[dict[str, Tensor], StudentConfig]:
    """The weights of a student of the real model."""
    student = load_student(str(real_model.BUILD / "students" / STUDENTS[init]))
    return loaded(student.plan), student.student


def draw(path: Path, rows: list[dict[str, str]]) -> None:
    """KL against tokens for the best rate of every initialisation; readable without colours."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hxaconv"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for init in dict.fromkeys(row["init"] for row in rows):
        mine = [row for row in rows if row["init"] == init]
        last = max(int(row["tokens"]) for row in mine)
        best = min((row for row in mine if int(row["tokens"]) == last), key=lambda row: float(row["kl"]))["rate"]
        points = [(int(row["tokens"]) / 1000, float(row["kl"])) for row in mine if row["rate"] == best]
        axes.plot(*zip(*points, strict=True), STYLES.get(init, "k--d"), label=f"{init} (rate {best})", markersize=4)
    axes.set(xlabel="thousand tokens of training", ylabel="KL(teacher || student), nats per token, held-out text")
    axes.set_xscale("symlog", linthresh=4)
    axes.set_yscale("log")
    axes.set_xticks([0, 4, 10, 30, 100, 300], ["0", "4", "10", "30", "100", "300"])
    low, high = (f(float(row["kl"]) for row in rows) for f in (min, max))
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5) if low / 2 <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run what is missing from the table, then draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=153600)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument(
        "--inits", nargs="+", default=["published", "calibrated, 1024 tokens"], choices=list(INITS | STUDENTS)
    )
    parser.add_argument("--real", action="store_true", help="students of the real model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    name = "distill_real" if options.real else "distill"
    table = options.out / f"{name}.csv"
    rows = list(csv.DictReader(table.open())) if table.exists() else []
    teacher = load_teacher(str(real_model.BUILD / "teacher" if options.real else TEACHER))
    if options.real:
        text, judged = (torch.from_numpy(np.load(real_model.BUILD / f"{n}.npy")) for n in ("fit", "held_out"))
        text = text[torch.arange(options.tokens // LENGTH) % len(text)]
    else:
        text = written_by(teacher, loaded(teacher.plan).__getitem__, options.tokens // LENGTH)
        judged = read("heldout")[:JUDGED]
    text, judged = text.to(options.device), judged.to(options.device)
    for init in options.inits:
        weights, config = made(init) if options.real else start(init, teacher)
        for rate in options.rates:
            if any(row["init"] == init and float(row["rate"]) == rate for row in rows):
                continue
            begin = time.perf_counter()
            curve = train(dict(weights), config, teacher, text, judged, rate)
            rows += [{"init": init, "rate": f"{rate:g}", "tokens": str(n), "kl": f"{kl:.4f}"} for n, kl in curve]
            print(
                f"{init}, rate {rate:g}: {curve[0][1]:.3f} -> {curve[-1][1]:.3f}, {time.perf_counter() - begin:.0f} s"
            )
            with table.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["init", "rate", "tokens", "kl"], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    draw(options.out / f"{name}.svg", rows)


if __name__ == "__main__":
    main()
