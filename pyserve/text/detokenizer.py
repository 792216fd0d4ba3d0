"""Output tokens -> text, as they are generated.

The texts that `push` and `flush` return, joined, are exactly what decoding prompt and output
together gives beyond the text of the prompt, however the output is cut into pushes. Only the bytes
of an incomplete character are held back, at most 3, so the state does not grow, and making a
Detokenizer looks at only a few prompt tokens.
"""

from __future__ import annotations

import copy
from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from pyserve.text.decoding import TokenDecoder


class HasDecoder(Protocol):
    """The part of a Tokenizer that a Detokenizer needs."""

    @property
    def decoder(self) -> TokenDecoder: ...


class Detokenizer:
    """The text of one sequence's output.

    prompt_token_ids  the tokens before the output. They decide how its first characters read:
                      SentencePiece removes a space at the start of a text, but not in its middle,
                      and a prompt may end within a character. A character that the output completes
                      belongs to the output.
    shown             special tokens that are never skipped.
    """

    __slots__ = (
        "_decoder", "_skip", "_shown", "_piece_of", "_errors", "_held",
        "_at_start", "_wants_first", "_strip_left", "_prompt_tail",
    )  # fmt: skip

    def __init__(
        self,
        tokenizer: HasDecoder,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._decoder = tokenizer.decoder
        self._skip = skip_special_tokens
        self._shown = shown
        pieces = self._decoder.pieces(skip_special_tokens=skip_special_tokens, shown=shown)
        self._piece_of = pieces.__getitem__
        self._errors = self._decoder.errors
        self._held = b""  # bytes of an incomplete character
        layout = self._decoder.layout
        self._wants_first = layout.has_first  # the text has no token yet
        # Characters that may still be removed from the text's start.
        self._strip_left = layout.strip_count
        # The text of the prompt's last bytes if their character stays incomplete.
        self._prompt_tail = ""
        self._at_start = self._wants_first or self._strip_left > 0
        if prompt_token_ids:
            self._pass_prompt(prompt_token_ids)

    def copy(self) -> Detokenizer:
        """A detokenizer for another text that continues from the same state."""
        return copy.copy(self)

    def hide(self, token_ids: frozenset[int]) -> None:
        """Remove these tokens from `shown`: from now on they are skipped like other
        special tokens.
        """
        self._shown -= token_ids
        pieces = self._decoder.pieces(skip_special_tokens=self._skip, shown=self._shown)
        self._piece_of = pieces.__getitem__

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; "" if they complete no character."""
        if self._at_start:
            return self._push_at_start(token_ids)
        data = self._held + b"".join(map(self._piece_of, token_ids))
        text, num_used = utf_8_decode(data, self._errors, False)
        self._held = data[num_used:]
        return text

    def flush(self) -> str:
        """The text that was held back, at the end of the output: an incomplete character gives
        U+FFFD.
        """
        text, _ = utf_8_decode(self._held, self._errors, True)
        self._held = b""
        return self._trim(text) if self._at_start else text

    def _push_at_start(self, token_ids: Sequence[int]) -> str:
        """Like `push`, while a rule about the start of the text or of the output may
        still apply.
        """
        data, index = self._held, 0
        while self._wants_first and index < len(token_ids):
            piece = self._decoder.first_piece(
                token_ids[index], skip_special_tokens=self._skip, shown=self._shown
            )
            index += 1
            if piece is not None:
                data += piece
                self._wants_first = False
        data += b"".join(map(self._piece_of, token_ids[index:]))
        text, num_used = utf_8_decode(data, self._errors, False)
        self._held = data[num_used:]
        return self._trim(text)

    def _trim(self, text: str) -> str:
        """Apply these rules to the next characters of the text. They end with the first character
        that is kept.
        """
        if text and self._prompt_tail:
            # The character was never completed, so its text belongs to the prompt.
            if text.startswith(self._prompt_tail):
                text = text[len(self._prompt_tail) :]
                self._strip_left = 0
            self._prompt_tail = ""
        strip_char = self._decoder.layout.strip_char
        while text and self._strip_left:
            if text[0] == strip_char:
                text = text[1:]
                self._strip_left -= 1
            else:
                self._strip_left = 0
        self._at_start = self._wants_first or self._strip_left > 0 or bool(self._prompt_tail)
        return text

    def _pass_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        """Set the state to the end of the prompt, reading only its first and last tokens."""
        for token_id in prompt_token_ids:
            if not self._at_start:
                break
            self._push_at_start([token_id])
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = self._piece_of(token_id) + tail
            if len(tail) >= 3:  # an incomplete character has at most 3 bytes
                break
        _, num_used = utf_8_decode(tail, "replace", False)
        self._held = tail[num_used:]
        if self._held:
            self._prompt_tail, _ = utf_8_decode(self._held, self._errors, True)
            self._at_start = True
