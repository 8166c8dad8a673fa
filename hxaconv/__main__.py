"""Where the program begins: Ctrl-C ends it in one line from the first import on."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; returns 0 done, 1 a check failed, 2 wrong use or bad input, 130 interrupted."""
    try:
        from hxaconv.cli import app
        from hxaconv.exits import guarded

        return guarded(app)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; nothing was begun.\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
