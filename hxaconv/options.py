"""Every option, once: groups of fields that carry their help, the panel they are shown in, and their default.

The command line is made from these groups, the Python functions take them (or their fields as keywords), and
hxaconv.json records what differs from the defaults. To add an option, add a field, and read it where it acts.
Neither torch nor numpy is imported here: `--help` needs this module.
"""

from __future__ import annotations

import numbers
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, Self, Union, get_args, get_origin, get_type_hints

from hxaconv.errors import HxaconvError
from hxaconv.model.variants import VARIANTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What an option says of itself, beside its name, type and default."""

    help: str
    panel: str = ""
    """Where `--help` shows it; empty: the panel of its group."""
    names: tuple[str, ...] = ()
    """On the command line, where that is not the field's own name."""
    recorded: bool = True
    """Whether what is written depends on it."""
    least: int | None = None
    most: int | None = None
    choices: tuple[str, ...] = ()
    convert: Callable[[Any], Any] | None = None
    """From what Python may give to what the field holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument(Option):
    """What is given by its place on the command line, not by a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """How a command shows a group: which of its fields it does not take, and in which panel."""

    without: tuple[str, ...] = ()
    panel: str = ""
    help: Mapping[str, str] = field(default_factory=dict)
    """Field -> another help text."""


class WrongOption(HxaconvError):
    """Values that options cannot have; `lines` are (field, what is wrong)."""

    def __init__(self, lines: Sequence[tuple[str, str]], named: Callable[[str], str] = str) -> None:
        super().__init__("\n".join(f"{named(name)}: {why}" for name, why in lines))
        self.lines = lines


class ArrayLike(Protocol):
    """Numpy arrays and torch tensors."""

    def __array__(self) -> Any: ...


class Group:
    """A frozen dataclass of options."""

    PANEL: ClassVar[str] = ""

    def __post_init__(self) -> None:
        wrong = []
        for name, (kind, option) in options_of(type(self)).items():
            try:
                object.__setattr__(self, name, checked(getattr(self, name), kind, option))
            except ValueError as error:
                wrong.append((name, str(error)))
        if wrong:
            raise WrongOption(wrong)

    def to_dict(self) -> dict[str, Any]:
        """Its fields as JSON can hold them."""
        return {name: plain(getattr(self, name)) for name in options_of(type(self))}

    def differing(self, defaults: Self | None = None) -> dict[str, Any]:
        """The fields, as JSON can hold them, that are not what `defaults` (the group without arguments) has."""
        usual = (type(self)() if defaults is None else defaults).to_dict()
        return {name: value for name, value in self.to_dict().items() if value != usual[name]}


_OPTIONS: dict[type, dict[str, tuple[Any, Option]]] = {}


def options_of(group: type[Group]) -> Mapping[str, tuple[Any, Option]]:
    """Field -> (its type, its option), in order."""
    if group not in _OPTIONS:
        hints = get_type_hints(group, include_extras=True)
        found = {}
        for known in fields(group):  # type: ignore[arg-type]
            kind, *extras = get_args(hints[known.name])
            found[known.name] = (kind, next(extra for extra in extras if isinstance(extra, Option)))
        _OPTIONS[group] = found
    return _OPTIONS[group]


def checked(value: Any, kind: Any, option: Option) -> Any:
    """The value as a field of this type holds it: paths and torch's dtypes as text, numbers of numpy as numbers.

    Raises:
        ValueError: saying what the field takes.
    """
    wanted = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and type(None) in wanted:
        return None
    if option.convert is not None:
        return option.convert(value)
    simple = next((found for found in (bool, int, float, str) if found in wanted), None)
    if simple is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        value = str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value
    elif simple in (int, float) and isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = float(value)
        value = int(value) if simple is int and value.is_integer() else value
    if (simple is not None and not isinstance(value, simple)) or (simple is int and isinstance(value, bool)):
        raise ValueError(f"{value!r} is not {_KINDS[simple]}")
    if option.least is not None and not value >= option.least:
        raise ValueError(f"{value} is not possible, it takes {option.least} or more")
    if option.most is not None and not value <= option.most:
        raise ValueError(f"{value} is not possible, it takes {option.most} or less")
    if option.choices and value not in option.choices:
        raise ValueError(f"{value!r} is not known, it takes {', '.join(option.choices)}")
    return value


_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def plain(value: Any) -> Any:
    """An option's value as JSON can hold it; token ids in memory are counted."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, tuple) and all(isinstance(item, str | float) for item in value):
        return list(value)
    return f"{size(value)} token ids in memory"


def size(ids: Sequence[Any] | ArrayLike) -> int:
    """How many token ids there are in memory."""
    if isinstance(ids, Sequence):
        return sum(size(row) if isinstance(row, list | tuple) else 1 for row in ids)
    return int(ids.__array__().size)


def layers_text(layers: str | os.PathLike[str] | int | Iterable[int]) -> str:
    """A choice of layers as the command line has it; from Python it may be a number, or several."""
    if isinstance(layers, str | os.PathLike):
        return os.fspath(layers)
    try:
        return ",".join(str(int(i)) for i in (layers if isinstance(layers, Iterable) else [layers])) or "none"
    except (TypeError, ValueError):
        raise ValueError(f"{layers!r} is neither text nor layer numbers") from None


def _ids(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, str | Sequence) or hasattr(value, "__array__"):
        return value
    raise ValueError(f"{value!r} is neither a file nor token ids")


def _texts(value: Any) -> tuple[str, ...]:
    """One text or path, or several."""
    several = [value] if isinstance(value, str | os.PathLike) else value
    if not isinstance(several, Sequence) or not all(isinstance(item, str | os.PathLike) for item in several):
        raise ValueError(f"{value!r} is neither text nor a list of it")
    return tuple(map(os.fspath, several))


def _floats(value: Any) -> tuple[float, ...]:
    """One number, or several."""
    several = [value] if isinstance(value, numbers.Real) else value
    if not isinstance(several, Sequence) or not all(isinstance(item, numbers.Real) for item in several):
        raise ValueError(f"{value!r} is neither a number nor a list of them")
    return tuple(map(float, several))


TokenIds = str | Sequence[Any] | ArrayLike
"""A file of token ids, or the ids themselves: one sequence, or several of one length."""

LARGEST_SEED = 2**63 - 1
STAGES = ("untrained", "calibrated", "attention-trained")
"""What may be expected of a student beside its teacher."""

Source = Annotated[str, Argument(help="Folder, .pth/.pt/.bin file or Hub id of the checkpoint.")]
OutAny = Annotated[str, Argument(help="Folder, or NAME.pth, to create.")]
OutFolder = Annotated[str, Argument(help="Folder to create.")]
OutFile = Annotated[str, Argument(help="NAME.pth to create; NAME.json goes beside it.")]
TeacherToo = Annotated[
    str | None,
    Option(help="Folder or Hub id: completes attention-only checkpoints.", panel="Teacher and settings"),
]
Dtype = Annotated[str | None, Option(help="bfloat16, float16 or float32. Default: as in the source.", panel="Output")]


def option_words(names: Iterable[str]) -> str:
    """Fields as the command line names them."""
    return ", ".join(f"--{name.rstrip('_').replace('_', '-')}" for name in names)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """`5GB` (decimal, as the Hub counts), `4GiB`, `500MB` -> bytes.

    Raises:
        ValueError: for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not 0 < float(match[1]) < 1e18:
        raise ValueError(f"{text[:40]!r} is not a size, such as 5GB, 500MB or 4GiB")
    unit = match[2].lower().removesuffix("b")
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match[1]) * base ** " kmgt".index(unit.removesuffix("i") or " "))


def _size_text(value: Any) -> str:
    text = str(value)
    parse_size(text)
    return text


class Display:
    """What every command of the command line takes beside the options of its function."""

    Json = Annotated[bool, Option(help="Print the result as JSON.", panel="Display")]
    Quiet = Annotated[
        bool, Option(help="Print nothing but warnings and errors.", panel="Display", names=("--quiet", "-q"))
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Group):
    """Settings of the source that no file tells, or that overrule what a file tells."""

    PANEL: ClassVar[str] = "Teacher and settings"

    layer_map: Annotated[str | None, Option(help="Layer map that names rope_theta and eps.")] = None
    gqa_layers: Annotated[
        str | None, Option(help="Confirms which layers are GQA, where a file lacks some.", convert=layers_text)
    ] = None
    rope_theta: Annotated[float | None, Option(help="Where no file says it, or to override it.")] = None
    rms_norm_eps: Annotated[float | None, Option(help="Where no file says it, or to override it.")] = None
    tie_word_embeddings: Annotated[
        bool | None,
        Option(
            help="Whether the head is the embedding, where no file says it.",
            names=("--tie-word-embeddings/--no-tie-word-embeddings",),
        ),
    ] = None
    allow_output_bias: Annotated[bool, Option(help="Keep o_proj and MLP biases.")] = False
    drop_rope_scaling: Annotated[bool, Option(help="Go on without rope_scaling.")] = False
    variant: Annotated[
        str | None,
        Option(
            help="Variant of the RWKV layers; asked for where tensors and files do not tell.",
            choices=tuple(VARIANTS),
        ),
    ] = None
    revision: Annotated[str | None, Option(help="Branch, tag or commit of a Hub source.")] = None
    weights: Annotated[
        str | None,
        Option(
            help="Of a ZeRO folder: master (float32) or model (what it computes with). Default: master.",
            choices=("master", "model"),
        ),
    ] = None
    adapter: Annotated[
        tuple[str, ...],
        Option(help="Adapter to merge into the source, a folder or file (LoRA, DoRA, PiSSA, Bone).", convert=_texts),
    ] = ()
    adapter_scale: Annotated[
        tuple[float, ...],
        Option(help="Its B A is multiplied by this (with PEFT: too). One per adapter.", convert=_floats),
    ] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers(Group):
    """Which layers of a new student stay attention."""

    PANEL: ClassVar[str] = "Layers"

    layer_map: Annotated[
        str | None,
        Option(help="Layer map (name or TOML file). Default: the teacher's shipped map, else evenly spaced."),
    ] = None
    gqa_layers: Annotated[
        str | None, Option(help="Layers that stay GQA: 8,15-17,-1, none, all.", convert=layers_text)
    ] = None
    allow_gqa_layer_0: Annotated[bool, Option(help="Accept layer 0 as GQA (loaders disagree).")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice(Group):
    """Another choice of the layers that are attention: named, or found by a strategy."""

    PANEL: ClassVar[str] = "Layers"

    layers: Annotated[
        str | None,
        Option(help="The layers that become GQA: 8,15-17,-1, a layer map or file.", convert=layers_text),
    ] = None
    count: Annotated[int | None, Option(help="How many to choose. Default: L//7.")] = None
    strategy: Annotated[str, Option(help="uniform, last, log, mse, influence, entropy, distance, kl or retrieval.")] = (
        "uniform"
    )
    min_gap: Annotated[int | None, Option(help="Least distance of two.")] = None
    max_gap: Annotated[int | None, Option(help="Greatest distance of two.")] = None
    max_consecutive: Annotated[int | None, Option(help="Longest run of adjacent ones.")] = None
    exclude: Annotated[str | None, Option(help="Layers never chosen: 0,5-7.", convert=layers_text)] = None
    kl_mode: Annotated[
        str,
        Option(
            help="restore (one layer of the student) or convert (one of the teacher).", choices=("restore", "convert")
        ),
    ] = "restore"
    log: Annotated[str | None, Option(help="Stage-1 training log (CSV), for --strategy log.")] = None
    allow_gqa_layer_0: Annotated[bool, Option(help="Accept layer 0 as GQA (loaders disagree).")] = False
    save: Annotated[
        str | None,
        Option(help="Write the choice as a layer map; interrupted scoring resumes beside it.", recorded=False),
    ] = None
    plot: Annotated[
        str | None, Option(help="Draw the scores: NAME.png, .svg or .pdf.", panel="Display", recorded=False)
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Init(Group):
    """How RWKV layers are initialised from attention."""

    PANEL: ClassVar[str] = "Initial values"

    init: Annotated[
        str,
        Option(help="openmose (published values) or calibrated (fitted to text).", choices=("openmose", "calibrated")),
    ] = "openmose"
    preset: Annotated[str, Option(help="openmose-stage1 (0.5 0.5 0.3 0.5) or openmose-stage2 (1.0).")] = (
        "openmose-stage1"
    )
    scale: Annotated[str | None, Option(help="Factors over the preset: receptance=0.5,key=1,...")] = None
    seed: Annotated[int, Option(help="Seed of the random matrices.", least=0, most=LARGEST_SEED)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(Group):
    """Which tokens a model is run on."""

    PANEL: ClassVar[str] = "Probe tokens"

    input_ids: Annotated[TokenIds | None, Option(help="Token ids: .npy, .safetensors or .json.", convert=_ids)] = None
    text: Annotated[str | None, Option(help="Text file, cut by the tokenizer in the folder.")] = None
    tokens: Annotated[int, Option(help="Calibration tokens.", least=2)] = 1024
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu"

    @property
    def given(self) -> bool:
        """Whether the tokens are somebody's text, not random."""
        return self.input_ids is not None or self.text is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Tokens):
    """The forward of `verify`: its tokens, and how it is computed."""

    tokens: Annotated[int, Option(help="Tokens per sequence.", least=1)] = 64
    batch: Annotated[int, Option(help="Sequences.", least=1)] = 1
    seed: Annotated[int, Option(help="Seed of random tokens.", least=0, most=LARGEST_SEED)] = 0
    dtype: Annotated[str, Option(help="float32 or float64.", choices=("float32", "float64"))] = "float32"
    logits_out: Annotated[str | None, Option(help="Write input_ids, logits and hidden.{i} as safetensors.")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit(Tokens):
    """What a calibration fits to, and how."""

    PANEL: ClassVar[str] = "Calibration"

    text: Annotated[str | None, Option(help="Text file, cut by the teacher's tokenizer.")] = None
    chunk: Annotated[int, Option(help="Tokens per sequence: no decay can see beyond it.", least=2)] = 2048
    random_tokens: Annotated[bool, Option(help="Fit to random tokens (much worse).")] = False
    refit_output: Annotated[
        str,
        Option(help="Fit the output matrix too: auto, never or always.", choices=("auto", "never", "always")),
    ] = "auto"
    refine_steps: Annotated[int, Option(help="Local refinement after the closed form; 0 for none.", least=0)] = 100
    fold_rope: Annotated[bool, Option(help="Fold the mean rotation into q of GQA layers.")] = False
    polish_tokens: Annotated[
        int, Option(help="Then train all mixers together on so many tokens of the text; 0: not.", least=0)
    ] = 0
    polish_only: Annotated[bool, Option(help="Fit no layer, only polish what the student holds.")] = False
    plot: Annotated[
        str | None, Option(help="Draw errors and decays by layer: NAME.png, .svg or .pdf.", recorded=False)
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check(Group):
    """What is expected of a comparison; None: what the two architectures, or the student's record, imply."""

    expect: Annotated[
        str | None,
        Option(
            help="untrained, calibrated, attention-trained, identical, close or report. Default: identical for the same"
            " architecture; for a student and its teacher what its record says, else attention-trained.",
            choices=(*STAGES, "identical", "close", "report"),
        ),
    ] = None
    max_logit: Annotated[float | None, Option(help="Largest difference of a logit (identical: 0).", least=0)] = None
    max_layer: Annotated[float | None, Option(help="Largest relative error of a layer (close: 0.01).", least=0)] = None
    max_kl: Annotated[float | None, Option(help="Largest KL, in nats per token (close: 0.001).", least=0)] = None
    plot: Annotated[
        str | None, Option(help="Draw errors and cosine by depth: NAME.png, .svg or .pdf.", panel="Display")
    ] = None
    overwrite: Annotated[bool, Option(help="Replace the files of --logits-out and --plot.", panel="Display")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Write(Group):
    """What is written and how: none of this changes a value of the tensors."""

    PANEL: ClassVar[str] = "Output"

    format: Annotated[
        str | None,
        Option(
            help="hf, pth or training (attention alone). Default: by OUT's suffix.", choices=("hf", "pth", "training")
        ),
    ] = None
    max_shard_size: Annotated[
        str, Option(help="Largest file of an hf folder: 5GB, 500MB, 4GiB.", convert=_size_text)
    ] = "5GB"
    copy_code: Annotated[bool, Option(help="Copy .py files of the source too.")] = False
    keep_shell: Annotated[bool, Option(help="Carry vision tensors and processor files through.")] = False
    dry_run: Annotated[bool, Option(help="Print the plan, write nothing.", recorded=False)] = False
    overwrite: Annotated[bool, Option(help="Replace OUT once the new one is complete.", recorded=False)] = False
    resume: Annotated[bool, Option(help="Continue an interrupted run.", recorded=False)] = False
    verify: Annotated[
        bool, Option(help="Skip the check of what was written.", names=(" /--no-verify",), recorded=False)
    ] = True
    workers: Annotated[int | None, Option(help="Threads. Default: 2, or 1 on one core.", least=1, recorded=False)] = (
        None
    )
    digest: Annotated[
        str, Option(help="Per tensor: crc32, sha256 or none.", choices=("crc32", "sha256", "none"), recorded=False)
    ] = "crc32"
    allow_nonfinite: Annotated[bool, Option(help="Go on although a source holds NaN or Inf.", recorded=False)] = False
    push_to: Annotated[str | None, Option(help="ORG/NAME: upload the finished folder, private.", recorded=False)] = None

    @property
    def max_shard_bytes(self) -> int:
        """The size as a number."""
        return parse_size(self.max_shard_size)

    def format_of(self, out: str) -> str:
        """The format of an output: as given, else by the suffix of its name."""
        return self.format or ("pth" if Path(out).suffix == ".pth" else "hf")
