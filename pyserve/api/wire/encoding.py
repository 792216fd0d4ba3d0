"""JSON encoding for server-sent events."""

from __future__ import annotations

import msgspec

_encode = msgspec.json.encode


def encode_line(value: object) -> bytes:
    """Encode `value` as JSON that every client reads as a single line.

    JSON always escapes characters below U+0020. Clients that use `str.splitlines`, such as httpx
    and requests, also end a line at U+0085, U+2028 and U+2029, which JSON need not escape, so they
    are escaped here. Replacing bytes is safe: in UTF-8 these sequences are part of no other
    character.
    """
    data = _encode(value)
    if data.isascii():
        return data
    return (
        data.replace(b"\xc2\x85", rb"\u0085")
        .replace(b"\xe2\x80\xa8", rb"\u2028")
        .replace(b"\xe2\x80\xa9", rb"\u2029")
    )
