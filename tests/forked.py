"""Processes that run a test's own command, without the second that the imports of one take.

They are forked from a process that has done nothing but import what they need. What a start of the
real command is like is for tests/test_main.py and tests/e2e.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from pyserve import log

MODULES = ["tests.api.served", "tests.api.batches.batched"]  # whose `main` is forked


class Forked:
    """A process whose sys.argv has `arguments`, and whose exit code is what `main` returns.

    What it writes goes into the file at `log_path`.
    """

    def __init__(self, main: Callable[[], int], arguments: list[str], log_path: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(MODULES)
        log_path.touch()
        self._process: ForkServerProcess = context.Process(
            target=_as_command, args=(main, arguments, log_path)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None where it has not ended in time."""
        self._process.join(timeout_s)
        return self._process.exitcode


def _as_command(main: Callable[[], int], arguments: list[str], log_path: Path) -> None:
    with log_path.open("wb", buffering=0) as sink:
        for output in (1, 2):
            os.dup2(sink.fileno(), output)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [main.__module__, *arguments]
    try:
        code = main()
    finally:
        log.flush()  # which an interpreter does at its end, but no process of multiprocessing
    sys.exit(code)
