"""Which adapter version occupies which adapter slot of the device, and which may be evicted.

The slot of an adapter is held while a running sequence uses it, so a step never needs more adapters
than there are slots. An adapter that no running sequence uses stays in its slot until another one
needs the slot; the least recently used adapter is evicted first. This is bookkeeping only: the
runner copies the weights named in `Step.adapter_loads` to the device before it executes the step.
"""

from __future__ import annotations

from collections import OrderedDict

from pyserve.client import Adapter


class AdapterSlots:
    """Assigns `num_slots` device slots to versions of adapters."""

    def __init__(self, num_slots: int = 0) -> None:
        self.num_slots = num_slots
        self.num_loads = 0
        self._slot_of: dict[int, int] = {}  # adapter version -> slot
        self._adapter_in: list[Adapter | None] = [None] * num_slots
        self._num_running = [0] * num_slots  # running sequences that use each slot
        # Slots that no running sequence uses, the least recently used first.
        self._unused: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_slots))
        self._wants_load: set[int] = set()  # versions that have a slot, but whose load failed

    @property
    def num_used(self) -> int:
        """Number of slots whose adapter a running sequence uses."""
        return self.num_slots - len(self._unused)

    @property
    def running(self) -> list[str]:
        """Names of the adapters that running sequences use, sorted."""
        slots = (slot for slot, count in enumerate(self._num_running) if count)
        names = {adapter.name for slot in slots if (adapter := self._adapter_in[slot]) is not None}
        return sorted(names)

    def has_room(self, adapter: Adapter) -> bool:
        """Whether a sequence with this adapter could start now: it has a slot, or can get one."""
        return bool(self._unused) or adapter.version in self._slot_of

    def hold(self, adapter: Adapter) -> tuple[int, bool]:
        """Hold a slot for a sequence that starts to run; the caller has checked `has_room`.

        Returns the slot, and whether the adapter's weights must be loaded into it.
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
        """Release `slot` for one sequence that held it and has stopped running."""
        self._num_running[slot] -= 1
        if not self._num_running[slot]:
            self._unused[slot] = None

    def reload(self, adapter: Adapter) -> None:
        """Have the adapter loaded again when a sequence next holds it: its load may have failed."""
        if adapter.version in self._slot_of:
            self._wants_load.add(adapter.version)

    def forget_all(self) -> None:
        """Empty all slots because the device has lost their weights; no sequence may be running."""
        assert not self.num_used, "an adapter is used"
        for slot in range(self.num_slots):
            self._forget(slot)

    def check_invariants(self, held: list[tuple[int, Adapter]]) -> None:
        """Assert that the bookkeeping matches `held`, the (slot, adapter) of each running sequence
        that uses one. For tests."""
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
