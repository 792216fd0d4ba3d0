"""Meeting: how the ranks that torchrun has started find each other, however long one takes.

One rank may download a model for an hour that another has already. A rank that waits knows by the
heartbeats of the others that they are alive, and gives up on one that has been silent for SILENT_S.
"""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pyserve import log
from pyserve.config import env
from pyserve.errors import StartupError

SILENT_S = 25.0  # without a heartbeat, until a rank counts as gone
BEAT_S = 2.0  # between two heartbeats
PAUSE_S = 0.1  # between two looks at what the others have said
END_S = 5.0  # how long `end` waits for a heartbeat that is under way

_Heard = dict[int, tuple[int, float]]  # rank -> its last beat, and when it was new


class Meeting:
    """tp_rank, tp_size   this rank of how many
    store                 of words that all ranks have in common
    """

    def __init__(self, store: Any, tp_rank: int, tp_size: int) -> None:
        self.store, self.tp_rank, self.tp_size = store, tp_rank, tp_size
        self._is_over = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="meeting", daemon=True)
        self._beating.start()
        # The store's own end waits for a call that is under way, which would never return then.
        atexit.register(self.end)

    @classmethod
    def launched(cls) -> Meeting:
        """Where torchrun's variables say. Raises StartupError where nobody is there, or another
        process has this one's rank."""
        # The store may be that of torchrun's agent, which holds what was said before a restart.
        attempt = env("TORCHELASTIC_RESTART_COUNT") or "0"
        _find_store()
        try:
            limit = timedelta(seconds=SILENT_S)
            found = dist.rendezvous("env://", timeout=limit)  # type: ignore[attr-defined]
            store, tp_rank, tp_size = next(found)
            own = dist.PrefixStore(f"pyserve/{attempt}", store)  # type: ignore[attr-defined]
            num_alike = own.add(f"came/{tp_rank}", 1)
        except (RuntimeError, ValueError) as error:
            raise _failed(error) from error
        if num_alike > 1:
            raise StartupError(
                f"another process is rank {tp_rank} too: each machine needs a --node-rank of its "
                "own, and each server a --master-port of its own"
            )
        return cls(own, tp_rank, tp_size)

    def wait_all(self, topic: str, said: str = "") -> list[bytes]:
        """What each rank has said of a topic, once all have. Raises StartupError."""
        try:
            self.store.set(f"{topic}/{self.tp_rank}", said)
            self._wait_all(topic)
            return [self.store.get(f"{topic}/{tp_rank}") for tp_rank in range(self.tp_size)]
        except RuntimeError as error:
            raise _failed(error) from error

    def end(self) -> None:
        """This rank is seen in other ways from now on."""
        self._is_over.set()
        self._beating.join(END_S)

    def watch(self) -> None:
        """End this process where another is no longer heard of, until `end` is called. Torch waits
        for such a one for ten minutes, in calls that nothing else ends."""
        threading.Thread(target=self._watch, name="meeting watch", daemon=True).start()

    def _watch(self) -> None:
        others = [tp_rank for tp_rank in range(self.tp_size) if tp_rank != self.tp_rank]
        heard: _Heard = {}
        try:
            while not self._is_over.wait(BEAT_S):
                self._check_beats(others, heard)
        except (StartupError, RuntimeError) as error:
            if not self._is_over.wait(PAUSE_S):
                shown = error if isinstance(error, StartupError) else _failed(error)
                log.get_logger().error("%s", shown)
                log.flush()
                os._exit(1)

    def _wait_all(self, topic: str) -> None:
        heard: _Heard = {}
        while missing := [
            tp_rank
            for tp_rank in range(self.tp_size)
            if not self.store.check([f"{topic}/{tp_rank}"])
        ]:
            self._check_beats(missing, heard)
            time.sleep(PAUSE_S)

    def _check_beats(self, ranks: Sequence[int], heard: _Heard) -> None:
        """Raise StartupError where one of `ranks` has been silent for too long, by `heard` of the
        calls before."""
        now_s = time.monotonic()
        for tp_rank in ranks:
            beat = self.store.add(f"beat/{tp_rank}", 0)
            before, heard_s = heard.get(tp_rank, (-1, now_s))
            heard[tp_rank] = beat, now_s if beat != before else heard_s
            if now_s - heard[tp_rank][1] > SILENT_S:
                raise StartupError(
                    f"the ranks did not come together: nothing was heard of rank {tp_rank} for "
                    f"{SILENT_S:g} s; see its own log"
                )

    def _beat(self) -> None:
        try:
            while not self._is_over.wait(BEAT_S):
                self.store.add(f"beat/{self.tp_rank}", 1)
        except RuntimeError:
            return  # the store has gone, which others see too


_meeting: Meeting | None = None


def meeting() -> Meeting:
    """The one of this process. Raises StartupError."""
    global _meeting
    if _meeting is None:
        _meeting = Meeting.launched()
    return _meeting


def _find_store() -> None:
    """Raise StartupError where nobody listens to what torch will connect to. Torch tries for twice
    the time limit, and writes C++ frames."""
    is_agents = env("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if env("RANK") == "0" and not is_agents:
        return  # this process will listen itself
    host, port = env("MASTER_ADDR") or "", env("MASTER_PORT") or ""
    deadline_s = time.monotonic() + SILENT_S
    while True:
        try:
            socket.create_connection((host, int(port)), SILENT_S).close()
            return
        except (OSError, ValueError) as error:
            # torchrun's agent started this process by means of what it listens for there.
            has_gone = is_agents and isinstance(error, ConnectionRefusedError)
            if has_gone or time.monotonic() > deadline_s:
                raise StartupError(
                    f"the ranks did not come together: {host} port {port}, where rank 0 was "
                    f"started, is not reached ({error}); see the log there"
                ) from error
        time.sleep(PAUSE_S)


def _failed(error: Exception) -> StartupError:
    first_line, _, _ = str(error).partition("\n")
    return StartupError(f"the ranks did not come together: {first_line}")
