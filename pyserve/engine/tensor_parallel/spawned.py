"""Spawned: the processes of follower ranks, before they know their configuration.

A process takes seconds to import torch, so followers are started as soon as their number is known,
while the leader imports torch itself. This file must not import torch.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

MODULE = "pyserve.engine.tensor_parallel.follower"
CAUSE_S = 1.0  # a process's end may be noticed this much later than the failed step that it causes


class Spawned:
    """One follower process, and the leader's end of its socket.

    The process first waits for a Start message. If this end is closed, it ends; while it is still
    importing, only after that.
    """

    def __init__(self, tp_rank: int) -> None:
        self.tp_rank = tp_rank
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # It gets a session of its own: Ctrl-C in a terminal must reach only the leader.
        self.process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        theirs.close()

    def how_it_ended(self) -> str:
        """A phrase that says how the process ended; called after its socket has closed."""
        try:
            code = self.process.wait(CAUSE_S)
        except subprocess.TimeoutExpired:
            return "has closed its socket"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    def kill(self) -> None:
        """End the process at once. Harmless when called again."""
        self.process.kill()
        self.process.wait()
        self.sock.close()


def is_stuck(pid: int) -> bool:
    """Whether no thread of the process is running, runnable, or waiting for a disk."""
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # a thread that has ended meanwhile
            state = path.read_text().rpartition(") ")[2][0]
            if state in "RD":
                return False
    return True


def spawn(tp_size: int) -> list[Spawned]:
    """Start the processes of all ranks but the leader."""
    return [Spawned(tp_rank) for tp_rank in range(1, tp_size)]
