"""Bodies on their way in: all of them together have a bound, small ones pass."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyserve.api.http import bounds
from tests.api.fakes import Server, run_server
from tests.waiting import wait_until

CHAT = "/v1/chat/completions"
MIB = 2**20


@pytest.fixture
def narrow(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with room for 4 MiB of bodies, 3 of them of one client."""
    monkeypatch.setattr(bounds, "MAX_UPLOAD_BYTES", 4 * MIB)
    monkeypatch.setattr(bounds, "MAX_CLIENT_UPLOAD_BYTES", 3 * MIB)
    with run_server(tokenizer_folder, api_keys=("a", "b")) as server:
        server.play("Hello")
        yield server


def head(length: int | None, key: str = "a", path: str = CHAT) -> bytes:
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n{framing}\r\n\r\n"
    ).encode()


def upload(server: Server, length: int, sent: int, key: str = "a") -> socket.socket:
    """A body of which `sent` bytes have come."""
    before = server.state.uploads.num_bytes
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    sock.sendall(head(length, key) + b" " * sent)
    wanted = before + sent - bounds.SMALL_BODY_BYTES
    wait_until(lambda: server.state.uploads.num_bytes >= wanted)
    return sock


def answer(sock: socket.socket) -> tuple[int, bytes]:
    reply = sock.recv(65536)
    return int(reply.split()[1]), reply


def test_a_body_without_room_is_refused_before_it_comes(narrow: Server) -> None:
    with ExitStack() as stack:
        held = stack.enter_context(upload(narrow, 2 * MIB, 2 * MIB - 10))
        for key, length, is_taken in (("a", 2 * MIB, False), ("b", 3 * MIB, False)):
            with socket.create_connection(("127.0.0.1", narrow.port), timeout=10) as sock:
                sock.sendall(head(length, key))
                status, reply = answer(sock)
                assert (status == 200) == is_taken and status == 429
                assert b"Retry-After: 5\r\n" in reply and b"Connection: close\r\n" in reply
                assert b'"RateLimitError"' in reply and b"no room for" in reply
        # Another user has room, and small bodies always have.
        other = stack.enter_context(upload(narrow, 1 * MIB, 1 * MIB - 10, "b"))
        small = {"messages": [{"role": "user", "content": "x" * 400}]}
        for key in ("a", "b"):
            status, _, _ = narrow.request("POST", CHAT, small, {"Authorization": f"Bearer {key}"})
            assert status == 200
        for sock in (held, other):
            sock.sendall(b" " * 10)
            assert answer(sock)[0] == 400  # spaces are no JSON
    wait_until(lambda: narrow.state.uploads.num_bytes == 0)


def test_what_grows_out_of_its_room_is_refused_and_lets_the_others_pass(narrow: Server) -> None:
    with upload(narrow, 2 * MIB, MIB) as first, socket.socket() as chunked:
        chunked.connect(("127.0.0.1", narrow.port))
        chunked.settimeout(10)
        chunked.sendall(head(None))
        for _ in range(64):
            try:
                chunked.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
            except ConnectionError:
                break
        assert answer(chunked)[0] == 429
        wait_until(lambda: narrow.state.uploads.num_bytes <= MIB)
        first.sendall(b" " * MIB)
        assert answer(first)[0] == 400
    wait_until(lambda: narrow.state.uploads.num_bytes == 0)


def test_who_announces_and_sends_nothing_takes_nothing(narrow: Server) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            sock = socket.create_connection(("127.0.0.1", narrow.port), timeout=10)
            stack.enter_context(sock).sendall(head(2 * MIB) + b" ")
        wait_until(lambda: narrow.state.num_in_flight == 20)
        assert narrow.state.uploads.num_bytes == 0
        body = {"messages": [{"role": "user", "content": "x"}], "user": "x" * 2 * MIB}
        status, _, reply = narrow.request("POST", CHAT, body, {"Authorization": "Bearer a"})
        assert status == 200, reply
    wait_until(lambda: narrow.state.num_in_flight == 0)


@pytest.mark.parametrize("how", ["leaves", "too late", "ends its side"])
def test_a_body_that_does_not_come_gives_its_room_back(
    narrow: Server, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "too late":
        monkeypatch.setattr(bounds, "BODY_TIMEOUT_S", 0.3)
    with upload(narrow, 2 * MIB, MIB) as sock:
        if how == "too late":
            assert answer(sock)[0] == 408
        elif how == "leaves":
            sock.close()
        else:
            sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: narrow.state.uploads.num_bytes == 0)
        assert narrow.state.num_in_flight == 0


def test_a_body_is_not_kept_while_its_answer_runs(server: Server) -> None:
    """32 MB of it for an hour of streaming would be in nobody's budget."""
    server.play("Hello", delay_s=0.5)
    body = {"messages": [{"role": "user", "content": "x" * 400}], "x": "x" * 100_000}
    with server.connect(CHAT, body):
        wait_until(lambda: server.engine.running() != [])
        assert server.state.uploads.num_bytes == 0
        request = next(
            connection.request  # type: ignore[attr-defined]
            for connection in server.connections._all
        )
        assert request is not None and not request._read_bytes


def test_bodies_are_not_waited_for_when_the_server_shuts_down(narrow: Server) -> None:
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=10) as sock:
        sock.sendall(head(100) + b"{")
        wait_until(lambda: narrow.state.num_in_flight == 1)
        started_s = time.monotonic()
        narrow.state.uploads.close()  # from another thread than the loop's: seen at its next turn
        narrow.request("GET", "/health")
        status, reply = answer(sock)
        assert status == 503 and b"Retry-After" in reply
        error = json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
        assert error["message"] == "the server is shutting down"
        assert time.monotonic() - started_s < 20.0, "a body has 120 s"
