"""Constrained sequences on a fake device: what is allowed and nothing else, whatever happens."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from pyserve.engine.engine import Engine
from pyserve.engine.masks import MaskWorkers, is_host_dependent, masked_rows
from pyserve.errors import EngineError, InvalidRequestError
from pyserve.params import SamplingParams
from tests.engine.constraints import Rule, Scripted, always, windows
from tests.engine.driver import Driver, Reader, fill
from tests.engine.fake_runner import VOCAB_SIZE, FakeRunner, expected_tokens, make_engine

RULE = windows(VOCAB_SIZE, 3)


def unconstrained(output: object) -> None:
    """A rule."""


def rule_of(reader: Reader) -> Rule:
    return unconstrained if reader.constraint is None else reader.constraint.rule


def check(reader: Reader) -> None:
    """What came out is what must come out, or the beginning of it, and its constraint knows it."""
    expected = expected_tokens(reader.prompt, reader.params, rule_of(reader))
    assert reader.output == expected[: len(reader.output)]
    if reader.finish_reason in ("stop", "length"):
        assert reader.output == expected
    if reader.constraint is not None:
        assert reader.constraint.history == reader.output


def fake(engine: Engine) -> FakeRunner:
    assert isinstance(engine.runner, FakeRunner)
    return engine.runner


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("num_blocks", [200, 14])
def test_a_mixed_batch_draws_what_is_allowed(depth: int, num_blocks: int) -> None:
    engine = make_engine(num_blocks=num_blocks, max_model_len=56)
    driver = Driver(engine, depth)
    for index in range(8):
        params = SamplingParams(
            max_tokens=40, seed=index, presence_penalty=0.5 * (index % 3),
            stop_token_ids=(index, 20 + index), min_tokens=index,
        )  # fmt: skip
        driver.submit([index, 1, 2] * 3, params, Scripted(RULE) if index % 2 else None)
    driver.drain()
    engine.check_invariants()
    assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 14)
    for reader in driver.readers:
        check(reader)
    assert {reader.finish_reason for reader in driver.readers} == {"stop", "length"}
    plain = [expected_tokens(reader.prompt, reader.params) for reader in driver.readers]
    assert [reader.output == tokens for reader, tokens in zip(driver.readers, plain, strict=True)] \
        == [True, False] * 4  # fmt: skip


@pytest.mark.parametrize(
    ("depth", "num_operations"), [(0, 10_000), (1, 4000), (2, 4000)]
)  # fmt: skip
def test_random_operations(depth: int, num_operations: int) -> None:
    """Submit, abort, launch, sample and update in any order, failing steps, broken constraints."""
    rng = random.Random(f"masks {depth}")
    engine = make_engine(
        num_blocks=20, num_slots=6, max_num_batched_tokens=14, max_model_len=64
    )  # fmt: skip
    driver = Driver(engine, depth)
    seen: dict[int, Reader] = {}

    def fail_sometimes(step: object) -> None:
        if rng.random() < 0.01:
            raise RuntimeError("as wanted")

    fake(engine).on_step = fail_sometimes
    for _ in range(num_operations):
        choice = rng.random()
        if choice < 0.12 and engine.num_seqs < 20:
            prompt = [rng.randrange(3)] * rng.randrange(1, 30)
            max_tokens = rng.randrange(1, 25)
            params = SamplingParams(
                max_tokens=max_tokens, seed=rng.randrange(99), stop_token_ids=(5, 40),
                frequency_penalty=rng.choice([0.0, 0.5]),
                min_tokens=rng.randrange(max_tokens) if rng.random() < 0.3 else 0,
            )  # fmt: skip
            constraint = None
            if rng.random() < 0.6:
                constraint = Scripted(
                    windows(VOCAB_SIZE, rng.choice([1, 3, 9])),
                    broken_at=10 if rng.random() < 0.05 else None,
                )
            driver.submit(prompt, params, constraint)
        elif choice < 0.14 and driver.readers:
            engine.abort(rng.choice(driver.readers).stream)
        elif choice < 0.45:
            driver.launch()
        elif choice < 0.7:
            driver.sample()
        else:
            driver.update()
        engine.check_invariants()
        running = [*engine.scheduler.running, *engine.scheduler.waiting]
        for seq in running:
            if isinstance(seq.constraint, Scripted):
                assert seq.constraint.history == seq.token_ids[seq.num_prompt_tokens :]
        seen |= {id(reader): reader for reader in driver.readers if reader.is_finished}
        driver.readers = [reader for reader in driver.readers if not reader.is_finished] or (
            driver.readers[-1:]
        )
    driver.drain()
    engine.check_invariants()
    seen |= {id(reader): reader for reader in driver.readers}
    for reader in seen.values():
        if isinstance(reader.error, InvalidRequestError):
            assert "as scripted" in reader.error.message or reader.error.param == "min_tokens"
            assert reader.constraint is not None and not reader.finish_reason
            assert reader.constraint.history[: len(reader.output)] == reader.output
        else:
            check(reader)
    assert {reader.finish_reason for reader in seen.values()} == {"stop", "length", "abort", None}
    errors = {type(reader.error) for reader in seen.values() if reader.error is not None}
    assert errors == {InvalidRequestError, EngineError}
    assert engine.scheduler.blocks.num_free == 20 and engine.scheduler.slots.num_free == 6
    assert engine.scheduler.num_preemptions > 20


@pytest.mark.parametrize("depth", [0, 1])
def test_only_steps_that_draw_for_a_constraint_wait(depth: int) -> None:
    engine = make_engine(max_num_batched_tokens=8)
    driver = Driver(engine, depth)
    driver.submit([1] * 20, SamplingParams(max_tokens=3, seed=0), Scripted(RULE))
    waits = []
    while driver.launch():
        step = driver.in_flight[-1][0]
        waits.append((is_host_dependent(step), len(masked_rows(step))))
        driver.sample()
        driver.update()
    assert waits[:3] == [(False, 0), (False, 0), (True, 1)]  # chunks of 8, 8 and 4 tokens
    driver.drain()
    driver.submit([1] * 4, SamplingParams(max_tokens=3, seed=0))
    driver.launch()
    assert not engine.is_host_dependent(driver.in_flight[-1][0])
    driver.drain()


def test_a_constraint_that_is_free_is_asked_for_no_mask() -> None:
    engine = make_engine()
    driver = Driver(engine, 1)
    free = driver.submit([1], SamplingParams(max_tokens=9, seed=0), Scripted(unconstrained))
    some = driver.submit([2], SamplingParams(max_tokens=10, seed=0), Scripted(RULE))
    driver.drain()
    assert free.constraint is not None and some.constraint is not None
    assert free.constraint.num_masks == 0 and some.constraint.num_masks == 8  # of 10: two are free
    for reader in driver.readers:
        check(reader)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_end_that_a_constraint_tells_needs_no_stop_token(depth: int) -> None:
    engine = make_engine()
    driver = Driver(engine, depth)
    reader = driver.submit([1], SamplingParams(max_tokens=30, seed=0), Scripted(RULE, end=6))
    longer = driver.submit([1], SamplingParams(max_tokens=30, seed=0), Scripted(RULE))
    driver.drain()
    assert (reader.finish_reason, len(reader.output)) == ("stop", 6)
    assert reader.output == longer.output[:6] and len(longer.output) == 30
    assert reader.stream.take().stop_token_id is None  # type: ignore[union-attr]
    engine.check_invariants()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("constraint", "message", "param"),
    [
        (Scripted(RULE, broken_at=4), "the answer cannot go on: as scripted", None),
        (
            Scripted(lambda output: [] if len(output) == 3 else [1, 2]),
            "no token is allowed after 3 output tokens",
            None,
        ),
        (
            Scripted(lambda output: [7] if len(output) == 3 else [1, 2]),
            "min_tokens is 10, and after 3 tokens the constraints on the answer allow nothing but "
            "its end",
            "min_tokens",
        ),
        (
            Scripted(lambda output: [1, 2], end=3),
            "min_tokens is 10, and after 3 tokens the constraints",
            "min_tokens",
        ),
    ],
    ids=["error", "nothing", "min_tokens", "end"],
)
def test_a_sequence_that_cannot_go_on_fails_alone(
    depth: int, constraint: Scripted, message: str, param: str | None
) -> None:
    constraint.history.clear()
    engine = make_engine()
    driver = Driver(engine, depth)
    params = SamplingParams(max_tokens=20, seed=3, stop_token_ids=(7,), min_tokens=10)
    reader = driver.submit([1, 2], params, constraint)
    others = [driver.submit([3], params), driver.submit([4], params, Scripted(windows(64, 9)))]
    driver.drain()
    assert isinstance(reader.error, InvalidRequestError) and message in reader.error.message
    assert reader.error.param == param
    assert len(reader.output) == 3
    for other in others:
        assert len(other.output) >= 10
        check(other)
    engine.check_invariants()
    assert engine.scheduler.blocks.num_free == 64


def test_a_stop_token_is_not_drawn_before_min_tokens_though_it_is_allowed() -> None:
    driver = Driver(make_engine(), 1)
    params = SamplingParams(max_tokens=20, seed=3, stop_token_ids=(7,), min_tokens=6)
    reader = driver.submit([1], params, Scripted(lambda output: [7, 9 + len(output)]))
    driver.drain()
    assert reader.output[:6] == [9, 10, 11, 12, 13, 14]
    check(reader)


@pytest.mark.parametrize("call", ["fill_bitmask", "accept"])
def test_a_bug_of_a_constraint_fails_its_sequence_alone(
    call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Scripted):
        pass

    def fail(*args: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Broken, call, fail)
    driver = Driver(make_engine(), 1)
    params = SamplingParams(max_tokens=5, seed=0)
    reader = driver.submit([1], params, Broken(RULE))
    other = driver.submit([2], params, Scripted(RULE))
    with caplog.at_level(logging.ERROR, "pyserve"):
        driver.drain()
    assert isinstance(reader.error, EngineError) and "a bug" not in reader.error.message
    assert call in caplog.text and not reader.output
    check(other)


def test_bits_beyond_the_vocabulary_allow_nothing() -> None:
    class Padding(Scripted):
        def fill_bitmask(self, words: np.ndarray) -> None:
            words.fill(0)
            words[-1] = -(2 ** (60 % 32))  # tokens 60 and up

    for vocab_size, is_left in ((61, True), (60, False), (64, True)):
        engine = make_engine()
        driver = Driver(engine, 0)
        driver.submit([1], SamplingParams(max_tokens=1), Padding(lambda output: [1]))
        driver.launch()
        workers = MaskWorkers(1, vocab_size)
        bitmask = np.full((8, 2), -1, np.int32)
        rows, failures = asyncio.run(fill(workers, driver.in_flight[0][0], bitmask))
        assert rows == [0] and bool(failures) != is_left
        bits = np.unpackbits(bitmask[0].view(np.uint8), bitorder="little")
        assert np.flatnonzero(bits).tolist() == list(range(60, vocab_size))
        workers.close()
        engine.abort(driver.readers[0].stream)


def test_masks_of_many_rows_are_shared_out_and_keep_their_places() -> None:
    engine = make_engine(num_slots=30, num_blocks=100)
    driver = Driver(engine, 0)
    for number in range(30):
        constraint = Scripted(always(number, number + 32)) if number % 3 else None
        driver.submit([1], SamplingParams(max_tokens=1), constraint)
    driver.launch()
    step = driver.in_flight[0][0]
    engine.abort(driver.readers[4].stream)  # a row that has lost its sequence needs no mask
    for num_threads in (1, 3, 8):
        workers = MaskWorkers(num_threads, VOCAB_SIZE)
        bitmask = np.zeros((30, 2), np.int32)
        rows, failures = asyncio.run(fill(workers, step, bitmask))
        assert rows == [row for row in range(30) if row % 3 and row != 4] and not failures
        for row, words in zip(rows, bitmask, strict=False):
            assert words.view(np.uint32).tolist() == [1 << row, 1 << row]
        workers.close()
    driver.drain()


def test_what_cannot_be_filled_side_by_side_is_filled_on_one_thread() -> None:
    class Filler:
        def __init__(self) -> None:
            self.calls: list[tuple[int, list[int]]] = []

        def work(self, constraint: Keyed) -> tuple[object, float]:
            return constraint.group, 1.0

        def fill(
            self, constraints: Sequence[Keyed], rows: Sequence[int], bitmask: NDArray[np.int32], *,
            is_alone: bool,
        ) -> None:  # fmt: skip
            assert not is_alone
            self.calls.append((threading.get_ident(), [int(c.group) for c in constraints]))
            for constraint, row in zip(constraints, rows, strict=True):
                constraint.fill_bitmask(bitmask[row])
                if constraint.group == broken:
                    raise ValueError("a bug")

    class Keyed(Scripted):
        group = 0.0

    class Key(float):
        """Two groups with the same number are still two."""

    engine = make_engine(num_slots=40, num_blocks=100, max_num_batched_tokens=40)
    driver, filler, broken = Driver(engine, 0), Filler(), -1.0
    keys = [Key(i) for i in range(4)]
    for number in range(40):
        constraint = Keyed(always(number))
        if number % 5:
            constraint.filler, constraint.group = filler, keys[number % 4]
        driver.submit([1], SamplingParams(max_tokens=1), constraint)
    driver.launch()
    workers, bitmask = MaskWorkers(8, VOCAB_SIZE), np.zeros((40, 2), np.int32)
    rows, failures = asyncio.run(fill(workers, driver.in_flight[0][0], bitmask))
    assert rows == list(range(40)) and not failures
    for row, words in enumerate(bitmask.view(np.uint64)):
        assert words.tolist() == [1 << row]
    assert len(filler.calls) > 1
    groups = [group for _, call in filler.calls for group in set(call)]
    assert sorted(groups) == [0, 1, 2, 3], "a group in two calls"
    broken = 2.0
    _, failures = asyncio.run(fill(workers, driver.in_flight[0][0], bitmask))
    (with_it,) = [call for _, call in filler.calls[-len(groups) :] if 2 in call][-1:]
    assert len(failures) == len(with_it)
    assert all(isinstance(failure.error, EngineError) for failure in failures)
    workers.close()
    driver.drain()
