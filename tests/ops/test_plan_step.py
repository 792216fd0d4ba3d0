"""plan_step against its twin, and against buffers that lie."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pyserve import ops
from pyserve.ops import StepPlan, reference
from pyserve.ops import step_layout as layout
from tests.ops.step_inputs import SlotUpdate, Tables

Step = tuple[list[int], list[int], list[list[int] | None], list[bool], list[int], list[bytes]]


def pack(step: Step) -> torch.Tensor:
    buffer = np.zeros(4096, dtype=np.int32)
    return torch.from_numpy(buffer[: ops.pack_step(buffer, *step)].copy())


def poisoned_plan(num_tokens: int, num_rows: int) -> StepPlan:
    plan = StepPlan.allocate(num_tokens, num_rows, torch.device("cpu"))
    for tensor in plan:
        tensor.fill_(77)
    return plan


def run(words: torch.Tensor, tables: Tables, plan: StepPlan) -> None:
    args = (tables.slots, tables.block_table, tables.token_counts, tables.block_size)
    ops.plan_step(words, *args, plan)


def run_twin(words: torch.Tensor, tables: Tables, plan: StepPlan) -> None:
    args = (tables.slots, tables.block_table, tables.token_counts, tables.block_size)
    reference.plan_step(words, *args, *plan)


def small_step() -> Step:
    """A new sequence of 6 tokens in slot 2, and one in slot 0 that takes its last token."""
    updates = [
        SlotUpdate(slot=2, bias={5: 1.5}, stop_ids=[9], has_penalties=1, prompt=[1, 1, 2]).pack(),
        SlotUpdate(slot=0, num_computed=5, last_token=42).pack(),
    ]
    blocks = [2, 0, 3, 2, 1, 6, 0, 1, 1]
    return [2, 0], [6, 1], [[1, 1, 2, 3, 4, 5], None], [False, True], blocks, updates


def test_small_step_by_hand() -> None:
    tables, plan = Tables.make(), poisoned_plan(9, 4)
    run(pack(small_step()), tables, plan)
    assert plan.input_ids.tolist() == [1, 1, 2, 3, 4, 5, 42, 0, 0]
    assert plan.positions.tolist() == [0, 1, 2, 3, 4, 5, 5, 0, 0]
    assert plan.slot_mapping.tolist() == [12, 13, 14, 15, 24, 25, 5, -1, -1]
    assert plan.row_slots.tolist() == [2, 0, -1, -1]
    assert plan.cu_seqlens_q.tolist() == [0, 6, 7, 7, 7]
    assert plan.seq_lens.tolist() == [6, 6, 0, 0]
    assert plan.sample_rows.tolist() == [[6, 0], [-1, -1], [-1, -1], [-1, -1]]
    assert tables.slots[2, layout.SLOT_NUM_COMPUTED] == 6
    assert tables.slots[0, layout.SLOT_NUM_COMPUTED] == 6
    assert tables.token_counts[2, :3].tolist() == [0, layout.IN_PROMPT, layout.IN_PROMPT]


def test_the_next_step_needs_no_host_tokens() -> None:
    tables, plan = Tables.make(), poisoned_plan(9, 4)
    run(pack(small_step()), tables, plan)
    tables.slots[0, layout.SLOT_LAST_TOKEN] = 17  # as sample does
    run(pack(([0], [1], [None], [True], [], [])), tables, plan.narrow(1, 1))
    assert plan.input_ids[0] == 17 and plan.positions[0] == 6 and plan.slot_mapping[0] == 6
    assert tables.slots[0, layout.SLOT_NUM_COMPUTED] == 7


def test_an_empty_step_is_all_padding() -> None:
    tables, plan = Tables.make(), poisoned_plan(3, 2)
    run(pack(([], [], [], [], [], [])), tables, plan)
    assert plan.slot_mapping.tolist() == [-1] * 3 and plan.row_slots.tolist() == [-1] * 2
    assert plan.cu_seqlens_q.tolist() == [0] * 3 and (plan.sample_rows == -1).all()


def test_kv_slots_beyond_int32() -> None:
    tables, plan = Tables.make(block_size=256), poisoned_plan(1, 1)
    block_id = 2**31 - 1
    blocks = [1, 0, block_id]
    run(pack(([1], [1], [[3]], [True], blocks, [SlotUpdate(slot=1).pack()])), tables, plan)
    assert plan.slot_mapping.item() == block_id * 256


def random_step(rng: random.Random, tables: Tables, known: set[int]) -> Step:
    num_slots, max_blocks = tables.block_table.shape
    vocab_size = tables.token_counts.shape[1]

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    slots = rng.sample(range(num_slots), rng.randrange(num_slots + 1))
    updates, rows = [], []
    for slot in slots:
        if slot not in known or rng.random() < 0.2:
            known.add(slot)
            updates.append(
                SlotUpdate(
                    slot=slot,
                    num_computed=rng.randrange(6),
                    last_token=rng.randrange(vocab_size),
                    has_penalties=rng.randrange(2),
                    temperature=rng.random(),
                    top_k=rng.randrange(9),
                    seed=rng.randrange(2**64),
                    bias={i: rng.uniform(-100, 100) for i in tokens(rng.randrange(4))},
                    stop_ids=tokens(rng.randrange(4)),
                    prompt=tokens(rng.randrange(8)),
                    output=tokens(rng.randrange(8)) + [3] * rng.randrange(5),
                ).pack()
            )
        ids = None if rng.random() < 0.5 else tokens(rng.randrange(1, 7))
        rows.append((slot, 1 if ids is None else len(ids), ids, rng.random() < 0.7))
    blocks = []
    for _ in range(rng.randrange(9)):
        blocks += [rng.randrange(num_slots), rng.randrange(max_blocks), rng.randrange(1000)]
    return (
        [row[0] for row in rows],
        [row[1] for row in rows],
        [row[2] for row in rows],
        [row[3] for row in rows],
        blocks,
        updates,
    )


def test_random_steps_equal_the_twin() -> None:
    rng = random.Random(0)
    tables, known = Tables.make(max_blocks=40), set[int]()
    for _ in range(150):
        step = random_step(rng, tables, known)
        num_tokens, num_rows = sum(step[1]), len(step[0])
        words, twin_tables = pack(step), tables.clone()
        plan = poisoned_plan(num_tokens + rng.randrange(3), num_rows + rng.randrange(3))
        twin_plan = poisoned_plan(len(plan.input_ids), len(plan.row_slots))
        run(words, tables, plan)
        run_twin(words, twin_tables, twin_plan)
        assert tables.equal(twin_tables)
        for mine, theirs in zip(plan, twin_plan, strict=True):
            assert torch.equal(mine, theirs)


def test_counts_saturate() -> None:
    tables, plan = Tables.make(vocab_size=4), poisoned_plan(1, 1)
    update = SlotUpdate(slot=1, has_penalties=1, prompt=[2], output=[2] * 40_000)
    buffer = np.zeros(50_000, dtype=np.int32)
    num_words = ops.pack_step(buffer, [], [], [], [], [], [update.pack()])
    run(torch.from_numpy(buffer[:num_words]), tables, plan)
    assert tables.token_counts[1].tolist() == [0, 0, -1, 0]  # in the prompt, 0x7fff outputs


def words_with(index: int, value: int) -> torch.Tensor:
    words = pack(small_step())
    words[index] = value
    return words


ROWS = layout.HEADER_WORDS
TOKENS = ROWS + 2 * layout.ROW_WORDS
BLOCKS = TOKENS + 6
UPDATES = BLOCKS + 9
SLOT_ROW = UPDATES + layout.SLOT_UPDATE_WORDS


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (layout.HEADER_MAGIC, 0),
        (layout.HEADER_NUM_WORDS, 10**6),
        (layout.HEADER_NUM_WORDS, -1),
        (layout.HEADER_NUM_WORDS, 17),
        (layout.HEADER_MAX_QUERY_LEN, 4),
        (layout.HEADER_MAX_QUERY_LEN, -1),
        (layout.HEADER_NUM_ROWS, 5),
        (layout.HEADER_NUM_ROWS, -1),
        (layout.HEADER_NUM_ROWS, 1),
        (layout.HEADER_NUM_TOKENS, 10),
        (layout.HEADER_NUM_TOKENS, 6),
        (layout.HEADER_NUM_SAMPLES, 0),
        (layout.HEADER_NUM_SAMPLES, 2),
        (layout.HEADER_ROWS_OFFSET, -(2**31)),
        (layout.HEADER_ROWS_OFFSET, 0),
        (layout.HEADER_TOKENS_OFFSET, 2**31 - 1),
        (layout.HEADER_NUM_BLOCK_UPDATES, 2**31 - 1),
        (layout.HEADER_NUM_BLOCK_UPDATES, -1),
        (layout.HEADER_BLOCK_UPDATES_OFFSET, 2),
        (layout.HEADER_NUM_SLOT_UPDATES, 2**31 - 1),
        (layout.HEADER_NUM_SLOT_UPDATES, 3),
        (layout.HEADER_SLOT_UPDATES_OFFSET, 2**31 - 1),
        (ROWS + layout.ROW_SLOT, 5),
        (ROWS + layout.ROW_SLOT, -1),
        (ROWS + layout.ROW_SLOT, 0),  # two rows of one slot
        (ROWS + layout.ROW_QUERY_LEN, 0),
        (ROWS + layout.ROW_QUERY_LEN, -5),
        (ROWS + layout.ROW_QUERY_LEN, 2**31 - 1),
        (ROWS + layout.ROW_TOKENS_OFFSET, -1),
        (ROWS + layout.ROW_TOKENS_OFFSET, 1),
        (ROWS + layout.ROW_TOKENS_OFFSET, -2),
        (TOKENS, 100),
        (TOKENS, -1),
        (BLOCKS, 5),
        (BLOCKS + 1, 8),
        (BLOCKS + 1, -1),
        (BLOCKS + 2, -1),
        (UPDATES, 3),
        (UPDATES, 10**6),
        (UPDATES + layout.SLOT_UPDATE_SLOT, 5),
        (UPDATES + layout.SLOT_UPDATE_NUM_PROMPT_TOKENS, 2**31 - 1),
        (UPDATES + layout.SLOT_UPDATE_NUM_OUTPUT_TOKENS, -1),
        (SLOT_ROW + layout.SLOT_NUM_COMPUTED, -1),
        (SLOT_ROW + layout.SLOT_NUM_COMPUTED, 2**31 - 1),
        (SLOT_ROW + layout.SLOT_NUM_COMPUTED, 27),
        (SLOT_ROW + layout.SLOT_LAST_TOKEN, 100),
        (SLOT_ROW + layout.SLOT_TOP_K, -1),
        (SLOT_ROW + layout.SLOT_TEMPERATURE, 0x7FC00000),
        (SLOT_ROW + layout.SLOT_TOP_P, 0),
        (SLOT_ROW + layout.SLOT_NUM_BIAS, 301),
        (SLOT_ROW + layout.SLOT_NUM_BIAS, -1),
        (SLOT_ROW + layout.SLOT_NUM_STOP, 65),
        (SLOT_ROW + layout.SLOT_HEADER_WORDS, 100),  # a bias id
        (SLOT_ROW + layout.SLOT_HEADER_WORDS + 1, 0x7F800000),  # its value
        (SLOT_ROW + layout.SLOT_HEADER_WORDS + 2, -1),  # a stop id
    ],
)
def test_hostile_words(index: int, value: int) -> None:
    for function in (run, run_twin):
        with pytest.raises(RuntimeError, match="bad step input"):
            function(words_with(index, value), Tables.make(), poisoned_plan(9, 4))


def test_words_beyond_the_step_are_not_read() -> None:
    """A runner passes its whole buffer, which still holds what an earlier step left there."""
    words = pack(small_step())
    buffer = torch.full((len(words) + 50,), -(2**31), dtype=torch.int32)
    buffer[: len(words)] = words
    for function in (run, run_twin):
        plan, expected = poisoned_plan(9, 4), poisoned_plan(9, 4)
        tables, expected_tables = Tables.make(), Tables.make()
        function(buffer, tables, plan)
        function(words, expected_tables, expected)
        assert tables.equal(expected_tables)
        assert all(map(torch.equal, plan, expected))


def test_every_truncation_is_refused() -> None:
    words = pack(small_step())
    for length in range(len(words)):
        with pytest.raises(RuntimeError, match="bad step input"):
            run(words[:length], Tables.make(), poisoned_plan(9, 4))


def test_random_corruption_never_crashes() -> None:
    rng = random.Random(1)
    good, refused = pack(small_step()), 0
    values = [0, 1, -1, 2, 7, 100, 2**31 - 1, -(2**31), 2**16]
    for _ in range(3000):
        words, tables = good.clone(), Tables.make()
        for _ in range(rng.randrange(1, 4)):
            words[rng.randrange(len(words))] = rng.choice(values)
        try:
            run(words, tables, poisoned_plan(9, 4))
        except RuntimeError:
            refused += 1
    assert refused > 1500


def test_a_slot_that_never_sampled_has_no_last_token() -> None:
    updates = [SlotUpdate(slot=0).pack()]
    with pytest.raises(RuntimeError, match="a row holds token id -1, the vocabulary 100"):
        run(pack(([0], [1], [None], [True], [], updates)), Tables.make(), poisoned_plan(2, 2))


def test_mismatched_tables() -> None:
    tables = Tables.make()
    tables.block_table = tables.block_table[:4]
    with pytest.raises(RuntimeError, match="size 0 of block_table is 4, expected 5"):
        run(pack(small_step()), tables, poisoned_plan(9, 4))
    plan = poisoned_plan(9, 4)._replace(sample_rows=torch.zeros(3, 2, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="size 0 of sample_rows is 3, expected 4"):
        run(pack(small_step()), Tables.make(), plan)
