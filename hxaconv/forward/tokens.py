"""Calibration tokens for commands that look at activations: from a file, a text, or, on request, random."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hxaconv.errors import HxaconvError

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.model.model import Checkpoint


LARGEST_SEED = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOptions:
    """Where tokens come from; `tokens` is how many are used at most, `batch` only shapes random ones."""

    input_ids: str | None = None
    text: str | None = None
    tokens: int = 1024
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < LARGEST_SEED:
            raise HxaconvError(f"--seed {self.seed} is not possible", hint=f"It takes 0 to {LARGEST_SEED - 1}.")

    @property
    def given(self) -> bool:
        """Whether the tokens are somebody's text, not random."""
        return self.input_ids is not None or self.text is not None


def tokens_of(options: TokenOptions, vocab_size: int, checkpoint: Checkpoint) -> Tensor:
    """Token ids (sequences, length): a file's as they are, or as many as asked for; the tokenizer is the checkpoint's.

    Raises:
        HxaconvError: for files that hold no token ids, and ids outside the vocabulary.
    """
    from hxaconv.forward.probe import probe_tokens

    return probe_tokens(
        vocab_size,
        tokens=options.tokens,
        batch=options.batch,
        seed=options.seed,
        input_ids=Path(options.input_ids) if options.input_ids else None,
        text=Path(options.text) if options.text else None,
        tokenizer=checkpoint.companions.get("tokenizer.json"),
    )


def calibration_tokens(options: TokenOptions, vocab_size: int, checkpoint: Checkpoint) -> Tensor:
    """As `tokens_of`, but at most `options.tokens` of them: of as few sequences as hold that many, equal parts.

    Raises:
        HxaconvError: for too few, for files that hold no token ids, and ids outside the vocabulary.
    """
    if options.tokens < 2:
        raise HxaconvError(f"--tokens {options.tokens} is too few", hint="A few hundred are a beginning.")
    ids = tokens_of(options, vocab_size, checkpoint)
    rows = min(-(-options.tokens // ids.shape[1]), ids.shape[0])
    used = ids[:rows, : options.tokens // rows]
    if used.numel() < 2:
        where = options.input_ids or options.text
        raise HxaconvError(f"{where} holds a single token, which is too few", hint="A few hundred are a beginning.")
    return used
