"""What a server does wrong is seen: here one that closes at an end, and takes whatever comes."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator

import pytest

from bench import hostile_clients
from bench.hostile_clients import Target


class Careless(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while self.request.recv(2**20):
            pass


@pytest.fixture
def target() -> Iterator[Target]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Careless) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Target("127.0.0.1", int(server.server_address[1]))
        server.shutdown()


def test_what_is_not_refused_or_answered_is_named(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in (("UPLOADS", 2), ("GONE", 2), ("UNREAD", 2)):
        monkeypatch.setattr(hostile_clients, f"NUM_{name}", number)
    monkeypatch.setattr(hostile_clients, "UPLOAD_BYTES", 1000)
    monkeypatch.setattr(hostile_clients, "HOLD_S", 0.1)
    monkeypatch.setattr(hostile_clients, "ANSWER_S", 0.2)
    assert "0 got a 429" in str(hostile_clients.uploads(target))
    assert "0 got a 200" in str(hostile_clients.ended(target))
    assert "no answer was made" in str(hostile_clients.unread(target))


def test_interim_answers_are_none(target: Target) -> None:
    class Interim(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + b"HTTP/1.1 429 x\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Interim) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with Target("127.0.0.1", int(server.server_address[1])).connections(1) as (sock,):
            assert hostile_clients._status(sock) == 429
