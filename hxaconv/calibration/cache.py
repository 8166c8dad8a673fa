"""Finished layers in a folder: a safetensors file each, and the pass's state, so that a run can go on.

    OUT.calibration/layer-007.safetensors    the tensors that a layer replaces, its report in the metadata
    OUT.calibration/stream.safetensors       the teacher's residual stream before the next layer
    OUT.calibration/distances.json           the divergences, measured once: a second measurement may round otherwise

Every file names the calibration that it belongs to. One process at a time writes them, see `locked`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hxaconv.calibration.report import Distances, LayerReport, Recall, Settings
from hxaconv.errors import HxaconvError
from hxaconv.forward.state import StateFile
from hxaconv.forward.state import fingerprint as fingerprint_of
from hxaconv.forward.walk import First
from hxaconv.model.model import Model
from hxaconv.save import diskio

FORMAT = 2


@dataclass(frozen=True, slots=True)
class Done:
    """A finished layer; `report` is None where there was nothing to fit."""

    layer: int
    tensors: dict[str, Tensor]
    """Canonical name -> replaced tensor; empty where they are in a file."""
    report: LayerReport | None


@dataclass(slots=True)
class State:
    """The pass between two layers."""

    layer: int
    """The next one."""
    x: Tensor
    """The teacher's residual stream, (B, T, C)."""
    first: First = None
    """v_first and k_first of the student, once its first RWKV layer is fitted."""
    done: list[Done] = field(default_factory=list)


def fingerprint(teacher: Model, student: Model, ids: Tensor, settings: Settings) -> str:
    """A digest of everything that a calibration depends on."""
    models = {"teacher": teacher, "student": student}
    of_polish = ("polish_tokens", "polish_only")  # they come later, and have a key of their own
    used = {name: value for name, value in settings.of_result().items() if name not in of_polish} | {"format": FORMAT}
    return fingerprint_of(models, ids.cpu().numpy(), used)


class Cache:
    """One folder that belongs to one calibration; files of another are replaced."""

    def __init__(self, folder: Path, key: str, polish: str = "") -> None:
        """`polish` says what the student that is judged owes to a polish, which the layers know nothing of."""
        self.folder, self.key, self._of_distances = folder, key, f"{key} {polish}"

    def path(self, layer: int) -> Path:
        """The file of a layer."""
        return self.folder / f"layer-{layer:03d}.safetensors"

    @property
    def _stream(self) -> StateFile:
        return StateFile(self.folder / "stream.safetensors", self.key)

    def load(self, device: str) -> State | None:
        """Where an interrupted run stopped, or None to start over."""
        saved = self._stream.load(device)
        if saved is None:
            return None
        tensors, facts = saved
        try:
            layer = int(facts["layer"])
            done = [self._load_layer(i) for i in range(layer)]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None  # nothing there yet, or half a file of a full disk
        if any(found is None for found in done):
            return None
        first = (tensors["v_first"], tensors["k_first"]) if "v_first" in tensors else None
        return State(layer, tensors["x"], first, [found for found in done if found is not None])

    def _load_layer(self, layer: int) -> Done | None:
        with safe_open(self.path(layer), "pt") as file:
            facts = file.metadata() or {}
            if facts.get("key") != self.key:
                return None
            values = json.loads(facts["report"])
        if values is None:
            return Done(layer, {}, None)
        values |= {name: tuple(values[name]) for name in ("decay", "iclr", "warnings")}
        return Done(layer, {}, LayerReport(**values))

    def save(self, state: State) -> None:
        """Keep the layer that was finished last, then the state of the pass after it.

        Raises:
            HxaconvError: when the folder cannot be written.
        """
        done, first = state.done[-1], state.first
        report = json.dumps(None if done.report is None else asdict(done.report))
        self._write(self.path(done.layer), done.tensors, {"report": report})
        tensors = {"x": state.x}
        if first is not None:
            tensors |= {"v_first": first[0], "k_first": first[1]}
        self._stream.save(tensors, {"layer": state.layer})

    def load_distances(self) -> Distances | None:
        """The divergences as they were measured first, or None."""
        try:
            held = json.loads(self._distances.read_bytes())
            if held["key"] != self._of_distances:
                return None
            recall = tuple(Recall(**one) for one in held["distances"].pop("recall"))
            return Distances(**held["distances"], recall=recall)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save_distances(self, distances: Distances) -> None:
        """Keep them for whoever goes on.

        Raises:
            HxaconvError: when the folder cannot be written.
        """
        data = json.dumps({"key": self._of_distances, "distances": asdict(distances)}).encode()
        self._replace(self._distances, lambda path: path.write_bytes(data))

    @property
    def _distances(self) -> Path:
        return self.folder / "distances.json"

    def _write(self, path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        # A file without tensors is not read back by every version of safetensors.
        held = {name: values.contiguous().cpu() for name, values in tensors.items()} or {"": torch.zeros(1)}
        self._replace(path, lambda beside: save_file(held, beside, metadata={"key": self.key, **facts}))

    def _replace(self, path: Path, write: Callable[[Path], object]) -> None:
        beside = path.with_name(f"{path.name}.part")
        try:
            self.folder.mkdir(exist_ok=True)
            write(beside)
            os.replace(beside, path)
        except (OSError, SafetensorError) as error:
            raise HxaconvError(
                f"{path}: a calibrated layer cannot be kept: {error}",
                hint="Free some space, or give another folder.",
            ) from None
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)

    def names(self, layer: int) -> list[str]:
        """Canonical names of the tensors that a finished layer replaces.

        Raises:
            HxaconvError: when its file is gone, or of another calibration.
        """
        with self._open(layer) as file:
            return [name for name in file.keys() if name]  # noqa: SIM118

    def read(self, layer: int, name: str) -> Tensor:
        """One of them; raises as `names`."""
        with self._open(layer) as file:
            tensor = file.get_tensor(name)
        assert isinstance(tensor, Tensor)
        return tensor

    @contextlib.contextmanager
    def _open(self, layer: int) -> Iterator[Any]:
        path, hint = self.path(layer), "Run the command again, without another one that calibrates to the same target."
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    raise HxaconvError(f"{path} was replaced by another calibration", hint=hint)
                yield file
        except (OSError, SafetensorError) as error:
            raise HxaconvError(f"{path} can no longer be read: {error}", hint=hint) from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time calibrates into a folder.

    The lock is a file beside the folder, which is removed in the end.

    Raises:
        HxaconvError: when another process is at it, or nothing can be written there.
    """
    with diskio.held(folder.with_name(f".{folder.name}.hxaconv-lock"), folder):
        yield
