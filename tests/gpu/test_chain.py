"""A step's last kernels, each started while the one before it runs, as the same kernels one by one:
equal bit for bit. What is said of a kernel that waits too late is seen here, if at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import sample_workspace
from pyserve.ops import step_layout as layout

VOCAB_SIZE, HIDDEN, NUM_ROUNDS = 32064, 512, 12


@dataclass
class Samplings:
    """What a sampling of `num_rows` masked rows reads and writes, at addresses that stay."""

    hidden: Tensor
    head: Tensor
    mask: Tensor
    rows: Tensor
    logits: Tensor
    raw_logits: Tensor
    slots: Tensor
    counts: Tensor
    sampled: Tensor
    told: Tensor
    told_raw: Tensor

    @classmethod
    def make(cls, num_rows: int) -> Samplings:
        def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device="cuda")

        slots = zeros(num_rows, layout.SLOT_WORDS, dtype=torch.int32)
        reals = slots.view(torch.float32)
        reals[:, [layout.SLOT_TOP_P, layout.SLOT_REPETITION_PENALTY]] = 1.0
        reals[1::2, layout.SLOT_TEMPERATURE] = 0.8  # the others are greedy
        slots[:, layout.SLOT_SEED_LOW] = torch.arange(num_rows, dtype=torch.int32)
        return cls(
            hidden=zeros(num_rows, HIDDEN),
            head=torch.randn(VOCAB_SIZE, HIDDEN, device="cuda").bfloat16() / 8,
            mask=zeros(num_rows, VOCAB_SIZE // 32, dtype=torch.int32),
            rows=torch.arange(num_rows, dtype=torch.int32, device="cuda").flip(0).contiguous(),
            logits=zeros(num_rows, VOCAB_SIZE),
            raw_logits=zeros(num_rows, VOCAB_SIZE),
            slots=slots,
            counts=zeros(num_rows, VOCAB_SIZE, dtype=torch.int16),
            sampled=zeros(num_rows, dtype=torch.int32),
            told=zeros(num_rows, ops.LOGPROB_WORDS, dtype=torch.int32),
            told_raw=zeros(num_rows, ops.LOGPROB_WORDS, dtype=torch.int32),
        )

    def calls(self) -> list[Callable[[], object]]:
        """In a step's order; a copy of torch's stands between two of them, as it may there."""
        ids = torch.arange(len(self.rows), dtype=torch.int32, device="cuda")
        workspace = sample_workspace.allocate(len(ids), VOCAB_SIZE, device=ids.device)
        told, told_raw = ops.LogprobRows.of(self.told), ops.LogprobRows.of(self.told_raw)
        return [
            lambda: torch.ops.pyserve.linear(self.hidden, self.head, None, self.logits),
            lambda: self.raw_logits.copy_(self.logits),
            lambda: torch.ops.pyserve.linear(self.hidden, self.head, None, self.logits),
            lambda: ops.apply_bitmask(self.logits, self.mask, self.rows),
            lambda: ops.sample(
                self.logits, ids, self.slots, self.counts, workspace=workspace, out=self.sampled
            ),
            lambda: ops.logprobs(self.logits, self.rows, self.sampled, told),
            lambda: ops.logprobs(self.raw_logits, self.rows, self.sampled, told_raw),
        ]

    def set_round(self, index: int, slots: Tensor) -> None:
        """Other inputs in each round, and garbage where results go."""
        generator = torch.Generator("cuda").manual_seed(index)
        self.hidden.normal_(generator=generator)
        self.mask.random_(-(2**31), 2**31 - 1, generator=generator)
        self.slots.copy_(slots)
        self.counts.zero_()
        for poisoned in (self.logits, self.raw_logits):
            poisoned.fill_(torch.nan)
        for poisoned in (self.sampled, self.told, self.told_raw):
            poisoned.fill_(77)

    def bits(self) -> dict[str, Tensor]:
        return {
            field.name: getattr(self, field.name).clone().view(torch.uint8)
            for field in fields(self)
        }


@pytest.mark.parametrize("num_rows", [1, 8, 33])
def test_masked_and_told_in_a_chain_as_one_by_one(num_rows: int) -> None:
    torch.manual_seed(0)
    samplings = Samplings.make(num_rows)
    calls, slots = samplings.calls(), samplings.slots.clone()
    expected = []
    for index in range(NUM_ROUNDS):
        samplings.set_round(index, slots)
        for call in calls:
            call()
            torch.cuda.synchronize()
        expected.append(samplings.bits())
    assert len({tuple(bits["sampled"].tolist()) for bits in expected}) > 1
    assert bool((samplings.logits == -torch.inf).any() & samplings.logits.isfinite().any())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for run in (graph.replay, lambda: [call() for call in calls]):
        for index in range(NUM_ROUNDS):
            samplings.set_round(index, slots)
            run()
            for name, bits in samplings.bits().items():
                assert torch.equal(bits, expected[index][name]), (index, name)
