"""Text -> token ids, without spending time and memory on text that cannot fit the context.

Tokenising hostile text takes a microsecond and 400 bytes per character: 32 MB of it would occupy a
thread for a minute and take gigabytes of memory. Therefore the number of characters is limited, for
/tokenize too, and the tokens of long text are first counted piece by piece, until they exceed the
context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from pyserve.api.endpoints.sampling import check_token_ids
from pyserve.api.state import Loaded
from pyserve.api.wire.pooling import PoolingFields
from pyserve.api.wire.protocol import (
    MAX_REQUEST_TOKENS,
    MAX_SEQUENCES,
    SamplingFields,
    TokenizeRequest,
)
from pyserve.errors import ContextError, InvalidRequestError
from pyserve.params import shown
from pyserve.text.tokenizer import Tokenizer

PIECE_CHARS = 2**16  # characters that check_may_fit counts at a time
CUT_TOKENS = 32  # more tokens than cutting a text into pieces can add to a piece's count
# Limit for one text; a long context raises it to CHARS_PER_TOKEN for each of its tokens.
MAX_TOKENIZE_CHARS = 2**20
CHARS_PER_TOKEN = 8
MAX_TOKENIZE_TOKENS = 2**20  # of a text that need not fit the context; a longer context raises it

PromptField = str | list[str | int | list[int]]


@dataclass(frozen=True, slots=True)
class Truncation:
    """truncate_prompt_tokens: at most `limit` tokens of each prompt are kept.

    is_start_kept  the first tokens are kept, else the last ones.
    """

    limit: int
    is_start_kept: bool

    def cut(self, token_ids: list[int]) -> list[int]:
        """Cut a prompt that the client gave as token ids."""
        if len(token_ids) <= self.limit:
            return token_ids
        end = len(token_ids) - self.limit
        return token_ids[: self.limit] if self.is_start_kept else token_ids[end:]

    def cut_text(
        self, tokenizer: Tokenizer, token_ids: list[int], *, has_special_tokens: bool
    ) -> list[int]:
        """Cut the token ids of a text. The special tokens around it are kept.

        has_special_tokens  the text was encoded with add_special_tokens.
        """
        before, behind = tokenizer.surroundings() if has_special_tokens else ([], [])
        room = self.limit - len(before) - len(behind)
        if len(token_ids) <= self.limit or room < 1:
            return self.cut(token_ids)
        inner = token_ids[len(before) : len(token_ids) - len(behind)]
        kept = Truncation(room, self.is_start_kept).cut(inner)
        return [*before, *kept, *behind]


def truncation(
    body: SamplingFields | TokenizeRequest | PoolingFields, *, max_model_len: int, max_tokens: int
) -> Truncation | None:
    """Read truncate_prompt_tokens and truncation_side; None if nothing is to be cut.

    max_tokens  output tokens, for which the value -1 leaves room in the context. If they fill the
                whole context, -1 cuts nothing, so that a prompt that fits is kept whole.

    Raises InvalidRequestError on a value out of range.
    """
    num_tokens, side = body.truncate_prompt_tokens, body.truncation_side
    if side not in (None, "left", "right"):
        raise InvalidRequestError(
            f"truncation_side must be left or right, got {(side or '')[:40]}", "truncation_side"
        )
    if num_tokens is None or (num_tokens == -1 and max_tokens >= max_model_len):
        return None
    if num_tokens == -1:
        num_tokens = max(max_model_len - max(max_tokens, 1), 1)
    if not 1 <= num_tokens <= max_model_len:
        raise InvalidRequestError(
            f"truncate_prompt_tokens must be -1 or in [1, {max_model_len}], the context, "
            f"got {shown(num_tokens)}",
            "truncate_prompt_tokens",
        )
    return Truncation(num_tokens, is_start_kept=side == "right")


def size_of(value: PromptField) -> int:
    """The number of characters and token ids in a field, for deciding whether to use a thread.

    Prompts beyond MAX_SEQUENCES are not looked into, as the request will be refused.
    """
    if isinstance(value, str):
        return len(value)
    inner = [item for item in value[:MAX_SEQUENCES] if not isinstance(item, int)]
    return len(value) + sum(map(len, inner))


def read_token_ids(
    loaded: Loaded, value: PromptField, *, name: str, add_special_tokens: bool,
    cut: Truncation | None,
) -> list[list[int]]:  # fmt: skip
    """The token ids of every prompt in the field `name`.

    No prompt is empty. Ids that the client gave are checked against the vocabulary, up to the
    length of the context.

    Raises InvalidRequestError naming the field.
    """
    if isinstance(value, str):
        value = [value]
    kinds = set(map(type, value))
    if len(kinds) > 1:
        raise InvalidRequestError(
            f"{name} must not mix texts, token ids and lists of token ids", name
        )
    if kinds == {int}:
        value = [cast("list[int]", value)]
    if not 1 <= len(value) <= MAX_SEQUENCES:
        raise InvalidRequestError(
            f"{name} must hold 1 to {MAX_SEQUENCES} entries, got {len(value)}", name
        )
    if not all(value):
        raise InvalidRequestError(f"{name} must not be empty", name)
    if kinds == {str}:
        texts = cast("list[str]", value)
        token_ids = _encode_all(loaded, texts, name, add_special_tokens, cut)
        if not all(token_ids):
            raise InvalidRequestError(f"{name} must not be empty", name)
        return token_ids
    token_ids = cast("list[list[int]]", value)
    if cut is not None:
        token_ids = list(map(cut.cut, token_ids))
    info = loaded.engine.info
    for ids in token_ids:
        # A prompt longer than the context is refused later, so that the rest needs no check.
        check_token_ids(ids[: info.max_model_len], info.vocab_size, name)
    return token_ids


def _encode_all(
    loaded: Loaded, texts: list[str], name: str, add_special_tokens: bool, cut: Truncation | None
) -> list[list[int]]:
    max_model_len = loaded.engine.info.max_model_len
    # With a truncation every text is tokenised completely, so the texts are bounded together first.
    if cut is not None:
        check_size(sum(map(len, texts)), max_model_len=max_model_len, param=name)
    token_ids = []
    num_tokens = 0
    for text in texts:
        ids = encode(
            loaded.tokenizer,
            text,
            add_special_tokens=add_special_tokens,
            max_model_len=max_model_len,
            cut=cut,
            param=name,
        )
        token_ids.append(ids)
        num_tokens += len(ids)
        check_total(num_tokens, n=1, param=name)
    return token_ids


def encode(
    tokenizer: Tokenizer,
    text: str,
    *,
    add_special_tokens: bool,
    max_model_len: int,
    cut: Truncation | None = None,
    param: str = "prompt",
) -> list[int]:
    """The token ids of a text, cut by `cut` if that is given.

    Without `cut` the text must fit the context. A text that is slightly too long may pass here, as
    check_may_fit is not exact. `param` is the field that errors name.

    Raises InvalidRequestError, and its subclass ContextError if the text cannot fit.
    """
    if cut is not None:
        ids = encode_any(
            tokenizer,
            text,
            add_special_tokens=add_special_tokens,
            max_model_len=max_model_len,
            param=param,
        )
        return cut.cut_text(tokenizer, ids, has_special_tokens=add_special_tokens)
    check_may_fit(tokenizer, text, max_model_len=max_model_len, param=param)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens, param=param)


def encode_any(
    tokenizer: Tokenizer,
    text: str,
    *,
    add_special_tokens: bool,
    max_model_len: int,
    param: str = "prompt",
) -> list[int]:
    """The token ids of a text that need not fit the context. Raises InvalidRequestError."""
    check_size(len(text), max_model_len=max_model_len, param=param)
    return tokenizer.encode(
        text,
        add_special_tokens=add_special_tokens,
        param=param,
        max_tokens=max_tokenize_tokens(max_model_len),
    )


def check_may_fit(tokenizer: Tokenizer, text: str, *, max_model_len: int, param: str) -> None:
    """Raise ContextError for a text with more tokens than the context, without tokenising it all.

    A text that passes may still have a few tokens too many; the exact count follows later. Messages
    that contain the name of a special token are counted too low here: the name counts as one token,
    but in a chat it stays ordinary text of several tokens.
    """
    check_chars(len(text), max_model_len=max_model_len, param=param)
    if len(text) <= PIECE_CHARS:
        return
    num_tokens = 0
    for start in range(0, len(text), PIECE_CHARS):
        piece = text[start : start + PIECE_CHARS]
        num_tokens += max(tokenizer.count(piece, param=param) - CUT_TOKENS, 0)
        if num_tokens > max_model_len:
            raise ContextError(
                f"the prompt has at least {num_tokens}",
                param,
                num_tokens=num_tokens,
                max_model_len=max_model_len,
            )


def check_chars(num_chars: int, *, max_model_len: int, param: str) -> None:
    """Raise ContextError for a text that is too long for the context by its characters alone.

    A token has four characters on average, and a few tokens have a hundred. A text that is refused
    here could only have fitted if it consisted of such long tokens.
    """
    limit = max_tokenize_chars(max_model_len)
    if num_chars > limit:
        raise ContextError(
            f"the prompt has {num_chars} characters, more than {limit}",
            param,
            num_tokens=num_chars // CHARS_PER_TOKEN,
            max_model_len=max_model_len,
        )


def check_total(num_tokens: int, *, n: int, param: str) -> None:
    """Refuse too many prompt tokens in one request, as the server holds those of all sequences.

    num_tokens  of all prompts together; each prompt makes n sequences.

    Raises InvalidRequestError naming n or the field `param`.
    """
    if num_tokens * n > MAX_REQUEST_TOKENS:
        times = f" times n {n}" if n > 1 else ""
        raise InvalidRequestError(
            f"{num_tokens} prompt tokens{times} are more than the {MAX_REQUEST_TOKENS} "
            "that one request may have",
            "n" if n > 1 else param,
        )


def max_tokenize_chars(max_model_len: int) -> int:
    """The limit on the characters of one text, whether or not it has to fit the context."""
    return max(MAX_TOKENIZE_CHARS, CHARS_PER_TOKEN * max_model_len)


def max_tokenize_tokens(max_model_len: int) -> int:
    """The limit on the tokens of one text that need not fit the context."""
    return max(MAX_TOKENIZE_TOKENS, max_model_len)


def check_size(num_chars: int, *, max_model_len: int, param: str) -> None:
    """Raise InvalidRequestError for more characters than `max_tokenize_chars`."""
    limit = max_tokenize_chars(max_model_len)
    if num_chars > limit:
        raise InvalidRequestError(
            f"{param} has {num_chars} characters, the limit is {limit}", param
        )
