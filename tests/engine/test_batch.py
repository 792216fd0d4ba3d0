"""Packing a step, and how large a packed step can get."""

from __future__ import annotations

import numpy as np
import pytest

from pyserve.engine.batch import (
    MIN_UPDATE_WORDS,
    TILE_ROWS,
    Step,
    StepShape,
    max_step_words,
    max_update_words,
    pack,
    padded_size,
)
from pyserve.ops import step_layout as layout


def test_pack_passes_every_list_on() -> None:
    record = np.arange(20, dtype=np.int32)
    record[layout.SLOT_UPDATE_NUM_WORDS] = 20
    step = Step(
        row_slots=[4, 1],
        query_lens=[3, 1],
        host_tokens=[[7, 8, 9], None],
        row_samples=[False, True],
        block_updates=[4, 0, 6],
        slot_updates=[record.tobytes()],
        num_tokens=4,
    )
    buffer = np.full(100, -7, np.int32)
    num_words = pack(step, buffer)
    assert num_words == 16 + 2 * 4 + 3 + 3 + 20
    header = buffer[: layout.HEADER_WORDS]
    assert header[layout.HEADER_NUM_ROWS] == 2
    assert header[layout.HEADER_NUM_TOKENS] == 4
    assert header[layout.HEADER_NUM_SAMPLES] == 1
    assert header[layout.HEADER_MAX_QUERY_LEN] == 3
    assert buffer[16:24].tolist() == [4, 3, 0, 0, 1, 1, -1, 1]
    assert buffer[24:30].tolist() == [7, 8, 9, 4, 0, 6]
    assert buffer[30:50].tolist() == record.tolist()
    assert (buffer[num_words:] == -7).all()
    assert StepShape.of(buffer) == StepShape(4, num_rows=2, num_samples=1, max_query_len=3)
    assert step.shape == StepShape.of(buffer) and step.shape is step.shape  # worked out once


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 48), (65, 80), (128, 128), (129, 160),
     (500, 512), (600, 640), (1024, 1024), (1025, 1152), (1900, 1920), (1921, 2000)],
)  # fmt: skip
def test_padded_sizes(count: int, size: int) -> None:
    assert padded_size(count, 2000) == size


def test_padding_has_few_sizes_and_little_waste() -> None:
    sizes = [padded_size(count, 4096) for count in range(1, 4097)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 24 + 3 * 1024 // TILE_ROWS
    assert all(count <= size for count, size in enumerate(sizes, 1))
    assert all(size < 1.25 * count for count, size in enumerate(sizes, 1) if count > 64)
    assert all(size < count + TILE_ROWS for count, size in enumerate(sizes, 1))


def test_room_for_updates() -> None:
    assert max_update_words(128, 16) == MIN_UPDATE_WORDS
    # One sequence of 100,000 tokens with penalties: its record and 6,250 blocks.
    assert max_update_words(100_000, 16) == 4 + 680 + 100_000 + 3 * 6_250
    expected = 16 + 8 * (4 + 3) + 32 + MIN_UPDATE_WORDS
    assert max_step_words(32, 8, max_model_len=128, block_size=16) == expected
