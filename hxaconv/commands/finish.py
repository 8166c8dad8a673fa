"""`finish`: publish what the parts of a conversion have written, when none of them did."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hxaconv.commands import calibrate, convert, init, pick
from hxaconv.commands.common import Outcome, WriteOptions
from hxaconv.errors import HxaconvError

RUNNERS: dict[str, Callable[..., Outcome]] = {
    init.COMMAND: init.run,
    pick.COMMAND: pick.run,
    calibrate.COMMAND: calibrate.run,
    "to-hf": convert.to_hf,
    "to-pth": convert.to_pth,
    "to-training": convert.to_training,
}


def run(out: str, write: WriteOptions) -> Outcome:
    """Compute the recorded plan of `out` again and publish its finished files; nothing is converted.

    Raises:
        HxaconvError: when there is no conversion to finish, or more than one, or files are missing.
    """
    from hxaconv.save.staging import read_record, stagings_at

    found = stagings_at(Path(out).absolute())
    if len(found) != 1:
        folders = ", ".join(str(staging.path) for staging in found)
        raise HxaconvError(
            f"{out}: {f'several conversions are unfinished: {folders}' if found else 'no conversion is unfinished'}",
            hint="Delete those that are not wanted." if found else "Run the parts first: --part 1/n ... --part n/n.",
        )
    record = read_record(found[0].path)
    assert record is not None
    command, options = record["command"], {**record["options"], "out": out}
    write = replace(write, digest=record["plan"]["digest"])
    try:
        inspect.signature(RUNNERS[command]).bind(**options, write=write)
    except (KeyError, TypeError) as error:
        raise HxaconvError(
            f"{found[0].path}: its record is of another version of hxaconv ({command}: {error})",
            hint="Use that version, or delete the folder and run the parts again.",
        ) from None
    return RUNNERS[command](**options, write=write)
