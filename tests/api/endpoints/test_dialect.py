"""An endpoint of another API is a file and a row: its own fields, frames, ends and errors."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from pyserve.api import app
from pyserve.api.endpoints import prompts
from pyserve.api.endpoints.answer import Dialect, Head, answer
from pyserve.api.endpoints.body import Wire
from pyserve.api.endpoints.sampling import Resolver
from pyserve.api.generation import stream
from pyserve.api.generation.generate import Choice, Generation
from pyserve.api.generation.job import Job, Prompt
from pyserve.api.state import STATE
from pyserve.api.wire.protocol import SamplingFields, Usage
from pyserve.errors import EngineError, RequestError
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.parts import Content, Part, content_of
from tests.api.fakes import Script, Server, run_server

PATH = "/v1/ask"


class Ask(msgspec.Struct, frozen=True):
    question: str
    budget: int = 8
    streamed: bool = False


class BySentence:
    """A stage that holds text back until a sentence has ended."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, content: Content) -> Sequence[Part]:
        *sentences, self._held = (self._held + content.text).split(".")
        return [Content(f"{sentence}.") for sentence in sentences]

    def flush(self) -> Sequence[Part]:
        return [Content(self._held)] if self._held else []


class AskFrames:
    def __init__(self, head: Head, job: Job) -> None:
        self._id = head.id

    def begin(self) -> bytes:
        return b""

    def first(self, choice: Choice) -> bytes:
        return f"event: begin\ndata: {self._id}\n\n".encode()

    def part(self, choice: Choice, part: Part) -> bytes:
        assert isinstance(part, Content)
        return f"event: part\ndata: {part.text}\n\n".encode()

    def finish(self, choice: Choice, last: Part | None) -> bytes:
        return (self.part(choice, last) if last else b"") + b"event: finish\ndata: \n\n"

    def end(self, usage: Usage) -> bytes:
        return f"event: end\ndata: {usage.completion_tokens}\n\n".encode()

    def failed(self, error: RequestError) -> bytes:
        return f"event: failed\ndata: {error.message}\n\n".encode()

    def keep_alive(self, choices: Sequence[Choice]) -> bytes:
        return b"event: wait\ndata: \n\n"


def whole(head: Head, generation: Generation) -> bytes:
    return msgspec.json.encode({"say": [content_of(choice.parts) for choice in generation.choices]})


def error_body(error: RequestError) -> bytes:
    return msgspec.json.encode({"trouble": error.message})


WIRE = Wire(Ask)
DIALECT = Dialect(id_prefix="ask-", frames=AskFrames, whole=whole)


async def ask(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    loaded = state.model_with_room(request)
    body, ignored = await WIRE.read(request, state)
    info, tokenizer = loaded.engine.info, loaded.tokenizer
    ids = prompts.encode(
        tokenizer, body.question, add_special_tokens=False, max_model_len=info.max_model_len
    )
    resolver = Resolver(SamplingFields(), info, tokenizer=tokenizer, defaults=loaded.defaults)
    params = resolver.params(
        len(ids), prompt_name="question", max_tokens=body.budget, limit_name="budget", default=8
    )
    job = Job(
        prompts=[Prompt(ids, "", Detokenizer(tokenizer, ids, skip_special_tokens=True))],
        params=[params],
        ending=resolver.ending,
        make_stage=BySentence,
        is_streamed=body.streamed,
        ignored=ignored,
    )
    return await answer(request, loaded.engine, job, DIALECT, arrived_s=time.monotonic())


@pytest.fixture
def asked(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    row = app.Route("POST", PATH, ask, is_of_model=True, error_body=error_body)
    monkeypatch.setattr(app, "ROUTES", (*app.ROUTES, row))
    with run_server(tokenizer_folder) as server:
        server.play("a. b c")
        yield server


def events(server: Server, body: dict[str, object]) -> list[tuple[str, str]]:
    status, _, reply = server.request("POST", PATH, {**body, "streamed": True})
    assert status == 200 and reply.endswith(b"\n\n")
    lines = [event.split("\ndata: ") for event in reply.decode().split("\n\n")[:-1]]
    return [(name.removeprefix("event: "), data) for name, data in lines]


def test_a_stream_in_its_own_words(asked: Server) -> None:
    begin, *others = events(asked, {"question": "x"})
    assert begin[0] == "begin" and begin[1].startswith("ask-")
    num_tokens = len(asked.tokenizer.encode("a. b c", add_special_tokens=False)) + 1
    assert others == [
        ("part", "a."), ("part", " b c"), ("finish", ""), ("end", str(num_tokens)),
    ]  # fmt: skip


def test_a_whole_answer_in_its_own_words(asked: Server) -> None:
    assert asked.post(PATH, {"question": "x"}) == {"say": ["a. b c"]}


def test_errors_in_its_own_words(asked: Server) -> None:
    asked.engine.script = lambda number: Script([80], error=EngineError("a step failed"))
    assert events(asked, {"question": "x"})[-1] == ("failed", "a step failed")
    for body, status, said in (
        ({"question": "x", "budget": 0}, 400, "budget must be at least 1, got 0"),
        ({"budget": 1}, 400, "question is missing"),
        ({"question": "x"}, 500, "a step failed"),
    ):
        got, _, reply = asked.request("POST", PATH, body)
        assert got == status and json.loads(reply) == {"trouble": said}


def test_other_routes_keep_theirs(asked: Server) -> None:
    error = asked.error("/v1/completions", {"prompt": "hi", "max_tokens": 0})
    assert error["param"] == "max_tokens"
    assert asked.error("/v1/asks", {}, 404)["param"] is None


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", PATH, 405), ("POST", f"{PATH}/more", 404), ("POST", f"{PATH}/", 400)],
)
def test_what_lies_under_a_route_speaks_as_it_does(
    asked: Server, method: str, path: str, status: int
) -> None:
    got, _, reply = asked.request(method, path)
    assert got == status and set(json.loads(reply)) == {"trouble"}


def test_a_silent_stream_in_its_own_words(asked: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SILENCE_S", 0.02)
    asked.play("a.", delay_s=0.5, burst=8)
    found = events(asked, {"question": "x"})
    assert found[0] == ("wait", "") and ("part", "a.") in found
