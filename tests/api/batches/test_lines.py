"""Lines of a batch: bounded reading, refusals that name their field, one line an answer."""

from __future__ import annotations

import io
import json

import pytest

from pyserve.api.batches.journal import has_failed
from pyserve.api.batches.lines import (
    LINE_HEAD_BYTES,
    BadLineError,
    lines_of,
    make_output,
    read_line,
    some_lines,
)

GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


def refused(data: bytes) -> BadLineError:
    with pytest.raises(BadLineError) as caught:
        read_line(data, max_body_bytes=1000)
    return caught.value


def test_a_line_too_long_is_not_held() -> None:
    text = b"a\n" + b"x" * 5000 + b"\n\n  \nb\n" + b"y" * 50
    file = io.BufferedReader(io.BytesIO(text))
    lines = lines_of(file, max_bytes=10)
    assert some_lines(lines) == [(0, b"a\n"), (1, b"x" * 11), (2, b"b\n"), (3, b"y" * 11)]
    assert some_lines(lines) == []
    error = refused(b"x" * (1001 + LINE_HEAD_BYTES))
    assert "longer than" in str(error) and error.custom_id is None


def test_a_file_of_blank_lines_is_passed_over_by_the_buffer() -> None:
    """Line by line it held the interpreter's lock, and other streams waited."""
    num_lines = 0

    class Counting(io.BufferedReader):
        def readline(self, size: int | None = -1, /) -> bytes:
            nonlocal num_lines
            num_lines += 1
            return super().readline(size)

    file = Counting(io.BytesIO(b"a\n" + b" \n" * 10**6 + b" b\n"))
    assert list(lines_of(file, max_bytes=10)) == [(0, b"a\n"), (1, b"b\n")]
    assert num_lines == 4


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"method": "GET"}, "method", "must be POST, got GET"),
        ({"url": "/v1/models"}, "url", "got /v1/models"),
        ({"url": "x" * 10_000}, "url", "got xxx"),
        ({"body": {"stream": 1}}, "stream", "must not be true"),
        ({"custom_id": "c" * 513}, "custom_id", "513 characters, the limit is 512"),
        ({"custom_id": None}, None, "custom_id"),
        ({"url": 5}, None, "url"),
    ],
)
def test_what_is_refused(change: dict[str, object], param: str | None, words: str) -> None:
    error = refused(json.dumps({**GOOD, **change}).encode())
    assert (error.error.param, error.error.status) == (param, 400)
    assert words in str(error) and len(str(error)) < 400
    assert error.custom_id == (None if "custom_id" in change else "a")


@pytest.mark.parametrize("missing", ["custom_id", "url", "body"])
def test_a_missing_field_is_named(missing: str) -> None:
    error = refused(json.dumps({k: v for k, v in GOOD.items() if k != missing}).encode())
    assert str(error) == f"the line has no {missing}"


@pytest.mark.parametrize("data", [b"[]", b"5", b"{", b'{"custom_id": "\xff"}', b"[" * 10_000])
def test_what_is_no_line(data: bytes) -> None:
    assert refused(data).custom_id is None


def test_a_body_is_handed_on_as_it_is() -> None:
    body = b'{"prompt" : "x",  "stream":false, "n":1e0}'
    data = b'{"custom_id":"a","url":"/v1/completions/","body":' + body + b"}"
    assert bytes(read_line(data, max_body_bytes=1000).body) == body


def test_an_answer_is_one_line_and_tells_whether_it_failed() -> None:
    line = make_output("a", "id", 200, b'{\n"text": "\\n", "error":null}')
    assert line.count(b"\n") == 1 and not has_failed(line)
    assert json.loads(line)["response"]["body"] == {"text": "\n", "error": None}
    line = make_output("a", "id", 500, b'{"error":{"message":"m"}}')
    assert has_failed(line) and json.loads(line)["error"] == {"message": "m"}
    assert json.loads(make_output("a", "id", 400, b'{"type":"error"}'))["error"] == {
        "type": "error"
    }
