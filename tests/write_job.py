"""One write in a process of its own, slowed down so that a kill finds it at any point.

    python write_job.py FOLDER TARGET [--resume] [--overwrite] [--slow SECONDS]

FOLDER holds the source. Exits as the command line would: 0, 2 with a message, 128 + signal.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from writing import output, plan_over, source, write

from hxaconv.errors import HxaconvError
from hxaconv.options import Write
from hxaconv.save import fill
from hxaconv.save.interruption import Interrupted


def slowed(call: Any, seconds: float) -> Any:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return call(*arguments, **options)

    return wrapped


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    fill.BATCH_BYTES = 20_000
    for name in ("pwrite", "fsync", "rename", "replace"):
        setattr(os, name, slowed(getattr(os, name), arguments.slow))
    settings = Write(
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        workers=arguments.workers,
    )
    out = output(arguments.target, plan_over(source(arguments.folder)))
    print("ready", flush=True)
    try:
        write(out, settings, verify=lambda path: {"ok": True})
    except Interrupted as interruption:
        print(interruption.message, file=sys.stderr)
        return interruption.exit_code
    except HxaconvError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"published {out.target.name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
