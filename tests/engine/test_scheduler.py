"""What one step runs: order, budget, fairness, what is sent to the device."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from pyserve.client import SequenceRequest
from pyserve.engine import scheduler as scheduler_module
from pyserve.engine.batch import Step, StepOutput, max_update_words
from pyserve.engine.engine import Engine
from pyserve.engine.sequence import Sequence
from pyserve.params import SamplingParams
from tests.engine.fake_runner import make_engine


def run_step(engine: Engine) -> Step:
    step = engine.schedule()
    assert step is not None
    engine.update(step, engine.runner.run(step))
    engine.check_invariants()
    return step


def rows(step: Step) -> list[tuple[int, int]]:
    return [
        (seq.stream.seq_id, query_len)
        for seq, query_len in zip(step.seqs, step.query_lens, strict=True)
    ]


def params(max_tokens: int = 20) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=1)


def test_a_long_prompt_is_cut_into_chunks_and_mixed_with_decodes() -> None:
    engine = make_engine(max_num_batched_tokens=10)
    engine.add(SequenceRequest([1, 2], params()))
    assert rows(run_step(engine)) == [(0, 2)]
    engine.add(SequenceRequest(list(range(23)), params()))
    assert rows(run_step(engine)) == [(0, 1), (1, 9)]
    step = run_step(engine)
    assert rows(step) == [(0, 1), (1, 9)] and step.row_samples == [True, False]
    assert step.num_tokens == 10 and sum(step.row_samples) == 1
    step = run_step(engine)
    assert rows(step) == [(0, 1), (1, 5)] and step.row_samples == [True, True]
    assert rows(run_step(engine)) == [(0, 1), (1, 1)]


def test_a_long_prompt_ahead_does_not_starve_a_running_decode() -> None:
    engine = make_engine(max_num_batched_tokens=8, policy="priority")
    decode = engine.add(SequenceRequest([1, 2], params(), priority=5))
    run_step(engine)
    engine.add(SequenceRequest([3] * 40, params(), priority=0))  # runs before it, in five chunks
    assert rows(run_step(engine)) == [(0, 1), (1, 7)]
    for _ in range(4):
        assert rows(run_step(engine)) == [(0, 1), (1, 7)]
    delta = decode.take()
    assert delta is not None and len(delta.token_ids) == 6


def test_every_sequence_that_decodes_gets_a_token_in_a_full_house() -> None:
    engine = make_engine(num_slots=8, max_num_batched_tokens=8)
    for index in range(12):
        engine.add(SequenceRequest([index] * 20, params(6)))
    while True:
        decoding = [
            seq
            for seq in engine.scheduler.running
            if seq.num_computed_tokens >= seq.num_prompt_tokens
        ]
        step = engine.schedule()
        if step is None:
            break
        assert all(seq in step.seqs for seq in decoding)
        assert sum(step.query_lens) == step.num_tokens <= 8
        assert step.num_tokens == 8 or not engine.scheduler.waiting
        engine.update(step, engine.runner.run(step))
    assert engine.num_seqs == 0


def test_a_short_prompt_does_not_wait_for_a_long_one_to_end() -> None:
    engine = make_engine(max_num_batched_tokens=17, max_model_len=512, num_blocks=200)
    engine.add(SequenceRequest([1, 2], params(60)))
    run_step(engine)
    engine.add(SequenceRequest([3] * 300, params()))
    assert rows(run_step(engine)) == [(0, 1), (1, 16)]
    engine.add(SequenceRequest([4] * 12, params()))
    assert rows(run_step(engine)) == [(0, 1), (2, 8), (1, 8)]  # half of it for who has waited
    step = run_step(engine)  # the long one has its half, the short one the rest of its prompt
    assert sorted(rows(step)) == [(0, 1), (1, 12), (2, 4)]
    assert rows(run_step(engine)) == [(0, 1), (2, 1), (1, 15)]


def test_a_long_prompt_gets_on_among_short_ones_without_end() -> None:
    engine = make_engine(max_num_batched_tokens=16, max_model_len=512, num_blocks=200)
    long = engine.add(SequenceRequest([3] * 200, params(1)))
    num_steps = 0
    while (delta := long.take()) is None or delta.finish_reason is None:
        engine.add(SequenceRequest([num_steps] * 40, params(1)))
        run_step(engine)
        num_steps += 1
    assert num_steps <= 200 / (16 / 2) + 1


def test_a_step_that_others_decode_in_has_the_size_that_is_fast_enough() -> None:
    engine = make_engine(max_num_batched_tokens=256, max_model_len=512, num_blocks=200)
    engine.scheduler.mixed_limit = 70
    engine.add(SequenceRequest([1] * 200, params(60)))
    assert run_step(engine).num_tokens == 200  # nobody decodes
    engine.add(SequenceRequest([2] * 200, params()))
    engine.add(SequenceRequest([3] * 50, params()))
    step = run_step(engine)
    # 64 and not 70, which would run as 80; but a chunk has MIN_CHUNK tokens at least.
    assert step.num_prompt_tokens == 64 and step.num_tokens == 65
    engine.scheduler.mixed_limit = 100
    step = run_step(engine)
    assert step.num_tokens == 96 and step.num_prompt_tokens == 95


def test_prompts_alone_have_the_size_that_is_fast_enough_for_who_comes_next() -> None:
    engine = make_engine(max_num_batched_tokens=256, max_model_len=512, num_blocks=200)
    engine.scheduler.alone_limit = 100
    engine.add(SequenceRequest([1] * 200, params()))
    assert [run_step(engine).num_tokens for _ in range(3)] == [96, 96, 8]


def test_steady_decode_sends_no_tokens() -> None:
    engine = make_engine(num_blocks=64, block_size=16)
    for index in range(4):
        engine.add(SequenceRequest([index] * 5, params()))
    first = run_step(engine)
    assert len(first.slot_updates) == 4 and len(first.block_updates) == 3 * 4
    assert all(ids is not None for ids in first.host_tokens)
    for number in range(15):
        step = run_step(engine)
        assert step.host_tokens == [None] * 4 and not step.slot_updates
        assert len(step.block_updates) == (3 * 4 if number == 11 else 0)  # the second block


def test_first_come_first_served() -> None:
    engine = make_engine(num_slots=2, max_num_batched_tokens=8)
    streams = [
        engine.add(SequenceRequest([index] * 5, params(3), priority=-index)) for index in range(6)
    ]
    order = []
    while engine.step():
        order += [s.seq_id for s in streams if s.is_finished and s.seq_id not in order]
    assert order == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_what_is_background_gives_way(policy: str) -> None:
    engine = make_engine(num_slots=2, policy=policy)
    batch = [
        engine.add(SequenceRequest([i] * 5, params(9), -9, user="batch", is_background=True))
        for i in range(4)
    ]
    engine.step()
    assert [seq.user for seq in engine.scheduler.running] == ["batch", "batch"]
    alice = [engine.add(SequenceRequest([i] * 5, params(3), 5, user="alice")) for i in (7, 8)]
    engine.step()
    assert [seq.user for seq in engine.scheduler.running] == ["alice", "alice"]
    assert engine.scheduler.num_preemptions == 2
    while not all(stream.is_finished for stream in alice):
        assert not any(stream.is_finished for stream in batch), "it goes on behind the others"
        engine.step()
    while engine.step():
        pass
    assert all(stream.is_finished for stream in batch) and engine.scheduler.num_preemptions == 2


def test_what_is_background_gives_up_the_blocks_that_are_wanted() -> None:
    engine = make_engine(num_blocks=12, num_slots=4, max_model_len=40)
    for index in range(3):
        request = SequenceRequest([index] * 9, params(20), user="batch", is_background=True)
        engine.add(request)
    engine.step()
    engine.add(SequenceRequest([7] * 17, params(9), user="alice"))
    for _ in range(2):  # the first attempt finds out how many blocks it takes
        engine.step()
        engine.scheduler.check_invariants()
    users = [seq.user for seq in engine.scheduler.running]
    assert users[0] == "alice" and "batch" in users
    while engine.step():
        engine.scheduler.check_invariants()


def test_what_is_background_has_few_rows_beside_others_and_loses_nothing() -> None:
    engine = make_engine(num_slots=32, num_blocks=200, max_num_batched_tokens=64)
    for index in range(32):
        engine.add(SequenceRequest([index] * 3, params(30), user="batch", is_background=True))
    while len(engine.scheduler.running) < 32 or engine.scheduler.running[-1].num_tokens < 6:
        engine.step()
    alice = engine.add(SequenceRequest([7] * 4, params(5), user="alice"))
    while not alice.is_finished:
        step = run_step(engine)
        users = Counter(seq.user for seq in step.seqs)
        assert users["batch"] <= 2 and users["alice"] <= 1
    assert engine.scheduler.num_preemptions == 1, "its slot, and no more"
    assert len(run_step(engine).seqs) >= 31, "alone it has all rows again"
    while engine.step():
        engine.scheduler.check_invariants()


def test_by_priority() -> None:
    engine = make_engine(num_slots=1, policy="priority")
    priorities = [2, 0, 1, 0]
    streams = [
        engine.add(SequenceRequest([i] * 5, params(3), priority=p))
        for i, p in enumerate(priorities)
    ]
    order = []
    while engine.step():
        order += [s.seq_id for s in streams if s.is_finished and s.seq_id not in order]
    assert order == [1, 3, 2, 0]


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    engine = make_engine(num_blocks=8, num_slots=3, max_model_len=32)
    streams = [engine.add(SequenceRequest([index] * 7, params(20))) for index in range(3)]
    preempted: Sequence | None = None
    while preempted is None:
        step = run_step(engine)
        if engine.scheduler.num_preemptions:
            preempted = list(engine.scheduler.waiting)[0]
            assert not {preempted, *engine.scheduler.waiting} & set(step.seqs)
    assert engine.scheduler.running[0].stream is streams[0], "the oldest goes on"
    num_known = len(preempted.token_ids)
    assert num_known > 7 and preempted.num_tokens == num_known
    engine.add(SequenceRequest([9] * 3, params(1)))
    assert list(engine.scheduler.waiting)[0] is preempted
    while engine.step():
        engine.check_invariants()
    for stream in streams:
        delta = stream.take()
        assert delta is not None and len(delta.token_ids) == 20
        assert stream.num_cached_tokens == 0, "of the first admission only"


def test_a_preempted_sequence_needs_what_it_needs_now() -> None:
    """Not what its first admission took: another sequence holds its prefix by now."""
    engine = make_engine(num_blocks=10, num_slots=3, max_model_len=64, policy="priority")
    growing = engine.add(SequenceRequest([1], params(12), priority=0))
    victim = engine.add(SequenceRequest([2] * 21, params(8), priority=5))  # 6 blocks
    run_step(engine)
    sharing = engine.add(
        SequenceRequest([2] * 21, params(8), priority=1)
    )  # 1 block beside the 5 they share
    scheduler = engine.scheduler
    while not scheduler.num_preemptions:
        run_step(engine)
    assert [seq.stream for seq in scheduler.waiting] == [victim]
    engine.abort(growing)
    assert scheduler.blocks.num_free == 3
    assert [seq.stream for seq in run_step(engine).seqs] == [sharing, victim]


def test_a_step_that_preempts_admits_nobody() -> None:
    """What it frees is for those that run, even where one waits that comes before the victim."""
    engine = make_engine(num_blocks=7, num_slots=2, max_model_len=32, policy="priority")
    first = engine.add(SequenceRequest([1] * 16, params(8), priority=0))
    victim = engine.add(SequenceRequest([2] * 8, params(8), priority=5))
    run_step(engine)
    better = engine.add(SequenceRequest([3], params(2), priority=1))
    step = run_step(engine)
    scheduler = engine.scheduler
    assert scheduler.num_preemptions == 1 and scheduler.blocks.num_free == 2
    assert [seq.stream for seq in step.seqs] == [first] and not step.slot_updates
    assert [seq.stream for seq in scheduler.waiting] == [better, victim]
    assert [seq.stream for seq in run_step(engine).seqs] == [first, better]


def test_the_gap_of_a_sequence_preempted_twice_begins_at_the_first_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    engine = make_engine(
        num_blocks=11, num_slots=3, max_num_batched_tokens=3, max_model_len=64,
        enable_prefix_caching=False, policy="priority",
    )  # fmt: skip
    first = engine.add(SequenceRequest([1], params(40), priority=0))
    victim = engine.add(SequenceRequest([2] * 17, params(8), priority=2))
    while not victim.first_token_s:
        run_step(engine)
    between = engine.add(SequenceRequest([3, 3], params(8), priority=1))
    scheduler, gaps = engine.scheduler, engine.histograms.inter_token_s
    while not scheduler.num_preemptions:
        run_step(engine)
    assert victim.take() is not None
    now_s = 110.0
    engine.abort(between)
    while scheduler.num_preemptions < 2:  # admitted again, and preempted before its next token
        run_step(engine)
    assert victim.take() is None and list(scheduler.waiting)[0].stream is victim
    now_s = 125.0
    engine.abort(first)
    count, total = gaps.count, gaps.total
    while victim.take() is None:
        run_step(engine)
    assert (gaps.count, gaps.total) == (count + 1, total + 25.0)


def test_a_sequence_too_large_for_now_waits_for_room() -> None:
    engine = make_engine(num_blocks=8, max_num_batched_tokens=64)
    first = engine.add(SequenceRequest([1] * 12, params(8)))
    second = engine.add(SequenceRequest([2] * 20, params(8)))
    third = engine.add(SequenceRequest([3], params(2)))
    run_step(engine)
    scheduler = engine.scheduler
    assert [seq.stream for seq in scheduler.running] == [first], "5 blocks and 1 kept back"
    assert [seq.stream for seq in scheduler.waiting] == [second, third], "nobody passes it"
    while engine.step():
        engine.check_invariants()
    assert scheduler.num_preemptions == 0 and second.is_finished and third.is_finished


def test_admissions_of_one_step_fit_the_buffer() -> None:
    engine = make_engine(
        num_blocks=20_000, num_slots=8, max_num_batched_tokens=60_000, max_model_len=9000,
        enable_prefix_caching=False,
    )  # fmt: skip
    limit = max_update_words(9000, 4)
    penalised = SamplingParams(max_tokens=2, seed=1, presence_penalty=1.0)
    for index in range(8):
        engine.add(SequenceRequest([index] * 8900, penalised))
    num_running = []
    while (step := engine.schedule()) is not None:
        assert sum(map(len, step.slot_updates)) // 4 + len(step.block_updates) <= limit
        engine.update(step, StepOutput([[0]] * sum(step.row_samples)))
        num_running.append(len(step.seqs))
    assert num_running[0] == limit // (8900 + 20 + 3 * 2225) == 4


@pytest.mark.parametrize(("batch_size", "limit_us"), [(16, 400), (256, 3000)])
def test_host_time_of_a_step(batch_size: int, limit_us: float) -> None:
    """schedule + pack + update of a decode step; the limits are loose, the figures are printed."""
    engine = make_engine(
        num_blocks=32 * batch_size, block_size=16, num_slots=batch_size,
        max_num_batched_tokens=1024, max_model_len=512,
    )  # fmt: skip
    sampler = random.Random(0)
    for index in range(batch_size):
        engine.add(SequenceRequest([index % 60] * 20, SamplingParams(max_tokens=300, seed=1)))
    runner = engine.runner
    times: list[float] = []
    while len(times) < 100:
        start = time.thread_time()
        step = engine.schedule()
        assert step is not None
        runner.pack(step)  # type: ignore[attr-defined]
        between = time.thread_time()
        sampled = [[sampler.randrange(60)] for _ in step.row_slots]
        resumed = time.thread_time()
        engine.update(step, StepOutput(sampled))
        if len(step.seqs) == batch_size and step.num_tokens == batch_size:
            times.append(time.thread_time() - resumed + between - start)
    median_us = sorted(times)[50] * 1e6
    print(f"batch {batch_size}: {median_us:.0f} us a step")
    assert median_us < limit_us


def test_who_comes_to_full_slots_gets_an_equal_share_of_them() -> None:
    engine = make_engine(num_slots=4, num_blocks=64)
    hog = [engine.add(SequenceRequest([1, i], params(40), user="hog")) for i in range(12)]
    run_step(engine)
    assert engine.scheduler.num_running_of == {"hog": 4}
    late = [engine.add(SequenceRequest([2, i], params(8), user="late")) for i in range(3)]
    run_step(engine)
    assert engine.scheduler.num_running_of == {"hog": 3, "late": 1}
    run_step(engine)
    assert engine.scheduler.num_running_of == {"hog": 2, "late": 2}
    for _ in range(4):
        run_step(engine)
    assert engine.scheduler.num_running_of == {"hog": 2, "late": 2}, "nobody changes places"
    assert engine.scheduler.num_preemptions == 2
    while not all(stream.is_finished for stream in late):
        run_step(engine)
    assert not any(stream.is_finished for stream in hog)
    while engine.step():
        engine.check_invariants()
    for stream in hog:
        delta = stream.take()
        assert delta is not None and len(delta.token_ids) == 40


def test_users_take_turns_where_they_wait() -> None:
    engine = make_engine(num_slots=1)
    streams = [
        engine.add(SequenceRequest([i], params(2), user=user)) for i, user in enumerate("aaaabb")
    ]
    order: list[int] = []
    while engine.step():
        order += [s.seq_id for s in streams if s.is_finished and s.seq_id not in order]
    assert order == [0, 1, 2, 3, 4, 5], "one slot: nobody runs more than another, the oldest goes"
    engine = make_engine(num_slots=2)
    streams = [
        engine.add(SequenceRequest([i], params(2), user=user)) for i, user in enumerate("aaaabb")
    ]
    order = []
    while engine.step():
        order += [s.seq_id for s in streams if s.is_finished and s.seq_id not in order]
    assert order == [0, 4, 1, 5, 2, 3]


def test_priority_goes_before_an_equal_share() -> None:
    engine = make_engine(num_slots=2, policy="priority")
    for i in range(3):
        engine.add(SequenceRequest([1, i], params(6), priority=0, user="hog"))
    engine.add(SequenceRequest([2], params(6), priority=1, user="late"))
    for _ in range(3):
        run_step(engine)
    assert engine.scheduler.num_running_of == {"hog": 2}
    engine.add(SequenceRequest([3], params(6), priority=0, user="third"))
    run_step(engine)
    assert engine.scheduler.num_running_of == {"hog": 1, "third": 1}


def test_who_has_all_blocks_gives_way_too() -> None:
    engine = make_engine(num_slots=4, num_blocks=12, max_model_len=48, max_num_batched_tokens=64)
    for i in range(3):
        engine.add(SequenceRequest([1 + i] * 14, params(20), user="hog"))
    run_step(engine)
    engine.add(SequenceRequest([9] * 8, params(2), user="late"))
    for _ in range(3):
        run_step(engine)
        if "late" in engine.scheduler.num_running_of:
            break
    assert engine.scheduler.num_running_of["late"] == 1
    while engine.step():
        engine.check_invariants()


def test_a_step_looks_up_no_more_blocks_than_it_has_time_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """127 prompts that equal one of 32,000 tokens were hashed in one step, in 0.3 s."""
    monkeypatch.setattr(scheduler_module, "MAX_LOOKUPS", 8)
    engine = make_engine(num_slots=8, max_num_batched_tokens=64)
    blocks, find_prefix = engine.scheduler.blocks, engine.scheduler.blocks.find_prefix
    looked_up: list[int] = []

    def spy(seq: Sequence) -> tuple[list[int], bytes | None]:
        found = find_prefix(seq)
        looked_up.append(len(seq.block_hashes))
        return found

    monkeypatch.setattr(blocks, "find_prefix", spy)
    streams = [engine.add(SequenceRequest([1] * 20, params(2))) for _ in range(6)]
    num_admitted = []
    while not all(stream.is_finished for stream in streams):
        looked_up.clear()
        run_step(engine)
        assert sum(looked_up) <= 8 + 4, "one more than fits, or none longer would ever run"
        num_admitted.append(sum(stream.scheduled_s > 0 for stream in streams))
    assert num_admitted[0] == 1 and num_admitted[-1] == 6


def test_a_large_prompt_does_not_push_out_many_small_ones() -> None:
    """It would be one sequence against two, and then against one."""
    engine = make_engine(num_slots=8, num_blocks=32, max_num_batched_tokens=64)
    for i in range(6):
        engine.add(SequenceRequest([1 + i] * 8, params(12), user="many"))
    run_step(engine)
    engine.add(SequenceRequest([9] * 96, params(2), user="large"))
    for _ in range(4):
        run_step(engine)
    assert engine.scheduler.num_running_of == {"many": 6}
    assert engine.scheduler.num_preemptions == 0
    while engine.step():
        engine.check_invariants()


def test_prompts_share_a_step_with_those_of_their_priority() -> None:
    engine = make_engine(
        max_num_batched_tokens=16, max_model_len=512, num_blocks=200, policy="priority"
    )
    engine.add(SequenceRequest([1] * 100, params(), priority=1))
    assert rows(run_step(engine)) == [(0, 16)]
    engine.add(SequenceRequest([2] * 40, params(1), priority=0))
    engine.add(SequenceRequest([3] * 12, params(), priority=1))
    assert rows(run_step(engine)) == [(1, 16)], "who waits comes before a lower priority"
    assert rows(run_step(engine)) == [(1, 16)], "who runs comes before a lower priority"
    assert rows(run_step(engine)) == [(2, 4), (1, 8), (0, 4)]
    assert rows(run_step(engine)) == [(0, 8), (2, 8)]
