"""The life of the process: port first, phases, ready line, failures, drain, signals."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.api.served import FATAL_TOKEN, main
from tests.forked import Forked
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent.parent
START_S = 60.0  # for whatever takes a second on an idle machine


@dataclass
class Process:
    popen: Forked
    port: int
    log_path: Path
    go_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def health(self) -> dict[str, object] | None:
        """The body of /health; None where nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            body: dict[str, object] = json.loads(connection.getresponse().read())
            return body
        except OSError:
            return None
        finally:
            connection.close()

    def is_in(self, status: str) -> bool:
        health = self.health()
        return health is not None and health["status"] == status

    def stream(self, max_tokens: int, token_id: int = 80) -> socket.socket:
        data = json.dumps({"prompt": [token_id], "max_tokens": max_tokens, "stream": True}).encode()
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode() + data)
        assert sock.recv(65536)
        return sock


@contextmanager
def start(folder: Path, how: str = "well", drain_s: float = 10, *more: str) -> Iterator[Process]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    log_path, go_path = folder.parent / f"log-{port}", folder / f"go-{port}"
    go_path.unlink(missing_ok=True)  # an earlier process had the same port
    popen = Forked(main, [str(port), str(folder), how, str(drain_s), *more], log_path)
    try:
        yield Process(popen, port, log_path, go_path)
    finally:
        popen.kill()
        popen.wait(30)


def read_to(end: bytes, sock: socket.socket) -> bytes:
    received = b""
    while end not in received and (piece := sock.recv(65536)):
        received += piece
    return received


def read_to_end(sock: socket.socket) -> bytes:
    received = b""
    try:
        while piece := sock.recv(65536):
            received += piece
            if b"[DONE]" in received:
                break
    except ConnectionError:
        pass
    sock.close()
    return received


def test_phases_ready_and_a_clean_end(tokenizer_folder: Path) -> None:
    with start(tokenizer_folder, "held") as process:
        wait_until(lambda: process.is_in("starting"), START_S)
        wait_until(lambda: (process.health() or {}).get("phase") == "load", START_S)
        health = process.health()
        assert health is not None and health["progress"] == 0.25
        process.go_path.touch()
        wait_until(lambda: process.is_in("ready"), START_S)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(START_S) == 0
        for phase in ("start: ", "build: ", "load: "):
            assert phase in process.log
        line = f"pyserve is ready on http://127.0.0.1:{process.port} (model tiny, "
        assert process.log.count(line) == 1
        # What lives as long as the server costs no pause while it serves.
        assert "the collector looks at the engine: False" in process.log
        assert "Traceback" not in process.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(tokenizer_folder: Path, number: signal.Signals) -> None:
    with start(tokenizer_folder, "open", drain_s=START_S) as process:
        wait_until(lambda: process.is_in("ready"), START_S)
        sock = process.stream(20)
        process.popen.send_signal(number)
        wait_until(lambda: process.is_in("draining"), START_S)
        process.go_path.touch()
        received = read_to_end(sock)
        assert b'"finish_reason":"length"' in received and b"error" not in received
        assert process.popen.wait(START_S) == 0


def test_a_connection_that_has_asked_nothing_yet_is_answered_while_others_drain(
    tokenizer_folder: Path,
) -> None:
    """Accepted before the signal, its request comes behind it; one that has asked is closed."""
    ask = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with start(tokenizer_folder, "open", drain_s=START_S) as process:
        wait_until(lambda: process.is_in("ready"), START_S)
        idle = socket.create_connection(("127.0.0.1", process.port), timeout=10)
        idle.sendall(ask)
        assert b"200 OK" in idle.recv(65536)
        new = socket.create_connection(("127.0.0.1", process.port), timeout=10)
        begun = socket.create_connection(("127.0.0.1", process.port), timeout=10)
        begun.sendall(ask[:9])
        sock = process.stream(20)
        process.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: process.is_in("draining"), START_S)
        assert read_to_end(idle) == b""
        new.sendall(ask)
        begun.sendall(ask[9:])
        for late in (new, begun):
            assert b'"status":"draining"' in read_to(b"}", late)
        process.go_path.touch()
        for late in (new, begun):
            assert read_to_end(late) == b""
        assert b'"finish_reason":"length"' in read_to_end(sock)
        assert process.popen.wait(START_S) == 0


def test_what_does_not_finish_is_cut_off_with_an_error(tokenizer_folder: Path) -> None:
    with start(tokenizer_folder, "open", drain_s=0.2) as process:
        wait_until(lambda: process.is_in("ready"), START_S)
        sock = process.stream(20)
        process.popen.send_signal(signal.SIGTERM)
        received = read_to_end(sock)
        assert b'data: {"error":' in received and received.endswith(
            b"data: [DONE]\n\n\r\n0\r\n\r\n"
        )
        assert process.popen.wait(START_S) == 0
        assert "1 request is cut off" in process.log


@pytest.mark.parametrize("how", ["well", "stuck"])
def test_an_engine_that_gives_up_ends_the_process(tokenizer_folder: Path, how: str) -> None:
    with start(tokenizer_folder, how) as process:
        wait_until(lambda: process.is_in("ready"), START_S)
        sock = process.stream(500, FATAL_TOKEN)
        received = read_to_end(sock)
        assert b'data: {"error":{"message":"the engine has stopped: boom"' in received
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert (process.health() or {"status": "gone"})["status"] in ("failed", "gone")
        assert process.popen.wait(START_S) == 1
        errors = [line for line in process.log.splitlines() if "ERROR" in line]
        assert len(errors) == 1 and errors[0].endswith("the engine has stopped: boom; exiting")
        assert "Traceback" not in process.log


def test_a_second_signal_exits_at_once(tokenizer_folder: Path) -> None:
    with start(tokenizer_folder, "open", drain_s=START_S) as process:
        wait_until(lambda: process.is_in("ready"), START_S)
        sock = process.stream(20)
        process.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: process.is_in("draining"), START_S)
        started = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(START_S) == 128 + signal.SIGTERM
        assert time.monotonic() - started < START_S / 2
        sock.close()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 128 + signal.SIGINT)]
)
def test_a_signal_while_loading_ends_at_once(
    tokenizer_folder: Path, number: signal.Signals, code: int
) -> None:
    with start(tokenizer_folder, "hang") as process:
        wait_until(lambda: (process.health() or {}).get("phase") == "load", START_S)
        process.popen.send_signal(number)
        assert process.popen.wait(START_S) == code
        assert process.log.splitlines()[-1].endswith("INFO told to stop while starting")
        assert "Traceback" not in process.log and "ERROR" not in process.log


def test_a_load_that_fails_as_it_is_told_to_stop_is_no_error(tokenizer_folder: Path) -> None:
    """Ctrl-C on a terminal reaches the compiler too, whose failure must not be told."""
    with start(tokenizer_folder, "fail at go") as process:
        wait_until(lambda: (process.health() or {}).get("phase") == "load", START_S)
        process.popen.send_signal(signal.SIGSTOP)  # so that both come at once
        process.go_path.touch()
        process.popen.send_signal(signal.SIGINT)
        process.popen.send_signal(signal.SIGCONT)
        assert process.popen.wait(START_S) == 128 + signal.SIGINT
        assert "Traceback" not in process.log and "ERROR" not in process.log


@pytest.mark.parametrize(
    ("how_many", "words"), [(0, "shutting down\n"), (1, "1 request has"), (2, "2 requests have")]
)
def test_the_shutdown_tells_how_many_may_finish(
    tokenizer_folder: Path, how_many: int, words: str
) -> None:
    with start(tokenizer_folder, "open", drain_s=0.1) as process:
        wait_until(lambda: process.is_in("ready"), START_S)
        socks = [process.stream(20) for _ in range(how_many)]
        process.popen.send_signal(signal.SIGTERM)
        for sock in socks:
            read_to_end(sock)
        assert process.popen.wait(START_S) == 0
        assert words in process.log
        assert not re.search(r"\b0 requests|\b1 requests", process.log)


def test_an_engine_that_fails_to_stop_is_told(tokenizer_folder: Path) -> None:
    with start(tokenizer_folder, "bad end") as process:
        wait_until(lambda: process.is_in("ready"), START_S)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(START_S) == 1
        [line] = [line for line in process.log.splitlines() if "ERROR" in line]
        assert line.endswith("the engine did not stop cleanly")


def test_a_start_error_is_one_line(tokenizer_folder: Path) -> None:
    with start(tokenizer_folder, "too big") as process:
        assert process.popen.wait(START_S) == 1
        errors = [line for line in process.log.splitlines() if "ERROR" in line]
        assert len(errors) == 1 and errors[0].endswith("the model needs 9 GiB, 4 GiB are free")
        assert "Traceback" not in process.log


def test_a_bug_while_loading_shows_its_traceback(tokenizer_folder: Path) -> None:
    with start(tokenizer_folder, "bug") as process:
        assert process.popen.wait(START_S) == 1
        assert "Traceback" in process.log and "boom" in process.log


def test_a_loader_that_exits_ends_the_process(tokenizer_folder: Path) -> None:
    with start(tokenizer_folder, "exit") as process:
        assert process.popen.wait(START_S) == 3


def test_a_busy_port_is_one_line_before_loading(tokenizer_folder: Path) -> None:
    with start(tokenizer_folder) as first:
        wait_until(lambda: first.is_in("ready"), START_S)
        done = subprocess.run(
            [sys.executable, "-m", "tests.api.served", str(first.port), "nowhere", "bug", "1"],
            cwd=ROOT, capture_output=True, text=True, timeout=START_S,
        )  # fmt: skip
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert f"port {first.port}: Address already in use" in done.stderr


def test_slow_bodies_and_idle_clients_do_not_hold_up_the_end(tokenizer_folder: Path) -> None:
    """Only what runs is waited for: here a stream of a second."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
    with start(tokenizer_folder, drain_s=30) as process:
        wait_until(lambda: process.is_in("ready"), START_S)
        sockets = []
        for number in range(200):
            sock = socket.create_connection(("127.0.0.1", process.port), timeout=10)
            sock.sendall(head if number % 2 else b"")
            sockets.append(sock)
        stream = process.stream(100)
        told_s = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        assert b"[DONE]" in read_to_end(stream)
        assert process.popen.wait(START_S) == 0
        assert time.monotonic() - told_s < 10.0
        for number, sock in enumerate(sockets):
            reply = read_to_end(sock)
            assert reply.startswith(b"HTTP/1.1 503 ") if number % 2 else reply == b""
        assert "cut off" not in process.log and "Traceback" not in process.log
