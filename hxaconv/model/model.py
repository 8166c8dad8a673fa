"""A checkpoint as it was opened, and a model: a configuration and the plan that fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hxaconv.errors import HxaconvError, Inconsistent
from hxaconv.formats.files import SourceFile
from hxaconv.model.config import ModelConfig, StudentConfig, TeacherConfig, dropped_scaling
from hxaconv.model.names import EMBEDDING, HEAD
from hxaconv.model.plan import Plan, Recipe, same_bytes


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Checkpoint:
    """An opened checkpoint. Nothing but headers and small JSON files has been read."""

    label: str
    """As the user named it."""
    container: str = ""
    """`safetensors`, `pth` (zip) or `legacy`."""
    key_format: str = ""
    plan: Plan = field(default_factory=dict)
    """Canonical name -> recipe, in storage order."""
    stored_names: Mapping[str, str] = field(default_factory=dict)
    """Canonical name -> name in the file."""
    shell: Plan = field(default_factory=dict)
    """Stored name -> recipe of what wraps a text model: vision, audio."""
    shell_config: Mapping[str, Any] = field(default_factory=dict)
    """It in config.json."""
    shell_files: Mapping[str, SourceFile] = field(default_factory=dict)
    """Files of its processor."""
    warnings: tuple[str, ...] = ()
    """What people may take for a part of it, and is none."""
    dropped: tuple[str, ...] = ()
    """Known buffers that are left behind."""
    unknown: Mapping[str, Recipe] = field(default_factory=dict)
    """Tensors whose names are not known, or that have a shape that no tensor of their name has."""
    problem: HxaconvError | None = None
    """Why it is neither teacher nor student, where it was opened all the same."""
    config: Mapping[str, Any] | None = None
    """config.json beside the weights, as it is; of a shell, that of its text model."""
    sidecar: Mapping[str, Any] | None = None
    """NAME.json beside NAME.pth, where it is one of ours."""
    record: SourceFile | None = None
    """hxaconv.json beside the weights, unread."""
    files: tuple[SourceFile, ...] = ()
    companions: Mapping[str, SourceFile] = field(default_factory=dict)
    code_files: Mapping[str, SourceFile] = field(default_factory=dict)
    root: Path | None = None
    repo: str | None = None
    revision: str | None = None
    """The commit that was opened, for a Hub id."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """About the container: what the reader found, and what the choice of weight files left out."""
    handle: object = None
    """What downloads the files, for a Hub id."""

    @property
    def name(self) -> str:
        """A Hub id, or the bare name of a folder or file."""
        return self.repo or Path(self.label).resolve().name

    def __repr__(self) -> str:
        return f"<Checkpoint: {self.label}, {self.container}, {len(self.plan)} tensors>"


@dataclass(frozen=True, slots=True)
class TiedHead:
    """A head that is stored although its model's settings tie it to the embedding: both must have the same bits."""

    head: Recipe
    embedding: Recipe
    where: str

    @property
    def files(self) -> list[SourceFile]:
        """Those that both are in."""
        return list(dict.fromkeys([*self.head.make.sources(), *self.embedding.make.sources()]))

    def check(self) -> None:
        """Read both, where their headers do not decide it already.

        Raises:
            Inconsistent: when they differ.
        """
        if not same_bytes(self.head, self.embedding):
            raise Inconsistent(
                f"{self.where}: its settings tie the head to the embedding, but {HEAD} differs from {EMBEDDING}",
                hint="If the stored head is the right one: --no-tie-word-embeddings,"
                ' or "tie_word_embeddings": false in the config.json.',
            )


@dataclass(frozen=True, slots=True)
class Model:
    """What surgeries, the reference forward and verify work on; `label` is what messages call it."""

    config: ModelConfig
    plan: Plan
    label: str
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The config.json it was read from, where there is one."""
    tied_head: TiedHead | None = field(default=None, compare=False, repr=False)
    """A stored head that has not been compared with the embedding yet, and is not in the plan."""
    checkpoint: Checkpoint | None = field(default=None, compare=False, repr=False)
    """Where it was read from."""
    base: Model | None = field(default=None, compare=False, repr=False)
    """The teacher that completed it, or gave its settings."""
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """What came from the teacher, for people."""

    @property
    def sources(self) -> dict[str, Checkpoint]:
        """Role (`source`, `teacher`, or `base`, the student that a run began with) -> the checkpoint opened for it."""
        role = "base" if self.base and isinstance(self.base.config, StudentConfig) else "teacher"
        found = {"source": self.checkpoint, role: self.base.checkpoint if self.base else None}
        return {role: checkpoint for role, checkpoint in found.items() if checkpoint is not None}

    @property
    def opened(self) -> Checkpoint:
        """Where it was read from, for a model that was. An AssertionError is ours."""
        assert self.checkpoint is not None
        return self.checkpoint

    @property
    def source_warnings(self) -> list[str]:
        """What its sources hold that is not taken over, RoPE that is not followed among it."""
        sources = self.sources.values()
        return [line for found in sources for line in (*found.warnings, *dropped_scaling(found.config or {}))]

    @property
    def student(self) -> StudentConfig:
        """The config of a student. An AssertionError is ours: commands check before."""
        assert isinstance(self.config, StudentConfig)
        return self.config

    @property
    def teacher(self) -> TeacherConfig:
        """The config of a teacher."""
        assert isinstance(self.config, TeacherConfig)
        return self.config


def checked_here(model: Model) -> Model:
    """The model, its tied head compared if its files are on this machine; otherwise that is left for later.

    Raises:
        Inconsistent: when the head is not the embedding.
    """
    if model.tied_head is None or any(file.path is None for file in model.tied_head.files):
        return model
    model.tied_head.check()
    return replace(model, tied_head=None)
