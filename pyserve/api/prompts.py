"""Text -> token ids without paying for text that cannot fit.

Tokenising takes a microsecond and 400 bytes a character of hostile text: 32 MB of it would hold a
thread for a minute and gigabytes of memory. So long text is first counted in pieces, and given up
at the first piece that is too many.
"""

from __future__ import annotations

from pyserve.errors import InvalidRequestError
from pyserve.text.tokenizer import Tokenizer

PIECE_CHARS = 2**16
CUT_TOKENS = 32  # more than a cut through the text can add to its count
MAX_TOKENIZE_CHARS = 2**20  # for /tokenize, or 8 for each token of the context


def encode(
    tokenizer: Tokenizer, text: str, *, add_special_tokens: bool, max_model_len: int
) -> list[int]:
    """Token ids of a plain prompt. Raises InvalidRequestError, also where it cannot fit."""
    check_may_fit(tokenizer, text, max_model_len=max_model_len, param="prompt")
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def check_may_fit(tokenizer: Tokenizer, text: str, *, max_model_len: int, param: str) -> None:
    """Refuse a text that has more tokens than the context, without tokenising all of it.

    What passes has at most a few tokens too many, and is counted exactly later.
    """
    if len(text) <= PIECE_CHARS:
        return
    num_tokens = 0
    for start in range(0, len(text), PIECE_CHARS):
        piece = text[start : start + PIECE_CHARS]
        num_tokens += max(len(tokenizer.encode(piece, add_special_tokens=False)) - CUT_TOKENS, 0)
        if num_tokens > max_model_len:
            raise InvalidRequestError(
                f"This model's maximum context length is {max_model_len} tokens: "
                f"the prompt has at least {num_tokens}",
                param,
            )


def check_size(size: int, unit: str, *, max_model_len: int, param: str) -> None:
    """Bound what /tokenize and /detokenize work on, which need not fit the context."""
    limit = max(MAX_TOKENIZE_CHARS, 8 * max_model_len)
    if size > limit:
        raise InvalidRequestError(f"{param} has {size} {unit}, the limit is {limit}", param)
