"""Every option, once: groups of fields that carry their help, the panel they are shown in, and their default.

The command line is made from these groups, the Python functions take them (or their fields as keywords), and
hxaconv.json records what differs from the defaults. To add an option, add a field, and read it where it acts.
Neither torch nor numpy is imported here: `--help` needs this module.
"""

from __future__ import annotations

import numbers
import os
import re
import reprlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, Self, get_args, get_origin, get_type_hints

from hxaconv.errors import HxaconvError, meant, raise_all
from hxaconv.model.variants import VARIANTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What belongs to an option beside its name, type and default."""

    help: str = field(kw_only=False)
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
    """From what Python may give to what the field holds; a ValueError names what is wrong."""
    taken: Any = None
    """What Python may give, as its signature says it, where that is more than the field's type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument(Option):
    """What is given by its place on the command line, not by a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """How a command shows a group: without some of its fields."""

    without: tuple[str, ...] = ()


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

    def __new__(cls, **values: Any) -> Self:
        refuse_unknown(f"{cls.__name__} has no such options:", values, options_of(cls))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        wrong = []
        for name, (kind, option) in options_of(type(self)).items():
            try:
                object.__setattr__(self, name, checked(getattr(self, name), kind, option))
            except ValueError as error:
                wrong.append((name, str(error)))
        if wrong:
            raise WrongOption(wrong)

    def differing(self, defaults: Self | None = None) -> list[str]:
        """The fields that are not what `defaults` (the group without arguments) has."""
        usual = type(self)() if defaults is None else defaults
        return [name for name in options_of(type(self)) if plain(getattr(self, name)) != plain(getattr(usual, name))]


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of a group: its default, and the Option that it is."""
    return field(default=default, metadata={"option": Option(help, **more)})


_OPTIONS: dict[Any, dict[str, tuple[Any, Option]]] = {}


def options_of(group: Any) -> Mapping[str, tuple[Any, Option]]:
    """Field -> (its type, its option), in order."""
    if group not in _OPTIONS:
        kinds = get_type_hints(group)
        _OPTIONS[group] = {field.name: (kinds[field.name], field.metadata["option"]) for field in fields(group)}
    return _OPTIONS[group]


def refuse_unknown(summary: str, given: Iterable[Any], known: Iterable[str]) -> None:
    """Refuse names that there are not.

    Raises:
        HxaconvError: listing them, and what was probably meant.
    """
    names = list(known)
    raise_all(
        summary,
        [f"{name!r}{meant(str(name), names)}" for name in given if name not in names],
        hint=f"There are {', '.join(names)}." if len(names) <= 20 else "",
    )


def checked(value: Any, kind: Any, option: Option) -> Any:
    """The value as a field of this type holds it: paths as text, numbers of numpy as numbers.

    Raises:
        ValueError: naming what the field takes.
    """
    kinds = get_args(kind) or (kind,)
    if value is None and types.NoneType in kinds:
        return None
    convert = option.convert or next(convert for known, convert in _CONVERT.items() if known in kinds)
    if get_origin(kind) is tuple:
        alone = isinstance(value, str | os.PathLike) or not isinstance(value, Iterable)
        return tuple(map(convert, [value] if alone else value))
    value = convert(value)
    if option.least is not None and not value >= option.least:
        raise ValueError(f"{_short(value)} is not possible, it takes {option.least} or more")
    if option.most is not None and not value <= option.most:
        raise ValueError(f"{_short(value)} is not possible, it takes {option.most} or less")
    if option.choices and value not in option.choices:
        near = meant(str(value), option.choices)
        raise ValueError(f"{value!r} is not known{near}, it takes {', '.join(option.choices)}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{_short(value)} is not True or False")
    return value


def _number(value: Any) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, numbers.Real):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(f"{_short(value)} is not a number")


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or value % 1 != 0:
        raise ValueError(f"{_short(value)} is not a whole number")
    return int(value)  # type: ignore[call-overload, no-any-return]


LONGEST_PATH, LONGEST_NAME = 4095, 255
"""Bytes that file systems have room for, in all and between slashes."""


def text_of(value: Any) -> str:
    """Text, most often a path; what no file system can name is refused here, once for all.

    Raises:
        ValueError: naming what is wrong with it.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise ValueError(f"{_short(value)} is not text, nor a path")
    if not text:
        raise ValueError("it is empty")
    if "\0" in text:
        raise ValueError(f"{_short(text)} has a null byte")
    try:
        names = os.fsencode(text).split(b"/")
    except UnicodeEncodeError:
        raise ValueError(f"{_short(text)} has a character that no file system can name") from None
    if len(text) > LONGEST_PATH or max(map(len, names)) > LONGEST_NAME:
        raise ValueError(f"{_short(text)} is longer than the name of a file can be")
    return text


_CONVERT: Mapping[type, Callable[[Any], Any]] = {bool: _flag, int: _whole, float: _number, str: text_of}
_short = reprlib.Repr().repr


def dtype_name(value: Any) -> str:
    """A dtype's name; torch's and numpy's own are taken too."""
    name = value if isinstance(value, str) else getattr(value, "name", getattr(value, "__name__", str(value)))
    if not re.fullmatch(r"(torch\.)?[a-zA-Z]\w*", name):
        raise ValueError(f"{_short(value)} is not a dtype")
    return str(name).removeprefix("torch.")


def _device(value: Any) -> str:
    return text_of(str(value) if type(value).__module__ == "torch" else value)


def _scale(value: Any) -> str:
    """Factors as the command line has them; from Python they may be a dictionary."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={_number(factor)!r}" for name, factor in value.items())
    if not isinstance(value, str):
        raise ValueError(f"{_short(value)} is neither factors by name nor text such as value=0.4")
    return text_of(value)


def _layers(value: Any) -> str:
    """A choice of layers as the command line has it; from Python it may be a number, or several."""
    if isinstance(value, str) and "," in value:  # a list of many layers is longer than a name
        return value
    if isinstance(value, str) and not value:
        raise ValueError("it is empty; layers are named by their numbers, such as 8,15-17,-1")
    if isinstance(value, str | os.PathLike):
        return text_of(value)
    several = value.tolist() if hasattr(value, "tolist") else value
    several = several if isinstance(several, list | tuple | range | Set | Iterator) else [several]
    try:
        return ",".join(layer if isinstance(layer, str) else str(_whole(layer)) for layer in several) or "none"
    except ValueError:
        raise ValueError(f"{_short(value)} is neither text nor layer numbers") from None


def _ids(value: Any) -> Any:
    if isinstance(value, str | os.PathLike):
        return text_of(value)
    if isinstance(value, Sequence) or hasattr(value, "__array__"):
        return value
    raise ValueError(f"{_short(value)} is neither a file nor token ids")


def plain(value: Any) -> Any:
    """An option's value as JSON can hold it; token ids in memory are counted."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, tuple) and all(isinstance(item, str | float) for item in value):
        return list(value)
    return f"{_size(value)} token ids in memory"


def _size(ids: Sequence[Any] | ArrayLike) -> int:
    if isinstance(ids, Sequence):
        return sum(_size(row) if isinstance(row, list | tuple) else 1 for row in ids)
    return int(ids.__array__().size)


TokenIds = str | Sequence[Any] | ArrayLike
"""A file of token ids, or the ids themselves: one sequence, or several of one length."""

LayerNumbers = str | int | Iterable[int] | None
Factors = str | Mapping[str, float] | None

LARGEST_SEED = 2**63 - 1
STRATEGIES = ("uniform", "last", "log", "mse", "influence", "entropy", "distance", "kl", "nll", "retrieval", "gates")
PRESETS = ("openmose-stage1", "openmose-stage2")
STAGES = ("untrained", "calibrated", "attention-trained")
"""What may be expected of a student beside its teacher."""

Source = Annotated[str, Argument("Folder, .pth/.pt/.bin file or Hub id of the checkpoint.")]
OutAny = Annotated[str, Argument("Folder, or NAME.pth, to create.")]
OutFolder = Annotated[str, Argument("Folder to create.")]
OutFile = Annotated[str, Argument("NAME.pth to create; NAME.json goes beside it.")]
TeacherToo = Annotated[
    str | None,
    Option("Folder or Hub id: completes attention-only checkpoints.", panel="Teacher and settings"),
]
NewDtype = Annotated[str, Option("Dtype of the output.", panel="Output", convert=dtype_name)]
Dtype = Annotated[
    str | None, Option("bfloat16, float16 or float32. Default: as in the source.", panel="Output", convert=dtype_name)
]


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
    text = str(value) if isinstance(value, int) else text_of(value)
    parse_size(text)
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Group):
    """Settings of the source that are in no file, or that overrule those in a file."""

    PANEL: ClassVar[str] = "Teacher and settings"

    layer_map: str | None = option(None, "Layer map that names rope_theta and eps.")
    gqa_layers: str | None = option(
        None, "Confirms which layers are GQA, where a file lacks some.", convert=_layers, taken=LayerNumbers
    )
    rope_theta: float | None = option(None, "Where no file has it, or to override it.")
    rms_norm_eps: float | None = option(None, "Where no file has it, or to override it.")
    tie_word_embeddings: bool | None = option(
        None,
        "Whether the head is the embedding, where no file has it.",
        names=("--tie-word-embeddings/--no-tie-word-embeddings",),
    )
    allow_output_bias: bool = option(False, "Keep o_proj and MLP biases.")
    drop_rope_scaling: bool = option(False, "Go on without rope_scaling.")
    variant: str | None = option(
        None, "Variant of the RWKV layers; needed where tensors and files leave it open.", choices=tuple(VARIANTS)
    )
    revision: str | None = option(None, "Branch, tag or commit of a Hub source.")
    weights: str | None = option(
        None,
        "Of a ZeRO folder: master (float32) or model (what it computes with). Default: master. Of a .pth with several"
        " state dicts: its key (model, ema, ...).",
    )
    adapter: tuple[str, ...] = option(
        (), "Adapter to merge into the source, a folder or file (LoRA, DoRA, PiSSA, Bone)."
    )
    adapter_scale: tuple[float, ...] = option((), "Its B A is multiplied by this (with PEFT: too). One per adapter.")


OfStudent = Annotated[Settings, Shown(without=("allow_output_bias", "drop_rope_scaling"))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers(Group):
    """Which layers of a new student stay attention."""

    PANEL: ClassVar[str] = "Layers"

    layer_map: str | None = option(
        None, "Layer map (name or TOML file). Default: the teacher's shipped map, else evenly spaced."
    )
    gqa_layers: str | None = option(
        None, "Layers that stay GQA: 8,15-17,-1, none, all.", convert=_layers, taken=LayerNumbers
    )
    allow_gqa_layer_0: bool = option(False, "Accept layer 0 as GQA (loaders disagree).")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice(Group):
    """Another choice of the layers that are attention: named, or found by a strategy."""

    PANEL: ClassVar[str] = "Layers"

    layers: str | None = option(
        None, "The layers that become GQA: 8,15-17,-1, a layer map or file.", convert=_layers, taken=LayerNumbers
    )
    count: int | None = option(None, "How many to choose. Default: L//7.")
    strategy: str | None = option(
        None, f"{', '.join(STRATEGIES)}. Default: retrieval where there is text, else uniform.", choices=STRATEGIES
    )
    min_gap: int | None = option(None, "Least distance of two.")
    max_gap: int | None = option(None, "Greatest distance of two.")
    max_consecutive: int | None = option(None, "Longest run of adjacent ones.")
    exclude: str | None = option(None, "Layers never chosen: 0,5-7.", convert=_layers, taken=LayerNumbers)
    kl_mode: str = option(
        "restore", "restore (one layer of the student) or convert (one of the teacher).", choices=("restore", "convert")
    )
    log: str | None = option(None, "Stage-1 training log (CSV), for --strategy log.")
    allow_gqa_layer_0: bool = option(False, "Accept layer 0 as GQA (loaders disagree).")
    save: str | None = option(
        None, "Write the choice as a layer map; interrupted scoring resumes beside it.", recorded=False
    )
    plot: str | None = option(None, "Draw the scores: NAME.png, .svg or .pdf.", panel="Display", recorded=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Init(Group):
    """How RWKV layers are initialised from attention."""

    PANEL: ClassVar[str] = "Initial values"

    init: str = option(
        "openmose", "openmose (published values) or calibrated (fitted to text).", choices=("openmose", "calibrated")
    )
    preset: str = option(
        "openmose-stage1", "openmose-stage1 (0.5 0.5 0.3 0.5) or openmose-stage2 (1.0).", choices=PRESETS
    )
    scale: str | None = option(None, "Factors over the preset: receptance=0.5,key=1,...", convert=_scale, taken=Factors)
    seed: int = option(0, "Seed of the random matrices.", least=0, most=LARGEST_SEED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(Group):
    """Which tokens a model is run on."""

    PANEL: ClassVar[str] = "Probe tokens"

    input_ids: TokenIds | None = option(None, "Token ids: .npy, .safetensors or .json.", convert=_ids)
    text: str | None = option(None, "Text file, cut by the tokenizer in the folder.")
    tokens: int = option(1024, "Calibration tokens.", least=2)
    device: str = option("cpu", "cpu, cuda or cuda:1.", convert=_device)

    @property
    def given(self) -> bool:
        """Whether the tokens are given, not random."""
        return self.input_ids is not None or self.text is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Tokens):
    """The forward of `verify`: its tokens, and how it is computed."""

    tokens: int = option(64, "Tokens per sequence; 16 where nothing is compared.", least=1)
    batch: int = option(1, "Sequences.", least=1)
    seed: int = option(0, "Seed of random tokens.", least=0, most=LARGEST_SEED)
    dtype: str = option("float32", "float32 or float64.", choices=("float32", "float64"), convert=dtype_name)
    logits_out: str | None = option(None, "Write input_ids, logits and hidden.{i} as safetensors.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit(Tokens):
    """What a calibration fits to, and how."""

    PANEL: ClassVar[str] = "Calibration"

    text: str | None = option(None, "Text file, cut by the teacher's tokenizer.")
    chunk: int = option(2048, "Tokens per sequence: no decay can see beyond it.", least=2)
    random_tokens: bool = option(False, "Fit to random tokens (much worse).")
    refit_output: str = option(
        "auto", "Fit the output matrix too: auto, never or always.", choices=("auto", "never", "always")
    )
    refine_steps: int = option(64, "Local refinement after the closed form; 0 for none.", least=0)
    fold_rope: bool = option(False, "Of no use any more: GQA layers are trained whole.", recorded=False)
    polish_tokens: int = option(0, "Then train all mixers together on so many tokens of the text; 0: not.", least=0)
    polish_only: bool = option(False, "Fit no layer, only polish what the student holds.")
    plot: str | None = option(None, "Draw errors and decays by layer: NAME.png, .svg or .pdf.", recorded=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check(Group):
    """What is expected of a comparison; None: what the two architectures, or the student's record, imply."""

    expect: str | None = option(
        None,
        "untrained, calibrated, attention-trained, identical, close or report. Default: identical for the same"
        " architecture; for a student and its teacher as recorded, else attention-trained.",
        choices=(*STAGES, "identical", "close", "report"),
    )
    max_logit: float | None = option(None, "Largest difference of a logit (identical: 0).", least=0)
    max_layer: float | None = option(None, "Largest relative error of a layer (close: 0.01).", least=0)
    max_kl: float | None = option(None, "Largest KL, in nats per token (close: 0.001).", least=0)
    plot: str | None = option(None, "Draw errors and cosine by depth: NAME.png, .svg or .pdf.", panel="Display")
    overwrite: bool = option(False, "Replace the files of --logits-out and --plot.", panel="Display")


@dataclass(frozen=True, slots=True, kw_only=True)
class Write(Group):
    """What is written and how: none of this changes a value of the tensors."""

    PANEL: ClassVar[str] = "Output"

    format: str | None = option(
        None, "hf, pth or training (attention alone). Default: by OUT's suffix.", choices=("hf", "pth", "training")
    )
    max_shard_size: str = option("5GB", "Largest file of an hf folder: 5GB, 500MB, 4GiB.", convert=_size_text)
    copy_code: bool = option(False, "Copy .py files of the source too.")
    keep_shell: bool = option(False, "Carry vision tensors and processor files through.")
    dry_run: bool = option(False, "Print the plan, write nothing.", recorded=False)
    overwrite: bool = option(False, "Replace OUT once the new one is complete.", recorded=False)
    resume: bool = option(False, "Continue an interrupted run.", recorded=False)
    verify: bool = option(True, "Skip the check of what was written.", names=(" /--no-verify",), recorded=False)
    workers: int | None = option(None, "Threads. Default: 2, or 1 on one core.", least=1, recorded=False)
    digest: str = option(
        "crc32", "Per tensor: crc32, sha256 or none.", choices=("crc32", "sha256", "none"), recorded=False
    )
    allow_nonfinite: bool = option(False, "Go on although a source holds NaN or Inf.", recorded=False)
    push_to: str | None = option(None, "ORG/NAME: upload the finished folder, private.", recorded=False)

    @property
    def max_shard_bytes(self) -> int:
        """The size as a number."""
        return parse_size(self.max_shard_size)

    def format_of(self, out: str) -> str:
        """The format of an output: as given, else by the suffix of its name."""
        return self.format or ("pth" if Path(out).suffix == ".pth" else "hf")


def _show_what_is_taken() -> None:
    """Signatures of the groups say what Python may give, which `convert` makes the field's own type of."""
    for group in (Settings, Layers, Choice, Init):
        for name, (_, option) in options_of(group).items():
            if option.taken is not None:
                group.__init__.__annotations__[name] = option.taken


_show_what_is_taken()
