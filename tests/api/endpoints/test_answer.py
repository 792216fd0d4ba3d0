"""A token limit beyond the context is cut to what the prompt leaves, and a header says so."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.fakes import CONTEXT, Server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
PROMPT = [80] * 100
HEADER = "x-pyserve-clamped"
CASES: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": MESSAGES}, "max_tokens"),
    (CHAT, {"messages": MESSAGES}, "max_completion_tokens"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1}, "max_completion_tokens"),
    (COMPLETIONS, {"prompt": PROMPT}, "max_tokens"),
    (COMPLETIONS, {"prompt": "Hello world", "echo": True}, "max_tokens"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("path", "body", "name"), CASES)
def test_the_header_says_what_is_left(
    server: Server, path: str, body: dict[str, Any], name: str, n: int, stream: bool
) -> None:
    for asked in (b"512", b"32000", b"1e9", b"32000.0", b"9" * 300):
        server.play("Hello")
        raw = json.dumps({**body, "n": n, "stream": stream, name: 0}).encode()
        raw = raw.replace(b'"%b": 0}' % name.encode(), b'"%b": %b}' % (name.encode(), asked))
        status, headers, reply = server.request("POST", path, raw)
        assert status == 200, reply
        left = CONTEXT - len(server.engine.submitted[0].prompt)
        assert headers[HEADER] == f"{name}={left}"
        assert [item.params.max_tokens for item in server.engine.submitted] == [left] * n


def test_an_answer_fills_the_context_and_no_more(server: Server) -> None:
    server.play("fox ", eos=False, burst=50)
    whole = server.post(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 32000, "ignore_eos": True})
    assert whole["usage"]["total_tokens"] == CONTEXT
    assert whole["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": MESSAGES}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 7}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 99999, "max_completion_tokens": 7}),
        (COMPLETIONS, {"prompt": PROMPT}),
        (COMPLETIONS, {"prompt": PROMPT, "max_tokens": CONTEXT - len(PROMPT)}),
        (COMPLETIONS, {"prompt": [80] * (CONTEXT - 2)}),  # the default of 16 is nobody's wish
        (COMPLETIONS, {"prompt": "hi", "echo": True, "max_tokens": 0}),
    ],
)
def test_what_fits_or_was_not_asked_for_is_not_clamped(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    for stream in (False, True):
        status, headers, _ = server.request("POST", path, {**body, "stream": stream})
        assert status == 200 and HEADER not in headers


def test_each_prompt_has_its_own_rest(server: Server) -> None:
    """The header names the least of them."""
    body = {"prompt": [[80] * 12, [80] * 112, [80] * 62], "max_tokens": 450, "n": 2}
    _, headers, _ = server.request("POST", COMPLETIONS, body)
    limits = [item.params.max_tokens for item in server.engine.submitted]
    assert limits == [450, 450, 400, 400, 450, 450] and headers[HEADER] == "max_tokens=400"


@pytest.mark.parametrize("max_tokens", [None, 1, 32000])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prompt_that_does_not_fit_is_refused(
    server: Server, max_tokens: int | None, stream: bool
) -> None:
    for path, body, name in (
        (COMPLETIONS, {"prompt": [80] * CONTEXT}, "prompt"),
        (COMPLETIONS, {"prompt": [[80], [80] * (CONTEXT + 7)]}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "fox " * CONTEXT}]}, "messages"),
    ):
        error = server.error(path, {**body, "max_tokens": max_tokens, "stream": stream})
        assert error["param"] == name
        assert f"maximum context length is {CONTEXT} tokens: the prompt has " in error["message"]
    assert server.engine.submitted == []


def test_truncation_to_what_leaves_room_cuts_nothing_for_a_limit_that_leaves_none(
    server: Server,
) -> None:
    """Else an agent that sends 32000 blindly would have all of its prompt cut off but a token."""
    body: dict[str, Any] = {"truncate_prompt_tokens": -1, "max_tokens": 32000}
    server.post(COMPLETIONS, {**body, "prompt": PROMPT})
    assert server.engine.submitted[-1].prompt == PROMPT
    error = server.error(COMPLETIONS, {**body, "prompt": [80] * (CONTEXT + 5)})
    assert f"the prompt has {CONTEXT + 5}" in error["message"]
    for name in ("max_tokens", "max_completion_tokens"):
        body = {"truncate_prompt_tokens": -1, name: CONTEXT, "messages": MESSAGES}
        _, headers, _ = server.request("POST", CHAT, body)
        assert headers[HEADER].startswith(f"{name}=")
