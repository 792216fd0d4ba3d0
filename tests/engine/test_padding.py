"""Padding: a step runs in the next larger of a few shapes, and seldom for a few tokens alone."""

from __future__ import annotations

import pytest

from pyserve.client import SequenceRequest
from pyserve.engine.batch import Step
from pyserve.engine.engine import Engine
from pyserve.params import SamplingParams
from tests.engine.fake_runner import make_engine


def run_step(engine: Engine) -> Step:
    step = engine.schedule()
    assert step is not None
    engine.update(step, engine.runner.run(step))
    engine.check_invariants()
    return step


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=1)


def make_large_engine() -> Engine:
    return make_engine(
        num_blocks=800, num_slots=16, max_num_batched_tokens=2048, max_model_len=2048,
        enable_prefix_caching=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt_lens", "num_first", "rest"),
    [
        ([1030], 1024, 16),  # 1,040 with the rows that decode: 16 tokens would run as 128
        ([1100], 1110, 0),  # more than half of the padding are tokens
        ([505], 512, 3),  # of two smaller sizes
        ([300], 310, 0),  # the padding is cheap
        ([1000, 40], 1024, 26),  # of the last prompt, which has enough of them
        ([1030, 6], 1024, 22),  # of the one before it
    ],
)
def test_a_few_tokens_of_a_prompt_wait_where_a_step_would_be_padded_for_them(
    prompt_lens: list[int], num_first: int, rest: int
) -> None:
    engine = make_large_engine()
    short = [engine.add(SequenceRequest([9] * 4, params(20))) for _ in range(10)]
    run_step(engine)
    streams = [
        engine.add(SequenceRequest([7 + number] * size, params(3)))
        for number, size in enumerate(prompt_lens)
    ]
    step = run_step(engine)
    assert step.num_tokens == num_first and step.num_prompt_tokens == num_first - 10
    step = run_step(engine)
    assert step.num_prompt_tokens == rest
    assert step.num_tokens == 10 + rest + len(streams) - (rest > 0)
    while engine.step():
        engine.check_invariants()
    assert all(stream.is_finished for stream in [*short, *streams])


def test_a_prompt_alone_is_not_cut_for_its_padding() -> None:
    engine = make_large_engine()
    engine.add(SequenceRequest([7] * 1030, params(3)))
    assert run_step(engine).num_tokens == 1030
