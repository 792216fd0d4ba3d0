"""How much a JSON text holds, before it is decoded.

Decoding holds the interpreter's lock from its first byte to its last, so on a worker thread too it
stops the event loop for as long as it has values to make: 31 MB of small ones took five seconds,
four million token ids a fifth of one. Counting them goes in pieces of a millisecond or so, between
which the loop gets its turn.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyserve.api.wire.protocol import MAX_REQUEST_TOKENS
from pyserve.errors import InvalidRequestError

PIECE_BYTES = 2**18
MAX_JSON_VALUES = 2**17  # of one body, beside lists of token ids; keys count too
MAX_JSON_CONTAINERS = 2**15  # of these lists and objects, which cost five times as much
# In a row, as many as a double can have before its point. An integer takes the square of its digits
# to read: 31 MB of such with 4,300 half a second.
MAX_DIGITS = 309
MAX_BODY_IDS = 2**20  # token ids of a body, or the context's, which one prompt may have

_DIGITS_AS_0 = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_NUMBER = b"0" * (MAX_DIGITS + 1)


@dataclass(slots=True)
class Structure:
    """What a text holds outside its strings.

    Exact up to the first error in the text, and a decoder goes no further than that.
    """

    num_commas: int = 0
    num_brackets: int = 0  # [ and {
    num_strings: int = 0
    has_long_number: bool = False  # of more than MAX_DIGITS in one piece


def measure(body: bytes) -> Structure:
    """Count in pieces; a piece never ends between a backslash and what it escapes."""
    found = Structure()
    start, num_quotes = 0, 0
    while start < len(body):
        piece = body[start : start + PIECE_BYTES]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = body[start : start + PIECE_BYTES + 1]
        start += len(piece)
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        runs = piece.split(b'"')
        outside = b"".join(runs[num_quotes % 2 :: 2])
        num_quotes += len(runs) - 1
        found.num_commas += outside.count(b",")
        found.num_brackets += outside.count(b"[") + outside.count(b"{")
        found.has_long_number |= _LONG_NUMBER in outside.translate(_DIGITS_AS_0)
    found.num_strings = (num_quotes + 1) // 2
    return found


def check_structure(body: bytes, max_list_ids: int) -> None:
    """Refuse a body that holds too many values to decode.

    max_list_ids  how many token ids one list may need, 0 where the request has no such lists.

    Raises InvalidRequestError.
    """
    if len(body) <= MAX_JSON_CONTAINERS:  # a value takes a byte at least
        return
    found = measure(body)
    max_ids = min(max(MAX_BODY_IDS, max_list_ids), MAX_REQUEST_TOKENS)
    max_commas = MAX_JSON_VALUES + min(max_list_ids * found.num_brackets, max_ids)
    for number, limit in (
        (found.num_strings, MAX_JSON_VALUES),
        (found.num_commas, max_commas),
        (found.num_brackets, MAX_JSON_CONTAINERS),
    ):
        if number > limit:
            raise InvalidRequestError(
                f"the body holds more than {limit} values, the limit for this request"
            )
    if found.has_long_number:
        raise InvalidRequestError(f"the body holds a number of more than {MAX_DIGITS} digits")
