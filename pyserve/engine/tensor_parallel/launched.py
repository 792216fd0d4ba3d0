"""The ranks of one model if torchrun has started them all, on one machine or on several.

Besides the process group of their steps they have two gloo groups for messages: one broadcasts the
leader's calls to all followers, the other gathers the followers' news at the leader. When a rank
ends, torchrun ends the other ranks of its machine, but not those of other machines. Therefore each
follower also holds a "line" to the leader: a TCP connection that carries heartbeats alone, and
whose end tells either side that the other has gone.
"""

from __future__ import annotations

import os
import secrets
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import msgspec
import torch
import torch.distributed as dist

from pyserve import __version__, log
from pyserve.config import EngineConfig, env
from pyserve.engine.tensor_parallel import calls
from pyserve.engine.tensor_parallel.news import Begin, Failed, News, decode, encode
from pyserve.errors import DeviceError, StartupError
from pyserve.flag_rows import rows_of
from pyserve.model.adapter_weights import AdapterWeights
from pyserve.ops.group import LEADER, Group, ProcessGroup
from pyserve.ops.meeting import Meeting, meeting

PIECE_BYTES = 4096  # size of the first broadcast of a message, which holds all of most calls
LENGTH_BYTES = 8
SECRET_BYTES = 16  # a follower sends this secret, so that no stranger can open a line
LINE_S = 30.0  # time limit for all followers to connect
SHOW_S = 2.0  # time limit for a new connection to send the secret
# A follower waits for the next call for as long as the server is idle or asleep, but gloo's default
# time limit is half an hour. A lost leader is noticed by the end of the line instead.
IDLE = timedelta(days=3650)
LINE_BEAT_S, LINE_SILENT_S = 1.0, 20.0  # between heartbeats, and without one until a rank hangs
UNHEARD_MS = 5000  # how long what was sent on a line may stay unacknowledged
PEACE_S = 3.0  # after the line's end, time for a follower to end by itself if it was told to
# Fields of EngineConfig that the leader alone reads. The other ranks may be started without them.
LEADERS_OWN = frozenset({
    "logprobs_mode", "target_itl_ms", "enable_prefix_caching", "scheduling_policy", "trace",
    "max_queue", "idle_sleep_min",
})  # fmt: skip

_Kind = TypeVar("_Kind", bound=News)


def agree(config: EngineConfig, here: Meeting) -> None:
    """Meet all other ranks, before any of them fetches or loads a model. Raises StartupError where
    one does not come, or was started with other settings of the model or its steps than rank 0."""
    said = {"version": __version__, "torch": str(torch.__version__)} | {
        f"--{row.name}": _shown(getattr(config, field))
        for field, row in rows_of(EngineConfig).items()
        if field not in LEADERS_OWN
    }
    first, *others = here.wait_all("settings", msgspec.json.encode(said).decode())
    expected = msgspec.json.decode(first)
    for tp_rank, other in enumerate(others, 1):
        found = msgspec.json.decode(other)
        differences = [
            f"{name} {found.get(name)} (rank 0: {expected.get(name)})"
            for name in expected | found
            if found.get(name) != expected.get(name)
        ]
        if differences:
            raise StartupError(
                f"rank {tp_rank} has {', '.join(differences)}: all ranks must have the same "
                "version and the same flags of the model and the engine"
            )


def _shown(value: object) -> str:
    """A setting as users know it: one that was not given has no value."""
    return "not given" if value is None else str(value)


class _Words:
    """What leader and followers have in common: the model's process group, and the groups for calls
    and news."""

    def __init__(self, device: torch.device) -> None:
        """Waits for all other ranks. Raises StartupError if one does not come, DeviceError if torch
        cannot join them."""
        self.group = ProcessGroup.launched(device)
        self.tp_rank, self.tp_size = self.group.tp_rank, self.group.tp_size
        self._calls = dist.new_group(backend="gloo", timeout=IDLE)
        self._news = dist.new_group(backend="gloo")

    def join(self, device: torch.device) -> Group:
        return self.group

    def _spread(self, data: bytes = b"") -> bytes:
        """Broadcast the leader's `data`; returns it on every rank."""
        piece = torch.zeros(PIECE_BYTES, dtype=torch.uint8)
        if self.tp_rank == LEADER:
            data = len(data).to_bytes(LENGTH_BYTES, "little") + data
            piece[: min(len(data), PIECE_BYTES)] = _bytes(data[:PIECE_BYTES])
        dist.broadcast(piece, LEADER, group=self._calls)
        length = int.from_bytes(piece[:LENGTH_BYTES].numpy().tobytes(), "little") + LENGTH_BYTES
        if length <= PIECE_BYTES:
            return piece[LENGTH_BYTES:length].numpy().tobytes()
        rest = torch.zeros(length - PIECE_BYTES, dtype=torch.uint8)
        if self.tp_rank == LEADER:
            rest = _bytes(data[PIECE_BYTES:])
        dist.broadcast(rest, LEADER, group=self._calls)
        return piece[LENGTH_BYTES:].numpy().tobytes() + rest.numpy().tobytes()

    def _gather(self, data: bytes = b"") -> list[bytes]:
        """Gather each rank's `data` at the leader; returns it by rank there, b"" on the others.

        `data` and its length must fit in PIECE_BYTES.
        """
        assert len(data) + LENGTH_BYTES <= PIECE_BYTES
        piece = torch.zeros(PIECE_BYTES, dtype=torch.uint8)
        data = len(data).to_bytes(LENGTH_BYTES, "little") + data
        piece[: len(data)] = _bytes(data)
        all_pieces = [torch.zeros_like(piece) for _ in range(self.tp_size)]
        is_leader = self.tp_rank == LEADER
        dist.gather(piece, all_pieces if is_leader else None, LEADER, group=self._news)
        found = []
        for said in all_pieces:
            words = said.numpy().tobytes()
            end = LENGTH_BYTES + int.from_bytes(words[:LENGTH_BYTES], "little")
            found.append(words[LENGTH_BYTES:end])
        return found


class LaunchedFollowers(_Words):
    """Has the interface of Followers, for ranks that torchrun has started."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._is_begun = self._is_closing = False
        self._lost: str | None = None
        self._on_lost: Callable[[str], object] | None = None
        self._lines = self._accept()
        meeting().end()
        threading.Thread(target=self._listen, name="followers", daemon=True).start()

    def wait(self, kind: type[_Kind], timeout_s: float) -> list[_Kind]:
        """As Followers.wait, but the time limit is that of the gloo group, not timeout_s."""
        try:
            answers = self._gather()
        except RuntimeError as error:
            raise StartupError(self.cause(error)) from error
        found: list[_Kind] = []
        for tp_rank, answer in enumerate(answers[1:], 1):
            news = decode(answer)
            if isinstance(news, Failed):
                raise StartupError(f"rank {tp_rank}: {news.reason}")
            assert isinstance(news, kind), news
            found.append(news)
        return found

    def begin(self, begin: Begin, *, num_step_words: int) -> None:
        self._spread(encode(begin))
        self._is_begun = True

    def tell(self, call: calls.AnyCall) -> None:
        try:
            self._spread(msgspec.msgpack.encode(call))
        except RuntimeError as error:
            raise DeviceError(self.cause(error)) from error

    def tell_adapter(self, slot: int, weights: AdapterWeights) -> NoReturn:
        raise AssertionError("--enable-lora is refused under torchrun")

    def cause(self, error: Exception) -> str:
        time.sleep(0.2)  # a line's end may be noticed later than the failure that it causes
        first_line, _, _ = str(error).partition("\n")
        return self._lost or f"a rank is gone or out of step: {type(error).__name__}: {first_line}"

    def watch(self, on_lost: Callable[[str], object]) -> None:
        """As Followers.watch."""
        self._on_lost = on_lost
        if self._lost is not None:
            on_lost(self._lost)

    def kill(self) -> None:
        """End all followers at once: each ends when its line is closed."""
        self._is_closing = True
        for line in self._lines:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Tell the followers to end, then close their lines. Harmless when called again."""
        self._is_closing = True
        if self._is_begun:
            self._is_begun = False
            self.tell(calls.Close())
        self.kill()

    def _accept(self) -> list[socket.socket]:
        """Accept the followers' lines; returns them in the order of ranks. Raises StartupError."""
        secret = secrets.token_bytes(SECRET_BYTES)
        lines: dict[int, socket.socket] = {}
        with socket.create_server(("", 0)) as server:
            server.settimeout(LINE_S)
            port = server.getsockname()[1]
            self._spread(port.to_bytes(2, "little") + secret)
            while len(lines) < self.tp_size - 1:
                try:
                    line, _ = server.accept()
                except OSError as error:
                    raise StartupError(f"not all ranks reach port {port} of rank 0") from error
                line.settimeout(SHOW_S)
                with suppress(OSError):  # a stranger may say nothing
                    shown = b""
                    shown = line.recv(SECRET_BYTES + 1, socket.MSG_WAITALL)
                if secrets.compare_digest(shown[:SECRET_BYTES], secret):
                    lines[shown[SECRET_BYTES]] = line
        return [_kept_alive(line) for _, line in sorted(lines.items())]

    def _listen(self) -> None:
        lost = self._first_lost()
        if self._is_closing:
            return
        self._lost = lost
        if self._on_lost is not None:
            self._on_lost(lost)
            return
        time.sleep(PEACE_S)  # the call that fails by it says more
        if self._on_lost is None and not self._is_closing:
            log.get_logger().error("%s during the start", lost)
            log.flush()
            os._exit(1)

    def _first_lost(self) -> str:
        """What has become of the first that ends its line, or that hangs."""
        heard_s = dict.fromkeys(range(1, self.tp_size), time.monotonic())
        with selectors.DefaultSelector() as selector:
            for tp_rank, line in enumerate(self._lines, 1):
                selector.register(line, selectors.EVENT_READ, tp_rank)
            looked_s = time.monotonic()
            while True:
                for key, _ in selector.select(LINE_BEAT_S):
                    line, tp_rank = self._lines[key.data - 1], key.data
                    if not _heard(line):
                        return f"rank {tp_rank} has gone"
                    heard_s[tp_rank] = time.monotonic()
                now_s = time.monotonic()
                if now_s - looked_s > LINE_SILENT_S / 2:  # this process itself was stopped
                    heard_s = dict.fromkeys(heard_s, now_s)
                looked_s = now_s
                for tp_rank, last_s in heard_s.items():
                    if now_s - last_s > LINE_SILENT_S:
                        return f"rank {tp_rank} hangs: silent for {LINE_SILENT_S:g} s"


class LaunchedLine(_Words):
    """Implements follower.Line for a rank that torchrun has started.

    Ends the process if the leader ends.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        told = self._spread()
        port, secret = int.from_bytes(told[:2], "little"), told[2:]
        address = env("MASTER_ADDR") or "127.0.0.1"
        try:
            line = socket.create_connection((address, port), LINE_S)
            line.sendall(secret + bytes([self.tp_rank]))
        except OSError as error:
            raise StartupError(f"port {port} of {address}, rank 0, is not reached") from error
        self._line = _kept_alive(line)
        meeting().end()
        threading.Thread(target=self._live, name="leader", daemon=True).start()

    def _live(self) -> None:
        self._beat()
        time.sleep(PEACE_S)  # if the leader's last call was Close, this process ends by itself
        log.get_logger().error("rank 0 has gone")
        log.flush()
        os._exit(1)

    def _beat(self) -> None:
        """Say that this process lives, until the leader does not."""
        with suppress(OSError):
            while not select.select([self._line], [], [], LINE_BEAT_S)[0] or _heard(self._line):
                self._line.sendall(b".")

    def tell(self, news: News) -> None:
        self._gather(encode(news))

    def begin(self) -> Begin:
        news = decode(self._spread())
        assert isinstance(news, Begin), news
        return news

    def call(self) -> bytes:
        return self._spread()


def _heard(line: socket.socket) -> bool:
    """Whether what has come on a line is not its end."""
    try:
        return bool(line.recv(PIECE_BYTES))
    except OSError:
        return False


def _kept_alive(line: socket.socket) -> socket.socket:
    """Let the line end within seconds even if the other machine loses power.

    Keepalive probes notice that while nothing is sent. The user timeout does while a heartbeat is
    not acknowledged, as no probes are sent then.
    """
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 4),
        (socket.TCP_USER_TIMEOUT, UNHEARD_MS),
    ):  # fmt: skip
        line.setsockopt(socket.IPPROTO_TCP, option, value)
    return line


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
