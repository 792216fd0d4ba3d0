"""Requests that aiohttp would take and should not, and clients that leave in the middle of one."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path

import pytest
from aiohttp import http_parser

from tests.api.fakes import Server, run_server
from tests.waiting import wait_until

CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def exchange(server: Server, sent: bytes) -> bytes:
    """What comes until the server hangs up."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(sent)
        while piece := sock.recv(65536):
            received += piece
    return received


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"GET /health HTTP/2.0\r\nHost: x\r\n\r\n", "HTTP/1.1"),
        (b"GET /health HTTP/0.9\r\nHost: x\r\n\r\n", "HTTP/1.1"),
        (b"GET /health\r\n\r\n", "HTTP/1.1"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nExpect: 200-ok\r\n\r\n", "Expect"),
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\nExpect: 100-continue, x\r\n\r\n", "Expect"),
    ],
    ids=["2.0", "0.9", "none", "expect", "expects two"],
)
def test_what_is_not_spoken_is_refused_in_http_1(server: Server, sent: bytes, words: str) -> None:
    head, _, body = exchange(server, sent).partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] in (b"HTTP/1.0 400 Bad Request", b"HTTP/1.1 400 Bad Request")
    error = json.loads(body)["error"]
    assert words in error["message"] and error["code"] == 400


def test_requests_before_a_refused_one_are_answered(server: Server) -> None:
    good = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    reply = exchange(server, good * 2 + b"GET /health HTTP/2.0\r\n\r\n")
    assert reply.count(b"HTTP/1.1 200") == 2
    assert reply.count(b" 400 Bad Request") == 1


def test_an_announced_body_is_asked_for(server: Server) -> None:
    body = json.dumps({"prompt": "hi"}).encode()
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(head)
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert sock.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("is_reset", [True, False], ids=["reset", "closed"])
def test_a_client_that_leaves_in_its_body_is_no_error_of_ours(
    server: Server, caplog: pytest.LogCaptureFixture, is_reset: bool
) -> None:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    sock.sendall(CHAT + b'Content-Length: 100\r\n\r\n{"messages":')
    wait_until(lambda: server.state.num_in_flight)  # the body is being waited for
    if is_reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    wait_until(lambda: not server.state.num_in_flight)
    assert server.request("GET", "/health")[0] == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("is_there", [True, False])
def test_a_start_without_the_c_parser_is_warned_of(
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_there: bool,
) -> None:
    parser = object() if is_there else http_parser.HttpRequestParserPy
    monkeypatch.setattr(http_parser, "HttpRequestParser", parser)
    with run_server(tokenizer_folder):
        pass
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    remedies = ["Unset AIOHTTP_NO_EXTENSIONS" in line and "pip install" in line for line in said]
    assert remedies == ([] if is_there else [True])
