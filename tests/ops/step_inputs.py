"""Slot updates and slot tables for the tests of plan_step, pack_step and sample."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyserve.ops import step_layout as layout


@dataclass
class SlotUpdate:
    """One slot update with neutral values; `pack` gives the record."""

    slot: int
    num_computed: int = 0
    last_token: int = -1
    min_total_len: int = 0
    has_penalties: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    sample_index: int = 0
    bias: dict[int, float] = field(default_factory=dict)
    stop_ids: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)

    def pack(self) -> bytes:
        low = self.seed & 0xFFFFFFFF
        header = struct.pack(
            "<4i3fi3f2I3i",
            self.num_computed,
            self.last_token,
            self.min_total_len,
            self.has_penalties,
            self.temperature,
            self.top_p,
            self.min_p,
            self.top_k,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            low,
            self.seed >> 32 & 0xFFFFFFFF,
            self.sample_index,
            len(self.bias),
            len(self.stop_ids),
        )
        ids = [*self.stop_ids, *self.prompt, *self.output]
        body = header + struct.pack(f"<{len(self.bias)}i", *self.bias)
        body += struct.pack(f"<{len(self.bias)}f", *self.bias.values())
        body += struct.pack(f"<{len(ids)}i", *ids)
        num_words = layout.SLOT_UPDATE_WORDS + len(body) // 4
        return struct.pack("<4i", num_words, self.slot, len(self.prompt), len(self.output)) + body


@dataclass
class Tables:
    """Device state of a few slots."""

    slots: Tensor
    block_table: Tensor
    token_counts: Tensor
    block_size: int

    @classmethod
    def make(
        cls, *, num_slots: int = 5, max_blocks: int = 8, vocab_size: int = 100, block_size: int = 4
    ) -> Tables:
        return cls(
            slots=torch.zeros(num_slots, layout.SLOT_WORDS, dtype=torch.int32),
            block_table=torch.zeros(num_slots, max_blocks, dtype=torch.int32),
            token_counts=torch.zeros(num_slots, vocab_size, dtype=torch.int16),
            block_size=block_size,
        )

    def clone(self) -> Tables:
        return Tables(
            self.slots.clone(),
            self.block_table.clone(),
            self.token_counts.clone(),
            self.block_size,
        )

    def equal(self, other: Tables) -> bool:
        return (
            torch.equal(self.slots, other.slots)
            and torch.equal(self.block_table, other.block_table)
            and torch.equal(self.token_counts, other.token_counts)
        )
