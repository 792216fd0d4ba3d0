"""sample on CUDA: bit for bit the twin, which runs on the CPU."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import reference, sample_workspace
from pyserve.ops import step_layout as layout
from tests.ops.step_inputs import SlotUpdate, Tables
from tests.ops.test_sample import random_logits, random_update, tables_of

pytestmark = pytest.mark.gpu

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.bfloat16, torch.float16)


def sample_on_cuda(logits: Tensor, slot_ids: Tensor, tables: Tables) -> tuple[Tensor, Tables]:
    """Tokens and tables after the op; `logits` and `slot_ids` may be views of anything."""
    device = torch.device("cuda")
    after = Tables(
        tables.slots.to(device),
        tables.block_table,
        tables.token_counts.to(device),
        tables.block_size,
    )
    workspace = sample_workspace.allocate(len(slot_ids), logits.shape[1], device=device)
    workspace.fill_(-1)
    sampled = torch.full((len(slot_ids),), 77, dtype=torch.int32, device=device)
    ops.sample(logits, slot_ids, after.slots, after.token_counts, workspace=workspace, out=sampled)
    slots, counts = after.slots.cpu(), after.token_counts.cpu()
    return sampled.cpu(), Tables(slots, tables.block_table, counts, tables.block_size)


def check(logits: Tensor, slot_ids: list[int], tables: Tables) -> Tensor:
    """The op on CUDA tensors equals the twin; logits on the device, any strides."""
    ids = torch.tensor([[slot, 99_999] for slot in slot_ids], dtype=torch.int32, device="cuda")
    before = logits.clone()
    sampled, after = sample_on_cuda(logits, ids[:, 0], tables)
    twin, expected = tables.clone(), torch.empty_like(sampled)
    cpu_ids = torch.tensor(slot_ids, dtype=torch.int32)
    reference.sample(logits.cpu(), cpu_ids, twin.slots, twin.token_counts, None, expected)
    assert sampled.tolist() == expected.tolist()
    assert after.equal(twin)
    assert torch.equal(logits.view(torch.int16), before.view(torch.int16))
    return sampled


def strided(rng: random.Random, logits: Tensor) -> Tensor:
    """The same values on the device, rows some elements apart, not always aligned."""
    num_rows, vocab_size = logits.shape
    offset, gap = rng.choice([0, 0, 1, 3]), rng.choice([0, 8, 5])
    wide = torch.randn(num_rows, vocab_size + offset + gap, device="cuda").to(logits.dtype)
    view = wide[:, offset : offset + vocab_size]
    view.copy_(logits)
    return view


def random_case(rng: random.Random, vocab_size: int, num_rows: int) -> None:
    slots = range(num_rows + 2)
    updates = [random_update(rng, slot, vocab_size) for slot in slots]
    for update in updates:
        if rng.random() < 0.35:  # a plain one
            update.has_penalties, update.bias, update.stop_ids = 0, {}, []
        elif rng.random() < 0.1:
            ids = [rng.randrange(vocab_size) for _ in range(300)]
            update.bias = {i: rng.uniform(-5, 5) for i in ids}
            update.stop_ids = [rng.randrange(vocab_size) for _ in range(64)]
    logits = random_logits(rng, (num_rows, vocab_size)).to(rng.choice(DTYPES))
    slot_ids = rng.sample(slots, num_rows)
    if rng.random() < 0.3:
        slot_ids[rng.randrange(num_rows)] = -1
    check(strided(rng, logits), slot_ids, tables_of(updates, vocab_size))


@pytest.mark.parametrize("seed", range(4))
def test_bit_for_bit_the_twin(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        random_case(rng, rng.choice([1, 5, 17, 64, 100, 1000, 4096, 4099]), rng.choice([1, 2, 5]))


@pytest.mark.parametrize("seed", range(4))
def test_rows_shared_by_several_ctas(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(10):
        random_case(rng, rng.choice([8192, 8193, 20_001, 40_000, 128_256]), rng.choice([1, 2, 5]))


@pytest.mark.parametrize("num_rows", [64, 133, 300])
def test_mixed_batches(num_rows: int) -> None:
    torch.manual_seed(0)
    random_case(random.Random(num_rows), 9001, num_rows)


def test_largest_vocabulary() -> None:
    torch.manual_seed(0)
    updates = [
        SlotUpdate(slot=0, temperature=1.0, seed=1),
        SlotUpdate(slot=1, temperature=1.0, top_p=0.9, seed=2),
        SlotUpdate(slot=2, temperature=1.0, top_k=50, top_p=0.9, seed=3),
        SlotUpdate(slot=3, temperature=0.7, top_k=3000, min_p=0.01, seed=4),
        SlotUpdate(slot=4, bias={524_287: 50.0}),
    ]
    logits = torch.randn(5, 524_288, device="cuda").bfloat16()
    sampled = check(logits, list(range(5)), tables_of(updates, 524_288))
    assert sampled[4] == 524_287


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits(dtype: torch.dtype) -> None:
    """Lists overflow: thresholds must come from the radix selection, ties by id."""
    updates = [
        SlotUpdate(slot=0, temperature=1.0, top_k=50, seed=1),
        SlotUpdate(slot=1, temperature=1.0, top_p=0.3, seed=2),
        SlotUpdate(slot=2, temperature=1.0, top_k=7000, top_p=0.5, min_p=0.1, seed=3),
        SlotUpdate(slot=3, temperature=1.0, seed=4),
        SlotUpdate(slot=4),
        SlotUpdate(slot=5, temperature=1.0, top_k=992, top_p=0.99, seed=5),
    ]
    for draw in range(3):
        for update in updates:
            update.num_computed = draw
        tables = tables_of(updates, 20_000)
        sampled = check(torch.zeros(6, 20_000, dtype=dtype, device="cuda"), [*range(6)], tables)
        assert sampled[0] < 50 and sampled[1] <= 6000 and sampled[2] < 3500 and sampled[4] == 0
        ties = (torch.randn(6, 20_000, device="cuda") * 2).round().to(dtype)
        check(ties, [*range(6)], tables)


def shaped_logits(shape: str, num_rows: int, vocab_size: int) -> Tensor:
    """Rows for top-p alone: what is in the nucleus, and how many weigh what the last of it does."""
    noise = torch.randn(num_rows, vocab_size, device="cuda")
    if shape == "two values":  # of which one or the other is at the threshold
        return torch.where(torch.rand_like(noise) < 0.3, 3.0, 0.0)
    if shape == "few huge":
        noise[:, ::4001] += 12.0
        return noise
    if shape == "few finite":
        return noise.masked_fill(torch.rand_like(noise) > 0.002, -INF)
    scale = {"flat": 1.0, "flatter": 0.1, "flattest": 0.001, "equal": 0.0, "peaked": 4.0}
    return noise * scale[shape] if shape in scale else (noise * 2).round()


@pytest.mark.parametrize("num_rows", [1, 6, 140])
@pytest.mark.parametrize(
    "shape",
    ["flat", "flatter", "flattest", "equal", "peaked", "ties", "two values", "few huge",
     "few finite"],
)  # fmt: skip
def test_top_p_alone(shape: str, num_rows: int) -> None:
    vocab_size = 20_000 if num_rows > 6 else 128_256
    top_ps = [0.9, 0.1, 0.999, 0.5, 0.9999999, 0.01, 0.7]
    for draw, dtype in enumerate(DTYPES):
        torch.manual_seed(draw)
        logits = shaped_logits(shape, num_rows, vocab_size).to(dtype)
        updates = [
            SlotUpdate(
                slot=row, temperature=(1.0, 0.6, 1.7)[row % 3], top_p=top_ps[(row + draw) % 7],
                min_p=0.02 * (row % 5 == 4), seed=row, num_computed=draw,
            )
            for row in range(num_rows)
        ]  # fmt: skip
        check(logits, [*range(num_rows)], tables_of(updates, vocab_size))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_logits_fail_their_row_alone(bad: float) -> None:
    for position in (0, 10_000, 19_999):
        logits = torch.randn(3, 20_000, device="cuda").bfloat16()
        logits[1, position] = bad
        updates = [SlotUpdate(slot=i, temperature=0.5 * i, last_token=3) for i in range(3)]
        sampled = check(logits, [0, 1, 2], tables_of(updates, 20_000))
        assert sampled[1] == -1 and (sampled[[0, 2]] >= 0).all()


def test_nothing_left_is_an_error_and_minus_inf_is_not() -> None:
    updates = [SlotUpdate(slot=0, temperature=1.0, top_k=3), SlotUpdate(slot=1)]
    logits = torch.full((2, 9000), -INF, device="cuda").bfloat16()
    assert check(logits, [0, 1], tables_of(updates, 9000)).tolist() == [-1, -1]
    logits[:, 7000] = -1e30
    assert check(logits, [0, 1], tables_of(updates, 9000)).tolist() == [7000, 7000]


def test_the_draw_follows_the_softmax() -> None:
    """Chi-square at 3,000 draws over 12 tokens, far from both tails for this fixed seed."""
    torch.manual_seed(0)
    logits = (torch.randn(12) * 1.5).bfloat16()
    for temperature in (0.6, 1.0, 1.5):
        updates = [
            SlotUpdate(slot=slot, num_computed=slot, temperature=temperature, seed=5)
            for slot in range(3000)
        ]
        ids = torch.arange(3000, dtype=torch.int32, device="cuda")
        drawn, _ = sample_on_cuda(logits.cuda().repeat(3000, 1), ids, tables_of(updates, 12))
        observed = torch.bincount(drawn, minlength=12)
        expected = (logits.float() / temperature).softmax(0) * 3000
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert 1.6 < chi_square < 31.3  # 0.1 % and 99.9 % quantiles at 11 degrees of freedom


def test_batch_mates_change_nothing() -> None:
    rng = random.Random(3)
    updates = [random_update(rng, slot, 40_000) for slot in range(140)]
    logits = (torch.randn(140, 40_000, device="cuda") * 3).bfloat16()
    ids = torch.arange(140, dtype=torch.int32, device="cuda")
    tables = tables_of(updates, 40_000)
    together, _ = sample_on_cuda(logits, ids, tables)
    for rows in (slice(0, 1), slice(7, 12), slice(100, 140)):
        sampled, _ = sample_on_cuda(logits[rows], ids[rows], tables)
        assert torch.equal(sampled, together[rows])


def test_a_graph_replays_it() -> None:
    updates = [SlotUpdate(slot=i, temperature=1.0, top_p=0.9, seed=i) for i in range(4)]
    tables = tables_of(updates, 20_000)
    logits = torch.randn(4, 20_000, device="cuda").bfloat16()
    ids = torch.arange(4, dtype=torch.int32, device="cuda")
    slots, counts = tables.slots.cuda(), tables.token_counts.cuda()
    workspace = sample_workspace.allocate(4, 20_000, device=ids.device)
    ops.sample(logits, ids, slots, counts, workspace=workspace)
    out = torch.empty_like(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.sample(logits, ids, slots, counts, workspace=workspace, out=out)
    for position in range(3):
        slots[:, layout.SLOT_NUM_COMPUTED] = position
        graph.replay()
        tables.slots[:, layout.SLOT_NUM_COMPUTED] = position
        expected, _ = sample_on_cuda(logits, ids, tables)
        assert torch.equal(out.cpu(), expected)


def test_refusals() -> None:
    tables = tables_of([SlotUpdate(slot=0)], 10)
    slots, counts = tables.slots.cuda(), tables.token_counts.cuda()
    ids = torch.zeros(1, dtype=torch.int32, device="cuda")
    logits = torch.zeros(1, 10, device="cuda").bfloat16()
    with pytest.raises(RuntimeError, match="needs a workspace"):
        ops.sample(logits, ids, slots, counts)
    workspace = sample_workspace.allocate(1, 10, device=ids.device)
    with pytest.raises(RuntimeError, match="a workspace of"):
        ops.sample(logits, ids, slots, counts, workspace=workspace[:-1])
    with pytest.raises(RuntimeError, match="logits must be bfloat16 or float16"):
        ops.sample(logits.float(), ids, slots, counts, workspace=workspace)
    with pytest.raises(RuntimeError, match="size 1 of token_counts is 10, expected 11"):
        ops.sample(
            torch.zeros(1, 11, device="cuda").bfloat16(), ids, slots, counts, workspace=workspace
        )
