"""StopSignals: signals that ask the server to stop; a second one ends the process at once.

These are SIGINT (Ctrl-C), SIGTERM, SIGQUIT (which some container images use to stop) and SIGHUP
(the terminal has gone, for instance because an ssh session ended). Shell and kernel may both send
SIGHUP for that, so it is ignored as a second signal. Under nohup it is ignored altogether.

The handlers are set with signal.signal, not on the event loop, so that they work before there is a
loop, while it is blocked, and after it has ended.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)


class StopSignals:
    """A context manager that sets the handlers meanwhile; must be entered on the main thread.

    first  number of the first signal that asked to stop; None while none has arrived.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self._tell: Callable[[], object] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch(self, on_first: Callable[[], None]) -> None:
        """Call `on_first` on the running loop at the first signal, or soon if it has arrived."""
        loop = asyncio.get_running_loop()
        self._tell = lambda: loop.call_soon_threadsafe(on_first)
        if self.first is not None:
            loop.call_soon(on_first)

    def forget(self) -> None:
        """Forget the loop, which is ending: a first signal after this has nothing left to stop."""
        self._tell = None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # This runs between any two instructions of the main thread. It must not log, because it may
        # have interrupted logging itself.
        if self.first is not None and number == signal.SIGHUP:
            return
        if self.first is not None:
            os.write(2, b"told to stop twice: exiting at once\n")
            os._exit(128 + number)
        self.first = number
        if self._tell is not None:
            self._tell()
