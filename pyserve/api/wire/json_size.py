"""Limits on the number of values in a JSON text, checked before it is decoded.

Decoding holds the interpreter's lock from the first byte to the last, so even on a worker thread it
stops the event loop for as long as it creates values: 31 MB of small values took five seconds, four
million token ids 0.2 s. Counting the values works in pieces of about a millisecond, between which
the event loop can run.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyserve.api.wire.protocol import MAX_REQUEST_TOKENS
from pyserve.errors import InvalidRequestError

PIECE_BYTES = 2**18  # counted at a time
MAX_JSON_VALUES = 2**17  # of one body, without the elements of token id lists; keys count too
MAX_JSON_CONTAINERS = 2**15  # lists and objects of one body; one costs as much as five other values
# Digits in a row: as many as a double can have before its decimal point. The time to parse an
# integer grows with the square of its digits: 31 MB of integers with 4,300 digits took 0.5 s.
MAX_DIGITS = 309
# Token ids of one body; a longer context raises the limit, as one prompt may fill it.
MAX_BODY_IDS = 2**20

_DIGITS_AS_0 = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_NUMBER = b"0" * (MAX_DIGITS + 1)


@dataclass(slots=True)
class Structure:
    """Counts of what stands outside the strings of a JSON text.

    The counts are exact up to the first syntax error, where a decoder stops anyway.
    """

    num_commas: int = 0
    num_brackets: int = 0  # [ and {
    num_strings: int = 0
    has_long_number: bool = False  # more than MAX_DIGITS digits in a row, within one piece


def measure(body: bytes) -> Structure:
    """Count the values of a body, piece by piece.

    A piece never ends between a backslash and the character that it escapes.
    """
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
    """Refuse a body with too many values or too long a number.

    max_list_ids  how many token ids one list may hold; 0 if the request type has no such lists.

    Raises InvalidRequestError.
    """
    if len(body) <= MAX_JSON_CONTAINERS:  # each value takes a byte, so no count exceeds its limit
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
