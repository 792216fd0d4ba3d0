"""Every integer of every request may be written with a point; no fraction and no text is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from pyserve.api.endpoints.body import Wire
from pyserve.api.wire.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    TokenizeRequest,
)
from pyserve.errors import InvalidRequestError
from tests.api.fakes import Server

REQUESTS: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
MESSAGES = '[{"role": "user", "content": "hi"}]'
NEEDED = {ChatRequest: f'"messages": {MESSAGES}, ', DetokenizeRequest: '"tokens": [1], '}


def shapes(kind: inspect.Type, shape: str = "%s") -> Iterator[str]:
    """Where integers may stand in a value: "%s", "[%s]", "[[%s]]"."""
    if isinstance(kind, inspect.IntType):
        yield shape
    elif isinstance(kind, inspect.UnionType):
        for one in kind.types:
            yield from shapes(one, shape)
    elif isinstance(kind, inspect.ListType):
        yield from shapes(kind.item_type, shape % "[%s]")


def integer_fields() -> list[tuple[str, str, str]]:
    """(path, field, shape) of every integer in a wire type."""
    found = []
    for path, wire_type in REQUESTS.items():
        described = inspect.type_info(wire_type)
        assert isinstance(described, inspect.StructType)
        for field in described.fields:
            found += [(path, field.encode_name, shape) for shape in shapes(field.type)]
    return found


FIELDS = integer_fields()


def decode(path: str, name: str, raw: str) -> Any:
    wire_type = REQUESTS[path]
    needed = NEEDED.get(wire_type, "") if name != "tokens" else ""
    return Wire(wire_type)._decode(f'{{{needed}"{name}": {raw}}}'.encode())[0]


def test_the_table_is_whole() -> None:
    names = {name for _, name, _ in FIELDS}
    assert names >= {"max_tokens", "max_completion_tokens", "n", "top_k", "seed", "min_tokens",
                     "stop_token_ids", "prompt", "tokens", "truncate_prompt_tokens", "priority",
                     "best_of", "logprobs", "top_logprobs"}  # fmt: skip
    assert {shape for _, name, shape in FIELDS if name == "prompt"} == {"[%s]", "[[%s]]"}


@pytest.mark.parametrize(("path", "name", "shape"), FIELDS)
def test_a_whole_number_is_an_integer(path: str, name: str, shape: str) -> None:
    for written, meant in (
        ("1024.0", "1024"), ("1e3", "1000"), ("1.5E+1", "15"), ("-0.0", "0"), ("2.50e1", "25"),
        ("-3.0", "-3"), ("9007199254740993.0", "9007199254740993"), ("1e18", str(10**18)),
    ):  # fmt: skip
        got = decode(path, name, shape % written)
        assert got == decode(path, name, shape % meant)
        assert ".0" not in repr(getattr(got, name))
    mixed = shape.replace("%s", "%s, %s") if "[" in shape else None
    if mixed:
        assert decode(path, name, mixed % ("7", "8.0")) == decode(path, name, mixed % ("7", "8"))


@pytest.mark.parametrize(("path", "name", "shape"), FIELDS)
def test_what_is_no_whole_number_is_refused_by_name(path: str, name: str, shape: str) -> None:
    for raw, words in (
        ("10.5", "must be a whole number, got 10.5"), ("1e-3", "must be a whole number, got 0.001"),
        ("1e999", "out of range"), ("-1e400", "out of range"), ("1" * 5000, "out of range"),
    ):  # fmt: skip
        body = f'{{{NEEDED.get(REQUESTS[path], "")}"{name}": {shape % raw}}}'
        with pytest.raises(InvalidRequestError, match=words) as caught:
            Wire(REQUESTS[path]).decode(body.encode())
        assert (caught.value.param or "").startswith(name)
    if (name, shape) != ("prompt", "[%s]"):  # a list of texts there
        for raw in ('"10"', '"10.0"', "true"):
            body = f'{{{NEEDED.get(REQUESTS[path], "")}"{name}": {shape % raw}}}'
            if (name, raw) == ("logprobs", "true"):
                continue  # a switch of chats
            with pytest.raises(InvalidRequestError, match="got (str|bool)") as caught:
                Wire(REQUESTS[path]).decode(body.encode())
            assert (caught.value.param or "").startswith(name)


def test_fractions_stay_where_numbers_may_have_them() -> None:
    raw = (
        f'{{"messages": {MESSAGES}, "max_tokens": 5.0, "temperature": 1.0, "top_p": 0.5, '
        '"logit_bias": {"7": 1.0, "8": 2.5}, "documents": [{"a": [1.0, 2, {"b": 3.5}]}], '
        '"chat_template_kwargs": {"x": 1.0, "y": 12345678901234567890.0}, "stop": ["1.0"]}'
    )
    got, _ = Wire(ChatRequest).decode(raw.encode())
    slow = msgspec.structs.asdict(got)
    fast = msgspec.structs.asdict(Wire(ChatRequest).decode(raw.replace("5.0", "5").encode())[0])
    assert repr(slow) == repr(fast) and slow["max_tokens"] == 5
    assert isinstance(got.messages[0], Message)


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ('"temperature": 1e999', "temperature", "out of range"),
        ('"logit_bias": {"5": -1e999}', "logit_bias[...]", "out of range"),
        ('"temperature": "1.0"', "temperature", "got str"),
        ('"stop_token_ids": [1, 1e999]', "stop_token_ids[1]", "out of range"),
        ('"stream": 1.0', "stream", "expected bool | null, got float"),
        ('"user": 1.0', "user", "got float"),
    ],
)
def test_beside_a_point_all_else_is_checked_as_ever(extra: str, param: str, words: str) -> None:
    raw = f'{{"messages": {MESSAGES}, "max_tokens": 5.0, {extra}}}'
    with pytest.raises(InvalidRequestError) as caught:
        Wire(ChatRequest).decode(raw.encode())
    assert caught.value.param == param and words in caught.value.message


@pytest.mark.parametrize("body", [b"1.0", b"[1.0]", b'{"messages": 1.0}', b'{"messages": [1.0]}'])
def test_a_number_where_none_may_be(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="expected (object|array)"):
        Wire(ChatRequest).decode(body)


def test_they_reach_the_engine(server: Server) -> None:
    raw = (
        b'{"prompt": [80.0, 8.1e1], "max_tokens": 4e0, "top_k": 5.0, "seed": -2.0, "n": 1.0, '
        b'"min_tokens": 1.0, "stop_token_ids": [9.0], "priority": 0.0, "top_p": 1e-05}'
    )
    status, headers, reply = server.request("POST", "/v1/completions", raw)
    assert status == 200, reply
    (item,) = server.engine.submitted
    params = item.params
    assert item.prompt == [80, 81] and 9 in params.stop_token_ids
    assert (params.max_tokens, params.top_k, params.seed, params.min_tokens) == (4, 5, -2, 1)
    assert params.top_p == 1e-5 and "x-pyserve-ignored" not in headers
    answer = server.post("/detokenize", b'{"tokens": [80.0, 81.0]}')
    assert answer == server.post("/detokenize", {"tokens": [80, 81]})
    answer = server.post("/tokenize", b'{"prompt": "a b c d", "truncate_prompt_tokens": 2.0}')
    assert answer["count"] == 2
    error = server.error("/v1/completions", {"prompt": "x", "max_tokens": 1.5})
    assert error["param"] == "max_tokens"
