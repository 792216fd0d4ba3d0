"""Spawned: the processes of the ranks that follow, before they know what they are to do.

A process takes seconds to import torch, so they are started when their number is known, while the
leader imports its own. No torch here.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

MODULE = "pyserve.engine.tensor_parallel.follower"
CAUSE_S = 1.0  # that the end of a process may be told after what it does to a step


class Spawned:
    """One of them, and this end of its socket: the first word that it waits for is a Start. It
    ends when this end is closed, as soon as it has imported what it runs.
    """

    def __init__(self, tp_rank: int) -> None:
        self.tp_rank = tp_rank
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A session of its own: what a terminal sends to stop the server is for the leader.
        self.process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        theirs.close()

    def how_it_ended(self) -> str:
        """For after its socket has closed."""
        try:
            code = self.process.wait(CAUSE_S)
        except subprocess.TimeoutExpired:
            return "has closed its socket"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    def kill(self) -> None:
        """At once. Harmless when repeated."""
        self.process.kill()
        self.process.wait()
        self.sock.close()


def is_stuck(pid: int) -> bool:
    """Whether no thread of a process runs, waits for a core, or for a disk."""
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # a thread that has ended meanwhile
            state = path.read_text().rpartition(") ")[2][0]
            if state in "RD":
                return False
    return True


def spawn(tp_size: int) -> list[Spawned]:
    """Those of all ranks but the leader."""
    return [Spawned(tp_rank) for tp_rank in range(1, tp_size)]
