"""`python -m pyserve`, and the command `pyserve`.

The imports below take a moment, and Ctrl-C may come in it: its handler is the first thing here.
"""

from __future__ import annotations

import os
import sys

from pyserve import INTERRUPTED


def interrupt(*_: object) -> None:
    """End at once with one line: nothing has begun that would have to be ended in order."""
    try:
        os.write(2, b"interrupted\n")  # not by logging, which may be what is interrupted
    finally:
        os._exit(INTERRUPTED)


try:
    import signal

    signal.signal(signal.SIGINT, interrupt)
    from pyserve.cli import main
except KeyboardInterrupt:  # before the handler was there
    interrupt()

if __name__ == "__main__":
    sys.exit(main())
