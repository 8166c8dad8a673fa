"""What a trainer leaves on disk: a step's folder of DeepSpeed, of torch.distributed.checkpoint, or of DTensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hxaconv.errors import HxaconvError
from hxaconv.formats import dcp, dtensor, zero
from hxaconv.formats.contents import Contents
from hxaconv.formats.files import SourceFile

_SHARDED = re.compile(r"^(pytorch_model_fsdp|sharded_state_dict)(_\d+)?$")
"""What accelerate calls the folder of a sharded model inside a checkpoint's."""


@dataclass(frozen=True, slots=True)
class Trained:
    """Weights that several ranks saved, not opened yet."""

    folder: Path
    kind: str
    """`zero`, `dcp` or `dtensor`."""
    label: str

    def read(self, weights: str | None) -> tuple[list[SourceFile], Contents]:
        """Its files and the tensors in them; `weights` is `master` or `model`, where there are both.

        Raises:
            HxaconvError: for what is missing, damaged, or not put together.
        """
        if self.kind == "zero":
            return zero.read_zero(self.folder, label=self.label, weights=weights)
        if weights is not None:
            raise HxaconvError(f"{self.label} has one set of weights", hint="Leave --weights out.")
        read = dcp.read_dcp if self.kind == "dcp" else dtensor.read_dtensors
        return read(self.folder, label=self.label)


def find_trained(root: Path, label: str) -> Trained | None:
    """What a folder holds of a trainer: itself or one folder inside; None where it holds nothing of the kind.

    Raises:
        HxaconvError: when it names a step that is not there, or holds several.
    """
    step = zero.step_folder(root)
    if step is not None:
        return Trained(step, "zero", _label(root, step, label))
    if dcp.holds_dcp(root):
        return Trained(root, "dcp", label)
    if dtensor.holds_dtensors(root):
        return Trained(root, "dtensor", label)
    inside = [path for path in sorted(root.iterdir()) if _SHARDED.match(path.name) and path.is_dir()]
    found = [path for path in inside if dcp.holds_dcp(path)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise HxaconvError(f"{label} holds several models: {names}", hint="Give one of these folders.")
    return Trained(found[0], "dcp", _label(root, found[0], label)) if found else None


def _label(root: Path, folder: Path, label: str) -> str:
    return label if folder == root else f"{label.rstrip('/')}/{folder.name}"
