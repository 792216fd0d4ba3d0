"""SamplingParams: how the engine samples and stops one sequence.

The values are validated on construction, so that nothing behind the API has to check their ranges
again. The engine does not know EOS: whoever makes the params puts the EOS tokens, unless
`ignore_eos` is set, and the model's defaults into `stop_token_ids`.
"""

from __future__ import annotations

import msgspec

from pyserve.errors import InvalidRequestError
from pyserve.limits import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, TOP_LOGPROBS

MAX_TOP_K = 2**31 - 1
INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
# The device computes in float32. Below the minima here a value would become 0, or its effect
# infinite.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0  # of a sequence that is not greedy (0)
MIN_TOP_P = 1e-9
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_SHOWN_CHARS = 24  # a longer number is shortened in messages


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one sequence is sampled.

    max_tokens        maximum number of output tokens, at least 1.
    temperature       0 is greedy, else in [0.01, 2]; scales logits before top-k, top-p and min-p.
    top_k             number of most likely tokens that are kept; 0 keeps all.
    top_p             keeps the most likely tokens until their probability reaches top_p; in
                      [1e-9, 1].
    min_p             drops tokens less likely than min_p times the most likely one; in [0, 1].
    repetition_penalty
                      penalty on tokens of prompt and output (Keskar et al. 2019), in [0.01, 100].
    presence_penalty, frequency_penalty
                      OpenAI's penalties on tokens of the output, in [-2, 2].
    logit_bias        token id -> value that is added to its logit, in [-100, 100].
    seed              seed of the random numbers; None: a fresh one.
    sample_index      number of the choice of one request, which makes the n choices differ.
    min_tokens        stop_token_ids cannot be sampled before this many output tokens.
    stop_token_ids    tokens that end the sequence; the token itself is the last output token.
    allowed_token_ids only these tokens can be sampled, also as stop tokens; None: all tokens.
    bad_words         sequences of token ids, none of them empty; the last token of one may not
                      follow its other tokens in the output.
    num_logprobs, num_prompt_logprobs
                      report logprobs of the output tokens, or of the prompt tokens, with so many of
                      the most likely tokens beside each; None: report none.

    Raises InvalidRequestError naming the field, the value and the limit.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    sample_index: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0.0:
            _check("temperature", self.temperature, MIN_TEMPERATURE, MAX_TEMPERATURE, "0 or ")
        _check("top_p", self.top_p, MIN_TOP_P, 1.0)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("top_k", self.top_k, 0, MAX_TOP_K)
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            MIN_REPETITION_PENALTY,
            MAX_REPETITION_PENALTY,
        )
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check("max_tokens", self.max_tokens, 1, 2**31 - 1)
        for name in ("num_logprobs", "num_prompt_logprobs"):
            num = getattr(self, name)
            if num is not None:
                _check(name, num, 0, TOP_LOGPROBS)
        _check("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.seed is not None:
            _check("seed", self.seed, INT64_MIN, INT64_MAX)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(
                f"logit_bias has {len(self.logit_bias)} entries, the limit is {MAX_LOGIT_BIAS}",
                "logit_bias",
            )
        for token_id, value in self.logit_bias.items():
            _check(f"logit_bias[{token_id}]", value, -100.0, 100.0)
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(
                f"stop_token_ids has {len(self.stop_token_ids)} entries, "
                f"the limit is {MAX_STOP_TOKEN_IDS}",
                "stop_token_ids",
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError(
                "allowed_token_ids is empty: it must allow at least 1 token", "allowed_token_ids"
            )
        # A word makes two sequences: as it is at the beginning of a text, and inside a text.
        if len(self.bad_words) > 2 * MAX_BAD_WORDS:
            raise InvalidRequestError(
                f"bad_words make {len(self.bad_words)} token sequences, "
                f"the limit is {2 * MAX_BAD_WORDS}",
                "bad_words",
            )
        if not all(self.bad_words):
            raise InvalidRequestError("bad_words holds one of no tokens", "bad_words")

    @property
    def has_logprobs(self) -> bool:
        """Whether logprobs of output or prompt tokens are requested."""
        return self.num_logprobs is not None or self.num_prompt_logprobs is not None

    @property
    def has_penalties(self) -> bool:
        """Whether a penalty applies, so that sampling needs to know the sequence's tokens."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def shown(value: float) -> str:
    """A number from the client for a message; shortened, as it may have thousands of digits."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:8]}... ({len(text)} digits)"


def _check(name: str, value: float, low: float, high: float, beside: str = "") -> None:
    if not low <= value <= high:  # also true for a NaN
        raise InvalidRequestError(
            f"{name} must be {beside}in [{shown(low)}, {shown(high)}], got {shown(value)}",
            name.split("[")[0],
        )


# The parameters of a pooled sequence, which ends where its first token would be sampled.
POOLED = SamplingParams(max_tokens=1)
