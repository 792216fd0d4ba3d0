"""How large steps with prompts become, on machines of different speed, and whose they are."""

from __future__ import annotations

import random

import pytest

from pyserve.engine.batch import Step
from pyserve.engine.chunks import (
    ALONE_S,
    FIRST_LIMIT,
    MIN_CHUNK,
    MIN_SAMPLE,
    ChunkPacer,
    share_out,
)

MAX_TOKENS = 8192


def step_of(num_decoding: int, num_prompt_tokens: int) -> Step:
    return Step(num_tokens=num_decoding + num_prompt_tokens, num_prompt_tokens=num_prompt_tokens)


class Machine:
    """A step takes as long as reading the weights, or as computing its tokens, and attention."""

    def __init__(self, *, weights_s: float, token_s: float, attention_s: float = 0.0) -> None:
        self.weights_s, self.token_s, self.attention_s = weights_s, token_s, attention_s

    def seconds(self, step: Step) -> float:
        return max(self.weights_s, step.num_tokens * self.token_s) + self.attention_s


H200 = Machine(weights_s=4.2e-3, token_s=23e-6)
BUSY = Machine(weights_s=4.2e-3, token_s=23e-6, attention_s=8e-3)
RTX_3090 = Machine(weights_s=18e-3, token_s=230e-6)
TOO_SLOW = Machine(weights_s=50e-3, token_s=1e-3)  # decoding alone misses the target


def run(pacer: ChunkPacer, machine: Machine, num_decoding: int, num_steps: int) -> list[float]:
    """Seconds of steps with as much of a prompt as the pacer allows."""
    times = []
    for _ in range(num_steps):
        num_prompt_tokens = max(pacer.limit - num_decoding, MIN_CHUNK)
        for step in (step_of(num_decoding, 0), step_of(num_decoding, num_prompt_tokens)):
            times.append(machine.seconds(step))
            pacer.note(step, times[-1])
    return times[1::2]


@pytest.mark.parametrize(
    ("machine", "num_decoding"), [(H200, 1), (H200, 16), (H200, 200), (BUSY, 200), (RTX_3090, 16)]
)
def test_steps_come_to_take_what_they_may(machine: Machine, num_decoding: int) -> None:
    pacer = ChunkPacer(0.030, max_tokens=MAX_TOKENS)
    times = run(pacer, machine, num_decoding, 40)
    allowed_s = max(0.030, 2 * machine.seconds(step_of(num_decoding, 0)))
    assert times[-1] == pytest.approx(allowed_s, rel=0.05)
    assert all(seconds <= 1.05 * allowed_s for seconds in times[4:])


def test_a_prompt_alone_teaches_what_the_next_may_take() -> None:
    pacer = ChunkPacer(0.030, max_tokens=MAX_TOKENS)
    pacer.note(step_of(0, 8192), H200.seconds(step_of(0, 8192)))
    assert pacer.limit == pytest.approx(0.030 / 23e-6, rel=0.01)


@pytest.mark.parametrize(
    ("machine", "limit"), [(H200, 8192), (RTX_3090, ALONE_S / 230e-6), (TOO_SLOW, ALONE_S / 1e-3)]
)
def test_prompts_alone_keep_who_comes_next_waiting_for_less_than_half_a_second(
    machine: Machine, limit: float
) -> None:
    pacer = ChunkPacer(0.030, max_tokens=8192)
    assert pacer.alone_limit == FIRST_LIMIT
    for _ in range(10):
        step = step_of(0, pacer.alone_limit)
        pacer.note(step, machine.seconds(step))
    assert pacer.alone_limit == pytest.approx(limit, rel=0.15)


def test_a_prompt_of_an_adapter_is_one_step_as_it_is_without() -> None:
    """Of 8,192 tokens, 8B on an H200."""
    pacer = ChunkPacer(0.030, max_tokens=8192)
    pacer.note(step_of(0, 8192), 0.215)
    assert pacer.alone_limit == 8192


def test_a_prompt_that_was_cut_is_not_cut_for_ever() -> None:
    """The tokens that were left for a second step cost more each, and must not keep the limit below
    the prompt's length. Of 8,192 tokens, 8B with an adapter on an H200."""
    machine = Machine(weights_s=10e-3, token_s=24e-6, attention_s=8e-3)
    pacer = ChunkPacer(0.030, max_tokens=8192)
    pacer.note(step_of(0, 7552), 0.250)  # a slow one, which makes the limit smaller than the prompt
    num_steps: list[int] = []
    for _ in range(12):
        left, num_steps = 8192, [*num_steps, 0]
        while left:
            step = step_of(0, min(left, pacer.alone_limit))
            pacer.note(step, machine.seconds(step))
            left -= step.num_tokens
            num_steps[-1] += 1
        pacer.note(step_of(1, 0), 4e-3)
    assert num_steps[0] == 2
    assert num_steps[-4:] == [1, 1, 1, 1]


def test_prompts_get_on_where_decoding_alone_misses_the_target() -> None:
    pacer = ChunkPacer(0.030, max_tokens=MAX_TOKENS)
    times = run(pacer, TOO_SLOW, 4, 40)
    assert times[-1] == pytest.approx(0.100, rel=0.05)


def test_a_prompt_whose_later_tokens_take_longer_keeps_to_the_target() -> None:
    """On two cores the last of 4,000 tokens take three times what the first do."""
    pacer, num_done, times = ChunkPacer(0.040, max_tokens=MAX_TOKENS), 0, []
    while num_done < 4000:
        step = step_of(3, max(pacer.limit - 3, MIN_CHUNK))
        middle = num_done + step.num_prompt_tokens / 2
        times.append(step.num_tokens * 70e-6 * (1 + middle / 2000))
        pacer.note(step, times[-1])
        num_done += step.num_prompt_tokens
    assert len(times) > 8
    assert max(times) < 0.050 and max(times[2:]) < 0.042


def test_small_steps_teach_nothing_and_a_pause_is_forgotten() -> None:
    pacer = ChunkPacer(0.030, max_tokens=MAX_TOKENS)
    limit = pacer.limit
    pacer.note(step_of(3, MIN_SAMPLE - 4), 5.0)
    assert pacer.limit == limit
    run(pacer, H200, 16, 20)
    settled = pacer.limit
    pacer.note(step_of(16, 1000), 60.0)  # the machine was suspended
    assert settled / 2 < pacer.limit < settled
    run(pacer, H200, 16, 20)
    assert pacer.limit == pytest.approx(settled, rel=0.05)
    slower = Machine(weights_s=9e-3, token_s=230e-6)  # from here on
    run(pacer, slower, 16, 40)
    assert pacer.limit == pytest.approx(0.030 / 230e-6, rel=0.05)


def test_a_step_that_takes_no_time_is_not_divided_by() -> None:
    pacer = ChunkPacer(0.030, max_tokens=100)
    pacer.note(step_of(0, 100), 0.0)
    assert pacer.limit == 100


def test_shares() -> None:
    assert share_out([], 10, for_oldest=5) == []
    assert share_out([300], 10, for_oldest=5) == [10]
    assert share_out([300, 12], 16, for_oldest=8) == [8, 8]
    assert share_out([300, 12, 3], 16, for_oldest=8) == [8, 5, 3]
    assert share_out([300, 12, 3], 10, for_oldest=8) == [8, 0, 2]
    assert share_out([3, 300], 16, for_oldest=8) == [3, 13]
    assert share_out([300, 300], 9, for_oldest=5) == [9, 0], "of equal ones the older ends first"


def test_shares_of_random_prompts() -> None:
    generator = random.Random(3)
    for _ in range(300):
        needs = [generator.randint(1, 50) for _ in range(generator.randint(1, 8))]
        budget = generator.randint(0, 120)
        for_oldest = generator.randint(0, budget)
        shares = share_out(needs, budget, for_oldest=for_oldest)
        assert sum(shares) == min(budget, sum(needs))
        assert all(0 <= share <= need for share, need in zip(shares, needs, strict=True))
        assert shares[0] >= min(needs[0], for_oldest)
        least = needs.index(min(needs))
        assert shares[least] >= min(needs[least], budget - for_oldest)
