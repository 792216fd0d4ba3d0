"""What came back on a connection, read strictly: HTTP/1.1 answers and what is wrong with them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3}) [\x20-\x7e]*")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\t\x20-\x7e\x80-\xff]*)")
# Of a stream whose events have names.
_LAST_EVENTS = (
    b"message_stop", b"error", b"response.completed", b"response.incomplete",
)  # fmt: skip
_LEAKS = (b"Traceback", b"/pyserve/", b'.py"', b" object at 0x", b"<class", b"site-packages")


class ErrorDetail(msgspec.Struct, forbid_unknown_fields=True):
    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(msgspec.Struct, forbid_unknown_fields=True):
    error: ErrorDetail


class NamedError(msgspec.Struct, forbid_unknown_fields=True):
    message: str
    type: str


class MessagesErrorBody(msgspec.Struct, tag_field="type", tag="error", forbid_unknown_fields=True):
    """As /v1/messages has it."""

    error: NamedError
    request_id: str


_decode_error = msgspec.json.Decoder(ErrorBody).decode
_decode_messages_error = msgspec.json.Decoder(MessagesErrorBody).decode
_MESSAGES_ERROR = b'{"type":"error"'
_decode = msgspec.json.Decoder().decode


@dataclass(slots=True)
class Answer:
    """One whole answer; a body of None: its request was HEAD."""

    status: int
    headers: dict[str, str]
    body: bytes | None

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"

    def problem(self, request: bytes = b"") -> str | None:
        """What an innocent client could not make sense of; None: nothing.

        request  what is answered: an error may repeat a path of the client's own.
        """
        if self.status >= 500 and self.status != 503:
            return f"status {self.status}"
        if "x-injected" in self.headers:
            return "a header that the client made up"
        if self.body is None or self.status in (204, 304):
            return None
        if self.status >= 400:
            return self._error_problem(request)
        kind = self.headers.get("content-type", "")
        try:
            if kind.startswith("application/json"):
                _decode(self.body)
            elif kind.startswith("text/event-stream"):
                _check_stream(self.body)
        except (ValueError, msgspec.MsgspecError) as error:
            return f"a body that is no {kind}: {error}"
        return None

    def _error_problem(self, request: bytes) -> str | None:
        assert self.body is not None
        error: ErrorDetail | NamedError
        try:
            if self.body.startswith(_MESSAGES_ERROR):
                error = _decode_messages_error(self.body).error
            else:
                error = _decode_error(self.body).error
        except msgspec.MsgspecError as wrong:
            return f"status {self.status} without an error object of ours: {wrong}"
        if isinstance(error, ErrorDetail) and error.code != self.status:
            return f"code {error.code} in an answer of status {self.status}"
        if not error.message or not error.type:
            return "an error without a message or a type"
        leaks = (leak for leak in _LEAKS if leak in self.body and leak not in request)
        leak = next(leaks, None)
        return f"an error that shows our insides: {leak!r}" if leak else None


def read_answers(data: bytes, *, heads: int, at_end: bool) -> tuple[list[Answer], bytes]:
    """Whole answers at the start of `data`, and what follows them.

    heads   of the first so many answers only the head comes: they answer HEAD.
    at_end  nothing follows: an answer without a length ends here.

    Raises ValueError where this is no HTTP.
    """
    answers: list[Answer] = []
    position = 0
    while position < len(data):
        end = data.find(b"\r\n\r\n", position)
        if end < 0:
            break
        status, headers = _read_head(data[position:end])
        start = end + 4
        if 100 <= status < 200:  # an interim answer
            position = start
            continue
        is_head = len(answers) < heads
        read = (b"", start) if is_head else _read_body(data, start, status, headers, at_end=at_end)
        if read is None:
            break
        body, position = read
        answers.append(Answer(status, headers, None if is_head else body))
    return answers, data[position:]


def _read_head(head: bytes) -> tuple[int, dict[str, str]]:
    status_line, *lines = head.split(b"\r\n")
    match = _STATUS_LINE.fullmatch(status_line)
    if match is None:
        raise ValueError(f"an answer that is no HTTP: {status_line[:80]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        found = _HEADER_LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"a header line that is none: {line[:80]!r}")
        headers[found[1].decode().lower()] = found[2].decode("latin-1")
    return int(match[1]), headers


def _read_body(
    data: bytes, start: int, status: int, headers: dict[str, str], *, at_end: bool
) -> tuple[bytes, int] | None:
    """The body that starts there and where it ends; None: it is not whole yet."""
    if status in (204, 304):
        return b"", start
    if "transfer-encoding" in headers:
        if "content-length" in headers or headers["transfer-encoding"] != "chunked":
            raise ValueError("an answer with two framings")
        return _read_chunks(data, start)
    if "content-length" in headers:
        end = start + int(headers["content-length"])
        return (data[start:end], end) if len(data) >= end else None
    return (data[start:], len(data)) if at_end else None


def _read_chunks(data: bytes, start: int) -> tuple[bytes, int] | None:
    body = bytearray()
    position = start
    while True:
        line_end = data.find(b"\r\n", position)
        if line_end < 0:
            return None
        size = int(data[position:line_end], 16)
        position = line_end + 2
        if len(data) < position + size + 2:
            return None
        if data[position + size : position + size + 2] != b"\r\n":
            raise ValueError("a chunk that is longer than its size")
        body += data[position : position + size]
        position += size + 2
        if size == 0:
            return bytes(body), position


def _check_stream(body: bytes) -> None:
    """Frames of JSON, then [DONE]; or events that say their names, then one that is the last.

    Raises ValueError or a MsgspecError.
    """
    frames = body.split(b"\n\n")
    if frames.pop():
        raise ValueError("it does not end with a blank line")
    if body.startswith(b"event: "):
        _check_events(frames)
        return
    last = b""
    for frame in frames:
        if frame.startswith(b":"):  # a comment
            continue
        if not frame.startswith(b"data: ") or b"\n" in frame:
            raise ValueError(f"no frame: {frame[:80]!r}")
        if last == b"[DONE]":
            raise ValueError("a frame after [DONE]")
        last = frame[6:]
        if last != b"[DONE]":
            _decode(last)
    if last != b"[DONE]":
        raise ValueError("no [DONE]")


def _check_events(frames: list[bytes]) -> None:
    name = b""
    for frame in frames:
        head, _, data = frame.partition(b"\ndata: ")
        if name in _LAST_EVENTS or not head.startswith(b"event: ") or b"\n" in data:
            raise ValueError(f"no event, or one after the last: {frame[:80]!r}")
        name = head.removeprefix(b"event: ")
        if _decode(data)["type"] != name.decode():
            raise ValueError(f"an event of another type than {name.decode()}")
    if name not in _LAST_EVENTS:
        raise ValueError("the last event is missing")
