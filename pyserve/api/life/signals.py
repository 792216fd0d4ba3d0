"""Signals that ask the server to stop; a second one ends the process at once.

Ctrl-C (SIGINT), SIGTERM, SIGQUIT (which some images send to stop), and SIGHUP: the terminal has
gone, for instance as an ssh session ended. A shell and the kernel may both send SIGHUP for that, so
as a second signal it is ignored. Under nohup it is ignored altogether.

They are handlers of the interpreter, not of the event loop, so that they hold before there is a
loop, while it is stuck and after its end.
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
    """A context manager, entered on the main thread: the handlers are set inside it.

    first  the signal that asked to stop, None where none has come.
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
        """Call `on_first` on the running loop at the first signal, or soon where it has come."""
        loop = asyncio.get_running_loop()
        self._tell = lambda: loop.call_soon_threadsafe(on_first)
        if self.first is not None:
            loop.call_soon(on_first)

    def forget(self) -> None:
        """The loop ends: a first signal that comes from here on has nothing left to stop."""
        self._tell = None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # Between any two instructions of the main thread: logging may be what is interrupted.
        if self.first is not None and number == signal.SIGHUP:
            return
        if self.first is not None:
            os.write(2, b"told to stop twice: exiting at once\n")
            os._exit(128 + number)
        self.first = number
        if self._tell is not None:
            self._tell()
