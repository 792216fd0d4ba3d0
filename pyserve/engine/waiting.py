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
    """One sorted list a user; a user with nothing in it has none."""

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
        """Each once, as they are to be admitted: by priority, the fewest running, then age.

        num_running  user -> running sequences, absent: 0. It may change and a sequence that was
                     yielded be removed before the next is asked for; nothing else.
        """
        heap = [_turn(own[0], 0, num_running) for own in self._lists.values()]
        heapq.heapify(heap)
        while heap:
            *_, index, seq = heap[0]
            yield seq
            own = self._lists.get(seq.user, [])
            if index < len(own) and own[index] is seq:
                index += 1  # it stays, and is passed
            if index < len(own):
                heapq.heapreplace(heap, _turn(own[index], index, num_running))
            else:
                heapq.heappop(heap)


def _turn(
    seq: Sequence, index: int, num_running: Mapping[str, int]
) -> tuple[int, int, int, int, Sequence]:
    """Sorts whose turn it is; no two have the same arrival, so sequences are never compared."""
    priority, arrival = seq.order
    return priority, num_running.get(seq.user, 0), arrival, index, seq
