"""A model: a configuration and the plan that fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hxaconv.config import ModelConfig, StudentConfig, TeacherConfig
from hxaconv.plan import Plan


@dataclass(frozen=True, slots=True)
class Model:
    """What surgeries, the reference forward and verify work on; `label` is what messages call it."""

    config: ModelConfig
    plan: Plan
    label: str
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The config.json it was read from, where there is one."""

    @property
    def student(self) -> StudentConfig:
        """The config of an hxa079 model. An AssertionError is ours: commands check before."""
        assert isinstance(self.config, StudentConfig)
        return self.config

    @property
    def teacher(self) -> TeacherConfig:
        """The config of a teacher."""
        assert isinstance(self.config, TeacherConfig)
        return self.config
