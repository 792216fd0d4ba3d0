"""What one client may cost: the queue, the head, the body, the time, the connections."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.api.endpoints import answer
from pyserve.api.generation import stream
from pyserve.api.http import bounds
from tests.api.fakes import Script, Server, run_server
from tests.waiting import wait_until

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "x"}]
LONG: dict[str, Any] = {"prompt": "hi", "max_tokens": 400, "ignore_eos": True}


def open_with(server: Server, sent: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    sock.sendall(sent)
    return sock


def read_to_end(sock: socket.socket) -> bytes:
    received = b""
    sock.settimeout(30)  # whoever is not cut off fails the test, and does not hang it
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            received += piece
    sock.close()
    return received


@pytest.fixture
def full(server: Server) -> Iterator[Server]:
    server.engine.room = 0
    yield server
    server.engine.room = None


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_full_queue_is_a_429_with_retry_after(full: Server, path: str) -> None:
    sent = {"messages": MESSAGES} if path == CHAT else {"prompt": "x"}
    for streamed in (False, True):
        status, headers, reply = full.request("POST", path, {**sent, "stream": streamed})
        assert status == 429 and headers["Retry-After"] == "7"
        error = json.loads(reply)["error"]
        assert error["type"] == "RateLimitError" and error["code"] == 429
    assert full.engine.submitted == []


def test_a_full_queue_refuses_before_the_body_is_there(full: Server) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    sock = open_with(full, head.encode())
    assert sock.recv(65536).startswith(b"HTTP/1.1 429 ")
    sock.close()


def test_all_sequences_of_a_request_are_taken_or_none(server: Server) -> None:
    server.engine.room = 3
    try:
        assert server.request("POST", COMPLETIONS, {"prompt": ["a", "b"], "n": 2})[0] == 429
        assert server.engine.submitted == []
        assert len(server.post(COMPLETIONS, {"prompt": "a", "n": 3})["choices"]) == 3
    finally:
        server.engine.room = None


@pytest.mark.parametrize("part", ["few large", "many small", "endless line"])
def test_a_head_over_the_limit_is_a_400(server: Server, part: str) -> None:
    fields = {
        "few large": b"".join(b"X-%d: %s\r\n" % (i, b"a" * 6000) for i in range(3)) + b"\r\n",
        "many small": b"".join(b"X-%d: %s\r\n" % (i, b"a" * 200) for i in range(100)) + b"\r\n",
        "endless line": b"X: " + b"a" * 20_000,
    }[part]
    received = read_to_end(open_with(server, b"GET /health HTTP/1.1\r\nHost: x\r\n" + fields))
    assert received.startswith(b"HTTP/1.") and b" 400 " in received.splitlines()[0]
    assert b"bytes" in received.split(b"\r\n\r\n")[1]


def test_a_head_within_the_limit_passes(server: Server) -> None:
    fields = {f"X-{i}": "a" * 7000 for i in range(2)}
    assert server.request("GET", "/health", headers=fields)[0] == 200


def test_a_head_that_trickles_in_ends_its_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "HEAD_TIMEOUT_S", 0.3)
    slow = open_with(server, b"GET /health HTTP/1.1\r\n")
    idle = open_with(server, b"")
    started = time.monotonic()
    is_cut = False
    try:
        while time.monotonic() - started < 30:
            slow.sendall(b"X: y\r\n")
            time.sleep(0.05)
    except ConnectionError:
        is_cut = True
    assert time.monotonic() - started > 0.2
    assert is_cut, "it could send on and on"
    idle.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert read_to_end(idle).startswith(b"HTTP/1.1 200 ")  # it had not begun to ask
    slow.close()


def test_a_head_that_came_slowly_but_in_time_is_forgotten(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "HEAD_TIMEOUT_S", 1.0)
    server.engine.script = lambda number: Script([80], 0.15)
    data = json.dumps({"prompt": "hi", "max_tokens": 8, "stream": True}).encode()
    sock = open_with(server, f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n".encode())
    time.sleep(0.05)
    sock.sendall(f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    assert b"data: [DONE]" in read_to_end(sock)


@pytest.mark.parametrize("kind", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_never_ends_is_a_408(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(bounds, "BODY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(bounds, "LINGERING_TIME_S", 0.2)
    sent = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{kind}\r\n\r\n".encode()
    with run_server(tokenizer_folder) as server:
        sock = open_with(server, sent + (b"4\r\n{   \r\n" if "chunked" in kind else b"{   "))
        received = read_to_end(sock)
        assert received.startswith(b"HTTP/1.1 408 ") and b'"RequestTimeoutError"' in received
        wait_until(lambda: server.state.num_in_flight == 0)


def test_an_endless_chunked_body_is_a_413(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "LINGERING_TIME_S", 0.5)
    with run_server(tokenizer_folder, max_body_bytes=2**20) as server:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock = open_with(server, head.encode())
        stop = threading.Event()

        def pour() -> None:
            chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    sock.sendall(chunk)

        thread = threading.Thread(target=pour)
        thread.start()
        try:
            assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")
            started = time.monotonic()
            read_to_end(sock)  # what is poured in is dropped for a while, then the end comes
            assert time.monotonic() - started < bounds.LINGERING_TIME_S + 10.0
        finally:
            stop.set()
            thread.join(30)


def test_more_connections_than_allowed_are_closed(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all of them are busy; idle ones would make place (test_connections.py)."""
    monkeypatch.setattr(bounds, "MAX_CONNECTIONS", 3)
    with run_server(tokenizer_folder) as server:
        server.engine.script = lambda number: Script([80], 0.02)
        kept = [server.connect(COMPLETIONS, {**LONG, "stream": True}) for _ in range(3)]
        for sock in kept:
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert read_to_end(open_with(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")) == b""
        kept.pop().close()
        wait_until(lambda: _answers(server))
        for sock in kept:
            assert sock.recv(65536)
            sock.close()


def _answers(server: Server) -> bool:
    try:
        return server.request("GET", "/health")[0] == 200
    except OSError:
        return False


def test_a_request_that_takes_too_long_ends_with_the_reason(tokenizer_folder: Path) -> None:
    for timeout_s in (0.3, 3.0, 15.0):  # it may be over before a token where the machine is busy
        with run_server(tokenizer_folder, request_timeout_s=timeout_s) as server:
            server.engine.script = lambda number: Script([80], 0.05)
            error = server.error(COMPLETIONS, LONG, 503)
            assert f"longer than {timeout_s:g} s (--request-timeout)" in error["message"]
            *frames, last = server.frames(COMPLETIONS, LONG)
            assert "--request-timeout" in last["error"]["message"]
            assert all(item.is_aborted for item in server.engine.submitted)
            short = {"prompt": "hi", "max_tokens": 1}
            if frames and server.request("POST", COMPLETIONS, short)[0] == 200:
                return
    pytest.fail("no token came, or the next request was not served")


def test_a_request_without_any_news_ends_in_time_too(tokenizer_folder: Path) -> None:
    with run_server(tokenizer_folder, request_timeout_s=0.2) as server:
        server.engine.script = lambda number: Script([80], starts=False)
        assert "--request-timeout" in server.error(COMPLETIONS, LONG, 503)["message"]
        (frame,) = server.frames(COMPLETIONS, LONG)
        assert "--request-timeout" in frame["error"]["message"]


def test_who_does_not_even_take_the_error_is_cut_off(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is over once tokens gather because the socket is full, and no sooner."""
    monkeypatch.setattr(answer, "LAST_WRITE_S", 0.2)
    real, deadlines = answer._Deadline, []

    def deadline(*args: Any) -> answer._Deadline:
        deadlines.append(real(*args))
        return deadlines[-1]

    monkeypatch.setattr(answer, "_Deadline", deadline)
    with run_server(tokenizer_folder, request_timeout_s=0) as server:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server.engine.script = lambda number: Script([80], 0.05)
        data = json.dumps({**LONG, "n": 64, "stream": True}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(head.encode() + data)
            wait_until(lambda: len(server.engine.submitted) == 64)
            streams = [item.stream for item in server.engine.submitted]
            wait_until(lambda: all(len(stream._token_ids) >= 10 for stream in streams))
            server.loop.call_soon_threadsafe(deadlines[0]._interrupt)
            wait_until(lambda: server.state.num_in_flight == 0)
            assert all(item.is_aborted for item in server.engine.submitted), "none has ended"
            received = read_to_end(sock)
            assert received.startswith(b"HTTP/1.1 200 ") and b"[DONE]" not in received
            assert b"--request-timeout" not in received, "it took the error after all"


def test_a_silent_stream_says_that_it_lives(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SILENCE_S", 0.05)
    server.engine.script = lambda number: Script([80], starts=False)
    with server.connect(COMPLETIONS, {**LONG, "stream": True}) as sock:
        received = b""
        while received.count(b": keep-alive\n\n") < 5:  # again and again, by itself
            received += sock.recv(65536)
    server.engine.script = lambda number: Script([80, 81], 0.3, burst=2)
    began_s = time.monotonic()
    status, _, reply = server.request(
        "POST", COMPLETIONS, {"prompt": "hi", "max_tokens": 4, "stream": True}
    )
    took_s = time.monotonic() - began_s
    assert status == 200
    blocks = reply.decode().split("\n\n")
    comments = [block for block in blocks if block == ": keep-alive"]
    assert 2 <= len(comments) <= 1 + took_s / stream.SILENCE_S
    assert blocks[0] == ": keep-alive" and blocks[-2:] == ["data: [DONE]", ""]
    frames = [json.loads(b.removeprefix("data: ")) for b in blocks if b.startswith("data: {")]
    assert "".join(f["choices"][0]["text"] for f in frames) == "nono"
    assert (
        b"keep-alive"
        not in server.request("POST", COMPLETIONS, {"prompt": "hi", "max_tokens": 2})[2]
    )


def test_the_sdk_skips_over_the_comments(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SILENCE_S", 0.05)
    server.engine.script = lambda number: Script([80, 81], 0.2, burst=2)
    with server.sdk() as client:
        chunks = client.completions.create(model="alias", prompt="hi", max_tokens=2, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "no"
