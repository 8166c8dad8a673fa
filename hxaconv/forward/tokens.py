"""Token ids to run a model on: in memory, from a file, a text, or random."""

from __future__ import annotations

import bisect
import codecs
import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hxaconv.errors import HxaconvError, shortened
from hxaconv.formats.diskio import memory_limit
from hxaconv.formats.json_files import parse_json
from hxaconv.model.config import StudentConfig
from hxaconv.options import TokenIds, Tokens

if TYPE_CHECKING:
    from hxaconv.formats.files import SourceFile
    from hxaconv.model.model import Checkpoint, Model

Need = Callable[[int, int], int]
"""Bytes of memory that so many sequences of so many tokens take."""


def tokens_of(
    options: Tokens, vocab_size: int, checkpoint: Checkpoint, need: Need, *, batch: int = 1, seed: int = 0
) -> Tensor:
    """Token ids (sequences, length): given ones as they are, else `options.tokens` times `batch` of them.

    The tokenizer is the checkpoint's; `seed` is that of random ones.

    Raises:
        HxaconvError: for more than memory holds, files that hold no token ids, and ids outside the vocabulary.
    """
    text = Path(options.text) if options.text else None
    if options.input_ids is None:
        with contextlib.suppress(OSError):  # of a text there are no more tokens than bytes
            length = options.tokens if text is None else min(options.tokens, text.stat().st_size)
            refuse_beyond_memory(batch, length, need)
    ids = probe_tokens(
        vocab_size,
        tokens=options.tokens,
        batch=batch,
        seed=seed,
        input_ids=options.input_ids,
        text=text,
        tokenizer=checkpoint.companions.get("tokenizer.json"),
    )
    refuse_beyond_memory(ids.shape[0], ids.shape[1], need)
    return ids


def calibration_tokens(options: Tokens, seed: int, model: Model, tokenizer: Checkpoint | None = None) -> Tensor:
    """As `tokens_of`, but at most `options.tokens` of them: of as few sequences as hold that many, equal parts.

    The tokenizer is the model's own, or that of another checkpoint.

    Raises:
        HxaconvError: for too few, for files that hold no token ids, and ids outside the vocabulary.
    """
    config, checkpoint = model.config, tokenizer or model.opened
    # The residual stream, its normed copy, the heads and what attention adds, in float32.
    token = 4 * (3 * config.hidden_size + config.attention_size)
    ids = tokens_of(options, config.vocab_size, checkpoint, lambda rows, length: rows * length * token, seed=seed)
    rows = min(-(-options.tokens // ids.shape[1]), ids.shape[0])
    used = ids[:rows, : options.tokens // rows]
    if used.numel() < 2:
        where = options.text or (options.input_ids if isinstance(options.input_ids, str) else "input_ids")
        raise HxaconvError(f"{where} holds a single token, which is too few", hint="A few hundred are a beginning.")
    return used


def forward_need(models: Sequence[Model], dtype: str) -> Need:
    """What a forward of one model, or of two side by side, takes; attention holds its scores of all pairs of tokens."""
    size, config = {"float32": 4, "float64": 8}[dtype], models[0].config
    attends = not all(isinstance(m.config, StudentConfig) and not m.config.gqa_layers for m in models)
    token = size * (4 * len(models) * config.hidden_size + 20 * config.attention_size)
    pair = size * 3 * config.num_attention_heads if attends else 0
    return lambda rows, length: rows * length * (token + length * pair)


def refuse_beyond_memory(rows: int, length: int, need: Need) -> None:
    """Refuse more tokens than fit, instead of being ended by the system.

    Raises:
        HxaconvError: where so many do not.
    """
    room = memory_limit()
    if room is None or need(rows, length) <= room:
        return
    fits = bisect.bisect_right(range(min(length, 2**40)), room, key=lambda tokens: need(rows, tokens)) - 1
    count = f"{length:,} tokens" if rows == 1 else f"{rows:,} sequences of {length:,} tokens"
    raise HxaconvError(
        f"{count} need about {need(rows, length) / 1e9:,.0f} GB of memory, and {room / 1e9:,.0f} GB are free",
        hint=f"--tokens {fits} fits." if fits else "Fewer sequences fit.",
    )


def checked_device(text: str) -> str:
    """`cpu`, `cuda` or `cuda:1`, if this machine has it.

    Raises:
        HxaconvError: for other names, and for a GPU that is not there.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise HxaconvError(f"--device {text!r} is not known", hint="It takes cpu, cuda or cuda:1.")
    if text != "cpu":
        count = torch.cuda.device_count()
        if int(text.partition(":")[2] or 0) >= count:
            raise HxaconvError(f"--device {text}: torch sees {count} GPUs here", hint="Use --device cpu.")
    return text


def probe_tokens(
    vocab_size: int,
    *,
    tokens: int = 64,
    batch: int = 1,
    seed: int = 0,
    input_ids: TokenIds | Path | None = None,
    text: Path | None = None,
    tokenizer: SourceFile | None = None,
) -> Tensor:
    """Token ids (batch, tokens), int64, all below `vocab_size`.

    From `input_ids` (all of them, as they are), else the start of `text`, else drawn from `seed`.

    Raises:
        HxaconvError: for files that hold something else, and ids outside the vocabulary.
    """
    if input_ids is not None and text is not None:
        raise HxaconvError("--input-ids and --text both name the tokens to use", hint="Give one of them.")
    if input_ids is not None:
        where = str(input_ids) if isinstance(input_ids, str | Path) else "input_ids"
        ids = _ids(_read(Path(input_ids)) if isinstance(input_ids, str | Path) else input_ids, where)
    elif text is not None:
        ids, where = _cut(_encode(text, tokenizer, tokens * batch), tokens, batch, text), f"{text}, by this tokenizer,"
    else:
        return torch.randint(vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise HxaconvError(
            f"{where} holds token ids {ids.min().item()}..{ids.max().item()}, the vocabulary has {vocab_size}",
            hint="Were they made with another model's tokenizer?",
        )
    return ids


def said_twice(once: Tensor) -> Tensor:
    """Tokens (rows, D) and the same again, (rows, 2D)."""
    return torch.cat([once, once], dim=1)


def first_counted(twice: Tensor) -> int:
    """Where the second time begins, but for its first eighth: that cannot be recognised as a repetition yet."""
    length = twice.shape[1] // 2
    return length + max(1, length // 8)


def _read(path: Path) -> Any:
    """What a .npy, .safetensors (`input_ids`, or its only tensor) or .json file holds.

    Raises:
        HxaconvError: for another suffix, and for what is no such file.
    """
    if path.suffix not in (".npy", ".safetensors", ".json"):
        raise HxaconvError(
            f"{path}: token ids are read from .npy, .safetensors, .json files", hint="A file of text is for --text."
        )
    if not path.is_file():
        raise HxaconvError(f"{path} is not a file; token ids are read from one", hint="Check the path.")
    problem = f"{path} could not be read as token ids: "
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".json":
            content = parse_json(path.read_bytes())
            name, held = "input_ids", content if isinstance(content, dict) else {"input_ids": content}
        else:
            with safe_open(path, framework="pt") as file:
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            name = "input_ids" if len(held) != 1 else next(iter(held))
    except (OSError, ValueError, SafetensorError) as error:
        # numpy's message recommends to unpickle it
        reason = "it is no .npy file" if path.suffix == ".npy" else str(error)
        raise HxaconvError(problem + reason, hint=EXPECTED) from None
    if name not in held:
        raise HxaconvError(f"{problem}it holds {shortened(held) or 'nothing'}, and no input_ids", hint=EXPECTED)
    return held[name]


def _ids(values: Any, where: str) -> Tensor:
    """Whole numbers of one or two axes as (B, T), int64."""
    try:
        array = values if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError):
        raise HxaconvError(f"{where} holds rows of different lengths, not token ids", hint=EXPECTED) from None
    kind, shape = str(array.dtype).removeprefix("torch."), tuple(array.shape)
    if 0 in shape:
        raise HxaconvError(f"{where} is empty: it holds no token ids", hint="Expected whole numbers.")
    if not kind.startswith(("int", "uint")) or len(shape) not in (1, 2):
        kind = {"object": "other things than numbers"}.get(kind, "text" if "U" in kind else kind)
        raise HxaconvError(f"{where} holds {kind} of shape {shape}, not token ids", hint=EXPECTED)
    whole = array.to(torch.int64) if isinstance(array, Tensor) else torch.from_numpy(array.astype(np.int64))
    return whole.reshape(-1, shape[-1])


EXPECTED = "Expected whole numbers of shape (tokens,) or (batch, tokens)."
BYTES_PER_TOKEN = 8
"""As much of a text is read at first; where that makes too few tokens, four times as much."""
MARGIN = 64
"""Tokens that are read beyond those that are used: where a text is cut, its last ones are others."""


def _encode(text: Path, tokenizer: SourceFile | None, count: int) -> list[int]:
    """The first `count` tokens or more, as they are of the whole text; only as much of it is read as they need."""
    size = (count + MARGIN) * BYTES_PER_TOKEN
    content, ends = _beginning(text, size)
    if tokenizer is None:
        raise HxaconvError(
            f"--text {text} needs a tokenizer.json beside the weights, and there is none",
            hint="Copy the teacher's tokenizer.json into the folder, or use --input-ids.",
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise HxaconvError(
            "--text needs the `tokenizers` library", hint="`pip install 'hxaconv[text]'`, or use --input-ids."
        ) from None
    try:
        made = Tokenizer.from_str(tokenizer.read(0, tokenizer.size).decode("utf-8"))
    except Exception as error:
        raise HxaconvError(f"{tokenizer.label} is not a tokenizer that `tokenizers` reads: {error}") from None
    # Both can be stored with a tokenizer: it would truncate the text, or pad it.
    made.no_truncation()
    made.no_padding()
    ids: list[int] = made.encode(content).ids
    while not ends and len(ids) < count + MARGIN:
        size *= 4
        content, ends = _beginning(text, size)
        ids = made.encode(content).ids
    return ids


def _beginning(text: Path, size: int) -> tuple[str, bool]:
    """The first bytes of a text, without a character that is cut; whether that is all of it."""
    try:
        with text.open("rb") as file:
            data = file.read(min(size, text.stat().st_size or size))
            ends = not file.read(1)
    except OSError as error:
        raise HxaconvError(
            f"--text {text} cannot be read: {error.strerror}", hint="It takes a file of UTF-8 text."
        ) from None
    try:
        # Of a cut text, the bytes of the last character may be missing: the decoder waits for them.
        return codecs.getincrementaldecoder("utf-8")().decode(data, final=ends), ends
    except UnicodeDecodeError as error:
        raise HxaconvError(
            f"--text {text} is not UTF-8 text: {error.reason} at byte {error.start}", hint="Convert it with iconv."
        ) from None


def _cut(ids: list[int], tokens: int, batch: int, text: Path) -> Tensor:
    if not ids:
        raise HxaconvError(f"--text {text} is empty: the tokenizer makes no tokens of it", hint="Give it some text.")
    if batch == 1:
        tokens = min(tokens, len(ids))
    if len(ids) < tokens * batch:
        raise HxaconvError(
            f"{text} has {len(ids)} tokens, {batch} x {tokens} are requested", hint="Use a longer text, or --batch 1."
        )
    return torch.tensor(ids[: tokens * batch]).view(batch, tokens)
