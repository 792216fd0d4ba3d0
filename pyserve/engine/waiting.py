"""WaitingQueue: the sequences that wait, and whose turn it is.

Of several users the one with the fewest running sequences comes first, so that the slots are shared
equally, however many sequences each has queued. A user's own come in their order; one user alone
has a plain queue.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from operator import attrgetter

from pyserve.engine.sequence import Sequence

_order = attrgetter("order")


class WaitingQueue:
    """A sorted list for each user who has sequences in it."""

    def __init__(self) -> None:
        self._lists: dict[str, list[Sequence]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """All of them by their order, whoever they belong to."""
        return iter(sorted((seq for own in self._lists.values() for seq in own), key=_order))

    def add(self, seq: Sequence) -> None:
        insort(self._lists.setdefault(seq.user, []), seq, key=_order)
        self._size += 1

    def remove(self, seq: Sequence) -> None:
        own = self._lists[seq.user]
        index = bisect_left(own, seq.order, key=_order)
        assert own[index] is seq
        del own[index]
        self._size -= 1
        if not own:
            del self._lists[seq.user]

    def clear(self) -> None:
        self._lists.clear()
        self._size = 0

    def in_turn(self, num_running: Mapping[str, int]) -> Iterator[Sequence]:
        """All sequences in the order of admission: by priority, then by how few sequences of the
        same user run, then by age.

        num_running  user -> running sequences; 0 where the user is absent. Between two sequences
                     it may change, and the one that was yielded last may be removed; nothing else.
        """
        heap = [_turn(own[0], 0, num_running) for own in self._lists.values()]
        heapq.heapify(heap)
        while heap:
            *_, index, seq = heap[0]
            yield seq
            own = self._lists.get(seq.user, [])
            if index < len(own) and own[index] is seq:
                index += 1  # it was not admitted: the next of this user
            if index < len(own):
                heapq.heapreplace(heap, _turn(own[index], index, num_running))
            else:
                heapq.heappop(heap)


def _turn(
    seq: Sequence, index: int, num_running: Mapping[str, int]
) -> tuple[int, int, int, int, Sequence]:
    """The key of a sequence in the order of admission. No two sequences have the same arrival, so
    the comparison never comes to the last two entries."""
    priority, arrival = seq.order
    return priority, num_running.get(seq.user, 0), arrival, index, seq
