"""A calibration with everything it needs: models, tokens and settings, all checked before anything is computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hxaconv.calibration.planned import planned
from hxaconv.calibration.polish import cost, sequences
from hxaconv.calibration.report import Settings
from hxaconv.calibration.streaming import check_enough, check_sizes, cut, fitted_tokens
from hxaconv.errors import raise_all
from hxaconv.forward.tokens import calibration_tokens, checked_device
from hxaconv.model.config import unpublished
from hxaconv.model.model import Model
from hxaconv.model.plan import source_files
from hxaconv.options import Fit, options_of

if TYPE_CHECKING:
    from torch import Tensor

    from hxaconv.formats.files import SourceFile
    from hxaconv.model.plan import Plan

SHARE_OF_ONE_TOKEN = 0.5
RANDOM_HINT = "--random-tokens goes on without a text (much worse)."


@dataclass(frozen=True, slots=True)
class Task:
    """A calibration with everything it needs, checked; nothing has been computed."""

    teacher: Model
    plain: Model
    ids: Tensor
    asked: int
    """Tokens that were asked for; there may be fewer."""
    settings: Settings
    polish_ids: Tensor | None = None
    """Tokens to polish on, (B, T)."""

    @property
    def polished(self) -> tuple[Tensor, Tensor] | None:
        """Sequences to polish on, and those held out of it."""
        return None if self.polish_ids is None else sequences(self.polish_ids, self.settings.polish_tokens)

    @property
    def files(self) -> list[SourceFile]:
        """Those that are read."""
        return [*source_files(self.teacher.plan), *source_files(self.plain.plan)]

    @property
    def pieces(self) -> Tensor:
        """The tokens in sequences as they are used, (B, T)."""
        return cut(self.ids, self.settings.chunk)[0]

    @property
    def fitted(self) -> int:
        """How many of them are fitted, from the first on."""
        return int(fitted_tokens(self.pieces).sum())

    @property
    def heldout(self) -> Tensor:
        """Those that judge the student as a whole, (B, T): nothing was fitted to them."""
        if self.polished is not None:
            return self.polished[1]
        return heldout_rows(self.pieces, self.fitted)

    @property
    def notes(self) -> list[str]:
        """What will be fitted to what."""
        total, length = self.pieces.numel(), self.pieces.shape[1]
        judging, judging_all = total - self.fitted, self.heldout.numel()
        polished = []
        if self.polished is not None:
            trained, kept = self.polished
            price = cost(self.plain, trained).sentence
            polished = [f"Polish: {len(trained)} sequences of {trained.shape[1]}, {len(kept)} held out; {price}"]
            if self.settings.polish_only:
                return polished
        asked = "" if total == self.asked else f" ({self.asked} were asked for)"
        whole = "" if judging == judging_all else f" (the last {judging_all} of them the student as a whole)"
        note = (
            f"Calibration: {total} tokens{asked} in sequences of {length}, {self.fitted} to fit and {judging} to judge"
            f"{whole}; no decay can know of lags beyond {length}"
        )
        idle = self.settings.fold_rope and not self.plain.student.gqa_layers
        return [note, *polished, *(["--fold-rope changes nothing: no layer stays attention"] if idle else [])]

    @property
    def warnings(self) -> list[str]:
        """What makes the tokens no text."""
        [(token, count)] = Counter(self.pieces.flatten().tolist()).most_common(1)
        share = count / self.pieces.numel()
        said = f"{share:.0%} of the calibration tokens are one and the same (id {token})"
        return [f"{said}: figures made of them say little of text"] if share > SHARE_OF_ONE_TOKEN else []

    @property
    def planned(self) -> Plan:
        """The tensors that may be replaced, not calibrated yet."""
        return planned(self.plain, self.fitted, self.settings)


def prepare(teacher: Model, plain: Model, fit: Fit, seed: int, workers: int | None) -> Task:
    """Read the tokens and check the settings, all of them.

    Raises:
        HxaconvError: without tokens of real text, unless random ones are asked for; for settings without sense, and
            a variant without published initial values.
    """
    if plain.student.variant.ranks is None:
        raise unpublished(plain.student.rwkv_architecture)
    problems = []
    if fit.given and fit.random_tokens:
        problems.append("--random-tokens and a text both say which tokens to use; give one of them")
    if not fit.given and not fit.random_tokens:
        problems.append("calibration fits layers to text, and no text is given; pass --text FILE or --input-ids FILE")
    if fit.polish_only and not fit.polish_tokens:
        problems.append("--polish-only needs --polish-tokens")
    if 0 < fit.polish_tokens < 2 * fit.tokens and not fit.polish_only:
        problems.append(
            f"--polish-tokens {fit.polish_tokens}: the {fit.tokens} of --tokens come first, and at least twice"
            " as many are needed"
        )
    raise_all("the calibration cannot be done:", problems, hint=RANDOM_HINT if not fit.given else "")
    check_sizes(teacher, plain)
    checked_device(fit.device)
    settings = Settings(workers=2 if workers is None else workers, **{k: getattr(fit, k) for k in options_of(Fit)})
    ids = calibration_tokens(fit, seed, teacher.config.vocab_size, teacher.opened)
    polish_ids = None
    if fit.polish_tokens:
        more = replace(fit, tokens=fit.polish_tokens)
        polish_ids = calibration_tokens(more, seed, teacher.config.vocab_size, teacher.opened)
        sequences(polish_ids, fit.polish_tokens)
    task = Task(teacher, plain, ids, fit.tokens, settings, polish_ids)
    check_enough(task.pieces)
    return task


def heldout_rows(ids: Tensor, fitted: int) -> Tensor:
    """The part of token ids (B, T) after the first `fitted` of them: whole rows, or the end of the last one."""
    row, column = divmod(fitted, ids.shape[1])
    whole = ids[row + (column > 0) :]
    return whole if len(whole) else ids[row:, column:]
