"""JSON for event streams."""

from __future__ import annotations

import msgspec

_encode = msgspec.json.encode


def encode_line(value: object) -> bytes:
    """`value` as JSON that is one line to every reader.

    JSON escapes what lies below U+0020. Readers built on `str.splitlines`, httpx's and those of
    requests among them, end a line at U+0085, U+2028 and U+2029 too, which JSON may hold as they
    are; they are escaped here. In UTF-8 their bytes are part of no other character.
    """
    data = _encode(value)
    if data.isascii():
        return data
    return (
        data.replace(b"\xc2\x85", rb"\u0085")
        .replace(b"\xe2\x80\xa8", rb"\u2028")
        .replace(b"\xe2\x80\xa9", rb"\u2029")
    )
