"""The grammar engine's view of a model's vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import lru_cache

from llguidance import LLTokenizer, TokenizerWrapper

from pyserve.errors import InvalidRequestError
from pyserve.text.tokenizer import Tokenizer

# Where a grammar allows any text that matches one of these patterns, the engine allows all tokens
# that match it at once, without walking through its token trie. Each pattern is contained in the
# next. The engine's defaults are as many and as large, but have none for letters alone: with them a
# mask of `[a-z ]{2000}`, say, took 450 us instead of 4.
SLICES = [
    "[a-z]{1,10}",
    "[a-z ]{1,10}",
    r'[^"\\\x00-\x1F\x7F]{1,10}',
    r'[^"\\\x00-\x1F\x7F]+',
]
MIN_FORCED_CHARS = 256
MAX_FORCED_TEXTS = 1024  # cached texts, which take 1 to 2 MB


class Vocabulary:
    """A model's tokens, and the engine's table of them.

    vocab_size      of the model. Ids beyond the tokenizer's have no token and are never allowed.
    eos_token_ids   tokens that end an answer, sorted.
    pieces          token id -> its bytes, special tokens included.
    special_tokens  string of each special token -> its id.
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
        """Whether the id has a text. Ids that only pad the vocabulary have none."""
        return bool(self.pieces[token_id])

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of each text as part of a longer one; special tokens in it are parsed."""
        return [ids for text in texts if (ids := self.tokenizer.encode_inner(text))]

    def table(self) -> LLTokenizer:
        """The engine's token table, built by the first call. For 128k tokens that takes 0.2 s, of
        which a fifth holds the interpreter's lock. Raises InvalidRequestError if no token ends an
        answer.
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
    """What LLTokenizer reads from a tokenizer; it sets the names of these attributes."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        pieces = tokenizer.decoder.pieces(skip_special_tokens=False)
        special = tokenizer.special_token_ids | set(eos_token_ids)
        # The engine never allows a token without bytes.
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
        """Token ids of a text that a grammar forces, as the model would write it.

        Of a long text only a beginning is encoded: the engine uses the first id, and the others
        show where it ends. The engine calls this while it fills masks, again and again for the same
        texts, such as the names in an object, and encoding takes ten times as long as the rest of a
        mask. So results are cached.
        """
        return self._ids_of(text[: max(MIN_FORCED_CHARS, 4 * self._max_bytes)])

    def _encode(self, text: str) -> list[int]:
        wanted = text.encode()
        ids = self._tokenizer.encode_inner(text)
        if b"".join([self.tokens[token_id] for token_id in ids]) == wanted:
            return ids
        return self._longest(wanted)  # the tokenizer's normalizer has changed the text

    def _longest(self, wanted: bytes) -> list[int]:
        """Token ids by greedy longest match; they stop where no token matches."""
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
