"""The engine on a fake device: the same tokens whatever happens, and nothing ever leaks."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pyserve.client import SequenceRequest
from pyserve.engine.batch import Step
from pyserve.engine.engine import Engine
from pyserve.errors import EngineError, InvalidRequestError
from pyserve.params import SamplingParams
from tests.engine.driver import Driver, Reader
from tests.engine.fake_runner import VOCAB_SIZE, FakeRunner, expected_tokens, make_engine


def check(reader: Reader) -> None:
    """What came out is what must come out, or the beginning of it."""
    expected = expected_tokens(reader.prompt, reader.params)
    assert reader.output == expected[: len(reader.output)]
    if reader.finish_reason in ("stop", "length"):
        assert reader.output == expected
        is_stop = expected[-1] in reader.params.stop_token_ids
        assert reader.finish_reason == ("stop" if is_stop else "length")


def fake(engine: Engine) -> FakeRunner:
    assert isinstance(engine.runner, FakeRunner)
    return engine.runner


def random_params(rng: random.Random, max_tokens: int) -> SamplingParams:
    has_penalties = rng.random() < 0.3
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=rng.choice([0.0, 0.5, 1.0]),
        top_k=rng.choice([0, 5]),
        repetition_penalty=1.5 if has_penalties else 1.0,
        frequency_penalty=0.5 if has_penalties else 0.0,
        logit_bias={3: 1.5, 9: -2.0} if rng.random() < 0.2 else {},
        seed=rng.randrange(-(2**63), 2**63),
        sample_index=rng.randrange(3),
        min_tokens=rng.randrange(max_tokens) if rng.random() < 0.3 else 0,
        stop_token_ids=tuple(rng.sample(range(VOCAB_SIZE), 2)),
    )


def random_prompt(rng: random.Random, driver: Driver, max_len: int) -> list[int]:
    """Fresh, behind a shared prefix, a repeated one, or the next turn of a finished sequence."""
    kind = rng.random()
    tail = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 12))]
    if kind < 0.2:
        tail += [rng.randrange(VOCAB_SIZE) for _ in range(20)]
    elif kind < 0.6:
        prefix = random.Random(rng.randrange(3)).choices(range(VOCAB_SIZE), k=25)
        tail = prefix[: rng.choice([4, 8, 17, 25])] + tail
    elif kind < 0.75 and driver.readers:
        tail = rng.choice(driver.readers).prompt
    elif driver.readers:
        earlier = rng.choice(driver.readers)
        tail = earlier.prompt + earlier.output + tail[:3]
    return tail[:max_len]


@pytest.mark.parametrize(
    ("depth", "policy", "caching", "num_operations"),
    [(0, "fcfs", True, 4000), (1, "fcfs", True, 4000), (1, "priority", True, 3000),
     (1, "fcfs", False, 3000)],
)  # fmt: skip
def test_random_operations(depth: int, policy: str, caching: bool, num_operations: int) -> None:
    """Submit, abort, launch and update in any order, failing steps, NaN."""
    rng = random.Random(f"{depth} {policy} {caching}")
    max_model_len = 64
    engine = make_engine(
        num_blocks=20, num_slots=6, max_num_batched_tokens=14, max_model_len=max_model_len,
        enable_prefix_caching=caching, policy=policy,
    )  # fmt: skip
    driver = Driver(engine, depth)
    finished = []

    def fail_sometimes(step: Step) -> None:
        if rng.random() < 0.003:
            raise RuntimeError("as wanted")

    fake(engine).on_step = fail_sometimes
    for _ in range(num_operations):
        choice = rng.random()
        if choice < 0.12 and engine.num_seqs < 25:
            prompt = random_prompt(rng, driver, max_model_len - 1)
            params = random_params(rng, rng.randrange(1, min(25, max_model_len - len(prompt)) + 1))
            if rng.random() < 0.02:
                assert params.seed is not None
                fake(engine).nan_seeds.add(params.seed)
            for _ in range(rng.choice([1, 1, 1, 3])):
                driver.submit(
                    prompt, params, priority=rng.randrange(3), user=rng.choice("abbb"),
                    is_background=rng.random() < 0.2,
                )  # fmt: skip
        elif choice < 0.14 and driver.readers:
            engine.abort(rng.choice(driver.readers).stream)
        elif choice < 0.57:
            driver.launch()
        else:
            driver.update()
        engine.check_invariants()
        for reader in [reader for reader in driver.readers if reader.is_finished]:
            finished.append(reader)
        if len(driver.readers) > 60:
            driver.readers = [r for r in driver.readers[:-40] if not r.is_finished] + (
                driver.readers[-40:]
            )
    driver.drain()
    engine.check_invariants()
    finished += driver.readers
    seen = {id(reader): reader for reader in finished}.values()
    for reader in seen:
        check(reader)
    kinds = {reader.finish_reason for reader in seen}
    assert kinds == {"stop", "length", "abort", None}
    assert {type(reader.error) for reader in seen if reader.finish_reason is None} == {EngineError}
    scheduler = engine.scheduler
    assert scheduler.blocks.num_free == 20 and scheduler.slots.num_free == 6
    assert scheduler.num_preemptions > 20
    assert (scheduler.num_cached_tokens > 100) == caching
    histograms = engine.histograms
    assert histograms.num_tokens.count == engine.num_steps
    num_begun = sum(reader.stream.first_token_s > 0.0 for reader in seen)
    assert histograms.inter_token_s.count == engine.num_output_tokens - num_begun
    for reader in seen:
        stream = reader.stream
        assert stream.queued_s <= (stream.scheduled_s or stream.ended_s) <= stream.ended_s
        if reader.output:
            assert stream.scheduled_s <= stream.first_token_s <= stream.ended_s
        else:
            assert stream.first_token_s == 0.0


@pytest.mark.parametrize("depth", [0, 1])
def test_same_tokens_under_memory_pressure(depth: int) -> None:
    """Preempted sequences go on where they were, sampled and penalised ones too."""
    prompts = [[i, i + 1, i + 2] * 3 for i in range(6)]
    outputs = []
    for num_blocks in (200, 14):
        engine = make_engine(num_blocks=num_blocks, max_model_len=56)
        driver = Driver(engine, depth)
        for index, prompt in enumerate(prompts):
            params = SamplingParams(
                max_tokens=40, seed=index, presence_penalty=0.5, repetition_penalty=1.25
            )
            driver.submit(prompt, params)
        driver.drain()
        assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 14)
        outputs.append([reader.output for reader in driver.readers])
        for reader in driver.readers:
            check(reader)
    assert outputs[0] == outputs[1]


def test_an_unseeded_sequence_keeps_its_seed_when_preempted() -> None:
    engine = make_engine(num_blocks=8, max_model_len=32)
    driver = Driver(engine, 0)
    readers = [driver.submit([i] * 8, SamplingParams(max_tokens=16)) for i in range(2)]
    seeds = {id(seq): seq.seed for seq in engine.scheduler.waiting}
    driver.launch()
    seqs = list(engine.scheduler.running)
    driver.drain()
    assert engine.scheduler.num_preemptions > 0
    assert {id(seq): seq.seed for seq in seqs} == seeds
    assert readers[0].output != readers[1].output
    for reader, seq in zip(readers, seqs, strict=True):
        pinned = SamplingParams(max_tokens=16, seed=seq.seed)
        assert reader.output == expected_tokens(reader.prompt, pinned)


@pytest.mark.parametrize("depth", [0, 1])
def test_abort_in_every_state(depth: int) -> None:
    engine = make_engine(num_blocks=16, num_slots=2, max_num_batched_tokens=8, max_model_len=60)
    params = SamplingParams(max_tokens=20, seed=1)
    for num_operations in range(14):
        for victim in range(3):  # the third waits for a slot
            driver = Driver(engine, depth)
            readers = [driver.submit([victim, i] * 10, params) for i in range(3)]
            for number in range(num_operations):  # any mix of chunked, decoding, in flight
                _ = driver.launch() if number % 3 else driver.update()
            engine.abort(readers[victim].stream)
            engine.check_invariants()
            readers[victim].take()
            assert readers[victim].finish_reason == "abort"
            num_tokens = len(readers[victim].output)
            engine.abort(readers[victim].stream)  # harmless
            driver.drain()
            assert len(readers[victim].output) == num_tokens, "a token after the end"
            for reader in readers:
                check(reader)
            assert engine.scheduler.blocks.num_free == 16


def test_abort_frees_blocks_at_once_while_the_step_is_in_flight() -> None:
    engine = make_engine(num_blocks=16)
    driver = Driver(engine, 0)
    reader = driver.submit([1] * 30, SamplingParams(max_tokens=4, seed=1))
    driver.launch()
    assert engine.scheduler.blocks.num_free == 8
    engine.abort(reader.stream)
    assert engine.scheduler.blocks.num_free == 16
    # Its slot and blocks are taken again before its late token arrives.
    other = driver.submit([2] * 30, SamplingParams(max_tokens=4, seed=2))
    driver.depth = 1
    driver.launch()
    driver.drain()
    assert reader.output == []
    check(other)
    assert other.finish_reason == "length"


@pytest.mark.parametrize("how", ["late token", "late failure"])
def test_what_comes_late_of_an_earlier_stay_is_dropped(how: str) -> None:
    """Preempted and admitted again while the step of its first stay is still in flight."""
    engine = make_engine(num_blocks=7, max_model_len=32)
    driver = Driver(engine, 2)
    older = driver.submit([1] * 16, SamplingParams(max_tokens=8, seed=1))
    younger = driver.submit([2] * 8, SamplingParams(max_tokens=8, seed=2))

    def fail(step: Step) -> None:
        if how == "late failure":
            raise RuntimeError("as wanted")

    fake(engine).on_step = fail
    assert driver.launch()  # both prompts: 4 and 2 blocks
    fake(engine).on_step = lambda step: None
    assert driver.launch()  # the older one takes the last block
    assert engine.scheduler.num_preemptions == 1
    engine.abort(older.stream)
    assert driver.launch() and len(driver.in_flight) == 3
    assert [seq.stream for seq in engine.scheduler.running] == [younger.stream]
    driver.update()
    assert younger.output == [] and younger.error is None
    driver.drain()
    check(younger)
    assert younger.finish_reason == "length"


def test_a_nan_row_fails_alone_and_leaves_nothing_in_the_cache() -> None:
    engine = make_engine(max_num_batched_tokens=15)  # the first blocks are cached before the NaN
    fake(engine).nan_seeds.add(7)
    driver = Driver(engine, 0)
    prompt = [5] * 20
    bad = driver.submit(prompt, SamplingParams(max_tokens=4, seed=7))
    good = driver.submit([6] * 12, SamplingParams(max_tokens=4, seed=8))
    driver.drain()
    assert isinstance(bad.error, EngineError) and bad.output == []
    check(good)
    again = driver.submit(prompt, SamplingParams(max_tokens=4, seed=9))
    driver.drain()
    assert again.stream.num_cached_tokens == 0
    check(again)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_failed_step_fails_its_sequences_only(depth: int) -> None:
    engine = make_engine(num_slots=2, max_num_batched_tokens=8)
    driver = Driver(engine, depth)
    first = [driver.submit([i] * 9, SamplingParams(max_tokens=6, seed=i)) for i in range(2)]
    driver.launch()
    driver.update()
    waiting = driver.submit([2] * 9, SamplingParams(max_tokens=6, seed=2))

    def fail(step: Step) -> None:
        raise RuntimeError("as wanted")

    fake(engine).on_step = fail
    driver.launch()
    fake(engine).on_step = lambda step: None
    driver.drain()
    assert [type(reader.error) for reader in first] == [EngineError, EngineError]
    check(waiting)
    assert waiting.finish_reason == "length"


def test_equal_prompts_compute_their_prefix_once() -> None:
    engine = make_engine(max_num_batched_tokens=20)
    driver = Driver(engine, 0)
    prompt = list(range(30))
    readers = [
        driver.submit(prompt, SamplingParams(max_tokens=5, seed=4, sample_index=i))
        for i in range(4)
    ]
    passing = driver.submit([1, 2, 3], SamplingParams(max_tokens=1, seed=1))
    num_prompt_tokens = 0
    while driver.launch():
        step = driver.in_flight[0][0]
        num_prompt_tokens += sum(len(ids) for ids in step.host_tokens if ids is not None)
        driver.update()
        if engine.num_steps == 2:
            assert passing.is_finished, "others pass a sequence that waits for a prefix"
            assert len(engine.scheduler.waiting) == engine.scheduler.num_awaiting == 3
    assert [reader.stream.num_cached_tokens for reader in readers] == [0, 28, 28, 28]
    assert num_prompt_tokens == 30 + 3 * 2 + 3
    assert engine.scheduler.num_awaiting == 0
    for reader in readers:
        check(reader)
    assert len({tuple(reader.output) for reader in readers}) == 4


def test_who_comes_later_passes_those_that_wait_for_a_prefix() -> None:
    engine = make_engine()
    driver = Driver(engine, 1)
    waiting = [driver.submit([1] * 9, SamplingParams(max_tokens=2, seed=i)) for i in range(3)]
    driver.launch()
    assert engine.scheduler.num_awaiting == 2
    later = driver.submit([2, 3], SamplingParams(max_tokens=1, seed=9))
    driver.launch()  # the prefix is in flight
    assert later.stream in [seq.stream for seq in engine.scheduler.running]
    assert engine.scheduler.num_awaiting == 2
    driver.drain()
    for reader in waiting:
        check(reader)


@pytest.mark.parametrize("how", ["abort", "fail"])
def test_waiters_go_on_when_the_owner_of_their_prefix_is_lost(how: str) -> None:
    engine = make_engine(max_num_batched_tokens=8)
    driver = Driver(engine, 0)
    prompt = list(range(30))
    readers = [driver.submit(prompt, SamplingParams(max_tokens=3, seed=i)) for i in range(3)]
    driver.launch()
    assert len(engine.scheduler.running) == 1
    if how == "abort":
        engine.abort(readers[0].stream)
        driver.update()
    else:
        engine.fail_step(driver.in_flight.popleft()[0])
        readers[0].take()
    driver.drain()
    assert [reader.finish_reason for reader in readers[1:]] == ["length", "length"]
    for reader in readers:
        check(reader)
    assert [reader.stream.num_cached_tokens for reader in readers[1:]] == [0, 28]


def test_the_next_turn_of_a_conversation_hits_the_output_blocks() -> None:
    engine = make_engine()
    driver = Driver(engine, 0)
    turn = driver.submit(list(range(10)), SamplingParams(max_tokens=15, seed=3))
    driver.drain()
    history = turn.prompt + turn.output
    following = driver.submit(history + [1, 2, 3], SamplingParams(max_tokens=2, seed=3))
    salted = driver.submit(history, SamplingParams(max_tokens=2, seed=3), cache_salt="other")
    driver.drain()
    assert len(history) == 25
    assert following.stream.num_cached_tokens == 24
    assert salted.stream.num_cached_tokens == 0
    check(following)


def test_admission() -> None:
    engine = make_engine(num_blocks=10, block_size=4, max_model_len=50)
    cases: list[tuple[list[int], dict[str, Any], str, str]] = [
        ([], {"max_tokens": 1}, "prompt", "empty"),
        ([1, VOCAB_SIZE], {"max_tokens": 1}, "prompt", "token id 64"),
        ([1, -1], {"max_tokens": 1}, "prompt", "token id -1"),
        ([1] * 10, {"max_tokens": 41}, "max_tokens", "51, the limit is 50"),
        ([1] * 50, {"max_tokens": 1}, "prompt", "51, the limit is 50"),
        ([1] * 10, {"max_tokens": 32}, "max_tokens", "need 11 KV blocks, there are 10"),
        ([1], {"max_tokens": 1, "logit_bias": {64: 1.0}}, "logit_bias", "token id 64"),
    ]
    for prompt, kwargs, param, message in cases:
        with pytest.raises(InvalidRequestError, match=message) as caught:
            engine.add(SequenceRequest(prompt, SamplingParams(**kwargs)))
        assert caught.value.param == param
    assert engine.num_seqs == 0
    driver = Driver(engine, 0)
    largest = driver.submit([1] * 10, SamplingParams(max_tokens=31, seed=1))
    driver.drain()
    assert len(largest.output) == 31


def test_stop_ids_the_model_cannot_produce_are_harmless() -> None:
    driver = Driver(make_engine(), 0)
    reader = driver.submit(
        [1], SamplingParams(max_tokens=5, seed=0, stop_token_ids=(-1, VOCAB_SIZE, 2**40))
    )
    driver.drain()
    assert reader.finish_reason == "length" and len(reader.output) == 5


def test_fail_all_ends_every_stream() -> None:
    engine = make_engine(num_slots=1, max_num_batched_tokens=4)
    driver = Driver(engine, 0)
    readers = [driver.submit([i] * 9, SamplingParams(max_tokens=6, seed=i)) for i in range(3)]
    driver.launch()
    engine.fail_all(EngineError("the end"))
    assert engine.num_seqs == 0
    for reader in readers:
        reader.take()
        assert str(reader.error) == "the end"
