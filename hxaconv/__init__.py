"""Turn Llama-style transformers into RWKV-7/GQA hybrids (hxa079), convert and verify them.

The commands that read and write models are functions here; their arguments are the command's options:

    import hxaconv

    outcome = hxaconv.init_from_teacher("teacher/", "student/", gqa_layers="8,15,22")
    report = hxaconv.verify("student/", against="teacher/")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hxaconv.commands.calibrate import run as calibrate  # noqa: F401
    from hxaconv.commands.common import WriteOptions as WriteOptions
    from hxaconv.commands.convert import to_hf as to_hf
    from hxaconv.commands.convert import to_pth as to_pth
    from hxaconv.commands.convert import to_training as to_training
    from hxaconv.commands.fitting import CalibrateOptions as CalibrateOptions
    from hxaconv.commands.init import run as init_from_teacher  # noqa: F401
    from hxaconv.commands.inspect import run as inspect  # noqa: F401
    from hxaconv.commands.pick import run as pick_gqa_layers  # noqa: F401
    from hxaconv.commands.verify import VerifyOptions as VerifyOptions
    from hxaconv.commands.verify import run as verify  # noqa: F401
    from hxaconv.errors import CheckFailed as CheckFailed
    from hxaconv.errors import HxaconvError as HxaconvError
    from hxaconv.forward.tokens import TokenOptions as TokenOptions
    from hxaconv.load.checkpoint import open_checkpoint as open_checkpoint

_EXPORTS = {
    "CalibrateOptions": ("hxaconv.commands.fitting", "CalibrateOptions"),
    "CheckFailed": ("hxaconv.errors", "CheckFailed"),
    "HxaconvError": ("hxaconv.errors", "HxaconvError"),
    "TokenOptions": ("hxaconv.forward.tokens", "TokenOptions"),
    "VerifyOptions": ("hxaconv.commands.verify", "VerifyOptions"),
    "WriteOptions": ("hxaconv.commands.common", "WriteOptions"),
    "calibrate": ("hxaconv.commands.calibrate", "run"),
    "init_from_teacher": ("hxaconv.commands.init", "run"),
    "inspect": ("hxaconv.commands.inspect", "run"),
    "open_checkpoint": ("hxaconv.load.checkpoint", "open_checkpoint"),
    "pick_gqa_layers": ("hxaconv.commands.pick", "run"),
    "to_hf": ("hxaconv.commands.convert", "to_hf"),
    "to_pth": ("hxaconv.commands.convert", "to_pth"),
    "to_training": ("hxaconv.commands.convert", "to_training"),
    "verify": ("hxaconv.commands.verify", "run"),
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    # Imported at first use: `import hxaconv` alone stays as light as --help needs it.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hxaconv' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value
