"""Whose turn it is: random queues against the rule, written down a second time."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest

from pyserve.engine.sequence import Sequence
from pyserve.engine.waiting import WaitingQueue


class Waiting:
    """What the queue looks at of a sequence."""

    def __init__(self, user: str, priority: int, arrival: int) -> None:
        self.user = user
        self.order = (priority, arrival)


def make(rng: random.Random, arrival: int) -> Sequence:
    fake: Any = Waiting(rng.choice("aaaabc"), rng.randrange(2), arrival)
    return cast(Sequence, fake)


def expected(waiting: list[Sequence], num_running: dict[str, int]) -> Sequence:
    """Of each user the first by its order; of these the one by priority, fewest running, age."""
    firsts = [min((s for s in waiting if s.user == user), key=lambda s: s.order)
              for user in {s.user for s in waiting}]  # fmt: skip
    return min(firsts, key=lambda s: (s.order[0], num_running.get(s.user, 0), s.order[1]))


@pytest.mark.parametrize("seed", range(20))
def test_in_turn(seed: int) -> None:
    rng = random.Random(seed)
    queue, waiting = WaitingQueue(), []
    for arrival in rng.sample(range(1000), 60):
        seq = make(rng, arrival)
        queue.add(seq)
        waiting.append(seq)
    assert list(queue) == sorted(waiting, key=lambda seq: seq.order) and len(queue) == 60
    num_running = {"a": rng.randrange(5), "b": rng.randrange(5)}
    left = list(waiting)  # less those that were taken or passed
    for seq in queue.in_turn(num_running):
        assert seq is expected(left, num_running)
        left.remove(seq)
        if rng.random() < 0.6:
            queue.remove(seq)
            waiting.remove(seq)
            num_running[seq.user] = num_running.get(seq.user, 0) + 1
    assert left == []
    assert list(queue) == sorted(waiting, key=lambda seq: seq.order) and len(queue) == len(waiting)
    queue.clear()
    assert not queue and list(queue.in_turn({})) == []
