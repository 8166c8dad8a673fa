"""`demo`: the whole main job on the embedded teacher, every step an ordinary command."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from hxaconv.calls import Call, invoke, parameters_of, typed
from hxaconv.errors import HxaconvError
from hxaconv.options import Argument
from hxaconv.progress import Result


@dataclass(frozen=True, repr=False)
class Step(Result):
    """One command of the demo, and what it shows."""

    title: str
    command: str
    options: Mapping[str, Any]

    @property
    def headline(self) -> str:
        """What it shows."""
        return self.title

    @property
    def line(self) -> str:
        """The command as one types it."""
        from hxaconv.commands import COMMANDS

        return typed(self.command, parameters_of(COMMANDS[self.command]), self.options)

    def to_dict(self) -> dict[str, Any]:
        """The title and the command."""
        return {"title": self.title, "command": self.line}


@dataclass(frozen=True, repr=False)
class Demo(Result):
    """What a demo did, where its files are, and what to try next."""

    folder: Path
    steps: tuple[Step, ...]
    results: tuple[Result, ...]
    """What each step came to; last, where transformers is there, what the student wrote."""
    left_out: tuple[str, ...]
    """Steps that could not be done here, and why."""
    next: tuple[str, ...]
    """Commands to try."""

    @property
    def headline(self) -> str:
        """How many steps, and where."""
        return f"{len(self.steps)} steps in {self.folder}"

    def to_dict(self) -> dict[str, Any]:
        """The steps with their results, and the rest."""
        return {
            "folder": str(self.folder),
            "steps": [step.to_dict() for step in self.steps],
            "results": [result.to_dict() for result in self.results],
            "left_out": list(self.left_out),
            "next": list(self.next),
        }


def demo(
    out: Annotated[str, Argument("Folder for what the demo writes.")] = "hxaconv-demo",
    *,
    call: Call,
) -> Demo:
    """Run the whole main job on a small embedded teacher, every step an ordinary command; no network needed.

    Raises:
        HxaconvError: when the folder cannot be written.
        CheckFailed: when a step finds what it made wrong.
    """
    from hxaconv.commands import COMMANDS

    folder = Path(out)
    embedded = Path(str(resources.files("hxaconv") / "commands" / "embedded" / "teacher"))
    try:
        shutil.copytree(embedded, folder / "teacher", dirs_exist_ok=True)
    except OSError as error:
        raise HxaconvError(f"{out}: the demo's teacher cannot be put there: {error}") from None
    show = call.progress.show if call.progress is not None else lambda result: None
    plots, runs = (importlib.util.find_spec(name) is not None for name in ("matplotlib", "transformers"))
    steps, results = _steps(folder, plots=plots), list[Result]()
    for step in steps:
        show(step)
        results.append(invoke(COMMANDS[step.command], step.command, step.options, call.progress))
        show(results[-1])
        results[-1].raise_if_failed()
    if runs:
        results.append(generate(folder / "student-hf"))
        show(results[-1])
    lacking = {
        "plots of the ranking, the calibration and the comparison: pip install 'hxaconv[plot]'": plots,
        "text written by the student in transformers: pip install 'hxaconv[hf]'": runs,
    }
    left_out = tuple(text for text, done in lacking.items() if not done)
    return Demo(folder, tuple(steps), tuple(results), left_out, _next(folder))


def _steps(folder: Path, *, plots: bool) -> list[Step]:
    """Every step in order, without `plots` where these cannot be drawn."""

    def at(name: str) -> str:
        return str(folder / name)

    teacher, student, calibrated = at("teacher"), at("student"), at("student-calibrated")
    pth, back, chosen = at("student.pth"), at("student-hf"), at("layers.toml")
    text, heldout = at("teacher/calibration_tokens.npy"), at("teacher/heldout_tokens.npy")
    ranking = {"source": teacher, "count": 2, "strategy": "influence", "input_ids": text, "save": chosen}
    fit = {"init": "calibrated", "input_ids": text, "refine_steps": 0, "layer_map": chosen}
    compare, again = {"against": teacher, "input_ids": heldout}, {"overwrite": True}
    drawn = [{"plot": at(name)} if plots else {} for name in ("ranking.png", "calibration.png", "depth.png")]
    return [
        Step("What is this checkpoint?", "inspect", {"source": teacher}),
        Step("Which two layers should stay attention?", "pick-gqa-layers", {**ranking, **drawn[0], **again}),
        Step(
            "A student with these layers, the others RWKV with the published initial values",
            "init-from-teacher",
            {"teacher": teacher, "out": student, "layer_map": chosen, **again},
        ),
        Step("How near is it to the teacher?", "verify", {"source": student, **compare}),
        Step(
            "The same with its RWKV layers fitted to text",
            "init-from-teacher",
            {"teacher": teacher, "out": calibrated, **fit, **drawn[1], **again},
        ),
        Step(
            "And how near is this one?",
            "verify",
            {"source": calibrated, **compare, **drawn[2], **(again if plots else {})},
        ),
        Step("As one file, under RWKV names", "to-pth", {"source": calibrated, "out": pth, **again}),
        Step("And back to a Hugging Face folder", "to-hf", {"source": pth, "out": back, **again}),
        Step("The same model?", "verify", {"source": back, "against": calibrated}),
    ]


@dataclass(frozen=True, repr=False)
class Generated(Result):
    """Text that the student wrote."""

    folder: Path
    prompt: str
    text: str

    @property
    def headline(self) -> str:
        """The prompt and how it goes on."""
        return f">>> it continues {self.prompt!r} with {self.text!r} (not trained yet: this is no prose)"

    def to_dict(self) -> dict[str, Any]:
        """Prompt and text."""
        return {"prompt": self.prompt, "text": self.text}


def generate(folder: Path) -> Generated:
    """Load the folder as any user would, and let it write a few bytes."""
    import torch
    import transformers

    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    model = library.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = b"def main("
    ids = torch.tensor([list(prompt)])
    output = model.generate(ids, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(ids))
    text = bytes(output[0].tolist()).decode(errors="replace")
    return Generated(folder, prompt.decode(), text[len(prompt) :])


def _next(folder: Path) -> tuple[str, ...]:
    beside = Path(sys.executable).parent / "hxaconv"
    program = "hxaconv" if shutil.which("hxaconv") else str(beside) if beside.exists() else "python -m hxaconv"
    teacher, student = folder / "teacher", folder / "student-calibrated"
    return (
        f"{program} verify {student} --against {teacher} --text FILE.txt",
        f"{program} pick-gqa-layers {teacher} --strategy retrieval --text FILE.txt",
        f"{program} init-from-teacher RekaAI/reka-flash-3 student/ --dry-run",
        f"{program} --help",
    )
