"""sample: bit for bit the twin; and the twin itself against what sampling must mean."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import reference
from pyserve.ops import step_layout as layout
from tests.ops.exact_sample import possible_tokens, uniform
from tests.ops.step_inputs import SlotUpdate, Tables

INF, NAN = float("inf"), float("nan")


def tables_of(updates: list[SlotUpdate], vocab_size: int) -> Tables:
    """Slots as plan_step leaves them, num_computed as given."""
    num_slots = max(update.slot for update in updates) + 2
    tables = Tables.make(num_slots=num_slots, vocab_size=vocab_size)
    records = [update.pack() for update in updates]
    buffer = np.zeros(64 + sum(map(len, records)) // 4, dtype=np.int32)
    num_words = ops.pack_step(buffer, [], [], [], [], [], records)
    ops.plan_step(
        torch.from_numpy(buffer[:num_words]),
        tables.slots,
        tables.block_table,
        tables.token_counts,
        tables.block_size,
        ops.StepPlan.allocate(1, 1, torch.device("cpu")),
    )
    return tables


def sample(logits: Tensor, update: SlotUpdate, num_draws: int = 1) -> list[int]:
    """Tokens drawn for one row of logits at `num_draws` successive positions, by op and twin."""
    tables = tables_of([update], logits.shape[-1])
    twin = tables.clone()
    slot = torch.tensor([update.slot], dtype=torch.int32)
    drawn = []
    for _ in range(num_draws):
        row = logits.view(1, -1)
        sampled = ops.sample(row, slot, tables.slots, tables.token_counts)
        expected = torch.empty_like(sampled)
        reference.sample(row, slot, twin.slots, twin.token_counts, None, expected)
        assert torch.equal(sampled, expected)
        drawn.append(int(sampled))
        for state in (tables, twin):
            state.slots[update.slot, layout.SLOT_NUM_COMPUTED] += 1
    return drawn


def random_update(rng: random.Random, slot: int, vocab_size: int) -> SlotUpdate:
    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    return SlotUpdate(
        slot=slot,
        num_computed=rng.randrange(100),
        min_total_len=rng.choice([0, 50, 1000]),
        has_penalties=rng.randrange(2),
        temperature=rng.choice([0.0, 1e-6, 1e-3, 0.3, 1.0, 1.7]),
        top_p=rng.choice([1.0, 1.0, 0.999, 0.9, 0.5, 0.01]),
        min_p=rng.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
        top_k=rng.choice([0, 0, 1, 5, 50, 1000, vocab_size, vocab_size + 7]),
        repetition_penalty=rng.choice([1.0, 1.3, 0.7]),
        presence_penalty=rng.choice([0.0, 0.7]),
        frequency_penalty=rng.choice([0.0, 0.3, -0.2]),
        seed=rng.randrange(-(2**63), 2**63),
        sample_index=rng.randrange(4),
        bias=dict.fromkeys(tokens(rng.choice([0, 0, 3])), rng.uniform(-5, 5)),
        stop_ids=tokens(rng.choice([0, 2])),
        prompt=tokens(20),
        output=tokens(20),
    )


def random_logits(rng: random.Random, shape: tuple[int, int]) -> Tensor:
    logits = torch.randn(shape) * rng.choice([0.0, 0.1, 1.0, 5.0, 30.0])
    if rng.random() < 0.3:
        logits = logits.round()  # many ties
    if rng.random() < 0.2:
        logits[:, rng.randrange(shape[1])] = -INF
    if rng.random() < 0.1:
        logits[rng.randrange(shape[0]), rng.randrange(shape[1])] = rng.choice([NAN, INF])
    if rng.random() < 0.05:
        logits[0] = -INF
    return logits.bfloat16() if rng.random() < 0.5 else logits


def test_bit_for_bit_the_twin() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for i in range(500):
        vocab_size = rng.choice([1, 5, 17, 64, 100, 1000, 4096, 4099]) if i else 150_001
        num_samples = rng.choice([1, 2, 5])
        slots = range(num_samples + 2)
        tables = tables_of([random_update(rng, slot, vocab_size) for slot in slots], vocab_size)
        logits = random_logits(rng, (num_samples, vocab_size))
        sample_slots = torch.tensor(rng.sample(slots, num_samples), dtype=torch.int32)
        if rng.random() < 0.3:
            sample_slots[rng.randrange(num_samples)] = -1
        before, twin = logits.clone(), tables.clone()
        sampled = ops.sample(logits, sample_slots, tables.slots, tables.token_counts)
        expected = torch.empty_like(sampled)
        reference.sample(logits, sample_slots, twin.slots, twin.token_counts, None, expected)
        assert torch.equal(sampled, expected) and tables.equal(twin)
        assert torch.equal(logits.view(torch.int16), before.view(torch.int16))


def test_the_twin_draws_what_float64_says() -> None:
    """Every parameter, alone and together, against a computation that shares nothing with it."""
    rng = random.Random(7)
    torch.manual_seed(7)
    num_certain, drawn = 0, set[int]()
    for _ in range(600):
        vocab_size = rng.choice([2, 5, 17, 64, 300])
        row = random_update(rng, 0, vocab_size)
        row.temperature = rng.choice([0.0, 0.3, 1.0, 1.7])
        logits = torch.randn(1, vocab_size) * rng.choice([0.5, 1.0, 5.0])
        tables = tables_of([row], vocab_size)
        sampled = torch.empty(1, dtype=torch.int32)
        slots = torch.zeros(1, dtype=torch.int32)
        reference.sample(logits, slots, tables.slots, tables.token_counts, None, sampled)
        possible = possible_tokens(logits[0].double().numpy(), row)
        assert int(sampled) in possible, row
        num_certain += len(possible) == 1
        drawn.add(int(sampled))
    assert num_certain > 580 and len(drawn) > 100


def test_the_draw_is_the_published_generator_s() -> None:
    """Counter and key 0: the first of Random123's known answers, its second word the high one."""
    assert uniform(0, 0, 0) == 0xE169C58D6627E8D5 / 2**64
    for vocab_size in (10, 1000, 4096):
        expected = 0xE169C58D6627E8D5 * vocab_size >> 64
        row = SlotUpdate(slot=0, temperature=1.0)
        assert sample(torch.zeros(vocab_size), row) == [expected]


def test_weights_are_exp() -> None:
    x = torch.linspace(-16, 0, 100_001)
    exact = torch.exp(x.double()) * reference.WEIGHT_SCALE
    error = (reference.quantized_exp(x).double() - exact).abs()
    assert (error <= exact * 3e-7 + 0.5).all()
    assert reference.quantized_exp(torch.tensor([0.0, -30.0, -1e30, -INF])).tolist() == [
        reference.WEIGHT_SCALE,
        0.0,
        0.0,
        0.0,
    ]


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    for vocab_size in (3, 70, 1000):
        logits = torch.zeros(vocab_size)
        logits[[vocab_size // 2, vocab_size - 1]] = 2.0
        assert sample(logits, SlotUpdate(slot=0)) == [vocab_size // 2]
    assert sample(torch.tensor([-0.0, 0.0]), SlotUpdate(slot=0)) == [0]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_logits_fail_their_row_alone(bad: float) -> None:
    for vocab_size in (5, 64, 333):
        for position in (0, vocab_size // 2, vocab_size - 1):
            logits = torch.randn(3, vocab_size)
            logits[1, position] = bad
            updates = [SlotUpdate(slot=i, temperature=0.5 * i, last_token=3) for i in range(3)]
            tables = tables_of(updates, vocab_size)
            ids = torch.arange(3, dtype=torch.int32)
            sampled = ops.sample(logits, ids, tables.slots, tables.token_counts)
            assert sampled[1] == -1 and (sampled[[0, 2]] >= 0).all()
            assert tables.slots[1, layout.SLOT_LAST_TOKEN] == 0


def test_nothing_left_is_an_error_and_minus_inf_is_not() -> None:
    logits = torch.full((40,), -INF)
    assert sample(logits, SlotUpdate(slot=0, temperature=1.0)) == [-1]
    logits[7] = -1e30
    assert sample(logits, SlotUpdate(slot=0, temperature=1.0), 5) == [7] * 5
    only = SlotUpdate(slot=0, min_total_len=9, stop_ids=[7])
    assert sample(logits, only) == [-1]


def test_the_draw_follows_the_softmax() -> None:
    """Chi-square at 3,000 draws over 12 tokens, far from both tails for this fixed seed."""
    torch.manual_seed(0)
    logits = torch.randn(12) * 1.5
    for temperature in (0.6, 1.0, 1.5):
        drawn = sample(logits, SlotUpdate(slot=0, temperature=temperature, seed=5), 3000)
        observed = torch.bincount(torch.tensor(drawn), minlength=12)
        expected = (logits / temperature).softmax(0) * 3000
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert 1.6 < chi_square < 31.3  # 0.1 % and 99.9 % quantiles at 11 degrees of freedom


def test_seed_sample_index_and_position_make_the_draw() -> None:
    logits = torch.zeros(1000)

    def draws(**fields: Any) -> list[int]:
        return sample(logits, SlotUpdate(slot=0, temperature=1.0, **fields), 8)

    base = draws(seed=1)
    assert base == draws(seed=1) and len(set(base)) > 4
    assert base[3:] == draws(seed=1, num_computed=3)[:-3]
    others = [draws(seed=2), draws(seed=1 + 2**32), draws(seed=1, sample_index=1), draws(seed=-1)]
    assert all(other != base for other in others)


def support(logits: Tensor, update: SlotUpdate) -> set[int]:
    return set(sample(logits, update, 400))


def test_top_k() -> None:
    logits = torch.randn(500).round()  # many ties: the lowest ids of equal logits stay
    order = torch.sort(logits, descending=True, stable=True).indices.tolist()
    for k in (1, 3, 10):
        drawn = support(logits, SlotUpdate(slot=0, temperature=2.0, top_k=k))
        assert drawn == set(order[:k])


def test_top_p_keeps_the_smallest_set() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    for top_p, kept in ((0.39, {1}), (0.41, {1, 3}), (0.66, {1, 3, 4}), (0.86, {0, 1, 3, 4})):
        update = SlotUpdate(slot=0, temperature=1.0, top_p=top_p)
        assert support(probabilities.log(), update) == kept


def test_top_p_ends_where_the_mass_is_reached_exactly() -> None:
    for top_p, num_kept in ((0.25, 1), (0.5, 2), (0.75, 3)):
        update = SlotUpdate(slot=0, temperature=1.0, top_p=top_p)
        assert support(torch.zeros(4), update) == set(range(num_kept))


def test_min_p() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    for min_p, kept in ((0.7, {1}), (0.6, {1, 3}), (0.2, {0, 1, 3, 4}), (0.1, {0, 1, 2, 3, 4})):
        update = SlotUpdate(slot=0, temperature=1.0, min_p=min_p)
        assert support(probabilities.log(), update) == kept


def test_top_p_works_on_what_top_k_left() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    update = SlotUpdate(slot=0, temperature=1.0, top_k=2, top_p=0.6)  # 0.4 of 0.65 is 0.62
    assert support(probabilities.log(), update) == {1}


def test_logit_bias_and_min_tokens() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, 2.5])
    assert sample(logits, SlotUpdate(slot=0, bias={1: 1.5})) == [1]
    banned = SlotUpdate(slot=0, num_computed=4, min_total_len=6, stop_ids=[2, 3])
    assert sample(logits, banned, 3) == [1, 1, 2]
    # The ban comes after the bias.
    banned.bias = {2: 100.0}
    assert sample(logits, banned, 1) == [1]


def test_penalties() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0, -1.2])

    def greedy(**fields: object) -> int:
        update = SlotUpdate(slot=0, has_penalties=1, **fields)  # type: ignore[arg-type]
        return sample(logits, update)[0]

    assert greedy(repetition_penalty=1.5, prompt=[0]) == 1
    assert greedy(repetition_penalty=1.5, output=[0]) == 1
    assert greedy(presence_penalty=1.0, prompt=[0]) == 0  # counts the output only
    assert greedy(presence_penalty=0.6, output=[0]) == 1
    assert greedy(frequency_penalty=0.2, output=[0, 0]) == 0
    assert greedy(frequency_penalty=0.2, output=[0, 0, 0]) == 1
    assert greedy(repetition_penalty=2.0, output=[0, 1, 2]) == 0  # 1.0, 0.75, -2.0, -1.2
    logits = torch.tensor([-1.0, -1.2])  # a negative logit is multiplied: it must fall
    assert greedy(repetition_penalty=1.1, output=[0]) == 0
    assert greedy(repetition_penalty=1.3, output=[0]) == 1
    assert greedy(repetition_penalty=0.5, output=[1]) == 1  # below 1 it helps


def test_a_drawn_token_is_counted() -> None:
    update = SlotUpdate(slot=0, has_penalties=1, frequency_penalty=1.0)
    drawn = sample(torch.tensor([3.0, 2.5, 0.0]), update, 4)
    assert drawn == [0, 1, 0, 1]


@pytest.mark.parametrize("mark", [0, layout.IN_PROMPT], ids=["output", "prompt"])
def test_a_full_count_stays_what_it_is(mark: int) -> None:
    """One more would read as a token of the prompt."""
    for function in (ops.sample, sample_by_twin):
        tables = tables_of([SlotUpdate(slot=0, has_penalties=1, presence_penalty=0.1)], 3)
        full = layout.MAX_TOKEN_COUNT + mark
        tables.token_counts[0] = torch.tensor([5, full - 1, 0], dtype=torch.int16)
        for _ in range(3):
            drawn = function(
                torch.tensor([[0.0, 9.0, 0.0]]),
                torch.zeros(1, dtype=torch.int32),
                tables.slots,
                tables.token_counts,
            )
            assert int(drawn) == 1
        assert tables.token_counts[0].tolist() == [5, full, 0]


def sample_by_twin(logits: Tensor, slot: Tensor, slots: Tensor, token_counts: Tensor) -> Tensor:
    sampled = torch.empty(1, dtype=torch.int32)
    reference.sample(logits, slot, slots, token_counts, None, sampled)
    return sampled


def test_batch_mates_threads_and_strides_change_nothing() -> None:
    rng = random.Random(3)
    updates = [random_update(rng, slot, 3000) for slot in range(40)]
    logits = torch.randn(40, 3000) * 3
    alone = [sample(logits[i], updates[i])[0] for i in range(40)]
    before = torch.get_num_threads()
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        tables = tables_of(updates, 3000)
        rows = torch.stack((torch.zeros(40), torch.arange(40)), 1).int()
        wide = torch.randn(40, 3100)
        wide[:, 50:3050] = logits
        sampled = ops.sample(wide[:, 50:3050], rows[:, 1], tables.slots, tables.token_counts)
        assert sampled.tolist() == alone
        assert (tables.slots[:40, layout.SLOT_LAST_TOKEN] == sampled).all()
    torch.set_num_threads(before)


def test_refusals() -> None:
    tables = tables_of([SlotUpdate(slot=0)], 10)
    one = torch.zeros(1, dtype=torch.int32)
    for slot in (2, -2, 2**31 - 1):
        with pytest.raises(RuntimeError, match=f"slot {slot} of 2"):
            ops.sample(torch.zeros(1, 10), one + slot, tables.slots, tables.token_counts)
    with pytest.raises(RuntimeError, match="size 1 of token_counts is 10, expected 11"):
        ops.sample(torch.zeros(1, 11), one, tables.slots, tables.token_counts)
    with pytest.raises(RuntimeError, match="a vocabulary of 600000, at most 524288"):
        ops.sample(torch.zeros(1, 600_000), one, tables.slots, tables.token_counts)
    tables.slots[0, layout.SLOT_NUM_BIAS] = 301
    with pytest.raises(RuntimeError, match="a slot has 301 biases"):
        ops.sample(torch.zeros(1, 10), one, tables.slots, tables.token_counts)
    tables.slots[0, layout.SLOT_NUM_BIAS] = 1
    tables.slots[0, layout.SLOT_BIAS_IDS] = 10
    with pytest.raises(RuntimeError, match="a slot holds token id 10, the vocabulary 10"):
        ops.sample(torch.zeros(1, 10), one, tables.slots, tables.token_counts)
