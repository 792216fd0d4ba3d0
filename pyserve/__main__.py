"""`python -m pyserve`, and the command `pyserve`.

The imports below take a moment in which Ctrl-C may come, so its handler is set first.
"""

from __future__ import annotations

import os
import sys

from pyserve import INTERRUPTED


def interrupt(*_: object) -> None:
    """End at once with one line, as nothing has begun yet that needs an orderly end."""
    try:
        os.write(2, b"interrupted\n")  # logging is not used, as it may be what was interrupted
    finally:
        os._exit(INTERRUPTED)


try:
    import signal

    signal.signal(signal.SIGINT, interrupt)
    from pyserve.cli import main
except KeyboardInterrupt:  # it came before the handler was set
    interrupt()

if __name__ == "__main__":
    sys.exit(main())
