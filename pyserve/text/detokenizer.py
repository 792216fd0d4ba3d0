"""Output tokens -> text, as they come.

Exact: what `push` and `flush` return, put together, is the text that decoding prompt and output
together has beyond the text of the prompt, for every way the output is cut into pushes. Bytes of a
character that is not complete are held back, at most 3; nothing else is kept, so the state of a
stream does not grow, and its creation looks at a few prompt tokens only.
"""

from __future__ import annotations

import copy
from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from pyserve.text.decoding import TokenDecoder


class HasDecoder(Protocol):
    """What a Detokenizer needs of a Tokenizer."""

    @property
    def decoder(self) -> TokenDecoder: ...


class Detokenizer:
    """Text of one sequence's output.

    prompt_token_ids decide how the output's first characters read: SentencePiece drops a space at
    the start of a text, not in its middle, and a prompt may end within a character. A character
    that the output completes belongs to the output.

    shown are special tokens that are not skipped in any case.
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
        self._held = b""  # the bytes of a character that is not complete
        layout = self._decoder.layout
        self._wants_first = layout.has_first  # no token of the text has come yet
        self._strip_left = layout.strip_count  # characters at the text's start that may be dropped
        self._prompt_tail = ""  # what the prompt's last bytes read as if they stay incomplete
        self._at_start = self._wants_first or self._strip_left > 0
        if prompt_token_ids:
            self._pass_prompt(prompt_token_ids)

    def copy(self) -> Detokenizer:
        """A detokenizer for another text that goes on from the same place."""
        return copy.copy(self)

    def hide(self, token_ids: frozenset[int]) -> None:
        """From here on these tokens are not among those of `shown`."""
        self._shown -= token_ids
        pieces = self._decoder.pieces(skip_special_tokens=self._skip, shown=self._shown)
        self._piece_of = pieces.__getitem__

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; "" where they complete no character."""
        if self._at_start:
            return self._push_at_start(token_ids)
        data = self._held + b"".join(map(self._piece_of, token_ids))
        text, num_used = utf_8_decode(data, self._errors, False)
        self._held = data[num_used:]
        return text

    def flush(self) -> str:
        """The text held back, at the end of the output: an incomplete character reads U+FFFD."""
        text, _ = utf_8_decode(self._held, self._errors, True)
        self._held = b""
        return self._trim(text) if self._at_start else text

    def _push_at_start(self, token_ids: Sequence[int]) -> str:
        """`push` while a rule about the start of the text, or of the output, may still apply."""
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
        """Apply the rules to the next characters of the text; they end with the first one kept."""
        if text and self._prompt_tail:
            if text.startswith(self._prompt_tail):  # never completed: it is the prompt's text
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
        """Bring the state to the end of the prompt, from its first and last tokens alone."""
        for token_id in prompt_token_ids:
            if not self._at_start:
                break
            self._push_at_start([token_id])
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = self._piece_of(token_id) + tail
            if len(tail) >= 3:  # the longest incomplete character
                break
        _, num_used = utf_8_decode(tail, "replace", False)
        self._held = tail[num_used:]
        if self._held:
            self._prompt_tail, _ = utf_8_decode(self._held, self._errors, True)
            self._at_start = True
