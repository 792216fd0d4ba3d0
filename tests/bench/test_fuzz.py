"""The fuzzer: the same bytes from the same seed, and nothing wrong goes unnoticed."""

from __future__ import annotations

import asyncio
import json

import pytest

from bench.answers import read_answers
from bench.fuzz import run_case
from bench.hostile import FAMILIES, Case, get, make_case
from bench.hostile_grammars import MAKERS as GRAMMAR_MAKERS
from bench.hostile_large import MAKERS
from bench.hostile_structured import MAKERS as STRUCTURED_MAKERS
from bench.hostile_templates import MAKERS as TEMPLATE_MAKERS
from bench.hostile_templates import crafted_pairs
from pyserve.http_client import Endpoint

EVENTS = "Content-Type: text/event-stream"
ERROR = b'{"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}'


def answer(status: int, body: bytes = b"", *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} x", *headers, f"Content-Length: {length or len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def problem_of(reply: bytes, **options: object) -> str | None:
    """What is wrong with `reply`, sent by a server that then hangs up."""
    case = Case(0, "test", "test", [get("/")], **options)  # type: ignore[arg-type]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        writer.close()

    async def run() -> str | None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            _, problem, _ = await run_case(Endpoint("127.0.0.1", port), case)
            return problem

    return asyncio.run(run())


def test_cases_come_from_the_seed_alone() -> None:
    cases = [make_case(3, number) for number in range(2000)]
    again = [make_case(3, number) for number in reversed(range(2000))]
    assert [case.pieces for case in cases] == [case.pieces for case in reversed(again)]
    assert {case.family for case in cases} == set(FAMILIES)
    assert len({case.request for case in cases}) > 1000
    assert cases[5].pieces != make_case(4, 5).pieces


def test_sound_answers_pass() -> None:
    assert problem_of(answer(400, ERROR)) is None
    assert problem_of(answer(200, b"{}", "Content-Type: application/json")) is None
    named = b'{"type":"error","error":{"type":"x","message":"no"},"request_id":"r"}'
    assert problem_of(answer(400, named)) is None
    events = b'event: ping\ndata: {"type":"ping"}\n\nevent: error\ndata: ' + named + b"\n\n"
    assert problem_of(answer(200, events, EVENTS)) is None
    stream = b": wait\n\ndata: {}\n\ndata: [DONE]\n\n"
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(stream), stream)
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    assert problem_of(head + chunks) is None
    assert problem_of(b"HTTP/1.1 100 Continue\r\n\r\n" + answer(400, ERROR)) is None
    assert problem_of(answer(200, b"", length=5), heads=1) is None
    assert problem_of(answer(400, ERROR, "Connection: close"), num_answers=3) is None
    assert problem_of(b"", num_answers=0) is None


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (b"", "closed without an answer"),
        (b"garbage\r\n\r\n", "no HTTP"),
        (b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n", "no HTTP"),
        (answer(500, ERROR), "status 500"),
        (answer(400, b"Bad Request"), "error object"),
        (answer(400, ERROR.replace(b"400", b"404")), "code 404"),
        (answer(400, ERROR.replace(b'"no"', b'""')), "without a message"),
        (answer(400, ERROR.replace(b"no", b"Traceback")), "insides"),
        (answer(400, ERROR[:-1] + b',"x":1}'), "error object"),
        (answer(400, ERROR, "X-Injected: 1"), "made up"),
        (answer(400, ERROR, "bad line"), "a header line"),
        (answer(200, ERROR, length=500), "in the middle"),
        (answer(200, b"{", "Content-Type: application/json"), "no application/json"),
        (answer(200, b"data: {}\n\n", "Content-Type: text/event-stream"), "no [DONE]"),
        (answer(200, b"data: {\n\n", "Content-Type: text/event-stream"), "text/event-stream"),
        (answer(200, b'event: a\ndata: {"type":"a"}\n\n', EVENTS), "the last event is missing"),
        (answer(200, b'event: a\ndata: {"type":"b"}\n\n', EVENTS), "of another type"),
        (answer(200, b"event: a\ndata: {\n\n", EVENTS), "text/event-stream"),
        (answer(400, b'{"type":"error","error":{}}'), "error object"),
        (answer(400, ERROR) * 2, "2 answers, asked for 1"),
        (answer(401, ERROR.replace(b"400", b"401")), "status 401, may be 400 or 404"),
    ],
)
def test_what_is_wrong_is_named(reply: bytes, text: str) -> None:
    assert text in str(problem_of(reply, wanted=(400, 404)))


def test_an_error_may_repeat_what_was_sent() -> None:
    reply = answer(404, ERROR.replace(b"400", b"404").replace(b"no", b"no GET /pyserve/x"))
    (whole,), _ = read_answers(reply, heads=0, at_end=True)
    assert whole.problem(b"GET /pyserve/x HTTP/1.1\r\n\r\n") is None
    assert "insides" in str(whole.problem(b"GET /x HTTP/1.1\r\n\r\n"))


def test_a_pipeline_that_is_cut_off_must_be_announced() -> None:
    assert "unannounced" in str(problem_of(answer(400, ERROR) * 2, num_answers=3))


def test_answers_are_read_from_the_start_as_far_as_they_go() -> None:
    whole = answer(200, b"one") + answer(404, b"two")
    for end in range(len(whole)):
        answers, rest = read_answers(whole[:end], heads=0, at_end=False)
        assert len(answers) == (end >= len(answer(200, b"one")))
        assert whole[:end].endswith(rest)
    answers, rest = read_answers(whole, heads=0, at_end=False)
    assert [(a.status, a.body) for a in answers] == [(200, b"one"), (404, b"two")] and rest == b""


def test_one_family_alone() -> None:
    cases = [make_case(3, number, "large") for number in range(200)]
    assert {case.family for case in cases} == {"large"}
    kinds = {case.name.partition(",")[0] for case in cases}
    assert kinds == set(MAKERS)
    assert all(case.wanted == (200, 400, 429) or not case.num_answers for case in cases)
    assert max(len(case.request) for case in cases) < 2**25, "a body of 32 MB is a 413"


def test_chats_against_templates() -> None:
    cases = [make_case(3, number, "template") for number in range(300)]
    assert {case.name for case in cases} == set(TEMPLATE_MAKERS)
    assert all(case.wanted == (200, 400, 429) for case in cases)
    bodies = [json.loads(case.request.partition(b"\r\n\r\n")[2]) for case in cases]
    sources = [body["chat_template"] for body in bodies if "chat_template" in body]
    assert sources and max(map(len, sources)) < 2**16, "a longer template is refused unread"
    pairs = crafted_pairs(50, target=7)
    assert len(set(pairs)) == 50 and len(set(map(hash, pairs))) == 1


def test_hostile_grammars() -> None:
    cases = [make_case(3, number, "grammar") for number in range(400)]
    assert {case.name.partition(",")[0] for case in cases} == set(GRAMMAR_MAKERS)
    assert all(case.wanted == (200, 400, 429) for case in cases)
    bodies = [json.loads(case.request.partition(b"\r\n\r\n")[2]) for case in cases]
    used = {name for body in bodies for name in body}
    assert {"response_format", "structured_outputs", "tools", "tool_choice"} <= used
    assert {"guided_json", "guided_regex", "guided_choice", "guided_grammar"} <= used


def test_structured_outputs_are_asked_for_in_every_way() -> None:
    cases = [make_case(3, number, "structured") for number in range(400)]
    assert {case.name for case in cases} == set(STRUCTURED_MAKERS)
    bodies = [json.loads(case.request.partition(b"\r\n\r\n")[2]) for case in cases]
    fields = {field for body in bodies for field in body}
    assert fields >= {
        "tools", "response_format", "structured_outputs", "guided_json", "guided_regex",
        "guided_choice", "guided_grammar", "allowed_token_ids", "bad_words", "prompt", "messages",
    }  # fmt: skip
    assert {case.wanted for case in cases} == {(400, 429, 503), (200, 400, 429, 503)}
