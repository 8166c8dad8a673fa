"""`demo`: the whole main job on the embedded teacher, every step an ordinary command."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hxaconv.errors import HxaconvError

Run = Callable[[Sequence[str]], int]


def steps(out: Path) -> list[tuple[str, list[str]]]:
    """(what it shows, the command's words) of every step; outputs go into `out`."""
    teacher, student, picked = (str(out / name) for name in ("teacher", "student", "student-2-5"))
    pth, back, tokens = str(out / "student.pth"), str(out / "student-hf"), f"{teacher}/heldout_tokens.npy"
    return [
        ("What is this checkpoint?", ["inspect", teacher]),
        ("A student of it, its last layer kept as attention", ["init-from-teacher", teacher, student, "--overwrite"]),
        ("How near is it to the teacher?", ["verify", student, "--against", teacher, "--input-ids", tokens]),
        (
            "Another choice of attention layers",
            ["pick-gqa-layers", student, picked, "--layers", "2,5", "--teacher", teacher, "--overwrite"],
        ),
        ("As a .pth for RWKV-Infer", ["to-pth", picked, pth, "--overwrite"]),
        ("And back to a Hugging Face folder", ["to-hf", pth, back, "--overwrite"]),
        ("The same model?", ["verify", back, "--against", picked]),
    ]


def run(out: Path, call: Run, say: Callable[[str], None]) -> int:
    """Run all steps, stopping at the first that fails; returns its exit code, or 0."""
    embedded = Path(str(resources.files("hxaconv") / "commands" / "embedded" / "teacher"))
    try:
        shutil.copytree(embedded, out / "teacher", dirs_exist_ok=True)
    except OSError as error:
        raise HxaconvError(f"{out}: the demo's teacher cannot be put there: {error}") from None
    for title, words in steps(out):
        say(f"\n# {title}\n$ hxaconv {' '.join(words)}")
        code = call(words)
        if code != 0:
            return code
    if importlib.util.find_spec("transformers") is not None:
        say("\n# And transformers runs it")
        generate(out / "student-hf", say)
    return 0


def generate(folder: Path, say: Callable[[str], None]) -> None:
    """Load the folder as any user would, and let it write a few bytes."""
    import torch
    import transformers

    say(f'>>> model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)')
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, trust_remote_code=True)
    prompt = b"def main("
    ids = torch.tensor([list(prompt)])
    output = model.generate(ids, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(ids))
    text = bytes(output[0].tolist()).decode(errors="replace")
    say(f">>> it continues {prompt.decode()!r} with {text[len(prompt) :]!r} (untrained: this is no prose yet)")
