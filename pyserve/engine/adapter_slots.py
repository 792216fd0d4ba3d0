"""Which adapter lies in which slot of the device, and which of them may go.

The adapters of running sequences are held: so a step has at most as many different ones as there
are slots. An adapter that nobody runs stays where it is until its slot is wanted for another, the
one that was used longest ago first. Only bookkeeping: whoever executes a step puts the adapters of
`Step.adapter_loads` into their slots before it runs.
"""

from __future__ import annotations

from collections import OrderedDict

from pyserve.client import Adapter


class AdapterSlots:
    """Hands out `num_slots` slots to versions of adapters."""

    def __init__(self, num_slots: int = 0) -> None:
        self.num_slots = num_slots
        self.num_loads = 0
        self._slot_of: dict[int, int] = {}  # by version
        self._adapter_in: list[Adapter | None] = [None] * num_slots
        self._num_running = [0] * num_slots  # sequences
        # Those that nobody runs, the one that was used longest ago first.
        self._unused: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_slots))
        self._wants_load: set[int] = set()  # versions whose load has failed

    @property
    def num_used(self) -> int:
        """Slots whose adapters run."""
        return self.num_slots - len(self._unused)

    @property
    def running(self) -> list[str]:
        """Names of the adapters that run, in order."""
        slots = (slot for slot, count in enumerate(self._num_running) if count)
        names = {adapter.name for slot in slots if (adapter := self._adapter_in[slot]) is not None}
        return sorted(names)

    def has_room(self, adapter: Adapter) -> bool:
        """Whether a sequence that uses it may run beside those that do."""
        return bool(self._unused) or adapter.version in self._slot_of

    def hold(self, adapter: Adapter) -> tuple[int, bool]:
        """The slot of a sequence that begins to run, and whether the adapter is to be put there.

        There must be room.
        """
        slot = self._slot_of.get(adapter.version)
        has_to_load = adapter.version in self._wants_load
        if slot is None:
            slot = next(iter(self._unused))
            self._forget(slot)
            self._slot_of[adapter.version] = slot
            self._adapter_in[slot] = adapter.without_weights()
            has_to_load = True
        self._unused.pop(slot, None)
        self._num_running[slot] += 1
        self._wants_load.discard(adapter.version)
        self.num_loads += has_to_load
        return slot, has_to_load

    def let_go(self, slot: int) -> None:
        """A sequence that held `slot` does not run any more."""
        self._num_running[slot] -= 1
        if not self._num_running[slot]:
            self._unused[slot] = None

    def reload(self, adapter: Adapter) -> None:
        """What was to be put into its slot may not be there: whoever runs it next puts it again."""
        if adapter.version in self._slot_of:
            self._wants_load.add(adapter.version)

    def forget_all(self) -> None:
        """What lies in the slots is gone. Nothing runs."""
        assert not self.num_used, "an adapter is used"
        for slot in range(self.num_slots):
            self._forget(slot)

    def check_invariants(self, held: list[tuple[int, Adapter]]) -> None:
        """Assert that `held`, slot and adapter of each running sequence, is all there is. For
        tests."""
        counts = [0] * self.num_slots
        for slot, adapter in held:
            counts[slot] += 1
            assert self._slot_of[adapter.version] == slot, "two versions in one slot"
        assert counts == self._num_running, "adapter slots"
        assert set(self._unused) == {slot for slot, count in enumerate(counts) if not count}
        versions = [it.version for it in self._adapter_in if it is not None]
        assert sorted(versions) == sorted(self._slot_of)
        assert self._wants_load <= self._slot_of.keys()

    def _forget(self, slot: int) -> None:
        adapter = self._adapter_in[slot]
        if adapter is not None:
            del self._slot_of[adapter.version]
            self._wants_load.discard(adapter.version)
            self._adapter_in[slot] = None
