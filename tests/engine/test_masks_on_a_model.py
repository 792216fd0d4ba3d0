"""Constrained sequences on a real model on a CPU: the best of what is allowed, whatever happens."""

from __future__ import annotations

import random

import pytest

from pyserve.model.decoder import Decoder
from pyserve.params import SamplingParams
from tests.engine.constraints import Rule, Scripted, windows
from tests.engine.driver import Driver, Reader
from tests.engine.test_runner import decoder, make_engine, threads
from tests.engine.tiny import VOCAB_SIZE

__all__ = ["decoder", "threads"]  # fixtures

ALLOWED = [3, 31, 32, 40, 63, 64, 95, 96]
PROMPTS = [[7, i, 5, 30 + i, 9] * (1 + 3 * i) for i in range(6)]


def greedy(num_tokens: int = 24) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0)


def generate(
    decoder: Decoder, rules: list[Rule | None], *, depth: int = 0, is_alone: bool = False,
    num_blocks: int = 128, tile_rows: int = 64, budget: int = 512,
) -> list[Reader]:  # fmt: skip
    engine = make_engine(
        decoder, num_blocks=num_blocks, logits_tile_rows=tile_rows, budget=budget
    )  # fmt: skip
    driver = Driver(engine, depth)
    for number, (prompt, rule) in enumerate(zip(PROMPTS, rules, strict=True)):
        params = SamplingParams(max_tokens=40, temperature=0.8, seed=number, top_p=0.9)
        constraint = None if rule is None else Scripted(rule)
        driver.submit(prompt, params if number % 2 else greedy(40), constraint)
        if is_alone:
            driver.drain()
    driver.drain()
    engine.check_invariants()
    assert (engine.scheduler.num_preemptions > 0) == (num_blocks < 128)
    engine.runner.close()
    for reader in driver.readers:
        assert len(reader.output) == 40
        assert reader.constraint is None or reader.constraint.history == reader.output
    return driver.readers


RULES = [None, windows(VOCAB_SIZE, 5), windows(VOCAB_SIZE, 2), None, windows(VOCAB_SIZE, 9),
         windows(VOCAB_SIZE, 20)]  # fmt: skip


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> list[list[int]]:
    """Each sequence alone, its prompt in one piece."""
    readers = generate(decoder, RULES, is_alone=True)
    for reader in readers:
        assert len(set(reader.output)) > 8
        if reader.constraint is not None:
            assert reader.constraint.num_masks == 32  # of 40: every fifth is free
    return [reader.output for reader in readers]


@pytest.mark.parametrize("tile_rows", [1, 2, 64])
@pytest.mark.parametrize("depth", [0, 1])
def test_batch_mates_tiles_and_depth_change_nothing(
    decoder: Decoder, alone: list[list[int]], depth: int, tile_rows: int
) -> None:
    readers = generate(decoder, RULES, depth=depth, tile_rows=tile_rows, budget=20)
    assert [reader.output for reader in readers] == alone


@pytest.mark.parametrize("depth", [0, 1])
def test_recomputing_changes_nothing(decoder: Decoder, alone: list[list[int]], depth: int) -> None:
    readers = generate(decoder, RULES, depth=depth, num_blocks=16)
    assert [reader.output for reader in readers] == alone


def test_the_best_of_the_allowed_tokens_is_drawn(decoder: Decoder) -> None:
    """As a bias that outweighs every logit would have it."""
    engine = make_engine(decoder)
    driver = Driver(engine, 1)
    bias = dict.fromkeys(ALLOWED, 100.0)
    params = SamplingParams(max_tokens=30, temperature=0.0, logit_bias=bias)
    biased = driver.submit(PROMPTS[2], params)
    masked = driver.submit(PROMPTS[2], greedy(30), Scripted(lambda output: ALLOWED))
    plain = driver.submit(PROMPTS[2], greedy(30))
    driver.drain()
    engine.runner.close()
    assert masked.output == biased.output != plain.output
    assert set(masked.output) <= set(ALLOWED) and len(set(masked.output)) > 2


@pytest.mark.parametrize("depth", [0, 1])
def test_random_operations(decoder: Decoder, depth: int) -> None:
    rng = random.Random(depth)
    engine = make_engine(decoder, num_blocks=10, budget=40, caching=True, logits_tile_rows=3)
    driver = Driver(engine, depth)
    for _ in range(2500):
        choice = rng.random()
        if choice < 0.15 and engine.num_seqs < 9:
            params = SamplingParams(
                max_tokens=rng.randrange(1, 60), temperature=rng.choice([0.0, 1.0]),
                frequency_penalty=rng.choice([0.0, 0.5]),
                stop_token_ids=rng.choice([(), (), (5, 40)]),
                min_tokens=rng.choice([0, 1]), seed=rng.randrange(99),
            )  # fmt: skip
            rule = windows(VOCAB_SIZE, rng.choice([2, 9, 60]))
            prompt = [rng.randrange(3)] * rng.randrange(1, 60)
            driver.submit(prompt, params, Scripted(rule) if rng.random() < 0.7 else None)
        elif choice < 0.17 and driver.readers:
            engine.abort(rng.choice(driver.readers).stream)
        elif choice < 0.45:
            driver.launch()
        elif choice < 0.72:
            driver.sample()
        else:
            driver.update()
        for seq in [*engine.scheduler.running, *engine.scheduler.waiting]:
            if isinstance(seq.constraint, Scripted):
                assert seq.constraint.history == seq.token_ids[seq.num_prompt_tokens :]
    driver.drain()
    engine.check_invariants()
    engine.runner.close()
    assert engine.scheduler.num_preemptions > 2
    reasons = {reader.finish_reason for reader in driver.readers}
    assert reasons >= {"stop", "length", "abort"}
    for reader in driver.readers:
        assert reader.constraint is None or reader.constraint.history == reader.output
        assert reader.error is None or "min_tokens" in str(reader.error)
