"""AdapterSlots, and what the scheduler does where there are more adapters than slots."""

from __future__ import annotations

import random
from bisect import bisect_right

import pytest

from pyserve.client import Adapter
from pyserve.engine import scheduler as scheduler_module
from pyserve.engine.adapter_slots import AdapterSlots
from pyserve.engine.batch import Step
from pyserve.engine.engine import Engine
from pyserve.params import SamplingParams
from tests.engine.driver import Driver, Reader
from tests.engine.fake_runner import make_engine

ADAPTERS = [Adapter(f"adapter-{i}", 100 + i, weights=object()) for i in range(8)]


def engine_with(num_adapter_slots: int, **settings: int) -> Engine:
    engine = make_engine(**settings)  # type: ignore[arg-type]
    engine.scheduler.adapters = AdapterSlots(num_adapter_slots)
    return engine


def params(num_tokens: int = 4) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens)


def test_slots_by_random_operations() -> None:
    rng = random.Random(3)
    slots, held = AdapterSlots(3), []
    for _ in range(4000):
        adapter = rng.choice(ADAPTERS)
        if rng.random() < 0.5 and slots.has_room(adapter):
            is_there = adapter.version in slots._slot_of
            slot, has_to_load = slots.hold(adapter)
            assert has_to_load == (not is_there)
            held.append((slot, adapter))
        elif held:
            slot, _ = held.pop(rng.randrange(len(held)))
            slots.let_go(slot)
        slots.check_invariants(held)
        assert slots.num_used == len({slot for slot, _ in held}) <= 3
        assert slots.running == sorted({adapter.name for _, adapter in held})
    for slot, _ in held:
        slots.let_go(slot)
    slots.forget_all()
    slots.check_invariants([])
    assert slots.hold(ADAPTERS[0])[1]


def test_the_one_that_was_used_longest_ago_gives_way() -> None:
    slots = AdapterSlots(2)
    for adapter in (ADAPTERS[0], ADAPTERS[1], ADAPTERS[0]):
        slots.let_go(slots.hold(adapter)[0])
    slots.let_go(slots.hold(ADAPTERS[2])[0])
    assert not slots.hold(ADAPTERS[0])[1], "it was used since"
    assert slots.hold(ADAPTERS[1])[1]
    assert slots.num_loads == 4


def test_slots_keep_no_weights() -> None:
    slots = AdapterSlots(1)
    slots.let_go(slots.hold(ADAPTERS[0])[0])
    assert slots._adapter_in[0] is not None and slots._adapter_in[0].weights is None


def run(engine: Engine, readers: int, adapters: list[Adapter | None], depth: int) -> list[Reader]:
    driver = Driver(engine, depth)
    for i in range(readers):
        driver.submit([1 + i % 7] * (3 + i % 5), params(), adapter=adapters[i % len(adapters)])
    driver.drain()
    engine.check_invariants()
    return driver.readers


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_adapter_slots", [1, 2, 3])
def test_a_step_has_as_many_adapters_as_there_are_slots(num_adapter_slots: int, depth: int) -> None:
    engine = engine_with(num_adapter_slots)
    lies_in: dict[int, Adapter] = {}
    num_mixed = 0

    def look(step: Step) -> None:
        nonlocal num_mixed
        lies_in.update({load.slot: load.adapter for load in step.adapter_loads})
        used = {seq.adapter.version for seq in step.seqs if seq.adapter is not None}
        assert len(used) <= num_adapter_slots
        num_mixed += len(used) > 1
        if not used:
            assert not step.adapter_starts
            return
        starts = step.adapter_starts
        assert len(starts) == num_adapter_slots + 1
        token = 0
        for seq, query_len in zip(step.seqs, step.query_lens, strict=True):
            if seq.adapter is None:
                assert token < starts[0] or query_len == 0
            else:
                slot = bisect_right(starts, token) - 1
                assert lies_in[slot].version == seq.adapter.version, "another adapter's weights"
                assert lies_in[slot].weights is not None
            token += query_len
        assert starts[-1] == token == step.num_tokens

    engine.runner.on_step = look  # type: ignore[attr-defined]
    run(engine, 60, [None, *ADAPTERS[:5]], depth)
    assert num_mixed or num_adapter_slots == 1


def test_preempted_sequences_come_back_to_their_adapters() -> None:
    engine = engine_with(2, num_blocks=9, num_slots=4)
    readers = run(engine, 24, [*ADAPTERS[:3], None], 0)
    assert engine.scheduler.num_preemptions > 0
    assert all(reader.finish_reason == "length" for reader in readers)


def test_whoever_waits_for_an_adapter_is_passed_only_so_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream of requests for one adapter that never ends must not keep the others out."""
    monkeypatch.setattr(scheduler_module, "MAX_PASSED", 5)
    engine = engine_with(1, num_slots=3)
    driver = Driver(engine, 0)
    for num_tokens in (4, 6, 8):  # so that one of them runs at any time
        driver.submit([1, 2, 3], params(num_tokens), adapter=ADAPTERS[0])
    driver.launch()
    driver.update()
    waiting = driver.submit([1, 2, 3], params(6), adapter=ADAPTERS[1])
    num_passed = 0
    for _ in range(200):
        while len(engine.scheduler.waiting) < 4:
            driver.submit([4, 5], params(6), adapter=ADAPTERS[0])
        driver.launch()
        driver.update()
        engine.check_invariants()
        num_passed = max(num_passed, *(seq.num_passed for seq in engine.scheduler.waiting), 0)
        if waiting.is_finished:
            break
    assert waiting.is_finished and num_passed == 5


def test_those_of_other_adapters_are_not_held_up_at_once() -> None:
    engine = engine_with(1)
    driver = Driver(engine, 0)
    first = driver.submit([1], params(20), adapter=ADAPTERS[0])
    driver.launch()
    driver.update()
    second = driver.submit([1], params(2), adapter=ADAPTERS[1])
    others = [driver.submit([1], params(2), adapter=it) for it in (ADAPTERS[0], None)]
    for _ in range(4):
        driver.launch()
        driver.update()
    assert all(it.is_finished for it in others) and not second.is_finished
    assert engine.scheduler.waiting_adapters() == ["adapter-1"]
    assert engine.scheduler.adapters.running == ["adapter-0"]
    driver.drain()
    assert first.is_finished and second.is_finished


def test_the_background_gives_its_adapter_up() -> None:
    engine = engine_with(1)
    driver = Driver(engine, 0)
    behind = driver.submit([1], params(60), adapter=ADAPTERS[0], is_background=True)
    for _ in range(3):
        driver.launch()
        driver.update()
    front = driver.submit([1], params(2), adapter=ADAPTERS[1])
    for _ in range(3):
        driver.launch()
        driver.update()
    assert front.is_finished and not behind.is_finished
    driver.drain()
    assert behind.finish_reason == "length" and len(behind.output) == 60


def test_versions_share_no_blocks() -> None:
    engine = engine_with(2)
    driver = Driver(engine, 0)
    prompt = list(range(1, 14))
    versions = [Adapter("a", 1), Adapter("a", 2), None, Adapter("a", 2)]
    for adapter in versions:
        driver.submit(prompt, params(1), adapter=adapter)
        driver.drain()
    cached = [reader.stream.num_cached_tokens for reader in driver.readers]
    assert cached[:3] == [0, 0, 0] and cached[3] == 12


def test_a_failed_step_puts_its_adapters_again() -> None:
    engine = engine_with(1)
    driver = Driver(engine, 0)
    loads: list[int] = []

    def fail_first(step: Step) -> None:
        loads.append(len(step.adapter_loads))
        if len(loads) == 1:
            raise RuntimeError("of a test")

    engine.runner.on_step = fail_first  # type: ignore[attr-defined]
    failed = driver.submit([1], params(2), adapter=ADAPTERS[0])
    driver.drain()
    assert failed.error is not None
    driver.submit([1], params(2), adapter=ADAPTERS[0])
    driver.drain()
    assert loads == [1, 1, 0]
    engine.check_invariants()


def test_who_runs_behind_a_step_that_failed_to_put_its_adapter_in_fails_too() -> None:
    """On a card the next step is launched before the failure is known."""
    engine = engine_with(1)
    driver = Driver(engine, 1)
    is_first = iter([True])

    def fail_first(step: Step) -> None:
        if next(is_first, False):
            raise RuntimeError("of a test")

    engine.runner.on_step = fail_first  # type: ignore[attr-defined]
    first = driver.submit([1], params(1), adapter=ADAPTERS[0])
    driver.launch()
    behind = driver.submit([1, 2], params(4), adapter=ADAPTERS[0])
    other = driver.submit([1, 2], params(4))
    driver.launch()
    driver.drain()
    assert first.error is not None and behind.error is not None
    assert not behind.output and other.finish_reason == "length"
    assert engine.scheduler.adapters.hold(ADAPTERS[0])[1]


def test_nothing_lies_in_a_slot_after_a_sleep() -> None:
    engine = engine_with(1)
    driver = Driver(engine, 0)
    driver.submit([1], params(2), adapter=ADAPTERS[0])
    driver.drain()
    engine.scheduler.preempt_all()
    assert engine.scheduler.adapters.hold(ADAPTERS[0])[1]
