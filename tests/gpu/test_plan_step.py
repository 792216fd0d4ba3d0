"""plan_step on CUDA against its twin. Buffers that lie would end the process's use of the card, so
none is run here."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pyserve import ops
from pyserve.ops import StepPlan, reference
from pyserve.ops import step_layout as layout
from tests.ops.step_inputs import SlotUpdate, Tables
from tests.ops.test_plan_step import Step, poisoned_plan, random_step, small_step

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def pack(step: Step) -> torch.Tensor:
    slots, lens, _, _, blocks, updates = step
    room = 64 + 4 * len(slots) + sum(lens) + len(blocks) + sum(map(len, updates)) // 4
    buffer = np.zeros(room, dtype=np.int32)
    return torch.from_numpy(buffer[: ops.pack_step(buffer, *step)])


def on_cuda(tables: Tables) -> Tables:
    return Tables(
        tables.slots.cuda(),
        tables.block_table.cuda(),
        tables.token_counts.cuda(),
        tables.block_size,
    )


def check(step: Step, tables: Tables, num_tokens: int, num_rows: int) -> None:
    """Run the step on both devices; `tables` (CPU) is advanced."""
    words, device_tables = pack(step), on_cuda(tables)
    plan = StepPlan(*(tensor.cuda() for tensor in poisoned_plan(num_tokens, num_rows)))
    twin = poisoned_plan(num_tokens, num_rows)
    ops.plan_step(
        words.cuda(),
        device_tables.slots,
        device_tables.block_table,
        device_tables.token_counts,
        tables.block_size,
        plan,
    )
    reference.plan_step(
        words,
        tables.slots,
        tables.block_table,
        tables.token_counts,
        tables.block_size,
        *twin,
    )
    for mine, theirs in zip(plan, twin, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    assert torch.equal(device_tables.slots.cpu(), tables.slots)
    assert torch.equal(device_tables.block_table.cpu(), tables.block_table)
    assert torch.equal(device_tables.token_counts.cpu(), tables.token_counts)


def test_small_step() -> None:
    check(small_step(), Tables.make(), 9, 4)


def test_an_empty_step_is_all_padding() -> None:
    check(([], [], [], [], [], []), Tables.make(), 3, 2)


def test_random_steps_equal_the_twin() -> None:
    rng = random.Random(0)
    for vocab_size in (99, 100):
        tables, known = Tables.make(max_blocks=40, vocab_size=vocab_size), set[int]()
        for _ in range(60):
            step = random_step(rng, tables, known)
            num_tokens, num_rows = sum(step[1]), len(step[0])
            check(step, tables, num_tokens + rng.randrange(3), num_rows + rng.randrange(3))


@pytest.mark.parametrize(
    ("num_rows", "max_query_len", "block_size", "vocab_size"),
    [(256, 1, 16, 1000), (1500, 1, 7, 1001), (1100, 3, 5, 77), (64, 130, 16, 301)],
)
def test_many_rows(num_rows: int, max_query_len: int, block_size: int, vocab_size: int) -> None:
    """With several updates of one slot, and of one block: the last one counts."""
    rng = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    tables = Tables.make(
        num_slots=num_rows + 3, max_blocks=60, vocab_size=vocab_size, block_size=block_size
    )
    tables.block_table.random_(0, 1000)
    slots = rng.sample(range(num_rows + 3), num_rows)
    updates = [
        SlotUpdate(
            slot=slot,
            num_computed=rng.randrange(20),
            last_token=rng.randrange(vocab_size),
            has_penalties=int(rng.random() < 0.02),
            bias={rng.randrange(vocab_size): 1.0},
            prompt=tokens(rng.randrange(5)),
            output=tokens(rng.randrange(5)),
        ).pack()
        for slot in slots
    ]
    for _ in range(6):
        again = SlotUpdate(slot=rng.choice(slots), last_token=1, has_penalties=rng.randrange(2))
        again.output = [2, 2]
        updates.append(again.pack())
    lens = [rng.randrange(1, max_query_len + 1) for _ in slots]
    ids = [None if n == 1 and rng.random() < 0.5 else tokens(n) for n in lens]
    blocks = []
    for _ in range(2500):
        blocks += [rng.choice(slots[:20]), rng.randrange(60), rng.randrange(10**6)]
    is_sampled = [rng.random() < 0.7 for _ in slots]
    check((slots, lens, ids, is_sampled, blocks, updates), tables, sum(lens) + 9, num_rows + 5)
    # The next step, which needs nothing of the host.
    check((slots, [1] * num_rows, [None] * num_rows, [True] * num_rows, [], []), tables,
          num_rows, num_rows)  # fmt: skip


def test_kv_slots_beyond_int32() -> None:
    blocks = [1, 0, 2**31 - 1]
    step: Step = ([1], [1], [[3]], [True], blocks, [SlotUpdate(slot=1).pack()])
    check(step, Tables.make(block_size=256), 1, 1)


def test_counts_saturate_and_are_rebuilt() -> None:
    tables = Tables.make(vocab_size=5)
    tables.token_counts.fill_(7)
    output = [2] * 40_000 + [1] * 32_766 + [0] * 32_767 + [4] * 32_768
    update = SlotUpdate(slot=1, has_penalties=1, prompt=[2, 3], output=output)
    check(([], [], [], [], [], [update.pack()]), tables, 1, 1)
    assert tables.token_counts[1, 2] == -1  # in the prompt, MAX_TOKEN_COUNT outputs


def test_a_large_step() -> None:
    vocab_size = 128_256
    tables = Tables.make(num_slots=8, max_blocks=512, vocab_size=vocab_size, block_size=16)
    tables.block_table.random_(0, 100_000)
    ids = np.random.default_rng(0).integers(0, vocab_size, (4, 2048)).tolist()
    update = SlotUpdate(slot=3, has_penalties=1, num_computed=100, output=ids[0], prompt=ids[1])
    step: Step = ([3, 1, 0, 7], [2048] * 4, ids, [True, False, True, True], [], [update.pack()])
    check(step, tables, 8192, 4)


def test_refusals() -> None:
    tables = on_cuda(Tables.make())
    plan = StepPlan.allocate(9, 4, CUDA)
    args = (tables.slots, tables.block_table, tables.token_counts, tables.block_size)
    with pytest.raises(RuntimeError, match="10 words"):
        ops.plan_step(torch.zeros(10, dtype=torch.int32, device=CUDA), *args, plan)
    words = pack(small_step())
    with pytest.raises(RuntimeError, match="step_input must be on a CUDA device"):
        ops.plan_step(words, *args, plan)
    short = plan._replace(sample_rows=plan.sample_rows[:3])
    with pytest.raises(RuntimeError, match="size 0 of sample_rows is 3, expected 4"):
        ops.plan_step(words.cuda(), *args, short)
    assert tables.slots[:, layout.SLOT_NUM_COMPUTED].sum() == 0
