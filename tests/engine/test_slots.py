"""Slot update records, word by word, and slots that come and go."""

from __future__ import annotations

import struct

import pytest

from pyserve.client import SequenceStream
from pyserve.engine.sequence import NO_SLOT, Sequence
from pyserve.engine.slots import SlotAllocator, num_update_words, slot_update
from pyserve.ops import step_layout as layout
from pyserve.params import INT64_MIN, SamplingParams


def sequence(params: SamplingParams, token_ids: list[int], num_prompt_tokens: int) -> Sequence:
    return Sequence(
        stream=SequenceStream(0, num_prompt_tokens),
        params=params,
        token_ids=token_ids,
        num_prompt_tokens=num_prompt_tokens,
        max_total_tokens=num_prompt_tokens + params.max_tokens,
        order=(0, 0),
        seed=INT64_MIN + 5,
        stop_token_ids=frozenset(params.stop_token_ids),
        root_hash=b"",
        num_tokens=len(token_ids),
        slot=3,
        num_computed_tokens=2,
    )


def words(record: bytes, start: int, count: int) -> list[int]:
    return list(struct.unpack_from(f"<{count}i", record, 4 * start))


def floats(record: bytes, start: int, count: int) -> list[float]:
    return list(struct.unpack_from(f"<{count}f", record, 4 * start))


def test_a_plain_record() -> None:
    seq = sequence(SamplingParams(max_tokens=9, temperature=0.0), [7, 8, 9], 3)
    record = slot_update(seq)
    assert len(record) == 4 * num_update_words(seq) == 4 * 20
    assert words(record, 0, 8) == [20, 3, 0, 0, 2, -1, 3, 0]


def test_every_field_has_its_word() -> None:
    params = SamplingParams(
        max_tokens=9, temperature=0.5, top_p=0.25, min_p=0.125, top_k=40, repetition_penalty=1.5,
        presence_penalty=-0.5, frequency_penalty=0.75, sample_index=2, min_tokens=4,
        logit_bias={11: 2.5, 5: -3.0}, stop_token_ids=(31, 30),
    )  # fmt: skip
    seq = sequence(params, [7, 8, 9, 10, 11], 3)
    record = slot_update(seq)
    head = layout.SLOT_UPDATE_WORDS
    assert len(record) == 4 * num_update_words(seq)
    assert words(record, 0, head) == [20 + 4 + 2 + 5, 3, 3, 2]

    def word(offset: int) -> int:
        return words(record, head + offset, 1)[0]

    def real(offset: int) -> float:
        return floats(record, head + offset, 1)[0]

    assert word(layout.SLOT_NUM_COMPUTED) == 2
    assert word(layout.SLOT_LAST_TOKEN) == -1
    assert word(layout.SLOT_MIN_TOTAL_LEN) == 7
    assert word(layout.SLOT_HAS_PENALTIES) == 1
    assert real(layout.SLOT_TEMPERATURE) == 0.5
    assert real(layout.SLOT_TOP_P) == 0.25
    assert real(layout.SLOT_MIN_P) == 0.125
    assert word(layout.SLOT_TOP_K) == 40
    assert real(layout.SLOT_REPETITION_PENALTY) == 1.5
    assert real(layout.SLOT_PRESENCE_PENALTY) == -0.5
    assert real(layout.SLOT_FREQUENCY_PENALTY) == 0.75
    seed = (word(layout.SLOT_SEED_HIGH) << 32) + (word(layout.SLOT_SEED_LOW) & 0xFFFFFFFF)
    assert seed == INT64_MIN + 5
    assert word(layout.SLOT_SAMPLE_INDEX) == 2
    assert word(layout.SLOT_NUM_BIAS) == 2
    assert word(layout.SLOT_NUM_STOP) == 2
    at = head + layout.SLOT_HEADER_WORDS
    assert words(record, at, 2) == [11, 5]
    assert floats(record, at + 2, 2) == [2.5, -3.0]
    assert words(record, at + 4, 2) == [30, 31]
    assert words(record, at + 6, 5) == [7, 8, 9, 10, 11]


def test_a_generation_never_comes_again() -> None:
    slots = SlotAllocator(2)
    seqs = [sequence(SamplingParams(max_tokens=1), [1], 1) for _ in range(3)]
    slots.allocate(seqs[0])
    slots.allocate(seqs[1])
    assert slots.num_free == 0 and {seqs[0].slot, seqs[1].slot} == {0, 1}
    generations = {seqs[0].generation, seqs[1].generation}
    slots.release(seqs[0])
    assert seqs[0].slot == NO_SLOT and seqs[0].generation not in generations
    slots.allocate(seqs[2])
    assert seqs[2].slot != seqs[1].slot and seqs[2].generation not in generations
    slots.check_invariants(seqs[1:])
    with pytest.raises(AssertionError):
        slots.check_invariants(seqs[1:2])
