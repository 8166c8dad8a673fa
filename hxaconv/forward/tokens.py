"""Token ids for whoever looks at activations: in memory, from a file, a text, or, where wanted, random."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hxaconv.errors import HxaconvError
from hxaconv.options import Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.model.model import Checkpoint


def tokens_of(options: Tokens, vocab_size: int, checkpoint: Checkpoint, *, batch: int = 1, seed: int = 0) -> Tensor:
    """Token ids (sequences, length): given ones as they are, else `options.tokens` times `batch` of them.

    The tokenizer is the checkpoint's; `seed` is that of random ones.

    Raises:
        HxaconvError: for files that hold no token ids, and ids outside the vocabulary.
    """
    from hxaconv.forward.probe import probe_tokens

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
