"""A request body: bytes -> checked wire type, plus the names of the fields that have no effect."""

from __future__ import annotations

import re
from typing import Generic, TypeVar

import msgspec
from aiohttp import web

from pyserve import __version__
from pyserve.api.protocol import NO_EFFECT, NOT_BUILT, ContentPart, Message, StreamOptions
from pyserve.errors import BodyTooLargeError, InvalidRequestError, NotBuiltError

IGNORED_HEADER = "x-pyserve-ignored"
MAX_IGNORED_NAMES = 32
MAX_IGNORED_NAME_CHARS = 64

T = TypeVar("T", bound=msgspec.Struct)

_KEYS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_LIST_KEYS = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_NULL = b"null"


class Wire(Generic[T]):
    """Decodes one request type; a Decoder is built once, as msgspec compiles the type."""

    def __init__(self, wire_type: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(wire_type)
        self._known = frozenset(wire_type.__struct_fields__)

    async def read(self, request: web.Request, max_bytes: int) -> tuple[T, list[str]]:
        """The request of an HTTP body and the names of its fields that have no effect.

        Raises RequestError: not JSON, a wrong type, over `max_bytes`, a field that is not built.
        """
        content_type = request.headers.get("Content-Type", "application/json")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise InvalidRequestError("the Content-Type must be application/json")
        if request.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise InvalidRequestError("a compressed body is not supported")
        if (request.content_length or 0) > max_bytes:
            raise _too_large(max_bytes)
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise _too_large(max_bytes) from None
        except web.RequestPayloadError:
            raise InvalidRequestError("the body is cut off or badly encoded") from None
        return self.decode(body)

    def decode(self, body: bytes) -> tuple[T, list[str]]:
        """As `read`, from the bytes."""
        try:
            body.decode()  # msgspec skips over what it does not keep without looking at it
            value = self._decoder.decode(body)
            ignored = self._check_fields(value, _KEYS.decode(body))
        except UnicodeDecodeError:
            raise InvalidRequestError("the body is not valid UTF-8") from None
        except RecursionError:
            raise InvalidRequestError("the body is nested too deeply") from None
        except msgspec.ValidationError as error:
            raise _wrong_type(error) from None
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
        return value, ignored

    def _check_fields(self, value: T, given: dict[str, msgspec.Raw]) -> list[str]:
        ignored = []
        for name, raw in given.items():
            if memoryview(raw) == _NULL:
                continue
            if name not in self._known or (
                name in NO_EFFECT and not _is_among(getattr(value, name), NO_EFFECT[name])
            ):
                ignored.append(name)
            elif name in NOT_BUILT:
                check_built(name, getattr(value, name), name)
            elif name == "messages":
                ignored += _inside_messages(raw)
            elif name == "stream_options":
                ignored += _unknown(_KEYS.decode(raw), StreamOptions, name)
        return ignored


def check_built(name: str, value: object, path: str) -> None:
    """Refuse the value of a field of NOT_BUILT unless it asks for nothing."""
    if value is not None and not _is_among(value, NOT_BUILT[name]):
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


def _inside_messages(raw: msgspec.Raw) -> list[str]:
    ignored: list[str] = []
    for message in _LIST_KEYS.decode(raw):
        ignored += _unknown(message, Message, "messages")
        content = memoryview(message.get("content", b""))
        if bytes(content[:1]) == b"[":
            for part in _LIST_KEYS.decode(content):
                ignored += _unknown(part, ContentPart, "messages.content")
    return ignored


def _unknown(
    given: dict[str, msgspec.Raw], wire_type: type[msgspec.Struct], path: str
) -> list[str]:
    known = wire_type.__struct_fields__
    return [
        f"{path}.{name}"
        for name, raw in given.items()
        if name not in known and memoryview(raw) != _NULL
    ]


def _is_among(value: object, neutral: tuple[object, ...]) -> bool:
    # By type too: 0 == False, but `logprobs: 0` asks for something and `false` does not.
    return any(type(value) is type(other) and value == other for other in neutral)


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than {max_bytes} bytes")


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
