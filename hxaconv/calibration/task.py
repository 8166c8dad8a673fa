"""A calibration with everything it needs: models, tokens and settings, all checked before anything is computed."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hxaconv.calibration.polish import TRAINED, cost, sequences
from hxaconv.calibration.streaming import check_enough, check_sizes, cut, training_tokens
from hxaconv.calibration.time_mix import output_is_free
from hxaconv.errors import raise_all
from hxaconv.forward.tokens import calibration_tokens, checked_device
from hxaconv.model.config import unpublished
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention, layer_index
from hxaconv.model.plan import Recipe, source_files
from hxaconv.options import Fit
from hxaconv.surgery.arithmetic import Computed, tensor
from hxaconv.verification.specification import FITTED, REFITTED

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
    settings: Fit
    workers: int
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
    def rows(self) -> Tensor:
        """The tokens in sequences as they are used, (B, T)."""
        return cut(self.ids, self.settings.chunk)[0]

    @property
    def training(self) -> int:
        """How many of them are fitted, from the first on."""
        return int(training_tokens(self.rows).sum())

    @property
    def heldout(self) -> Tensor:
        """Those that validate the student as a whole, (B, T), which nothing was fitted to: the held-out sequences of
        a polish, else what follows the training tokens in whole rows, or the end of the last one."""
        if self.polished is not None:
            return self.polished[1]
        row, column = divmod(self.training, self.rows.shape[1])
        whole = self.rows[row + (column > 0) :]
        return whole if len(whole) else self.rows[row:, column:]

    @property
    def notes(self) -> list[str]:
        """What will be fitted to what."""
        (total, length), asked, fit = (self.rows.numel(), self.rows.shape[1]), self.settings.tokens, self.training
        polish = []
        if self.polished is not None:
            trained, kept = self.polished
            price = cost(self.plain, trained).sentence
            polish = [f"Polish: {len(trained)} sequences of {trained.shape[1]}, {len(kept)} held out; {price}"]
            if self.settings.polish_only:
                return polish
        fewer = "" if total == asked else f" ({asked} requested)"
        as_a_whole = self.heldout.numel()
        whole = "" if total - fit == as_a_whole else f" (the last {as_a_whole} of them the student as a whole)"
        note = (
            f"Calibration: {total} tokens{fewer} in sequences of {length}, {fit} to fit and {total - fit} to validate"
            f"{whole}; no decay can know of lags beyond {length}"
        )
        idle = ["--fold-rope changes nothing any more: layers that stay attention are trained whole"]
        return [note, *polish, *(idle if self.settings.fold_rope else [])]

    @property
    def warnings(self) -> list[str]:
        """What makes the tokens no text."""
        [(token, count)] = Counter(self.rows.flatten().tolist()).most_common(1)
        share = count / self.rows.numel()
        text = f"{share:.0%} of the calibration tokens are one and the same (id {token})"
        return [f"{text}: figures made of them do not carry over to text"] if share > SHARE_OF_ONE_TOKEN else []

    @property
    def planned(self) -> Plan:
        """The tensors of the plain student that may be replaced, holding what they hold until then."""
        fit, config, found = self.settings, self.plain.student, {}
        for name, recipe in self.plain.plan.items():
            layer, (part, _, kind) = layer_index(name), name.partition(".self_attn.")[2].partition(".")
            if layer is None or not is_attention(name):
                continue
            if config.layer_kind(layer) == "gqa":
                fitted = part in REFITTED and fit.refine_steps > 0 and layer not in self.teacher.config.nope_layers
            else:
                stays = not fit.refine_steps and (
                    part == "value" or (part == "output" and not output_is_free(fit, config, self.training))
                )
                fitted = part in FITTED and not (stays and kind == "weight") and (part, kind) != ("value", "bias")
            if (fitted and not fit.polish_only) or (fit.polish_tokens and part in TRAINED and kind == "weight"):
                until_then, files = functools.partial(tensor, recipe), tuple(recipe.make.sources())
                make = Computed(until_then, recipe.dtype, "calibrated", files)
                found[name] = Recipe(recipe.dtype, recipe.shape, make, f"calibrated from {recipe.origin}")
        return found


def prepare(teacher: Model, plain: Model, fit: Fit, seed: int, workers: int | None) -> Task:
    """Read the tokens and check the settings, all of them.

    Raises:
        HxaconvError: without tokens of real text, unless random ones are requested; for settings without sense, and
            a variant without published initial values.
    """
    if plain.student.variant.ranks is None:
        raise unpublished(plain.student.rwkv_architecture)
    problems = []
    if fit.given and fit.random_tokens:
        problems.append("--random-tokens and a text both name the tokens to use; give one of them")
    if not fit.given and not fit.random_tokens:
        problems.append("calibration fits layers to text, and no text is given; pass --text or --input-ids")
    if fit.polish_only and not fit.polish_tokens:
        problems.append("--polish-only needs --polish-tokens")
    if 0 < fit.polish_tokens < fit.tokens and not fit.polish_only:
        problems.append(f"--polish-tokens {fit.polish_tokens}: the {fit.tokens} of --tokens are among them")
    raise_all("the calibration cannot be done:", problems, hint=RANDOM_HINT if not fit.given else "")
    check_sizes(teacher, plain)
    checked_device(fit.device)
    ids = calibration_tokens(fit, seed, teacher)
    polish_ids = None
    if fit.polish_tokens:
        more = replace(fit, tokens=fit.polish_tokens)
        polish_ids = calibration_tokens(more, seed, teacher)
        sequences(polish_ids, fit.polish_tokens)
    task = Task(teacher, plain, ids, fit, 2 if workers is None else workers, polish_ids)
    check_enough(task.rows)
    return task
