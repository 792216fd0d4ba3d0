"""Large answers leave in pieces: whole, exact, and counted until they have left."""

from __future__ import annotations

import http.client
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from pyserve.api.http import bounds
from pyserve.api.pages import site
from tests.api.fakes import Server, run_server
from tests.api.tls_files import CERTIFICATE, KEY
from tests.waiting import wait_until

BUNDLE = "vendor/swagger-ui-bundle.js"


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def any_server(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_folder: Path) -> Any:
    (tmp_path / "pem").write_text(KEY + CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    with run_server(tokenizer_folder, tls=context if request.param else None) as server:
        yield server, request.param


def connect(server: Server, *, is_tls: bool, buffer_bytes: int | None = None) -> socket.socket:
    sock = socket.socket()
    if buffer_bytes is not None:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", server.port))
    if not is_tls:
        return sock
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(sock)


def test_pieces_make_the_whole(any_server: tuple[Server, bool]) -> None:
    server, is_tls = any_server
    expected = (site.FOLDER / BUNDLE).read_bytes()
    assert len(expected) > 3 * bounds.PIECE_BYTES
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.sock = connect(server, is_tls=is_tls)
    for method in ("GET", "HEAD", "GET"):  # on one connection
        connection.request(method, f"/static/{BUNDLE}")
        reply = connection.getresponse()
        assert reply.status == 200 and reply.getheader("Content-Length") == str(len(expected))
        assert reply.getheader("Transfer-Encoding") is None
        assert reply.getheader("X-Request-Id")
        assert reply.read() == (b"" if method == "HEAD" else expected)
    connection.close()
    wait_until(lambda: server.connections.num_unread_bytes == 0)


def test_what_is_not_taken_is_counted_and_cut_off(any_server: tuple[Server, bool]) -> None:
    """With TLS too, where asyncio would take all of it and tell nobody."""
    server, is_tls = any_server
    server.connections.write_timeout_s = 0.5
    request = f"GET /static/{BUNDLE} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    size = (site.FOLDER / BUNDLE).stat().st_size
    sockets = []
    for _ in range(3):
        sockets.append(connect(server, is_tls=is_tls, buffer_bytes=4096))
        sockets[-1].sendall(request)
        wait_until(lambda: server.connections.num_unread_bytes >= len(sockets) * size)
    # Of each answer the whole, which is held, and a few pieces in the buffers below.
    assert server.connections.num_unread_bytes < 3 * (size + 2**20)
    wait_until(lambda: len(server.connections) == 0)
    assert server.connections.num_unread_bytes == 0
    for sock in sockets:
        sock.close()
