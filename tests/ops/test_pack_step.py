"""pack_step in C++ writes what its numpy twin writes, and refuses what it refuses."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from pyserve import ops
from pyserve.ops import reference
from tests.ops.step_inputs import SlotUpdate


def test_random_steps_equal_the_twin() -> None:
    rng = random.Random(0)
    for _ in range(100):
        num_rows = rng.randrange(6)
        host_tokens: list[list[int] | None] = [
            None if rng.random() < 0.4 else [rng.randrange(2**31) for _ in range(rng.randrange(9))]
            for _ in range(num_rows)
        ]
        step = (
            [rng.randrange(64) for _ in range(num_rows)],
            [1 if ids is None else len(ids) for ids in host_tokens],
            host_tokens,
            [rng.random() < 0.5 for _ in range(num_rows)],
            [rng.randrange(2**31) for _ in range(3 * rng.randrange(5))],
            [
                SlotUpdate(slot=i, prompt=[1] * rng.randrange(9)).pack()
                for i in range(rng.randrange(3))
            ],
            rng.choice([None, [0, 3], [2, 2, 5, 7]]),
        )
        mine, theirs = np.full((2, 512), 77, dtype=np.int32)
        num_words = ops.pack_step(mine, *step)
        assert num_words == reference.pack_step(theirs, *step)
        assert (mine == theirs).all() and (mine[num_words:] == 77).all()


@pytest.mark.parametrize("pack", [ops.pack_step, reference.pack_step])
def test_refusals(pack: Any) -> None:
    buffer = np.zeros(64, dtype=np.int32)
    with pytest.raises(ValueError, match="the step needs 120 words, the buffer has 64"):
        pack(buffer, [0], [100], [[1] * 100], [True], [], [])
    with pytest.raises(ValueError, match="query_len 2 is not the number of the row's tokens"):
        pack(buffer, [0], [2], [None], [True], [], [])
    with pytest.raises(ValueError, match="query_len 2 is not the number of the row's tokens"):
        pack(buffer, [0], [2], [[1]], [True], [], [])
    with pytest.raises(ValueError, match="differ in length"):
        pack(buffer, [0], [1], [[1]], [], [], [])
    with pytest.raises(ValueError, match="flat triples"):
        pack(buffer, [], [], [], [], [1, 2], [])
    with pytest.raises(ValueError, match="a slot update of 15 bytes"):
        pack(buffer, [], [], [], [], [], [bytes(15)])


def test_words_out_of_range_are_refused() -> None:
    buffer = np.zeros(64, dtype=np.int32)
    with pytest.raises(ValueError, match="token id 2147483648 is not an int32"):
        ops.pack_step(buffer, [0], [1], [[2**31]], [True], [], [])
    with pytest.raises(OverflowError):
        ops.pack_step(buffer, [0], [1], [[2**70]], [True], [], [])


def test_the_buffer_must_be_int32_words() -> None:
    with pytest.raises(ValueError, match="contiguous int32 vector"):
        ops.pack_step(np.zeros(64, dtype=np.int64), [], [], [], [], [], [])
    with pytest.raises(ValueError, match="contiguous int32 vector"):
        ops.pack_step(np.zeros(64, dtype=np.int32)[::2], [], [], [], [], [], [])
