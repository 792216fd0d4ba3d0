"""Sequences to text: stop strings over any cut of the tokens, exact usage, one wake-up for all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from pyserve.api.generation.generate import Generation
from pyserve.api.generation.job import Ending, Job, Prompt
from pyserve.client import Constraint
from pyserve.errors import EngineError
from pyserve.metrics import Metrics
from pyserve.params import SamplingParams
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.parts import content_of
from pyserve.text.tokenizer import Tokenizer
from tests.api.fakes import FakeEngine, Script

EOS = 2
TEXT = "Hello world, how are you? 😀 漢字"
BURSTS = [1, 2, 3, 100]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)


def ending(
    stop: list[str] | None = None, *, is_stop_kept: bool = False, min_tokens: int = 0
) -> Ending:
    return Ending(stop or [], is_stop_kept, EOS, min_tokens)


def make_job(
    tokenizer: Tokenizer,
    prompt: list[int],
    params: SamplingParams,
    how: Ending,
    *,
    n: int = 1,
    skip_special_tokens: bool = True,
) -> Job:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip_special_tokens)
    return Job(prompts=[Prompt(prompt, "", detokenizer)], params=[params], ending=how, n=n)


def generate(
    tokenizer: Tokenizer,
    script: Callable[[int], Script],
    how: Ending,
    *,
    n: int = 1,
    skip_special_tokens: bool = True,
    max_tokens: int = 100,
    stop_token_ids: tuple[int, ...] = (EOS, 5),
) -> tuple[Generation, FakeEngine]:
    """Run n sequences to their end."""

    async def run() -> tuple[Generation, FakeEngine]:
        engine = FakeEngine(script, num_cached_tokens=3)
        generation = Generation(engine, Metrics("m"), arrived_s=0.0)
        job = make_job(
            tokenizer,
            [7, 8, 9, 10],
            SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids),
            how,
            n=n,
            skip_special_tokens=skip_special_tokens,
        )
        await generation.submit(job, cache_salt="", user="")
        try:
            await generation.read_all()
        finally:
            generation.close("error")
            tasks = [item.task for item in engine.submitted if item.task is not None]
            await asyncio.gather(*tasks)
        return generation, engine

    return asyncio.run(run())


def tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("burst", BURSTS)
def test_eos_ends_without_a_reason_and_counts(tokenizer: Tokenizer, burst: int) -> None:
    ids = [*tokens(tokenizer, TEXT), EOS]
    generation, _ = generate(tokenizer, lambda _: Script(ids, burst=burst), ending())
    (choice,) = generation.choices
    assert content_of(choice.parts) == TEXT
    assert (choice.finish_reason, choice.stop_reason) == ("stop", None)
    usage = generation.usage()
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, len(ids))
    assert usage.total_tokens == 4 + len(ids)
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_each_choice_has_a_constraint_of_its_own(tokenizer: Tokenizer) -> None:
    class Anything:
        is_free, is_finished, error = True, False, None

        def fill_bitmask(self, words: NDArray[np.int32]) -> None:
            words.fill(-1)

        def accept(self, token_ids: Sequence[int]) -> None: ...

        def rollback(self, num_tokens: int) -> None: ...

    async def submit(job: Job) -> list[Constraint | None]:
        engine = FakeEngine(lambda _: Script([EOS]))
        generation = Generation(engine, Metrics("m"), arrived_s=0.0)
        await generation.submit(job, cache_salt="", user="")
        generation.close("abort")
        return [item.constraint for item in engine.submitted]

    job = make_job(tokenizer, [7], SamplingParams(max_tokens=3), ending(), n=3)
    assert asyncio.run(submit(job)) == [None, None, None]
    constraints = asyncio.run(submit(msgspec.structs.replace(job, make_constraint=Anything)))
    assert all(isinstance(constraint, Anything) for constraint in constraints)
    assert len(set(map(id, constraints))) == 3


@pytest.mark.parametrize("burst", BURSTS)
def test_an_answer_that_is_whole_without_a_stop_token_loses_none(
    tokenizer: Tokenizer, burst: int
) -> None:
    ids = tokens(tokenizer, TEXT)
    generation, _ = generate(tokenizer, lambda _: Script(ids, burst=burst, is_whole=True), ending())
    (choice,) = generation.choices
    assert content_of(choice.parts) == TEXT
    assert (choice.finish_reason, choice.stop_reason) == ("stop", None)
    assert generation.usage().completion_tokens == len(ids)


def test_another_stop_id_is_the_reason(tokenizer: Tokenizer) -> None:
    ids = [*tokens(tokenizer, "Hello"), 5]
    generation, _ = generate(tokenizer, lambda _: Script(ids), ending())
    (choice,) = generation.choices
    assert content_of(choice.parts) == "Hello"
    assert (choice.finish_reason, choice.stop_reason) == ("stop", 5)


@pytest.mark.parametrize(("skip", "text"), [(True, "Hello"), (False, "Hello<|im_end|>")])
def test_the_stop_token_s_text_can_stay(tokenizer: Tokenizer, skip: bool, text: str) -> None:
    ids = [*tokens(tokenizer, "Hello"), EOS]
    generation, _ = generate(
        tokenizer, lambda _: Script(ids), ending(is_stop_kept=True), skip_special_tokens=skip
    )
    assert content_of(generation.choices[0].parts) == text


def test_length(tokenizer: Tokenizer) -> None:
    ids = tokens(tokenizer, TEXT)
    generation, _ = generate(tokenizer, lambda _: Script(ids, burst=4), ending(), max_tokens=3)
    (choice,) = generation.choices
    assert (choice.finish_reason, choice.stop_reason, choice.num_tokens) == ("length", None, 3)
    assert TEXT.startswith(content_of(choice.parts))


def test_a_character_cut_off_by_the_limit(tokenizer: Tokenizer) -> None:
    ids = tokens(tokenizer, "ß")  # two byte tokens
    generation, _ = generate(tokenizer, lambda _: Script(ids), ending(), max_tokens=1)
    assert content_of(generation.choices[0].parts) == "\ufffd"


@pytest.mark.parametrize("burst", BURSTS)
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["world", "o w", "are you", "😀", "d, h", "字", "Hello"])
def test_stop_strings(tokenizer: Tokenizer, stop: str, include: bool, burst: int) -> None:
    """Also those that span tokens; usage ends with the token that completed the string."""
    ids = [*tokens(tokenizer, TEXT), EOS]
    generation, engine = generate(
        tokenizer,
        lambda _: Script(ids, burst=burst),
        ending(["never", stop, "you?"], is_stop_kept=include),
    )
    (choice,) = generation.choices
    end = TEXT.index(stop) + (len(stop) if include else 0)
    if TEXT.index("you?") + 4 < TEXT.index(stop) + len(stop):
        stop, end = "you?", TEXT.index("you?") + (4 if include else 0)
    assert content_of(choice.parts) == TEXT[:end]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    needed = next(
        n for n in range(len(ids)) if stop in tokenizer.decode(ids[:n], skip_special_tokens=True)
    )
    assert choice.num_tokens == generation.usage().completion_tokens == needed
    assert engine.submitted[0].stream.is_finished


def test_a_stop_string_frees_the_sequence(tokenizer: Tokenizer) -> None:
    ids = tokens(tokenizer, TEXT)
    generation, engine = generate(tokenizer, lambda _: Script(ids), ending(["world"]))
    assert engine.submitted[0].is_aborted
    assert generation.choices[0].num_tokens < len(ids)


def test_what_was_held_back_for_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    ids = [*tokens(tokenizer, "Hello wor"), EOS]
    generation, _ = generate(tokenizer, lambda _: Script(ids), ending(["world"]))
    (choice,) = generation.choices
    assert content_of(choice.parts) == "Hello wor"
    assert (choice.finish_reason, choice.num_tokens) == ("stop", len(ids))
    assert choice.stop_reason is None


@pytest.mark.parametrize("min_tokens", [3, 4, 6])
@pytest.mark.parametrize("burst", BURSTS)
def test_min_tokens_holds_stop_strings_back(
    tokenizer: Tokenizer, burst: int, min_tokens: int
) -> None:
    ids = [*tokens(tokenizer, "a b a b a b"), EOS]
    assert tokenizer.decode(ids[:3], skip_special_tokens=True) == "a b"
    generation, _ = generate(
        tokenizer, lambda _: Script(ids, burst=burst), ending(["b"], min_tokens=min_tokens)
    )
    (choice,) = generation.choices
    assert (choice.num_tokens, choice.stop_reason) == (7, "b")
    assert content_of(choice.parts) == "a b a "


def test_n_choices_read_through_one_wakeup(tokenizer: Tokenizer) -> None:
    texts = ["Hello", "The lazy dog", "quick"]
    scripts = [Script([*tokens(tokenizer, text), EOS]) for text in texts]
    generation, engine = generate(tokenizer, lambda i: scripts[i], ending(), n=3)
    assert [content_of(choice.parts) for choice in generation.choices] == texts
    assert [item.params.sample_index for item in engine.submitted] == [0, 1, 2]
    usage = generation.usage()
    assert usage.prompt_tokens == 4
    assert usage.completion_tokens == sum(len(script.token_ids) for script in scripts)


@pytest.mark.parametrize(("n", "asked"), [(1, [1]), (3, [3, 1, 1, 1])])
def test_room_is_asked_for_all_sequences_before_the_first(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, n: int, asked: list[int]
) -> None:
    """Of one alone the engine asks itself, when it is submitted."""
    seen: list[int] = []
    monkeypatch.setattr(
        FakeEngine, "check_room", lambda self, num_sequences, **more: seen.append(num_sequences)
    )
    generate(tokenizer, lambda _: Script([9, EOS]), ending(), n=n)
    assert seen == asked


def test_an_error_ends_the_request_and_aborts_the_rest(tokenizer: Tokenizer) -> None:
    engines: list[FakeEngine] = []

    def script(number: int) -> Script:
        return Script([9], error=EngineError("broken")) if number == 1 else Script([9], 0.01)

    async def run() -> Metrics:
        engine = FakeEngine(script)
        engines.append(engine)
        metrics = Metrics("m")
        generation = Generation(engine, metrics, arrived_s=0.0)
        job = make_job(tokenizer, [7], SamplingParams(max_tokens=50), ending(), n=3)
        await generation.submit(job, cache_salt="", user="")
        with pytest.raises(EngineError, match="broken"):
            await generation.read_all()
        generation.close("error")
        await asyncio.gather(*[item.task for item in engine.submitted if item.task is not None])
        return metrics

    metrics = asyncio.run(run())
    assert [item.is_aborted for item in engines[0].submitted] == [True, False, True]
    assert metrics.num_finished == {"stop": 0, "length": 0, "abort": 0, "error": 3}


def test_a_request_is_observed_at_its_first_token_and_at_its_end(tokenizer: Tokenizer) -> None:
    async def run() -> Metrics:
        engine = FakeEngine(lambda _: Script([9], burst=5))
        metrics = Metrics("m")
        generation = Generation(engine, metrics, arrived_s=0.0)
        job = make_job(tokenizer, [7], SamplingParams(max_tokens=20), ending(), n=1)
        await generation.submit(job, cache_salt="", user="")
        await generation.read_all()
        generation.close("abort")
        return metrics

    metrics = asyncio.run(run())
    assert sum(metrics.time_to_first_token_s.counts) == 1
    for histogram, total in (
        (metrics.prompt_tokens, 1),
        (metrics.generation_tokens, 20),
        (metrics.max_num_generation_tokens, 20),
        (metrics.params_max_tokens, 20),
        (metrics.params_n, 1),
    ):
        assert (histogram.count, histogram.total) == (1, total)
    times = (
        metrics.queue_time_s, metrics.prefill_time_s, metrics.decode_time_s,
        metrics.inference_time_s, metrics.request_time_per_output_token_s,
    )  # fmt: skip
    assert all(0.0 <= histogram.total < 1.0 for histogram in times)
    assert all(histogram.count == 1 for histogram in (*times, metrics.e2e_latency_s))
    assert metrics.num_finished["length"] == metrics.num_requests["finished"] == 1
