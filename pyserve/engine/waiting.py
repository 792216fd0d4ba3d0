"""WaitingQueue: the sequences that wait, and whose turn it is.

Among users, the one with the fewest running sequences is next, so that the slots are shared equally
however many sequences each user has queued. The sequences of one user are taken in their order, so
with a single user this is a plain queue.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from operator import attrgetter

from pyserve.engine.sequence import Sequence

_order = attrgetter("order")


class WaitingQueue:
    """Holds one list, sorted by Sequence.order, for each user with waiting sequences."""

    def __init__(self) -> None:
        self._lists: dict[str, list[Sequence]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences of all users, sorted by Sequence.order."""
        return iter(sorted((seq for own in self._lists.values() for seq in own), key=_order))

    def add(self, seq: Sequence) -> None:
        """Insert a sequence at its place among those of its user."""
        insort(self._lists.setdefault(seq.user, []), seq, key=_order)
        self._size += 1

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence, which must be in the queue."""
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

        num_running  user -> running sequences; 0 where the user is absent.

        While iterating, the caller may change num_running and remove the sequence that was yielded
        last; it must not change the queue in any other way.
        """
        heap = [_turn(own[0], 0, num_running) for own in self._lists.values()]
        heapq.heapify(heap)
        while heap:
            *_, index, seq = heap[0]
            yield seq
            own = self._lists.get(seq.user, [])
            if index < len(own) and own[index] is seq:
                index += 1  # `seq` was not admitted: go on with the user's next one
            if index < len(own):
                heapq.heapreplace(heap, _turn(own[index], index, num_running))
            else:
                heapq.heappop(heap)


def _turn(
    seq: Sequence, index: int, num_running: Mapping[str, int]
) -> tuple[int, int, int, int, Sequence]:
    """The sort key of a sequence in the order of admission. Arrivals are unique, so a comparison
    never reaches the last two entries, which only travel along."""
    priority, arrival = seq.order
    return priority, num_running.get(seq.user, 0), arrival, index, seq
