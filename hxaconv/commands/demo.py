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
    """A step of the demo: what is shown of it, and the same for JSON."""

    text: str
    facts: Mapping[str, Any]

    @property
    def headline(self) -> str:
        """What is shown."""
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """The facts."""
        return dict(self.facts)


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

    @property
    def text(self) -> str:
        """What is shown in the end."""
        left, tries = (f"Left out: {line}" for line in self.left_out), (f"  $ {line}" for line in self.next)
        return "\n".join([f"\nEverything is in {self.folder}.", *left, "What to try next:", *tries])

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
    steps, results = list[Step](), list[Result]()
    for title, command, options in _steps(folder, plots=plots):
        line = typed(command, parameters_of(COMMANDS[command]), options)
        steps.append(Step(f"\n# {title}\n$ {line}", {"title": title, "command": line}))
        show(steps[-1])
        results.append(invoke(COMMANDS[command], command, options, call.progress))
        show(results[-1])
        results[-1].raise_if_failed()
    if runs:
        results.append(_generate(folder / "student-hf"))
        show(results[-1])
    lacking = {
        "plots of the ranking, the calibration and the comparison: pip install 'hxaconv[plot]'": plots,
        "text written by the student in transformers: pip install 'hxaconv[hf]'": runs,
    }
    left_out = tuple(text for text, done in lacking.items() if not done)
    beside = Path(sys.executable).parent / "hxaconv"
    program = "hxaconv" if shutil.which("hxaconv") else str(beside) if beside.exists() else "python -m hxaconv"
    tries = (
        f"{program} verify {folder / 'student-calibrated'} --against {folder / 'teacher'} --text FILE.txt",
        f"{program} pick-gqa-layers {folder / 'teacher'} --strategy retrieval --text FILE.txt",
        f"{program} init-from-teacher RekaAI/reka-flash-3 student/ --dry-run",
        f"{program} --help",
    )
    return Demo(folder, tuple(steps), tuple(results), left_out, tries)


def _steps(folder: Path, *, plots: bool) -> list[tuple[str, str, dict[str, Any]]]:
    """(title, command, options) of every step in order, without `plots` where these cannot be drawn."""

    def at(name: str) -> str:
        return str(folder / name)

    teacher, student, calibrated = at("teacher"), at("student"), at("student-calibrated")
    pth, back, chosen = at("student.pth"), at("student-hf"), at("layers.toml")
    text, heldout = at("teacher/calibration_tokens.npy"), at("teacher/heldout_tokens.npy")
    ranking = {"source": teacher, "count": 2, "strategy": "influence", "input_ids": text, "save": chosen}
    made, fit = {"teacher": teacher, "layer_map": chosen}, {"init": "calibrated", "input_ids": text, "refine_steps": 0}
    compare, again = {"against": teacher, "input_ids": heldout}, {"overwrite": True}
    drawn = [{"plot": at(name)} if plots else {} for name in ("ranking.png", "calibration.png", "depth.png")]
    depth = {**drawn[2], **again} if plots else {}
    published = "A student with these layers, the others RWKV with the published initial values"
    return [
        ("What is this checkpoint?", "inspect", {"source": teacher}),
        ("Which two layers should stay attention?", "pick-gqa-layers", {**ranking, **drawn[0], **again}),
        (published, "init-from-teacher", {**made, "out": student, **again}),
        ("How near is it to the teacher?", "verify", {"source": student, **compare}),
        (
            "The same with its RWKV layers fitted to text",
            "init-from-teacher",
            {**made, "out": calibrated, **fit, **drawn[1], **again},
        ),
        ("And how near is this one?", "verify", {"source": calibrated, **compare, **depth}),
        ("As one file, under RWKV names", "to-pth", {"source": calibrated, "out": pth, **again}),
        ("And back to a Hugging Face folder", "to-hf", {"source": pth, "out": back, **again}),
        ("The same model?", "verify", {"source": back, "against": calibrated}),
    ]


def _generate(folder: Path) -> Step:
    """Load the folder as any user would, and let it write a few bytes."""
    import torch
    import transformers

    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    model = library.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = b"def main("
    ids = torch.tensor([list(prompt)])
    output = model.generate(ids, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(ids))
    facts = {"prompt": prompt.decode(), "text": bytes(output[0].tolist()).decode(errors="replace")[len(prompt) :]}
    load = f'model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)'
    wrote = f"it continues {facts['prompt']!r} with {facts['text']!r} (not trained yet: this is no prose)"
    return Step(f"\n# And transformers runs it\n>>> {load}\n>>> {wrote}", facts)
