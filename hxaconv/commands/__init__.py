"""The commands: each a function that the package offers and the command line is made from.

A command reads as its own explanation; how models are loaded, computed and written stands in the folders beside.
"""

from collections.abc import Callable
from typing import Any

from hxaconv.commands.calibrate import calibrate as _calibrate
from hxaconv.commands.convert import to_hf, to_pth, to_training
from hxaconv.commands.demo import demo as _demo
from hxaconv.commands.init import init_from_teacher
from hxaconv.commands.inspect import inspect as _inspect
from hxaconv.commands.maps import maps as _maps
from hxaconv.commands.pick import pick_gqa_layers
from hxaconv.commands.verify import verify as _verify

# Functions called like their modules have an underscore here, so that both can be imported from this package.
COMMANDS: dict[str, Callable[..., Any]] = {
    "init-from-teacher": init_from_teacher,
    "calibrate": _calibrate,
    "to-hf": to_hf,
    "to-pth": to_pth,
    "to-training": to_training,
    "pick-gqa-layers": pick_gqa_layers,
    "verify": _verify,
    "inspect": _inspect,
    "maps": _maps,
    "demo": _demo,
}
"""Name on the command line -> function, in the order of `hxaconv --help`."""
