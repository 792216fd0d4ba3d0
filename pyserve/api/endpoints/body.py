"""A request body: bytes -> checked wire type, plus the names of the fields that have no effect."""

from __future__ import annotations

import codecs
import re
from functools import partial
from typing import Generic, TypeVar

import msgspec
from aiohttp import web

from pyserve import __version__
from pyserve.api.http.cors import is_foreign_page
from pyserve.api.state import ServerState
from pyserve.api.wire import whole_numbers
from pyserve.api.wire.json_size import check_structure
from pyserve.api.wire.protocol import (
    MAX_MESSAGES,
    MAX_PARTS,
    ContentPart,
    Message,
    StreamOptions,
)
from pyserve.errors import InvalidRequestError, NotBuiltError
from pyserve.features import Field, fields_of

IGNORED_HEADER = "x-pyserve-ignored"
SHORT_BODY_BYTES = 2**16  # decoded on the event loop: a few milliseconds at worst
UTF8_PIECE_BYTES = 2**20
MAX_IGNORED_NAMES = 32
MAX_IGNORED_NAME_CHARS = 64

T = TypeVar("T", bound=msgspec.Struct)

_KEYS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_LIST_KEYS = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_PART_KEYS = msgspec.json.Decoder(list[str | dict[str, msgspec.Raw]])
_utf8_decoder = codecs.getincrementaldecoder("utf-8")
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_NULL = b"null"


class Wire(Generic[T]):
    """Decodes one request type; a Decoder is built once, as msgspec compiles the type."""

    def __init__(self, wire_type: type[T]) -> None:
        self._type = wire_type
        self._decoder = msgspec.json.Decoder(wire_type)
        self._known = frozenset(wire_type.__struct_fields__)
        self._rows = fields_of(wire_type)
        self._unused = dict.fromkeys(self._rows)

    async def read(
        self, request: web.Request, state: ServerState, *, max_list_ids: int = 0
    ) -> tuple[T, list[str]]:
        """The request of an HTTP body and the names of its fields that have no effect.

        max_list_ids  the most token ids that one list of them can do with.

        Raises RequestError: not JSON, a wrong type, too large, a field that is not built.
        """
        _check_content_type(request)
        if request.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise InvalidRequestError("a compressed body is not supported")
        async with state.uploads.read(request, max_bytes=state.config.max_body_bytes) as body:
            decode = partial(self.decode, body, max_list_ids=max_list_ids)
            return await state.run_text(request, len(body), decode, short=SHORT_BODY_BYTES)

    def decode(self, body: bytes, *, max_list_ids: int = 0) -> tuple[T, list[str]]:
        """As `read`, from the bytes."""
        body = body.removeprefix(codecs.BOM_UTF8)  # Windows puts one before JSON
        try:
            _check_utf8(body)  # msgspec skips over what it does not keep without looking at it
            check_structure(body, max_list_ids)
            value = self._decode(body)
            ignored = self._check_fields(value, _KEYS.decode(body))
        except UnicodeDecodeError:
            raise InvalidRequestError("the body is not valid UTF-8") from None
        except RecursionError:
            raise InvalidRequestError("the body is nested too deeply") from None
        except msgspec.ValidationError as error:
            raise _wrong_type(error) from None
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
        if len(body) > SHORT_BODY_BYTES:
            # What nobody looks at would be kept for as long as the answer takes.
            value = msgspec.structs.replace(value, **self._unused)
        return value, ignored

    def _decode(self, body: bytes) -> T:
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
            return whole_numbers.decode(body, self._type)

    def _check_fields(self, value: T, given: dict[str, msgspec.Raw]) -> list[str]:
        ignored = _Names()
        for name, raw in given.items():
            if memoryview(raw) == _NULL:
                continue
            row = self._rows.get(name)
            if name not in self._known:
                ignored.add(name)
            elif row is not None:
                said = getattr(value, name)
                if row.is_neutral(said):
                    continue
                if not row.is_ignored and not (row.is_harmless and row.is_harmless(value)):
                    check_built(row, said, name)
                ignored.add(name)
            elif name == "messages":
                _check_counts(value.messages)  # type: ignore[attr-defined]
                _name_inside_messages(raw, ignored)
            elif name == "stream_options":
                _name_unknown(_KEYS.decode(raw), StreamOptions, name, ignored)
        return ignored.names


class _Names:
    """The first of some names, each once: as many as are shown, and one to tell of the others."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @property
    def is_full(self) -> bool:
        return len(self.names) > MAX_IGNORED_NAMES

    def add(self, name: str) -> None:
        if not self.is_full and name not in self.names:
            self.names.append(name)


def _check_content_type(request: web.Request) -> None:
    """JSON, or nothing said; a web page of another origin has to say it.

    Without the header a browser sends a page's request unasked, where it would first ask this
    server (http/cors.py) with it: any page could run prompts through its visitors' browsers.
    """
    default = "" if is_foreign_page(request) else "application/json"
    content_type = request.headers.get("Content-Type", default)
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise InvalidRequestError("the Content-Type must be application/json")


def check_built(row: Field, value: object, path: str) -> None:
    """Refuse the value of a field that is not built unless it asks for nothing."""
    if not row.is_neutral(value):
        raise NotBuiltError(f"{path} is not built yet in pyserve {__version__}, leave it out", path)


def ignored_header(names: list[str]) -> dict[str, str]:
    """The header that names fields without effect; none where there are none."""
    if not names:
        return {}
    unique = sorted(set(names))
    shown = [
        re.sub(r"[^A-Za-z0-9_.-]", "?", name[:MAX_IGNORED_NAME_CHARS])
        for name in unique[:MAX_IGNORED_NAMES]
    ]
    if len(unique) > MAX_IGNORED_NAMES:
        shown.append("...")
    return {IGNORED_HEADER: ", ".join(shown)}


def _check_utf8(body: bytes) -> None:
    """Raises UnicodeDecodeError. In pieces, so that other threads get their turn."""
    decoder = _utf8_decoder()
    for start in range(0, len(body), UTF8_PIECE_BYTES):
        decoder.decode(body[start : start + UTF8_PIECE_BYTES])
    decoder.decode(b"", final=True)


def _check_counts(messages: list[Message] | None) -> None:
    """Refuse too many messages or parts, before anything is done to each of them."""
    messages = messages or []
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(
            f"messages must hold 1 to {MAX_MESSAGES} messages, got {len(messages)}", "messages"
        )
    num_parts = sum(len(m.content) for m in messages if isinstance(m.content, list))
    if num_parts > MAX_PARTS:
        raise InvalidRequestError(
            f"messages hold {num_parts} content parts in all, the limit is {MAX_PARTS}", "messages"
        )


def _name_inside_messages(raw: msgspec.Raw, ignored: _Names) -> None:
    for message in _LIST_KEYS.decode(raw):
        _name_unknown(message, Message, "messages", ignored)
        content = memoryview(message.get("content", b""))
        if bytes(content[:1]) == b"[":
            for part in _PART_KEYS.decode(content):
                if isinstance(part, dict):
                    _name_unknown(part, ContentPart, "messages.content", ignored)


def _name_unknown(
    given: dict[str, msgspec.Raw], wire_type: type[msgspec.Struct], path: str, ignored: _Names
) -> None:
    known = wire_type.__struct_fields__
    for name, raw in given.items():
        if ignored.is_full:
            return
        if name not in known and memoryview(raw) != _NULL:
            ignored.add(f"{path}.{name}")


def _wrong_type(error: msgspec.ValidationError) -> InvalidRequestError:
    text = str(error).replace("Object", "the body")
    match = _PATH.search(text)
    path = match.group(1) if match else ""
    reason = (text[: match.start()] if match else text).replace("`", "")
    missing = re.fullmatch(r"the body missing required field (\w+)", reason)
    if missing:
        name = ".".join(filter(None, [path, missing.group(1)]))
        return InvalidRequestError(f"{name} is missing", name)
    reason = reason[:1].lower() + reason[1:]
    return InvalidRequestError(f"{path or 'the body'}: {reason}", path or None)
