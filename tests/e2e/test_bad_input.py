"""Hostile input is boring: a clear 4xx that names the field, and the next request is served."""

from __future__ import annotations

import itertools
import json
import socket
from typing import Any

import pytest

from tests.e2e.conftest import Server

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hello!"}]
HEAD = b'{"messages": [{"role": "user", "content": "x"}], '


def raw(**fields: Any) -> bytes:
    return json.dumps({"model": "pyserve-demo", "max_tokens": 4, **fields}).encode()


BODIES: list[tuple[str, str, bytes, int, str]] = [
    ("malformed", CHAT, b'{"model": ', 400, ""),
    ("not an object", CHAT, b"[1, 2]", 400, ""),
    ("empty body", CHAT, b"", 400, ""),
    ("invalid utf-8", CHAT, b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400, ""),
    ("nesting", CHAT, b"[" * 10_000 + b"]" * 10_000, 400, ""),
    ("nested object", CHAT, b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400, ""),
    ("nested unknown", CHAT, raw(messages=MESSAGES)[:-1] + b', "x":' + b"[" * 10_000 + b"]" * 10_000
     + b"}", 400, ""),
    ("unknown model", CHAT, raw(model="nobody", messages=MESSAGES), 404, "nobody"),
    ("no messages", CHAT, raw(), 400, "messages"),
    ("empty messages", CHAT, raw(messages=[]), 400, "messages"),
    ("messages of a wrong type", CHAT, raw(messages="hi"), 400, "messages"),
    ("role of a wrong type", CHAT, raw(messages=[{"role": 3, "content": "x"}]), 400, "role"),
    ("image part", CHAT, raw(messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]), 400, "image_url"),
    ("NaN", CHAT, HEAD + b'"temperature": NaN}', 400, ""),
    ("Infinity", CHAT, HEAD + b'"top_p": Infinity}', 400, ""),
    ("1e999", CHAT, HEAD + b'"temperature": 1e999}', 400, ""),
    ("negative temperature", CHAT, raw(messages=MESSAGES, temperature=-1), 400, "temperature"),
    ("huge top_k", CHAT, raw(messages=MESSAGES, top_k=2**70), 400, "top_k"),
    ("float top_k", CHAT, raw(messages=MESSAGES, top_k=1.5), 400, "top_k"),
    ("zero max_tokens", CHAT, raw(messages=MESSAGES, max_tokens=0), 400, "max_tokens"),
    ("fraction of a token", CHAT, raw(messages=MESSAGES, max_tokens=10.5), 400, "max_tokens"),
    ("huge n", CHAT, raw(messages=MESSAGES, n=10**9), 400, "n"),
    ("many stops", CHAT, raw(messages=MESSAGES, stop=["x"] * 5000), 400, "stop"),
    ("empty stop", CHAT, raw(messages=MESSAGES, stop=[""]), 400, "stop"),
    ("bias of an unknown token", CHAT, raw(messages=MESSAGES, logit_bias={"99999999": 1}), 400,
     "logit_bias"),
    ("bias of a word", CHAT, raw(messages=MESSAGES, logit_bias={"word": 1}), 400, "logit_bias"),
    ("seed out of range", CHAT, raw(messages=MESSAGES, seed=2**64), 400, "seed"),
    ("stop token out of range", CHAT, raw(messages=MESSAGES, stop_token_ids=[2**40]), 400,
     "stop_token_ids"),
    ("no token allowed", CHAT, raw(messages=MESSAGES, allowed_token_ids=[]), 400,
     "allowed_token_ids"),
    ("unknown token allowed", CHAT, raw(messages=MESSAGES, allowed_token_ids=[1, 2**40]), 400,
     "allowed_token_ids"),
    ("allowed words", CHAT, raw(messages=MESSAGES, allowed_token_ids=["x"]), 400,
     "allowed_token_ids"),
    ("empty bad word", CHAT, raw(messages=MESSAGES, bad_words=["x", ""]), 400, "bad_words"),
    ("one bad word", CHAT, raw(messages=MESSAGES, bad_words="x"), 400, "bad_words"),
    ("many bad words", COMPLETIONS, raw(prompt="x", bad_words=["x"] * 5000), 400, "bad_words"),
    ("negative thinking budget", CHAT, raw(messages=MESSAGES, thinking_token_budget=-2), 400,
     "thinking_token_budget"),
    ("thinking budget without a parser", CHAT, raw(messages=MESSAGES, thinking_token_budget=2), 400,
     "reasoning-parser"),
    ("tools without a parser", CHAT, raw(messages=MESSAGES, tools=[{"type": "function",
        "function": {"name": "f"}}]), 400, "--tool-call-parser"),
    ("too many logprobs", CHAT, raw(messages=MESSAGES, logprobs=True, top_logprobs=21), 400,
     "top_logprobs"),
    ("schema without a schema", CHAT, raw(messages=MESSAGES, response_format={
        "type": "json_schema"}), 400, "response_format"),
    ("empty prompt", COMPLETIONS, raw(prompt=""), 400, "prompt"),
    ("empty ids", COMPLETIONS, raw(prompt=[]), 400, "prompt"),
    ("negative id", COMPLETIONS, raw(prompt=[-1]), 400, "prompt"),
    ("id out of range", COMPLETIONS, raw(prompt=[10**8]), 400, "prompt"),
    ("huge id", COMPLETIONS, raw(prompt=[2**80]), 400, "prompt"),
    ("mixed prompt", COMPLETIONS, raw(prompt=[1, "x"]), 400, "prompt"),
    ("over-long prompt", COMPLETIONS, raw(prompt="word " * 20_000), 400, "max"),
    ("prompt missing", COMPLETIONS, raw(), 400, "prompt"),
    ("suffix is not built", COMPLETIONS, raw(prompt="x", suffix="y"), 400, "suffix"),
    ("unknown route", "/v1/nothing", raw(), 404, ""),
    ("detokenize out of range", "/detokenize", raw(tokens=[10**9]), 400, "tokens"),
    ("tokenize without prompt", "/tokenize", raw(), 400, "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "names"), [c[1:] for c in BODIES], ids=[c[0] for c in BODIES]
)
def test_refused_in_words_and_the_server_lives(
    server: Server, path: str, body: bytes, status: int, names: str
) -> None:
    got, reply = server.request("POST", path, body)
    assert got == status, reply
    error = json.loads(reply)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and names in f"{error['param']} {error['message']}"
    for leak in ("Traceback", "/pyserve/", ".py", " object at 0x", "<class"):
        assert leak not in error["message"]
    assert server.get("/health")[0] == 200


def test_50_mb_body(server: Server) -> None:
    status, reply = server.request("POST", CHAT, b" " * 50_000_000)
    assert status == 413
    assert "33554432" in json.loads(reply)["error"]["message"]


def test_wrong_verb(server: Server) -> None:
    status, reply = server.request("GET", CHAT)
    assert status == 405
    assert json.loads(reply)["error"]["type"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"b" * 100_000 + b"\r\n\r\n",
    ],
    ids=["tls", "version", "length", "long path", "long header"],
)
def test_broken_http(server: Server, request_bytes: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        sock.sendall(request_bytes)
        reply = sock.recv(4096)
    assert reply.split(b" ")[1] in (b"400", b"404", b"414", b"431"), reply
    assert server.get("/health")[0] == 200


def test_half_a_body_is_no_request(server: Server) -> None:
    before = server.metric("vllm:prompt_tokens_total")
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        body = raw(prompt="Hello")
        head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % (len(body) + 1) + body)
    assert server.get("/health")[0] == 200
    assert server.metric("vllm:prompt_tokens_total") == before


def test_the_neighbour_is_untouched(server: Server) -> None:
    """A stream that runs while hostile requests arrive gives what it gives alone."""
    client = server.client()
    arguments: dict[str, Any] = {
        "model": "pyserve-demo", "prompt": "Repeat: a b c", "max_tokens": 200, "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    alone = client.completions.create(**arguments).choices[0].text
    pieces = []
    hostile = itertools.cycle(BODIES)
    for chunk in client.completions.create(**arguments, stream=True):
        pieces.append(chunk.choices[0].text)
        _, path, body, status, _ = next(hostile)
        assert server.request("POST", path, body)[0] == status
    assert "".join(pieces) == alone
