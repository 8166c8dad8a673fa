"""Token ids for whoever looks at activations: in memory, from a file, a text, or, where wanted, random."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hxaconv.errors import HxaconvError
from hxaconv.options import ArrayLike, TokenIds, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.formats.files import SourceFile
    from hxaconv.model.model import Checkpoint


def tokens_of(options: Tokens, vocab_size: int, checkpoint: Checkpoint, *, batch: int = 1, seed: int = 0) -> Tensor:
    """Token ids (sequences, length): given ones as they are, else `options.tokens` times `batch` of them.

    The tokenizer is the checkpoint's; `seed` is that of random ones.

    Raises:
        HxaconvError: for files that hold no token ids, and ids outside the vocabulary.
    """

    return probe_tokens(
        vocab_size,
        tokens=options.tokens,
        batch=batch,
        seed=seed,
        input_ids=options.input_ids,
        text=Path(options.text) if options.text else None,
        tokenizer=checkpoint.companions.get("tokenizer.json"),
    )


def calibration_tokens(options: Tokens, seed: int, vocab_size: int, checkpoint: Checkpoint) -> Tensor:
    """As `tokens_of`, but at most `options.tokens` of them: of as few sequences as hold that many, equal parts.

    Raises:
        HxaconvError: for too few, for files that hold no token ids, and ids outside the vocabulary.
    """
    ids = tokens_of(options, vocab_size, checkpoint, seed=seed)
    rows = min(-(-options.tokens // ids.shape[1]), ids.shape[0])
    used = ids[:rows, : options.tokens // rows]
    if used.numel() < 2:
        where = options.text or (options.input_ids if isinstance(options.input_ids, str) else "input_ids")
        raise HxaconvError(f"{where} holds a single token, which is too few", hint="A few hundred are a beginning.")
    return used


def checked_device(text: str) -> str:
    """`cpu`, `cuda` or `cuda:1`, if this machine has it.

    Raises:
        HxaconvError: for other names, and for a GPU that is not there.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise HxaconvError(f"--device {text!r} is not known", hint="It takes cpu, cuda or cuda:1.")
    if text != "cpu":
        import torch

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
        raise HxaconvError("--input-ids and --text both say which tokens to use", hint="Give one of them.")
    if input_ids is None and text is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocab_size, (batch, tokens), generator=generator)
    if input_ids is not None:
        if isinstance(input_ids, str | Path):
            ids, where = read_ids(Path(input_ids)), str(input_ids)
        else:
            ids, where = _in_memory(input_ids), "input_ids"
    else:
        assert text is not None
        ids, where = _cut(_encode(text, tokenizer, tokens * batch), tokens, batch, text), f"{text}, by this tokenizer,"
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise HxaconvError(
            f"{where} holds token ids {ids.min().item()}..{ids.max().item()}, the vocabulary has {vocab_size}",
            hint="Were they made with another model's tokenizer?",
        )
    return ids


def read_ids(path: Path) -> Tensor:
    """Token ids of a .npy, .safetensors or JSON file, (T,) or (B, T) -> (B, T).

    A safetensors file holds them as `input_ids`, or as its only tensor.

    Raises:
        HxaconvError: for another suffix, and for content that is not one or two axes of whole numbers.
    """
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors, ".json": _read_json}
    if path.suffix not in readers:
        raise HxaconvError(f"{path}: token ids are read from {', '.join(readers)} files")
    if not path.is_file():
        raise HxaconvError(f"{path} is not a file; token ids are read from one")
    try:
        ids = readers[path.suffix](path)
    except HxaconvError:
        raise
    except Exception as error:
        raise HxaconvError(f"{path} could not be read as token ids: {error}") from None
    return _ids(ids, str(path))


def _in_memory(values: Sequence[Any] | ArrayLike) -> Tensor:
    import numpy as np

    try:
        array = np.asarray(values)
        ids = torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array.astype(np.float64))
    except (TypeError, ValueError) as error:
        raise HxaconvError(f"input_ids are no token ids: {error}", hint="Expected whole numbers.") from None
    return _ids(ids, "input_ids")


def _ids(ids: Tensor, where: str) -> Tensor:
    """Whole numbers of one or two axes as (B, T), int64."""
    if not ids.numel():
        raise HxaconvError(f"{where} is empty: it holds no token ids", hint="Expected whole numbers.")
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise HxaconvError(
            f"{where} holds {str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}, not token ids",
            hint="Expected whole numbers of shape (tokens,) or (batch, tokens).",
        )
    return ids.to(torch.int64)


def _read_npy(path: Path) -> Tensor:
    import numpy as np

    try:
        values: Any = np.load(path, allow_pickle=False)
    except ValueError:  # numpy's message recommends to unpickle it
        raise HxaconvError(f"{path} could not be read as token ids: it is no .npy file of numbers") from None
    return torch.from_numpy(values.astype(np.int64) if values.dtype.kind in "iu" else values.astype(np.float64))


def _read_safetensors(path: Path) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        name = "input_ids" if "input_ids" in names else names[0]
        if name != "input_ids" and len(names) != 1:
            raise HxaconvError(f"{path} holds {len(names)} tensors, none of them called input_ids")
        ids: Tensor = file.get_tensor(name)
    return ids


def _read_json(path: Path) -> Tensor:
    content = json.loads(path.read_text(encoding="utf-8"))
    return torch.tensor(content["input_ids"] if isinstance(content, dict) else content)


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
    # Both can be stored with a tokenizer: it would give a piece of the text, and fill up what is short of it.
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
            data = file.read(size)
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
            f"{text} has {len(ids)} tokens, {batch} x {tokens} are asked for", hint="Use a longer text, or --batch 1."
        )
    return torch.tensor(ids[: tokens * batch]).view(batch, tokens)
