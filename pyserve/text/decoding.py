"""Token ids -> bytes, by the rules in the `decoder` section of tokenizer.json.

Every decoder of a language model that we know is local: each token stands for fixed bytes, apart
from rules about the first token or the first characters of a text. So a text is the concatenation
of its tokens' bytes, and streaming need not look at earlier tokens (detokenizer.py). A decoder that
is not local is refused by name, because an error is better than a wrong text.

The result differs from the `tokenizers` library in two points, on purpose. First, the library
replaces a whole run of byte-fallback tokens by U+FFFD if any part of the run is not UTF-8, which
takes back characters that were already sent. Here, as in SentencePiece, only the invalid bytes are
replaced. Second, in byte-level tokenizers the library reads the letters of an added token as bytes,
although encoding finds such a token by its plain text: "schöner" loses its "ö". Here an added token
is decoded to its plain text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyserve.errors import CheckpointError

# (string of a token, whether it is the first of the text) -> its text.
Rewrite = Callable[[str, bool], str]

# Name of the codec error handler for byte fallback: one U+FFFD for each invalid byte, as
# SentencePiece and `tokenizers` do ("replace" gives one for each incomplete character, as ByteLevel
# decoders do).
REPLACE_EACH_BYTE = "pyserve.replace_each_byte"

_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>").fullmatch


@dataclass(frozen=True, slots=True)
class Layout:
    """What a `decoder` section says.

    rewrites                 functions that change a token's string, applied in order.
    byte_level               each character stands for a byte, as in GPT-2.
    byte_fallback            tokens named <0x00> to <0xFF> are bytes.
    strip_char, strip_count  up to strip_count of these characters are removed from the start of the
                             whole text.
    has_first                the rewrites treat the first token of a text differently.
    """

    rewrites: tuple[Rewrite, ...] = ()
    byte_level: bool = False
    byte_fallback: bool = False
    strip_char: str = ""
    strip_count: int = 0
    has_first: bool = False

    def piece(self, token: str, is_first: bool, *, is_plain: bool = False) -> bytes:
        """The bytes that a token adds to a text.

        is_plain  the token's string is its text, even where characters stand for bytes.
        """
        for rewrite in self.rewrites:
            token = rewrite(token, is_first)
        if self.byte_level and not is_plain:
            try:
                return bytes(map(_BYTE_OF_CHAR.__getitem__, token))
            except KeyError:
                pass  # plain text in a vocabulary, such as "<｜User｜>" that is not an added token
        if self.byte_fallback and (match := _FALLBACK_BYTE(token)):
            return bytes([int(match[1], 16)])
        return token.encode()


class Pieces(dict[int, bytes]):
    """Token id -> bytes, filled when an id is first asked for. Ids without a token have
    no bytes.
    """

    def __init__(self, make: Callable[[int], bytes | None]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, token_id: int) -> bytes:
        piece = self._make(token_id)
        if piece is None:
            return b""  # not kept: a hostile list of ids must not grow the table
        self[token_id] = piece
        return piece


class TokenDecoder:
    """The bytes of tokens, with and without special tokens; shared by all texts of a tokenizer."""

    def __init__(
        self,
        layout: Layout,
        id_to_token: Callable[[int], str | None],
        *,
        plain_token_ids: frozenset[int],
        special_token_ids: frozenset[int],
    ) -> None:
        self.layout = layout
        self.errors = REPLACE_EACH_BYTE if layout.byte_fallback else "replace"
        self._id_to_token = id_to_token
        self._plain_token_ids = plain_token_ids
        self._special_token_ids = special_token_ids
        self._all_pieces = Pieces(self._make_all)
        # Set of skipped special tokens -> pieces. There are few such sets: a parser shows the same
        # special tokens in every text.
        self._other_pieces: dict[frozenset[int], Pieces] = {}

    def pieces(self, *, skip_special_tokens: bool, shown: frozenset[int] = frozenset()) -> Pieces:
        """The bytes of each token. Special tokens have none if they are skipped.

        shown  special tokens that are never skipped.
        """
        if not skip_special_tokens:
            return self._all_pieces
        skipped = self._special_token_ids - shown
        if skipped not in self._other_pieces:
            make = partial(self._make_without, skipped)
            self._other_pieces[skipped] = Pieces(make)
        return self._other_pieces[skipped]

    def first_piece(
        self, token_id: int, *, skip_special_tokens: bool, shown: frozenset[int] = frozenset()
    ) -> bytes | None:
        """The bytes of a token at the start of a text; None if it is skipped or has no token."""
        if skip_special_tokens and token_id in self._special_token_ids - shown:
            return None
        return self._piece(token_id, is_first=True)

    def _piece(self, token_id: int, *, is_first: bool) -> bytes | None:
        token = self._id_to_token(token_id)
        if token is None:
            return None
        return self.layout.piece(token, is_first, is_plain=token_id in self._plain_token_ids)

    def _make_all(self, token_id: int) -> bytes | None:
        return self._piece(token_id, is_first=False)

    def _make_without(self, skipped: frozenset[int], token_id: int) -> bytes | None:
        return b"" if token_id in skipped else self._make_all(token_id)


def parse_layout(spec: Any) -> Layout:
    """Read a `decoder` section (decoded JSON). Raises CheckpointError if it is not local."""
    if spec is None:  # without a decoder, tokens are joined by spaces
        return Layout(rewrites=(_join_by_space,), has_first=True)
    rewrites: list[Rewrite] = []
    flags: dict[str, Any] = {}
    is_fused = False
    for part in _flatten(spec):
        kind = part.get("type")
        has_bytes = "byte_level" in flags or "byte_fallback" in flags
        if kind == "Replace" and "String" in part["pattern"] and not (has_bytes or is_fused):
            rewrites.append(_replace(part["pattern"]["String"], part["content"]))
        elif kind == "Metaspace" and not (has_bytes or is_fused):
            drops = part.get("prepend_scheme", "always") != "never"
            rewrites.append(_metaspace(part["replacement"], is_first_dropped=drops))
            flags["has_first"] = drops
        elif kind == "ByteLevel" and not (has_bytes or is_fused):
            flags["byte_level"] = is_fused = True
        elif kind == "ByteFallback" and not (has_bytes or is_fused):
            flags["byte_fallback"] = True
        elif kind == "Fuse":
            is_fused = True
        elif kind == "Strip" and is_fused and part["stop"] == 0 and "strip_char" not in flags:
            flags |= {"strip_char": part["content"], "strip_count": part["start"]}
        else:
            raise CheckpointError(
                f"tokenizer.json: the decoder {kind} is not supported"
                + (" in this place of a Sequence" if spec.get("type") == "Sequence" else "")
            )
    return Layout(rewrites=tuple(rewrites), **flags)


def _flatten(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if spec.get("type") != "Sequence":
        return [spec]
    return [part for inner in spec["decoders"] for part in _flatten(inner)]


def _join_by_space(token: str, is_first: bool) -> str:
    return token if is_first else " " + token


def _replace(pattern: str, content: str) -> Rewrite:
    return lambda token, is_first: token.replace(pattern, content)


def _metaspace(replacement: str, *, is_first_dropped: bool) -> Rewrite:
    def rewrite(token: str, is_first: bool) -> str:
        return token.replace(replacement, "" if is_first and is_first_dropped else " ")

    return rewrite


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table, character -> byte: printable bytes stand for themselves, others for U+0100 and
    up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(REPLACE_EACH_BYTE, _replace_each_byte)
