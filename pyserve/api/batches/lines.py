"""The lines of batch files: parses requests from input lines, and formats output lines.

in:   {"custom_id", "method", "url", "body"}
out:  {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}

Clients look for an error in one of two places, so it is in both: in `error` as in vLLM, and in the
body of the response as in OpenAI's API.
"""

from __future__ import annotations

import codecs
import secrets
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

import msgspec

from pyserve.api.http.errors import error_body
from pyserve.errors import InvalidRequestError, RequestError
from pyserve.http_client import Reply

# The endpoints that a line may name.
BATCH_PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings",
    "/v1/score", "/v1/rerank",
)  # fmt: skip
MAX_CUSTOM_ID_CHARS = 512
LINE_HEAD_BYTES = 2**16  # of a line, maximum beside its body
READ_BYTES = 2**20  # so many bytes or lines are read at a time
READ_LINES = 64


class BatchLine(msgspec.Struct, frozen=True):
    """One request of a batch; `body` is the JSON of the request body."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class BadLineError(Exception):
    """A line that is not a valid request. `custom_id` is its id, None where it has no valid one."""

    def __init__(self, error: RequestError, custom_id: str | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.custom_id = custom_id


class _Named(msgspec.Struct):
    custom_id: Any = None


class _Streamed(msgspec.Struct):
    stream: Any = None


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Output(msgspec.Struct):
    id: str
    custom_id: str | None
    response: _Response
    error: msgspec.Raw


_decode_line = msgspec.json.Decoder(BatchLine).decode
_decode_named = msgspec.json.Decoder(_Named).decode
_decode_streamed = msgspec.json.Decoder(_Streamed).decode
_NULL = msgspec.Raw(b"null")


def read_line(data: bytes, *, max_body_bytes: int) -> BatchLine:
    """Parse and check a line. Raises BadLineError, whose error names the field at fault."""
    if len(data) > max_body_bytes + LINE_HEAD_BYTES:
        raise _bad(f"the line is longer than {max_body_bytes + LINE_HEAD_BYTES} bytes", None, b"")
    try:
        line = _decode_line(data)
    except msgspec.ValidationError as error:
        raise _bad(_words(error), None, data) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _bad(f"the line is not valid JSON: {reason}", None, b"") from None
    if len(line.custom_id) > MAX_CUSTOM_ID_CHARS:
        raise _bad(
            f"custom_id has {len(line.custom_id)} characters, the limit is {MAX_CUSTOM_ID_CHARS}",
            "custom_id",
            b"",
        )
    if line.method.upper() != "POST":
        raise _bad(f"method must be POST, got {line.method[:20]}", "method", data)
    if line.url.rstrip("/") not in BATCH_PATHS:
        paths = ", ".join(BATCH_PATHS)
        raise _bad(f"url must be one of {paths}, got {line.url[:100]}", "url", data)
    if _is_streamed(line.body):
        raise _bad("stream must not be true in a batch", "stream", data)
    return line


def make_output(custom_id: str | None, request_id: str, status: int, body: bytes) -> bytes:
    """The output line, with its line feed, of a response or an error; `body` is its JSON body."""
    raw = msgspec.Raw(body)
    error = _NULL if status == 200 else _error_in(body)
    response = _Response(status, request_id, raw)
    output = _Output(f"batch_req_{secrets.token_hex(16)}", custom_id, response, error)
    line = msgspec.json.encode(output)
    return (line.replace(b"\n", b"") if b"\n" in line else line) + b"\n"


def refusal(error: BadLineError, request_id: str) -> bytes:
    """The output line of an input line that is not a valid request."""
    return make_output(error.custom_id, request_id, error.error.status, error_body(error.error))


def answer_of(line: BatchLine, request_id: str, reply: Reply) -> bytes:
    """The output line of a reply, whatever its status."""
    return make_output(line.custom_id, request_id, reply.status, reply.body)


def lines_of(file: BufferedReader[Any], *, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, each with its number, counted from 0 without blank lines.

    A line longer than `max_bytes` is cut to max_bytes + 1, so that its length shows what is wrong.
    """
    number = 0
    is_first = True
    while data := file.readline(max_bytes + 1):
        if len(data) > max_bytes and not data.endswith(b"\n"):
            while (rest := file.readline(READ_BYTES)) and not rest.endswith(b"\n"):
                pass
        if is_first:
            data, is_first = data.removeprefix(codecs.BOM_UTF8), False
        if data.strip():
            yield number, data
            number += 1
        else:
            _pass_over_blanks(file)


def _pass_over_blanks(file: BufferedReader[Any]) -> None:
    """Skip white space, a buffer at a time.

    Line by line, a file of nothing but blank lines would hold the GIL for long.
    """
    while ahead := file.peek():
        num_blanks = len(ahead) - len(ahead.lstrip())
        file.read(num_blanks)
        if num_blanks < len(ahead):
            break


def max_line_bytes(max_body_bytes: int) -> int:
    """Maximum size of a line, for a maximum size of its request body."""
    return max_body_bytes + LINE_HEAD_BYTES


def some_lines(lines: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """The next few lines, up to READ_LINES or about READ_BYTES; empty at the end."""
    found, num_bytes = [], 0
    for number, data in lines:
        found.append((number, data))
        num_bytes += len(data)
        if len(found) >= READ_LINES or num_bytes >= READ_BYTES:
            break
    return found


def _is_streamed(body: msgspec.Raw) -> bool:
    try:
        return bool(_decode_streamed(body).stream)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False  # the endpoint will say what is wrong with the body


def _error_in(body: bytes) -> msgspec.Raw:
    """The `error` object of an error body; the body itself where it has none."""
    try:
        found = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return msgspec.Raw(body)
    return found.get("error", msgspec.Raw(body))


def _words(error: msgspec.ValidationError) -> str:
    """msgspec's message, reworded for a line of a batch."""
    text = str(error).replace("Object missing", "the line has no").replace("`", "")
    text = text.replace("Expected object, got", "the line must be a JSON object, not")
    return text.replace("required field ", "").replace("$.", "")


def _bad(message: str, param: str | None, data: bytes) -> BadLineError:
    custom_id = None
    if data:
        try:
            custom_id = _decode_named(data).custom_id
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            pass
    is_named = isinstance(custom_id, str) and len(custom_id) <= MAX_CUSTOM_ID_CHARS
    return BadLineError(InvalidRequestError(message, param), custom_id if is_named else None)
