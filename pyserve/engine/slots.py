"""Slots: rows of device state, one per running sequence.

The host assigns slots and writes one update record when a sequence enters a slot. From then on the
device itself keeps its length, last token and penalty counts. A freed slot may be reused at once:
steps execute in order, and results are matched to sequences by generation. The layout of a slot is
in cuda/common/step.h.
"""

from __future__ import annotations

import struct
from array import array

from pyserve.engine.sequence import NO_SLOT, Sequence
from pyserve.ops import step_layout as layout

# The words of a slot update, then the header of the slot row; slot_update fills them in.
_RECORD_HEAD = struct.Struct("<4i 4i 3f i 3f q 3i")
assert _RECORD_HEAD.size == 4 * (layout.SLOT_UPDATE_WORDS + layout.SLOT_HEADER_WORDS)


class SlotAllocator:
    """Assigns `num_slots` slots; each assignment gets a new, never repeated generation."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._next_generation = 0

    @property
    def num_free(self) -> int:
        """Slots that no sequence is in."""
        return len(self._free)

    def allocate(self, seq: Sequence) -> None:
        """Put `seq` into a free slot; there must be one."""
        seq.slot = self._free.pop()
        seq.generation = self._next_generation
        self._next_generation += 1

    def release(self, seq: Sequence) -> None:
        """Take `seq` out of its slot; results of its steps in flight will be dropped."""
        self._free.append(seq.slot)
        seq.slot = NO_SLOT
        seq.generation = -1

    def check_invariants(self, running: list[Sequence]) -> None:
        """Assert that each slot is free or held by one running sequence. For tests."""
        held = [seq.slot for seq in running]
        assert sorted(held + self._free) == list(range(self.num_slots)), "slots"
        assert all(seq.generation >= 0 for seq in running)


def num_update_words(seq: Sequence) -> int:
    """Words of the record that `slot_update` makes for `seq`."""
    return (
        layout.SLOT_UPDATE_WORDS
        + layout.SLOT_HEADER_WORDS
        + 2 * len(seq.params.logit_bias)
        + len(seq.stop_token_ids)
        + (len(seq.token_ids) if seq.params.has_penalties else 0)
    )


def slot_update(seq: Sequence) -> bytes:
    """The update record that initialises the slot of `seq`, whose num_computed_tokens is set.

    It has `num_update_words(seq)` words of 4 bytes, laid out as in cuda/common/step.h.
    """
    params = seq.params
    num_output_tokens = len(seq.token_ids) - seq.num_prompt_tokens
    has_penalties = params.has_penalties
    head = _RECORD_HEAD.pack(
        num_update_words(seq),
        seq.slot,
        seq.num_prompt_tokens if has_penalties else 0,
        num_output_tokens if has_penalties else 0,
        seq.num_computed_tokens,
        -1,  # last token: none yet, as the host sends all tokens up to the first sampled one
        seq.num_prompt_tokens + params.min_tokens,
        has_penalties,
        params.temperature,
        params.top_p,
        params.min_p,
        params.top_k,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        seq.seed,
        params.sample_index,
        len(params.logit_bias),
        len(seq.stop_token_ids),
    )
    record = bytearray(head)
    if params.logit_bias:
        record += array("i", params.logit_bias.keys()).tobytes()
        record += array("f", params.logit_bias.values()).tobytes()
    record += array("i", sorted(seq.stop_token_ids)).tobytes()
    if has_penalties:
        record += array("i", seq.token_ids).tobytes()
    return bytes(record)
