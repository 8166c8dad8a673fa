"""Where the program begins: Ctrl-C and SIGTERM end it in one line from the first import on, and once."""

from __future__ import annotations

import sys

from hxaconv.save import interruption


def main() -> int:
    """Run the command line; returns 0 done, 1 a check failed, 2 wrong use or a fault, 130 or 143 interrupted."""
    try:
        interruption.for_life()
        from hxaconv.cli.app import run

        code = run()
        interruption.ignore_from_now()
        return code
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{getattr(stop, 'message', 'Interrupted; nothing was begun.')}\n")
        interruption.ignore_from_now()
        return getattr(stop, "exit_code", 130)


if __name__ == "__main__":
    sys.exit(main())
