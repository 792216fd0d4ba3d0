"""Request fields -> SamplingParams: the request's value, else the model's default, else neutral.

This includes everything about how an answer ends: stop strings, stop token ids, EOS and the limit
on output tokens.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pyserve.api.generation.job import Ending
from pyserve.api.wire.protocol import (
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS_CHARS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_CHARS_IN_ALL,
    MAX_STOP_STRINGS,
    SamplingFields,
)
from pyserve.client import EngineInfo
from pyserve.errors import ContextError, InvalidRequestError
from pyserve.limits import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from pyserve.params import (
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_TEMPERATURE,
    MIN_TOP_P,
    SamplingParams,
    shown,
)
from pyserve.text.tokenizer import GenerationDefaults, Tokenizer

GREEDY_BELOW = 1e-5  # a lower temperature means greedy decoding; the threshold is vLLM's

Number = TypeVar("Number", int, float)


class Resolver:
    """Resolves the sampling fields of one request; raises InvalidRequestError naming the field.

    n        number of choices shown for each prompt.
    best_of  number of sequences generated for each prompt, of which the n best are shown.
    ending   how the answers end; the same for all sequences.
    """

    def __init__(
        self,
        request: SamplingFields,
        info: EngineInfo,
        *,
        tokenizer: Tokenizer,
        defaults: GenerationDefaults,
    ) -> None:
        self._request = request
        self._info = info
        self._defaults = defaults
        self.n, self.best_of = _choices(request)
        eos_ids = [] if request.ignore_eos else _eos_token_ids(tokenizer, defaults, info)
        self.ending = Ending(
            stop=_stop_strings(request.stop),
            is_stop_kept=bool(request.include_stop_str_in_output),
            eos_token_id=eos_ids[0] if eos_ids else None,
            min_tokens=request.min_tokens or 0,
        )
        asked = request.stop_token_ids or []
        limit = max(MAX_STOP_TOKEN_IDS - len(eos_ids), 0)
        if len(asked) > limit:
            beside = f" beside the model's {len(eos_ids)} EOS" if eos_ids else ""
            raise InvalidRequestError(
                f"stop_token_ids has {len(asked)} entries, the limit is {limit}{beside}",
                "stop_token_ids",
            )
        check_token_ids(asked, info.vocab_size, "stop_token_ids")
        self._stop_token_ids = tuple(dict.fromkeys([*eos_ids, *asked]))
        self._logit_bias = _logit_bias(request.logit_bias, info.vocab_size)
        self._allowed_token_ids = _allowed(request.allowed_token_ids, info.vocab_size)
        self._bad_words = _bad_words(request.bad_words or [], tokenizer, info.vocab_size)
        self._temperature = self._resolve_temperature()
        self._top_k = _top_k(_first(request.top_k, defaults.top_k, 0))
        self._top_p = _top_p(_first(request.top_p, defaults.top_p, 1.0))

    def params(
        self,
        num_prompt_tokens: int,
        *,
        prompt_name: str,
        max_tokens: int | None,
        limit_name: str,
        default: int,
    ) -> SamplingParams:
        """The SamplingParams of the sequences of one prompt.

        max_tokens   the requested limit on output tokens, or `default` if it is None; both are
                     reduced to what the prompt leaves of the context.
        prompt_name, limit_name
                     names of the fields with the prompt and the limit, which errors name.

        Raises ContextError if the prompt leaves no room, InvalidRequestError for a wrong value.
        """
        request, defaults = self._request, self._defaults
        max_model_len = self._info.max_model_len
        left = max_model_len - num_prompt_tokens
        if left < 1:
            full = ", which leaves none for the answer" if left == 0 else ""
            raise ContextError(
                f"the prompt has {num_prompt_tokens}{full}",
                prompt_name,
                num_tokens=num_prompt_tokens,
                max_model_len=max_model_len,
            )
        if max_tokens is not None and max_tokens < 1:
            raise InvalidRequestError(
                f"{limit_name} must be at least 1, got {shown(max_tokens)}", limit_name
            )
        max_tokens = min(left, default if max_tokens is None else max_tokens)
        min_tokens = request.min_tokens or 0
        if min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens must be at most {max_tokens}, {limit_name} or what the prompt's "
                f"{num_prompt_tokens} tokens leave of the context, got {shown(min_tokens)}",
                "min_tokens",
            )
        seed = request.seed
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self._temperature,
            top_k=self._top_k,
            top_p=self._top_p,
            min_p=_first(request.min_p, defaults.min_p, 0.0),
            repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=self._logit_bias,
            seed=None if seed == -1 else seed,
            min_tokens=min_tokens,
            stop_token_ids=self._stop_token_ids,
            allowed_token_ids=self._allowed_token_ids,
            bad_words=self._bad_words,
            num_logprobs=0 if self.best_of > self.n else None,
        )

    def _resolve_temperature(self) -> float:
        temperature = _first(self._request.temperature, self._defaults.temperature, 1.0)
        if not 0.0 <= temperature <= MAX_TEMPERATURE:
            raise InvalidRequestError(
                f"temperature must be in [0, {MAX_TEMPERATURE:g}], got {shown(temperature)}",
                "temperature",
            )
        if temperature < GREEDY_BELOW:
            if self.best_of > 1 and not self._request.use_beam_search:
                name = "n" if self.n > 1 else "best_of"
                raise InvalidRequestError(
                    f"{name} must be 1 when temperature is 0 (greedy), got {self.best_of}", name
                )
            return 0.0
        return max(temperature, MIN_TEMPERATURE)


def _top_k(top_k: int) -> int:
    if not -1 <= top_k <= MAX_TOP_K:
        raise InvalidRequestError(
            f"top_k must be in [1, {MAX_TOP_K}], or 0 or -1 for all tokens, got {shown(top_k)}",
            "top_k",
        )
    return max(top_k, 0)


def _top_p(top_p: float) -> float:
    if not 0.0 < top_p <= 1.0:
        raise InvalidRequestError(
            f"top_p must be above 0 and at most 1, got {shown(top_p)}", "top_p"
        )
    return max(top_p, MIN_TOP_P)  # a lower value has the same effect: only the top token is kept


def check_token_ids(token_ids: list[int], vocab_size: int, name: str) -> None:
    """Raise InvalidRequestError for ids outside [0, vocab_size), naming the field `name`."""
    if token_ids and not (0 <= min(token_ids) and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise InvalidRequestError(
            f"{name} holds token id {shown(wrong)}, ids must be in [0, {vocab_size - 1}]", name
        )


def _eos_token_ids(
    tokenizer: Tokenizer, defaults: GenerationDefaults, info: EngineInfo
) -> list[int]:
    """Ids of the EOS tokens without duplicates, the tokenizer's own first.

    Ids that the model cannot sample, outside its vocabulary, are left out.
    """
    named = dict.fromkeys([tokenizer.eos_token_id, *defaults.eos_token_ids])
    return [token_id for token_id in named if token_id is not None and token_id < info.vocab_size]


def _choices(request: SamplingFields) -> tuple[int, int]:
    """The checked values of n and best_of."""
    n = 1 if request.n is None else request.n
    if not 1 <= n <= MAX_N:
        raise InvalidRequestError(f"n must be in [1, {MAX_N}], got {shown(n)}", "n")
    best_of = n if request.best_of is None else request.best_of
    if not n <= best_of <= MAX_N:
        raise InvalidRequestError(
            f"best_of must be in [{n}, {MAX_N}], and at least n, got {shown(best_of)}", "best_of"
        )
    if best_of > n and request.stream:
        raise InvalidRequestError(
            f"best_of must be n where the answer is a stream: got best_of {best_of} and n {n}",
            "best_of",
        )
    return n, best_of


def _stop_strings(stop: str | list[str] | None) -> list[str]:
    strings = [stop] if isinstance(stop, str) else stop or []
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError(
            f"stop has {len(strings)} strings, the limit is {MAX_STOP_STRINGS}", "stop"
        )
    for string in strings:
        if not 1 <= len(string) <= MAX_STOP_CHARS:
            raise InvalidRequestError(
                f"each stop string must have 1 to {MAX_STOP_CHARS} characters, got {len(string)}",
                "stop",
            )
    num_chars = sum(map(len, strings))
    if num_chars > MAX_STOP_CHARS_IN_ALL:
        raise InvalidRequestError(
            f"stop has {num_chars} characters in all, the limit is {MAX_STOP_CHARS_IN_ALL}", "stop"
        )
    return strings


def _logit_bias(given: dict[str, Any] | None, vocab_size: int) -> dict[int, float]:
    if given and len(given) > MAX_LOGIT_BIAS:  # checked before any work is done for each entry
        raise InvalidRequestError(
            f"logit_bias has {len(given)} entries, the limit is {MAX_LOGIT_BIAS}", "logit_bias"
        )
    bias: dict[int, float] = {}
    for key, value in (given or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise InvalidRequestError(
                f"logit_bias: keys must be token ids in [0, {vocab_size - 1}], got {key[:40]}",
                "logit_bias",
            )
        if int(key) in bias:
            raise InvalidRequestError(
                f"logit_bias names the token {int(key)} twice, also as {key}", "logit_bias"
            )
        bias[int(key)] = float(value)
    return bias


def _allowed(token_ids: list[int] | None, vocab_size: int) -> tuple[int, ...] | None:
    if token_ids is None:
        return None
    if not token_ids:
        raise InvalidRequestError(
            "allowed_token_ids must hold at least 1 token id, got 0", "allowed_token_ids"
        )
    check_token_ids(token_ids, vocab_size, "allowed_token_ids")
    return tuple(token_ids)


def _bad_words(
    words: list[str], tokenizer: Tokenizer, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """The token ids of each word, as it is tokenised at the start of a text and after a space.

    The second form is left out where it ends with the tokens of the first, which then bans both.
    """
    name = "bad_words"
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequestError(
            f"{name} has {len(words)} words, the limit is {MAX_BAD_WORDS}", name
        )
    for word in words:
        if not 1 <= len(word) <= MAX_BAD_WORD_CHARS:
            raise InvalidRequestError(
                f"each of {name} must have 1 to {MAX_BAD_WORD_CHARS} characters, got {len(word)}",
                name,
            )
    num_chars = sum(map(len, words))
    if num_chars > MAX_BAD_WORDS_CHARS:
        raise InvalidRequestError(
            f"{name} has {num_chars} characters in all, the limit is {MAX_BAD_WORDS_CHARS}", name
        )
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        first = tokenizer.encode(bare or word, add_special_tokens=False, param=name)
        found[tuple(first)] = None
        if bare:
            inside = tokenizer.encode(" " + bare, add_special_tokens=False, param=name)
            if inside[-len(first) :] != first:  # equal if the space is a token of its own
                found[tuple(inside)] = None
    # A word with an id outside the vocabulary can never be sampled, so it needs no ban.
    return tuple(ids for ids in found if ids and max(ids) < vocab_size)


def _first(asked: Number | None, default: Number | None, neutral: Number) -> Number:
    """The first of the request's value, the model's default and the neutral value that is given."""
    if asked is not None:
        return asked
    return neutral if default is None else default
