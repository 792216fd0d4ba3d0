"""Request bodies: JSON bytes -> a wire type, and the names of the fields that have no effect."""

from __future__ import annotations

import codecs
import re
from functools import partial
from typing import Any, Generic, TypeVar

import msgspec
from aiohttp import web

from pyserve import __version__, any_json
from pyserve.api.http.cors import is_foreign_page
from pyserve.api.state import ServerState
from pyserve.api.wire.json_size import check_structure
from pyserve.api.wire.lenient import MAX_NAME_CHARS, MAX_NAMES, Lenient, Names, is_for_here
from pyserve.api.wire.protocol import MAX_MESSAGES, MAX_PARTS, Message
from pyserve.errors import InvalidRequestError, NotBuiltError
from pyserve.features import Field, fields_of

IGNORED_HEADER = "x-pyserve-ignored"
MERGED_HEADER = "x-pyserve-merged"
SHORT_BODY_BYTES = 2**16  # up to this size a body is decoded on the event loop: a few ms at worst
UTF8_PIECE_BYTES = 2**20  # checked at a time, so that other threads can run in between

T = TypeVar("T", bound=msgspec.Struct)

_utf8_decoder = codecs.getincrementaldecoder("utf-8")
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")  # the place of the error in a message of msgspec


class Wire(Generic[T]):
    """Decodes the bodies of one request type. Build one per type: msgspec compiles the type."""

    def __init__(self, wire_type: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(wire_type, float_hook=any_json.read_float)
        self._lenient = Lenient(wire_type)
        self._rows = fields_of(wire_type)
        self._unused = dict.fromkeys(self._rows)

    async def read(
        self, request: web.Request, state: ServerState, *, max_list_ids: int = 0
    ) -> tuple[T, list[str]]:
        """Read and decode the body of `request`.

        max_list_ids  how many token ids one list may hold; see json_size.check_structure.

        Returns the decoded request and the names of its fields that have no effect. Raises
        RequestError if the body is not JSON, has a wrong type, is too large or has a field that is
        not built.
        """
        _check_content_type(request)
        if request.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise InvalidRequestError("a compressed body is not supported")
        async with state.uploads.read(request, max_bytes=state.config.max_body_bytes) as body:
            decode = partial(self.decode, body, max_list_ids=max_list_ids)
            return await state.run_text(request, len(body), decode, short=SHORT_BODY_BYTES)

    def decode(self, body: bytes, *, max_list_ids: int = 0) -> tuple[T, list[str]]:
        """Decode the bytes of a body; returns and raises as `read`."""
        body = body.removeprefix(codecs.BOM_UTF8)  # programs on Windows may write one before JSON
        try:
            check_structure(body, max_list_ids)
            value, ignored = self._decode(body)
            _check_counts(getattr(value, "messages", None))
            _check_bias(getattr(value, "logit_bias", None))
            self._check_built(value, body, ignored)
        except UnicodeDecodeError:
            raise InvalidRequestError("the body is not valid UTF-8") from None
        except RecursionError:
            raise InvalidRequestError("the body is nested too deeply") from None
        except msgspec.ValidationError as error:
            raise wrong_type(error) from None
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
        if len(body) > SHORT_BODY_BYTES:
            # Drop the values of fields that are not built: large ones would otherwise stay in
            # memory until the answer ends.
            value = msgspec.structs.replace(value, **self._unused)
        return value, ignored.names

    def _decode(self, body: bytes) -> tuple[T, Names]:
        """Decode strictly; a body that fails for a tolerable reason is decoded again leniently.

        Returns the value and the names of its unknown fields.
        """
        unknown = Names()
        try:
            return self._decoder.decode(body), unknown
        except msgspec.DecodeError as error:
            # msgspec stops at its first error, so bytes behind it may still be invalid UTF-8.
            _check_utf8(body)
            if not isinstance(error, msgspec.ValidationError) or not is_for_here(error):
                raise
        return self._lenient.decode(body, unknown), unknown

    def _check_built(self, value: T, body: bytes, ignored: Names) -> None:
        """Refuse fields that are not built, and name those without effect in `ignored`.

        A field whose value is neutral, that is, requests nothing, is neither refused nor named.
        """
        refused = []
        for name, row in self._rows.items():
            said = getattr(value, name)
            if said is None or row.is_neutral(said):
                continue
            if row.is_ignored or (row.is_harmless and row.is_harmless(value)):
                ignored.add(name)
            else:
                refused.append(name)
        if refused:  # the error names the one that comes first in the client's body
            name = next(name for name in any_json.decode(body) if name in refused)
            check_built(self._rows[name], getattr(value, name), name)


def _check_content_type(request: web.Request) -> None:
    """Refuse a Content-Type other than JSON. It may be missing, unless another host's page asks.

    A browser sends such a page's request without asking this server first, unless its Content-Type
    is JSON: then it sends a CORS preflight, which http/cors.py answers. Without this check any web
    page could run prompts through its visitors' browsers.
    """
    default = "" if is_foreign_page(request) else "application/json"
    content_type = request.headers.get("Content-Type", default)
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise InvalidRequestError("the Content-Type must be application/json")


def check_built(row: Field, value: object, path: str) -> None:
    """Raise NotBuiltError for a field that is not built, unless its value is neutral."""
    if not row.is_neutral(value):
        raise NotBuiltError(
            f"{path} is not built yet in pyserve {__version__}, {row.instead}", path
        )


def ignored_header(names: list[str]) -> dict[str, str]:
    """The response header that lists fields without effect; empty if there are none."""
    if not names:
        return {}
    unique = sorted(set(names))
    shown = [re.sub(r"[^A-Za-z0-9_.-]", "?", name[:MAX_NAME_CHARS]) for name in unique[:MAX_NAMES]]
    if len(unique) > MAX_NAMES:
        shown.append("...")
    return {IGNORED_HEADER: ", ".join(shown)}


def merged_header(merged: str) -> dict[str, str]:
    """The response header that says how messages were merged; empty if they were not."""
    return {MERGED_HEADER: merged} if merged else {}


def _check_utf8(body: bytes) -> None:
    """Raise UnicodeDecodeError if `body` is not UTF-8."""
    decoder = _utf8_decoder()
    for start in range(0, len(body), UTF8_PIECE_BYTES):
        decoder.decode(body[start : start + UTF8_PIECE_BYTES])
    decoder.decode(b"", final=True)


def _check_counts(messages: list[Message] | None) -> None:
    """Refuse too many messages or content parts, before any work is done for each of them."""
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


def _check_bias(bias: dict[str, Any] | None) -> None:
    """Refuse values that are not numbers; sampling.py limits how many entries there may be."""
    try:
        msgspec.convert(bias, dict[str, float] | None)
    except msgspec.ValidationError as error:
        raise wrong_type(error, "logit_bias") from None


def wrong_type(error: msgspec.ValidationError, prefix: str = "") -> InvalidRequestError:
    """Turn an error of msgspec into an InvalidRequestError that names the field.

    prefix  the place of the decoded value in the body, if it is not the body itself.
    """
    text = str(error).replace("Object", "the body")
    match = _PATH.search(text)
    path = match.group(1) if match else ""
    if prefix:
        path = prefix + ("" if not path or path.startswith("[") else ".") + path
    reason = (text[: match.start()] if match else text).replace("`", "")
    missing = re.fullmatch(r"the body missing required field (\w+)", reason)
    if missing:
        name = ".".join(filter(None, [path, missing.group(1)]))
        return InvalidRequestError(f"{name} is missing", name)
    reason = reason[:1].lower() + reason[1:]
    return InvalidRequestError(f"{path or 'the body'}: {reason}", path or None)
