"""Turn Llama-style transformers into RWKV-7/GQA hybrids (hxa079), convert and verify them.

The commands are functions here; their arguments are the command's options, or groups of them:

    import hxaconv

    outcome = hxaconv.init_from_teacher("teacher/", "student/", gqa_layers=[8, 15, 22], overwrite=True)
    report = hxaconv.verify("student/", against="teacher/")

Nothing is printed; work is reported to `progress`. Results show themselves in a notebook, pickle, and have
`to_dict()`. What a user can do wrong is a `HxaconvError`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from hxaconv.commands.demo import Demo
    from hxaconv.commands.inspect import Inspection
    from hxaconv.commands.maps import Maps
    from hxaconv.errors import CheckFailed as CheckFailed
    from hxaconv.errors import HxaconvError as HxaconvError
    from hxaconv.load import open_checkpoint as open_checkpoint
    from hxaconv.options import Check as Check
    from hxaconv.options import Choice as Choice
    from hxaconv.options import Fit as Fit
    from hxaconv.options import Init as Init
    from hxaconv.options import Layers as Layers
    from hxaconv.options import Probe as Probe
    from hxaconv.options import Settings as Settings
    from hxaconv.options import Tokens as Tokens
    from hxaconv.options import Write as Write
    from hxaconv.progress import Progress as Progress
    from hxaconv.save.run import Outcome
    from hxaconv.selection.advice import Advice
    from hxaconv.verification.report import Report
    from hxaconv.verification.written import DigestReport

    __version__: str
    calibrate: Callable[..., Outcome]
    demo: Callable[..., Demo]
    init_from_teacher: Callable[..., Outcome]
    inspect: Callable[..., Inspection]
    maps: Callable[..., Maps]
    pick_gqa_layers: Callable[..., Outcome | Advice]
    to_hf: Callable[..., Outcome]
    to_pth: Callable[..., Outcome]
    to_training: Callable[..., Outcome]
    verify: Callable[..., Report | DigestReport]

_FUNCTIONS = (
    *("init_from_teacher", "calibrate", "to_hf", "to_pth", "to_training"),
    *("pick_gqa_layers", "verify", "inspect", "maps", "demo"),
)
_NAMES = {
    **dict.fromkeys(("CheckFailed", "HxaconvError"), "hxaconv.errors"),
    **dict.fromkeys(
        ("Check", "Choice", "Fit", "Init", "Layers", "Probe", "Settings", "Tokens", "Write"), "hxaconv.options"
    ),
    "Progress": "hxaconv.progress",
    "open_checkpoint": "hxaconv.load",
}

__all__ = ["__version__", *_FUNCTIONS, *_NAMES]


def __getattr__(name: str) -> Any:
    # Imported at first use: `import hxaconv` alone stays light.
    value: Any
    if name == "__version__":
        value = _installed_version()
    elif name in _FUNCTIONS:
        from hxaconv.calls import public
        from hxaconv.commands import COMMANDS

        command = name.replace("_", "-")
        value = public(COMMANDS[command], command)
    elif name in _NAMES:
        value = getattr(import_module(_NAMES[name]), name)
    else:
        raise AttributeError(f"module 'hxaconv' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _installed_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("hxaconv")
    except metadata.PackageNotFoundError:  # used from a source tree that was never installed
        return "0+unknown"
