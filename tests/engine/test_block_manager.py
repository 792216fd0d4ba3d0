"""Blocks: what is a hit and what is not, the order of reuse, who waits for whom."""

from __future__ import annotations

import random

import pytest

from pyserve.client import SequenceStream
from pyserve.engine.block_manager import HASH_BYTES, BlockManager
from pyserve.engine.sequence import Sequence
from pyserve.params import SamplingParams

BLOCK_SIZE = 4


def manager(num_blocks: int = 8, *, caching: bool = True) -> BlockManager:
    return BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=caching)


def sequence(blocks: BlockManager, token_ids: list[int], salt: str = "") -> Sequence:
    return Sequence(
        stream=SequenceStream(0, len(token_ids)),
        params=SamplingParams(max_tokens=1),
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        max_total_tokens=len(token_ids) + 1,
        order=(0, 0),
        seed=0,
        stop_token_ids=frozenset(),
        root_hash=blocks.root_hash(salt),
        num_tokens=len(token_ids),
    )


def run(
    blocks: BlockManager, token_ids: list[int], *others: Sequence, salt: str = ""
) -> tuple[Sequence, list[int]]:
    """Admit a sequence beside others and compute all of it; returns it and its hits."""
    seq = sequence(blocks, token_ids, salt)
    hits, awaited = blocks.find_prefix(seq)
    assert awaited is None
    blocks.allocate(seq, hits)
    seq.num_computed_tokens = len(token_ids)
    blocks.offer(seq, len(token_ids))
    blocks.check_invariants([seq, *others])
    return seq, hits


def test_what_is_forgotten_is_computed_again_and_found_again() -> None:
    blocks = manager()
    token_ids = list(range(11))
    running, _ = run(blocks, token_ids)
    blocks.forget()
    blocks.check_invariants([running])
    second, hits = run(blocks, token_ids, running)
    assert hits == []
    blocks.release(running)
    _, hits = run(blocks, token_ids, second)
    assert hits == second.block_ids[:2]


@pytest.mark.parametrize(
    ("num_tokens", "num_hit_tokens"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)]
)
def test_a_hit_leaves_one_token_to_compute(num_tokens: int, num_hit_tokens: int) -> None:
    blocks = manager()
    token_ids = list(range(num_tokens))
    first, _ = run(blocks, token_ids)
    blocks.release(first)
    second = sequence(blocks, token_ids)
    hits, _ = blocks.find_prefix(second)
    assert len(hits) * BLOCK_SIZE == num_hit_tokens
    assert hits == blocks.find_prefix(second)[0], "looking changes nothing"


def test_hits_end_at_the_first_difference() -> None:
    blocks = manager()
    first, _ = run(blocks, list(range(12)))
    ids = first.block_ids
    changed = [*range(5), 99, *range(6, 12), 1]
    assert blocks.find_prefix(sequence(blocks, changed))[0] == ids[:1]
    # The same block behind another parent is another block.
    assert blocks.find_prefix(sequence(blocks, [99, 1, 2, 3, *range(4, 12), 1]))[0] == []


def test_salts_and_adapters_separate() -> None:
    blocks = manager(16)
    run(blocks, list(range(9)))
    assert blocks.find_prefix(sequence(blocks, list(range(9)), "salt"))[0] == []
    roots = {
        blocks.root_hash(""),
        blocks.root_hash("a"),
        blocks.root_hash("", "a"),
        blocks.root_hash("b", "a"),
        blocks.root_hash("ab"),
        blocks.root_hash("", "ab"),
    }
    assert len(roots) == 6
    assert all(len(root) == HASH_BYTES for root in roots)


def test_hashes_are_keyed_by_the_process() -> None:
    assert manager().root_hash("") != manager().root_hash("")


def test_a_hash_collision_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = manager()
    monkeypatch.setattr(blocks, "_hash", lambda preimage: bytes(HASH_BYTES))
    first = sequence(blocks, [1] * 5)
    blocks.allocate(first, blocks.find_prefix(first)[0])
    blocks.offer(first, 5)
    assert blocks.find_prefix(sequence(blocks, [1] * 5))[0] == first.block_ids[:1]
    assert blocks.find_prefix(sequence(blocks, [2] * 5))[0] == []


def test_contents_live_until_reuse_and_the_least_recently_used_goes_first() -> None:
    blocks = manager(8)
    old, _ = run(blocks, [1] * 9)  # 2 full blocks and a part
    new, _ = run(blocks, [2] * 9, old)
    blocks.release(old)
    blocks.release(new)
    assert blocks.num_free == 8
    # 4 blocks hold nothing that can be found again; then the tail of the oldest goes.
    taker, _ = run(blocks, [3] * 19)
    assert len(blocks.find_prefix(sequence(blocks, [1] * 9))[0]) == 1
    assert len(blocks.find_prefix(sequence(blocks, [2] * 9))[0]) == 2
    blocks.release(taker, has_bad_kv=True)
    assert blocks.find_prefix(sequence(blocks, [3] * 19))[0] == []


def test_hits_are_shared_and_counted_as_needed_only_when_free() -> None:
    blocks = manager(8)
    first, _ = run(blocks, list(range(9)))
    second = sequence(blocks, list(range(9)))
    hits, _ = blocks.find_prefix(second)
    assert blocks.num_needed(second, hits) == 1
    blocks.release(first)
    assert blocks.num_needed(second, hits) == 3
    blocks.allocate(second, hits)
    second.num_computed_tokens = 9
    assert blocks.num_free == 5 and second.block_ids[:2] == hits
    third, shared = run(blocks, list(range(9)), second)
    assert shared == hits and blocks.num_free == 4
    blocks.release(second)
    assert blocks.num_free == 5
    blocks.release(third)
    assert blocks.num_free == 8
    blocks.check_invariants([])


def test_a_block_that_is_being_computed_is_awaited() -> None:
    blocks = manager(16)
    owner = sequence(blocks, list(range(18)))
    blocks.allocate(owner, blocks.find_prefix(owner)[0])
    waiter = sequence(blocks, [*range(12), 99])
    hits, awaited = blocks.find_prefix(waiter)
    assert hits == [] and awaited == owner.block_hashes[2], "the last one they share"
    assert blocks.find_prefix(sequence(blocks, [99] * 9)) == ([], None)
    owner.num_computed_tokens = 9
    blocks.offer(owner, 9)
    assert blocks.is_awaited(awaited)
    assert blocks.find_prefix(waiter) == (owner.block_ids[:2], awaited)
    owner.num_computed_tokens = 12
    blocks.offer(owner, 12)
    assert not blocks.is_awaited(awaited)
    assert blocks.find_prefix(waiter) == (owner.block_ids[:3], None)
    blocks.check_invariants([owner])
    last = owner.block_hashes[3]
    assert blocks.is_awaited(last)
    blocks.release(owner)
    assert not blocks.is_awaited(last)


def test_output_blocks_are_cached_when_they_are_full() -> None:
    blocks = manager()
    seq, _ = run(blocks, [1, 2, 3])
    for token_id in (4, 5, 6, 7, 8):
        seq.token_ids.append(token_id)
        if len(seq.token_ids) > seq.kv_capacity:
            blocks.grow(seq)
        seq.num_computed_tokens = len(seq.token_ids)
        blocks.offer(seq, seq.num_computed_tokens)
        blocks.check_invariants([seq])
    hits, _ = blocks.find_prefix(sequence(blocks, list(range(1, 10))))
    assert hits == seq.block_ids[:2]


def test_without_caching_nothing_is_shared() -> None:
    blocks = manager(caching=False)
    first, _ = run(blocks, list(range(9)))
    second = sequence(blocks, list(range(9)))
    assert blocks.find_prefix(second) == ([], None)
    blocks.release(first)
    assert blocks.find_prefix(second) == ([], None)
    assert second.block_hashes == []


def test_random_operations_keep_the_invariants() -> None:
    rng = random.Random(1)
    blocks = manager(24)
    running: list[Sequence] = []
    num_hits = 0
    for _ in range(3000):
        choice = rng.random()
        if choice < 0.4:
            prefix = [rng.randrange(3)] * rng.randrange(12)
            seq = sequence(blocks, [*prefix, *rng.choices(range(9), k=rng.randrange(1, 9))])
            hits, awaited = blocks.find_prefix(seq)
            if awaited is None and blocks.num_needed(seq, hits) <= blocks.num_free:
                blocks.allocate(seq, hits)
                seq.num_computed_tokens = len(hits) * BLOCK_SIZE
                running.append(seq)
                num_hits += len(hits)
        elif choice < 0.7 and running:
            seq = rng.choice(running)
            seq.num_computed_tokens = rng.randint(seq.num_computed_tokens, len(seq.token_ids))
            blocks.offer(seq, seq.num_computed_tokens)
        elif choice < 0.8 and running and blocks.num_free:
            seq = rng.choice(running)
            if len(seq.token_ids) == seq.kv_capacity:
                blocks.grow(seq)
                seq.token_ids += rng.choices(range(3), k=BLOCK_SIZE)
        elif running:
            seq = running.pop(rng.randrange(len(running)))
            blocks.release(seq, has_bad_kv=rng.random() < 0.1)
        blocks.check_invariants(running)
    assert num_hits > 100
