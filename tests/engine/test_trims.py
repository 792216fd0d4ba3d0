"""Mixed steps end at a padded size, and the few tokens left over run in the step after."""

from __future__ import annotations

import pytest

from pyserve.client import SequenceRequest, SequenceStream
from pyserve.engine.batch import Step
from pyserve.engine.engine import Engine
from pyserve.params import SamplingParams
from tests.engine.fake_runner import make_engine

NUM_DECODING = 10


def run_step(engine: Engine) -> Step:
    step = engine.schedule()
    assert step is not None
    engine.update(step, engine.runner.run(step))
    engine.check_invariants()
    return step


def add(engine: Engine, token_id: int, num_tokens: int, max_tokens: int = 3) -> SequenceStream:
    params = SamplingParams(max_tokens=max_tokens, seed=1)
    return engine.add(SequenceRequest([token_id] * num_tokens, params))


def chunks(step: Step) -> list[tuple[int, int]]:
    """(number of the prompt, tokens) of the rows of a step that do not decode."""
    return [
        (seq.stream.seq_id - NUM_DECODING, query_len)
        for seq, query_len in zip(step.seqs, step.query_lens, strict=True)
        if seq.num_computed_tokens <= seq.num_prompt_tokens
    ]


def make_large_engine(num_decoding: int = NUM_DECODING) -> Engine:
    """An engine in which rows decode."""
    engine = make_engine(
        num_blocks=1500, num_slots=16, max_num_batched_tokens=2048, max_model_len=2048,
        enable_prefix_caching=False,
    )  # fmt: skip
    for _ in range(num_decoding):
        add(engine, 9, 4, max_tokens=500)
    if num_decoding:
        run_step(engine)
    return engine


@pytest.mark.parametrize(
    ("prompt_lens", "first", "rest"),
    [
        ([1030], [1014], {0: 16}),  # 1,040 with the rows that decode: 16 would run as 128
        ([1100], [1100], {}),  # more than half of the padding are tokens
        ([505], [502], {0: 3}),  # between smaller sizes
        ([300], [300], {}),  # the padding of a small step is cheap
        ([1000, 40], [1000, 14], {1: 26}),  # the newest waits
        ([1030, 6], [1008, 6], {0: 22}),  # unless it has too few tokens
        ([1014], [1014], {}),  # just a padded size
    ],
)
def test_a_few_tokens_of_the_newest_prompt_are_left_to_the_next_step(
    prompt_lens: list[int], first: list[int], rest: dict[int, int]
) -> None:
    engine = make_large_engine()
    for number, size in enumerate(prompt_lens):
        add(engine, number, size)
    assert chunks(run_step(engine)) == list(enumerate(first))
    step = run_step(engine)
    assert chunks(step) == list(rest.items())
    assert step.num_tokens == NUM_DECODING + len(prompt_lens) - len(rest) + sum(rest.values())
    while engine.num_seqs > NUM_DECODING:
        run_step(engine)


def test_a_prompt_that_comes_waits_while_a_trimmed_one_ends() -> None:
    engine = make_large_engine()
    add(engine, 0, 1030)
    run_step(engine)
    add(engine, 1, 1030)
    assert chunks(run_step(engine)) == [(0, 16)]
    assert chunks(run_step(engine)) == [(1, 1013)]  # 11 rows decode now
    assert chunks(run_step(engine)) == [(1, 17)]


def test_no_part_of_a_second_prompt_is_begun() -> None:
    """And the first that waits always is."""
    engine = make_large_engine()
    for number in range(2):
        add(engine, number, 1030)
    assert [chunks(run_step(engine)) for _ in range(4)] == [
        [(0, 1014)], [(0, 16)], [(1, 1013)], [(1, 17)],
    ]  # fmt: skip
    engine.scheduler.mixed_limit = 1024
    add(engine, 2, 1900)
    assert [size for _, size in chunks(run_step(engine))] == [1024 - NUM_DECODING - 1]


def test_prompts_alone_are_neither_trimmed_nor_held_back() -> None:
    engine = make_large_engine(num_decoding=0)
    add(engine, 1, 1030)
    assert run_step(engine).num_tokens == 1030
    engine = make_large_engine(num_decoding=0)
    for number in range(2):
        add(engine, number, 1030)
    assert run_step(engine).query_lens == [1030, 1018]


def test_nothing_waits_for_a_trimmed_prompt_that_has_ended() -> None:
    engine = make_large_engine()
    stream = add(engine, 0, 1030)
    run_step(engine)
    engine.abort(stream)
    add(engine, 1, 100)
    assert chunks(run_step(engine)) == [(1, 100)]


def test_prompts_fill_the_steps_where_more_come_than_every_second_step_takes() -> None:
    engine = make_large_engine()
    num_steps = 0
    while len(chunks(run_step(engine))) < 2:  # until a part of a second prompt is begun
        for _ in range(3 - len(engine.scheduler.waiting)):
            add(engine, 1, 1030, max_tokens=1)
        num_steps += 1
        assert num_steps < 400
    assert num_steps > 100


def test_every_prompt_ends_in_its_second_step_whatever_comes() -> None:
    """One prompt is sent in each step; steps with prompts and small ones alternate."""
    engine = make_large_engine()
    for number in range(40):
        if number % 2 == 0:
            add(engine, number, 600 + 37 * number % 500, max_tokens=1)
        trimmed = engine.scheduler._trimmer.trimmed
        run_step(engine)
        if trimmed is not None:
            assert trimmed.num_computed_tokens >= trimmed.num_prompt_tokens
            assert engine.scheduler._trimmer.trimmed is None
