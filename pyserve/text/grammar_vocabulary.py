"""A model's tokens as the grammar engine has them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import lru_cache

from llguidance import LLTokenizer, TokenizerWrapper

from pyserve.errors import InvalidRequestError
from pyserve.text.tokenizer import Tokenizer

# Where all of such a text may come next, its tokens are allowed together and not one after the
# other, each inside the next. As many as the engine has of itself, and as large; it has none for
# letters, of which `[a-z ]{2000}` is made, say: a mask took 450 us and takes 4.
SLICES = [
    "[a-z]{1,10}",
    "[a-z ]{1,10}",
    r'[^"\\\x00-\x1F\x7F]{1,10}',
    r'[^"\\\x00-\x1F\x7F]+',
]
MIN_FORCED_CHARS = 256
MAX_FORCED_TEXTS = 1024  # that are remembered: a megabyte or two


class Vocabulary:
    """A model's tokens as the engine has them.

    vocab_size     of the model: ids beyond the tokenizer's have no token and are never allowed.
    eos_token_ids  what ends an answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Iterable[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.pieces = tokenizer.decoder.pieces(skip_special_tokens=False)
        self.eos_token_ids = sorted({i for i in eos_token_ids if 0 <= i < vocab_size})
        self.special_tokens = {
            token: token_id
            for token_id in tokenizer.special_token_ids
            if (token := tokenizer.id_to_token(token_id))
        }
        self._lock = threading.Lock()
        self._table: LLTokenizer | None = None

    def has_token(self, token_id: int) -> bool:
        """Whether the id has a text; ids of a padded vocabulary have none."""
        return bool(self.pieces[token_id])

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of each text as a part of another; special tokens are parsed."""
        return [ids for text in texts if (ids := self.tokenizer.encode_inner(text))]

    def table(self) -> LLTokenizer:
        """Built when it is first asked for: a fifth of a second for 128k tokens, of which another
        one holds the interpreter's lock. Raises InvalidRequestError where nothing can end.
        """
        with self._lock:
            if self._table is None:
                if not self.eos_token_ids:
                    raise InvalidRequestError(
                        "structured outputs need a token that ends an answer, and this model's "
                        "files name none"
                    )
                self._table = LLTokenizer(
                    _Tokens(self.tokenizer, self.vocab_size, self.eos_token_ids),
                    eos_token=self.eos_token_ids,
                    slices=SLICES,
                )
            return self._table


class _Tokens(TokenizerWrapper):
    """What LLTokenizer asks for; named as it has it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        pieces = tokenizer.decoder.pieces(skip_special_tokens=False)
        special = tokenizer.special_token_ids | set(eos_token_ids)
        # An empty token is never allowed.
        self.tokens = [pieces[token_id] for token_id in range(vocab_size)]
        self.special_token_ids = [token_id for token_id in special if token_id < vocab_size]
        self.eos_token_id = eos_token_ids[0]
        self._tokenizer = tokenizer
        self._ids: dict[bytes, int] = {}
        for token_id, piece in enumerate(self.tokens):
            if piece and token_id not in special:
                self._ids.setdefault(piece, token_id)
        self._max_bytes = max(map(len, self._ids), default=1)
        self._ids_of = lru_cache(MAX_FORCED_TEXTS)(self._encode)

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that a grammar forces, as the model would write it; of a long one, ids of
        its beginning: the first one counts, the rest shows where that ends.

        It is asked for in the midst of masks, again and again for the same texts: the names in an
        object. To encode one takes ten times as long as the rest of a mask.
        """
        return self._ids_of(text[: max(MIN_FORCED_CHARS, 4 * self._max_bytes)])

    def _encode(self, text: str) -> list[int]:
        wanted = text.encode()
        ids = self._tokenizer.encode_inner(text)
        if b"".join([self.tokens[token_id] for token_id in ids]) == wanted:
            return ids
        return self._longest(wanted)  # a normaliser has changed it

    def _longest(self, wanted: bytes) -> list[int]:
        """The longest token at each place; ends where there is none."""
        ids, at = [], 0
        while at < len(wanted):
            for end in range(min(len(wanted), at + self._max_bytes), at, -1):
                token_id = self._ids.get(wanted[at:end])
                if token_id is not None:
                    ids.append(token_id)
                    at = end
                    break
            else:
                break
        return ids
