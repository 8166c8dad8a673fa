"""`--from`: another trained student of the same teacher, whose layers can be taken over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hxaconv.commands.convert import main_dtype
from hxaconv.load.opening import open_checkpoint
from hxaconv.load.student import Facts, student_facts, student_model
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Model
from hxaconv.model.names import EMBEDDING

if TYPE_CHECKING:
    from hxaconv.load.checkpoint import Checkpoint
    from hxaconv.progress import Progress


@dataclass(frozen=True, slots=True)
class Donor:
    """The other student: as it is, and in the dtype of the one that takes its layers."""

    checkpoint: Checkpoint
    student: Model
    given: Model
    description: str

    def has(self, layer: int, config: StudentConfig) -> bool:
        """Whether its layer is of the kind that `config` wants."""
        return self.student.student.layer_kind(layer) == config.layer_kind(layer)


def open_donor(other: str, student: Model, flags: Mapping[str, Any], progress: Progress | None = None) -> Donor:
    """Open `other`; what it does not say of itself, it has in common with the student.

    Raises:
        HxaconvError: when it is no student, or of another shape.
    """
    checkpoint = open_checkpoint(other, progress=progress)
    common = student_facts(student.student)
    if EMBEDDING in checkpoint.plan:
        # Its mixers fit whatever its MLPs and vocabulary were padded to.
        common = {key: value for key, value in common.items() if key not in ("intermediate_size", "vocab_size")}
    donor = student_model(checkpoint, flags=flags, layer_map=Facts(f"SOURCE ({student.label})", common))
    own, wanted = main_dtype(donor.plan), main_dtype(student.plan)
    if own == wanted:
        return Donor(checkpoint, donor, donor, f"trained, from {other}")
    from hxaconv.surgery.arithmetic import cast

    given = replace(donor, plan={name: cast(recipe, wanted) for name, recipe in donor.plan.items()})
    return Donor(checkpoint, donor, given, f"trained, from {other}, cast from {own} to {wanted}, the student's dtype")
