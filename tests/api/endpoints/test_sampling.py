"""Request value, else the model's default, else neutral; how answers end; ranges and limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pyserve.api.endpoints.sampling import Resolver
from pyserve.api.wire.protocol import MAX_BAD_WORDS_CHARS, CompletionRequest
from pyserve.client import EngineInfo
from pyserve.errors import InvalidRequestError
from pyserve.limits import MAX_BAD_WORDS
from pyserve.params import SamplingParams
from pyserve.text.tokenizer import GenerationDefaults, Tokenizer

INFO = EngineInfo(
    max_model_len=100, vocab_size=400, max_num_seqs=4, block_size=16, num_blocks=10,
    dtype="float32", device="cpu",
)  # fmt: skip
NO_DEFAULTS = GenerationDefaults()


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)  # <|im_end|>, id 2, is its EOS


def resolver(
    tokenizer: Tokenizer, defaults: GenerationDefaults = NO_DEFAULTS, **fields: Any
) -> Resolver:
    return Resolver(CompletionRequest(**fields), INFO, tokenizer=tokenizer, defaults=defaults)


def params(
    tokenizer: Tokenizer,
    defaults: GenerationDefaults = NO_DEFAULTS,
    *,
    num_prompt_tokens: int = 10,
    default: int = 16,
    **fields: Any,
) -> SamplingParams:
    return resolver(tokenizer, defaults, **fields).params(
        num_prompt_tokens, prompt_name="prompt", max_tokens=fields.get("max_tokens"),
        limit_name="max_tokens", default=default,
    )  # fmt: skip


def test_neutral_values(tokenizer: Tokenizer) -> None:
    assert params(tokenizer) == SamplingParams(max_tokens=16, stop_token_ids=(2,))


def test_every_field_reaches_the_engine(tokenizer: Tokenizer) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": -0.4, "seed": 42, "min_tokens": 3,
        "max_tokens": 9,
    }  # fmt: skip
    got = params(tokenizer, logit_bias={"7": 1.5}, stop_token_ids=[9], **fields)
    assert got == SamplingParams(logit_bias={7: 1.5}, stop_token_ids=(2, 9), **fields)


def test_request_wins_over_the_model_s_defaults(tokenizer: Tokenizer) -> None:
    defaults = GenerationDefaults(
        temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.1
    )
    got = params(tokenizer, defaults)
    assert (got.temperature, got.top_p, got.top_k) == (0.6, 0.95, 20)
    assert (got.min_p, got.repetition_penalty) == (0.05, 1.1)
    asked = params(
        tokenizer, defaults, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0
    )
    assert asked == SamplingParams(max_tokens=16, stop_token_ids=(2,))


@pytest.mark.parametrize(
    ("asked", "got"), [(0, 0.0), (1e-6, 0.0), (1e-5, 0.01), (0.005, 0.01), (0.01, 0.01), (2, 2.0)]
)
def test_temperatures(tokenizer: Tokenizer, asked: float, got: float) -> None:
    assert params(tokenizer, temperature=asked).temperature == got


@pytest.mark.parametrize(
    ("field", "asked", "got"),
    [("top_k", -1, 0), ("top_k", 0, 0), ("seed", -1, None), ("seed", 0, 0), ("seed", None, None)],
)
def test_values_that_switch_off(
    tokenizer: Tokenizer, field: str, asked: Any, got: int | None
) -> None:
    assert getattr(params(tokenizer, **{field: asked}), field) == got


OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("temperature", -0.1), ("temperature", 2.1), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -2),
    ("top_k", 2**70), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0),
    ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("seed", 2**63), ("n", 0), ("n", 129),
    ("n", -1), ("min_tokens", 17), ("min_tokens", -1), ("max_tokens", 0), ("max_tokens", -5),
    ("min_tokens", 10**4000), ("top_k", 10**4000), ("n", 10**4000), ("max_tokens", -(10**4000)),
    ("stop_token_ids", [10**4000]), ("seed", 10**4000), ("stop", ""), ("stop", ["a", ""]),
    ("stop", ["x"] * 65), ("stop", "x" * 1001), ("stop", ["x" * 1000] * 9),
    ("stop_token_ids", [400]),
    ("stop_token_ids", [-1]), ("stop_token_ids", list(range(65))), ("logit_bias", {"400": 1.0}),
    ("logit_bias", {"-1": 1.0}), ("logit_bias", {"a": 1.0}), ("logit_bias", {"1": 101.0}),
    ("logit_bias", {"²": 1.0}), ("logit_bias", {str(i): 1.0 for i in range(301)}),
    ("logit_bias", {"9" * 5000: 1.0}), ("logit_bias", {"1": 1.0, "01": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE, ids=lambda value: str(value)[:24])
def test_out_of_range_names_the_field(tokenizer: Tokenizer, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        params(tokenizer, **{field: value})
    assert caught.value.param == field
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("asked", [40, 41, 32000, 2**31, 2**80])
def test_what_the_prompt_leaves_is_all_there_is(tokenizer: Tokenizer, asked: int) -> None:
    assert params(tokenizer, num_prompt_tokens=60, max_tokens=asked).max_tokens == 40
    assert params(tokenizer, num_prompt_tokens=99, max_tokens=asked).max_tokens == 1


@pytest.mark.parametrize("max_tokens", [None, 1, 41, 2**80])
@pytest.mark.parametrize("num_prompt_tokens", [100, 101, 5000])
def test_a_prompt_that_does_not_fit_names_both_numbers(
    tokenizer: Tokenizer, num_prompt_tokens: int, max_tokens: int | None
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        params(tokenizer, num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens)
    for words in ("maximum context length is 100 tokens", f"the prompt has {num_prompt_tokens}"):
        assert words in caught.value.message
    assert caught.value.param == "prompt"


def test_min_tokens_must_fit_too(tokenizer: Tokenizer) -> None:
    assert params(tokenizer, num_prompt_tokens=60, max_tokens=99, min_tokens=40).min_tokens == 40
    with pytest.raises(InvalidRequestError, match="min_tokens must be at most 40") as caught:
        params(tokenizer, num_prompt_tokens=60, max_tokens=99, min_tokens=41)
    assert "60 tokens" in caught.value.message


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "must be in [0, 2], got -0.1"),
        ("temperature", 2.5, "must be in [0, 2], got 2.5"),
        ("top_p", 0, "must be above 0 and at most 1, got 0"),
        ("top_p", 1.5, "must be above 0 and at most 1, got 1.5"),
        ("top_k", -2, "must be in [1, 2147483647], or 0 or -1 for all tokens, got -2"),
        ("min_p", 1.1, "must be in [0, 1], got 1.1"),
        ("presence_penalty", 2.5, "must be in [-2, 2], got 2.5"),
        ("repetition_penalty", 0.0, "must be in [0.01, 100], got 0"),
        ("n", 10**30, "got 10000000... (31 digits)"),
    ],
)
def test_messages_name_what_works(tokenizer: Tokenizer, field: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        params(tokenizer, **{field: value})
    assert caught.value.message == f"{field} {words}" or caught.value.message.endswith(words)


@pytest.mark.parametrize(("asked", "got"), [(1e-300, 1e-9), (1e-9, 1e-9), (1e-5, 1e-5), (1, 1.0)])
def test_top_ps(tokenizer: Tokenizer, asked: float, got: float) -> None:
    assert params(tokenizer, top_p=asked).top_p == got


def test_without_max_tokens_what_is_left(tokenizer: Tokenizer) -> None:
    assert params(tokenizer, num_prompt_tokens=95).max_tokens == 5
    assert params(tokenizer, num_prompt_tokens=95, default=1000).max_tokens == 5
    assert params(tokenizer, num_prompt_tokens=20, default=1000).max_tokens == 80


def test_greedy_takes_one_choice(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="n must be 1"):
        params(tokenizer, n=2, temperature=0)
    with pytest.raises(InvalidRequestError, match="n must be 1"):
        params(tokenizer, GenerationDefaults(temperature=0.0), n=2)
    assert resolver(tokenizer, n=2, temperature=0.5).n == 2


def test_best_of(tokenizer: Tokenizer) -> None:
    assert resolver(tokenizer, n=2, best_of=2).n == 2
    assert params(tokenizer, n=2, best_of=2).num_logprobs is None
    assert params(tokenizer, n=2, best_of=3).num_logprobs == 0  # how likely each of them is
    found = resolver(tokenizer, n=2, best_of=3)
    assert (found.n, found.best_of) == (2, 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 2, "best_of": 1}, "best_of must be in [2, 128], and at least n, got 1"),
        ({"best_of": 0}, "best_of must be in [1, 128], and at least n, got 0"),
        ({"best_of": 129}, "best_of must be in [1, 128], and at least n, got 129"),
        ({"best_of": 2, "stream": True}, "best_of must be n where the answer is a stream"),
        ({"best_of": 2, "temperature": 0}, "best_of must be 1 when temperature is 0 (greedy)"),
    ],
)
def test_bad_best_of(tokenizer: Tokenizer, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(words)) as caught:
        params(tokenizer, **fields)
    assert caught.value.param == "best_of"
    assert resolver(tokenizer, best_of=2, n=2, stream=True).n == 2


def test_stop_ids_primary_eos_first_each_once(tokenizer: Tokenizer) -> None:
    defaults = GenerationDefaults(eos_token_ids=(0, 2, 5000))
    got = resolver(tokenizer, defaults, stop_token_ids=[7, 0])
    assert got.ending.eos_token_id == 2
    assert params(tokenizer, defaults, stop_token_ids=[7, 0]).stop_token_ids == (2, 0, 7)


def test_many_biases_are_refused_for_their_number(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="logit_bias has 301 entries, the limit is 300"):
        params(tokenizer, logit_bias={f"x{i}": 1.0 for i in range(301)})


def test_room_is_kept_for_the_model_s_own_stop_ids(tokenizer: Tokenizer) -> None:
    defaults = GenerationDefaults(eos_token_ids=(0, 2))
    asked = list(range(100, 164))
    assert len(params(tokenizer, defaults, stop_token_ids=asked[:62]).stop_token_ids) == 64
    with pytest.raises(InvalidRequestError, match="64 entries, the limit is 62 beside"):
        params(tokenizer, defaults, stop_token_ids=asked)
    got = params(tokenizer, defaults, stop_token_ids=asked, ignore_eos=True)
    assert got.stop_token_ids == tuple(asked)


def test_ignore_eos_keeps_the_request_s_own(tokenizer: Tokenizer) -> None:
    defaults = GenerationDefaults(eos_token_ids=(0,))
    assert params(tokenizer, defaults, ignore_eos=True).stop_token_ids == ()
    got = resolver(tokenizer, defaults, ignore_eos=True, stop_token_ids=[2])
    assert got.ending.eos_token_id is None
    assert params(tokenizer, defaults, ignore_eos=True, stop_token_ids=[2]).stop_token_ids == (2,)


def test_a_single_stop_string_is_a_list(tokenizer: Tokenizer) -> None:
    assert resolver(tokenizer, stop="ab").ending.stop == ["ab"]
    assert resolver(tokenizer).ending.stop == []


def test_a_bad_word_is_one_at_the_beginning_and_one_behind_a_space(tokenizer: Tokenizer) -> None:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    got = params(tokenizer, bad_words=["fox", "  lazy dog", "\n", "fox"]).bad_words
    assert got == (ids("fox"), ids(" fox"), ids("lazy dog"), ids(" lazy dog"), ids("\n"))
    assert len(ids(" fox")) == 1 and len(ids("fox")) == 2
    assert params(tokenizer, bad_words=[]).bad_words == ()


def test_a_space_that_is_a_token_of_its_own_makes_no_other_word() -> None:
    class Spaced:
        def encode(self, text: str, **_: object) -> list[int]:
            return [{" ": 1}.get(char, 500 if char == "X" else 9) for char in text]

    def words(*given: str) -> tuple[tuple[int, ...], ...]:
        request = CompletionRequest(bad_words=list(given), ignore_eos=True)
        resolved = Resolver(request, INFO, tokenizer=Spaced(), defaults=NO_DEFAULTS)  # type: ignore[arg-type]
        return resolved.params(
            1, prompt_name="prompt", max_tokens=1, limit_name="max_tokens", default=1
        ).bad_words

    assert words("ab") == ((9, 9),)
    assert words("aX", "b") == ((9,),)  # the model has no token 500


def test_allowed_token_ids(tokenizer: Tokenizer) -> None:
    assert params(tokenizer).allowed_token_ids is None
    assert params(tokenizer, allowed_token_ids=[5, 399]).allowed_token_ids == (5, 399)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids must hold at least 1 token id, got 0"),
        ({"allowed_token_ids": [1, 400]}, "holds token id 400, ids must be in .0, 399."),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids holds token id -1"),
        ({"bad_words": [""]}, "each of bad_words must have 1 to 256 characters, got 0"),
        ({"bad_words": ["a" * 257]}, "each of bad_words must have 1 to 256 characters, got 257"),
        ({"bad_words": ["a"] * (MAX_BAD_WORDS + 1)}, "bad_words has 129 words, the limit is 128"),
        (
            {"bad_words": ["a" * 256] * (MAX_BAD_WORDS_CHARS // 256) + ["b"]},
            "bad_words has 4097 characters in all, the limit is 4096",
        ),
        ({"bad_words": ["\ud800"]}, "bad_words"),
    ],
)
def test_masks_out_of_range(tokenizer: Tokenizer, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        params(tokenizer, **fields)
    assert caught.value.param == next(iter(fields))
