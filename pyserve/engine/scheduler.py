"""Scheduler: decides which tokens of which sequences the next step runs.

Prefill and decode are not separate phases: the num_computed_tokens of each sequence catches up with
its num_tokens, within a token budget per step. Chunked prefill, prefix hits, resumption after
preemption and mixed batches are all this one path.

The running sequences are sorted by Sequence.order; the last is preempted first where KV blocks are
short. WaitingQueue decides which waiting sequence is next. Where slots or blocks are short,
sequences in the background give way to others, then those of the user who runs the most.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from itertools import accumulate, groupby, islice, takewhile
from operator import attrgetter

from pyserve.engine.adapter_slots import AdapterSlots
from pyserve.engine.batch import AdapterLoad, Step, padded_sizes
from pyserve.engine.block_manager import BlockManager, num_blocks_for
from pyserve.engine.chunks import MIN_CHUNK, share_out
from pyserve.engine.sequence import BACKGROUND_PRIORITY, NO_SLOT, Sequence, Status
from pyserve.engine.slots import SlotAllocator, num_update_words, slot_update
from pyserve.engine.waiting import WaitingQueue
from pyserve.ops import step_layout as layout

BACKGROUND_PART = 16  # beside other sequences the background has 1/16 of the slots as rows
MAX_LOOKUPS = 2**12  # blocks looked up in the prefix cache in one step: 8 ms of the event loop
# How many sequences with other adapters may be admitted before one that waits for an adapter slot.
# After that none is, until running sequences have ended and freed a slot for it.
MAX_PASSED = 64
MAX_HELD_BACK = 256  # sequences without an adapter slot that are looked at in one step

_order = attrgetter("order")


class Scheduler:
    """Owns the queues, the slots and, through `blocks`, the KV blocks.

    max_num_batched_tokens  token budget of a step, at least the number of slots.
    max_update_words        words of a packed step that admissions may take.
    adapters                the slots of adapters on the device; None: adapters are not served.
    """

    def __init__(
        self, blocks: BlockManager, slots: SlotAllocator, *, max_num_batched_tokens: int,
        max_update_words: int, adapters: AdapterSlots | None = None,
    ) -> None:  # fmt: skip
        assert max_num_batched_tokens >= slots.num_slots, "each running sequence needs a token"
        self.blocks = blocks
        self.slots = slots
        self.adapters = adapters or AdapterSlots()
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.num_running_of: dict[str, int] = {}  # user -> running sequences; never 0
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of all sequences that have been admitted
        self.num_cached_tokens = 0  # those of them that the prefix cache served
        # Tokens of a step of prompts beside rows that decode, and of prompts alone (chunks.py).
        self.mixed_limit = max_num_batched_tokens
        self.alone_limit = max_num_batched_tokens
        self._max_num_batched_tokens = max_num_batched_tokens
        self._step_sizes = padded_sizes(max_num_batched_tokens)
        self._max_update_words = max_update_words

    @property
    def num_awaiting(self) -> int:
        """Waiting sequences whose prefix another sequence is computing; others may pass them."""
        return sum(seq.awaited_hash is not None for seq in self.waiting)

    def waiting_adapters(self) -> list[str]:
        """Sorted names of adapters that waiting sequences use and no running one does."""
        if not self.adapters.num_slots:
            return []
        names = {seq.adapter.name for seq in self.waiting if seq.adapter is not None}
        return sorted(names.difference(self.adapters.running))

    def add(self, seq: Sequence) -> None:
        """Queue a new or preempted sequence."""
        seq.status = Status.WAITING
        self.waiting.add(seq)

    def schedule(self) -> Step | None:
        """The next step, or None if there is nothing to run.

        Its tokens count as computed from here on, so the caller has to launch it.
        """
        self.blocks.settle()
        if self.waiting:
            self._give_way()
            self._level()
        step = Step()
        running, prompts = self.running, []
        num_preemptions = self.num_preemptions
        num_rows, num_more = self._num_rows()
        for seq in islice(running, num_rows):  # _grow may preempt the last of them
            num_tokens, num_computed = seq.num_tokens, seq.num_computed_tokens
            if num_tokens - num_computed > 1:
                prompts.append(seq)
            elif num_tokens == seq.max_total_tokens:
                pass  # a step in flight samples its last token
            elif num_computed < seq.kv_capacity or self._grow(seq, step):
                step.seqs.append(seq)
                seq.num_computed_tokens = num_tokens
                seq.num_tokens = num_tokens + 1  # the placeholder of _add_row
        step.query_lens += [1] * len(step.seqs)
        budget = limit = self._prompt_limit(len(step.seqs))
        if self.num_preemptions == num_preemptions:
            budget -= self._admit(step, self._share_of_waiting(prompts, limit), num_more)
        else:
            prompts = [seq for seq in prompts if seq.status is Status.RUNNING]
        for _, equals in groupby(prompts, key=_priority):  # prompts are sorted by priority
            budget -= _add_prompts(step, list(equals), budget, for_oldest=limit - limit // 2)
        if not step.seqs:
            return None
        if self.adapters.num_used:
            _sort_by_adapter(step, self.adapters.num_slots)
        _fill(step)
        step.num_prompt_tokens = limit - budget
        step.num_tokens = sum(step.query_lens)
        return step

    def finish(self, seq: Sequence, *, has_bad_kv: bool = False) -> None:
        """Take `seq` out of its queue and free its slot and blocks; has_bad_kv as in
        BlockManager.release."""
        if seq.status is Status.RUNNING:
            self._stop(seq, has_bad_kv=has_bad_kv)
        else:
            self.waiting.remove(seq)
        seq.status = Status.FINISHED

    def preempt_all(self) -> None:
        """Preempt all running sequences and forget the prefix cache and the adapters on the device.

        Called with no step in flight, before the KV cache, and maybe the model, is freed.
        """
        for seq in list(reversed(self.running)):
            self._preempt(seq)
        self.blocks.forget()
        self.adapters.forget_all()

    def check_invariants(self) -> None:
        """Assert that queues, slots and blocks agree. Slow; for tests."""
        for queue, status in ((self.waiting, Status.WAITING), (self.running, Status.RUNNING)):
            assert all(seq.status is status for seq in queue)
        assert self.running == sorted(self.running, key=_order)
        assert self.num_running_of == Counter(seq.user for seq in self.running)
        assert len(self.waiting) == len(list(self.waiting))
        for seq in self.waiting:
            assert not seq.block_ids and seq.num_tokens == len(seq.token_ids)
        for seq in self.running:
            assert seq.num_computed_tokens <= seq.num_tokens <= seq.max_total_tokens
            assert seq.num_in_flight_tokens >= 0
        self.slots.check_invariants(self.running)
        self.blocks.check_invariants(self.running)
        self.adapters.check_invariants(
            [(seq.adapter_slot, seq.adapter) for seq in self.running if seq.adapter is not None]
        )

    def _prompt_limit(self, num_decoding: int) -> int:
        """Prompt tokens that a step may compute beside num_decoding rows of one token."""
        # The largest padded size within the limit: tokens beyond it would cost the padding up to
        # the next size, which exceeds the limit.
        limit = self.mixed_limit if num_decoding else self.alone_limit
        index = bisect_right(self._step_sizes, limit) - 1
        limit = max(self._step_sizes[index] - num_decoding, MIN_CHUNK)
        return min(limit, self._max_num_batched_tokens - num_decoding)

    def _share_of_waiting(self, prompts: list[Sequence], limit: int) -> int:
        """Tokens of a step that waiting sequences may take beside the running `prompts`.

        limit  prompt tokens of the step.

        With one running prompt of the same priority they may take half, with more of them a
        quarter. Prompts of a higher priority come first, those of a lower one last.
        """
        if not (self.waiting and prompts):
            return limit
        priority = _priority(next(self.waiting.in_turn(self.num_running_of)))
        num_ahead = sum(_num_left(seq) for seq in prompts if _priority(seq) < priority)
        num_equal = sum(_priority(seq) == priority for seq in prompts)
        return max(limit - num_ahead, 0) // (1, 2, 4)[min(num_equal, 2)]

    def _grow(self, seq: Sequence, step: Step) -> bool:
        """Give `seq` one more block, preempting the last running sequences if none is free.

        False if `seq` was the last itself and has been preempted. Rows are added in the order of
        running, so a preempted sequence never has a row in this step yet.
        """
        while not self.blocks.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        step.block_updates += (seq.slot, len(seq.block_ids), self.blocks.grow(seq))
        return True

    def _num_rows(self) -> tuple[int, int]:
        """(rows of `running` in the next step, background sequences that may be admitted to it).

        Beside other sequences the background gets few rows, as each row makes the step longer; the
        rest of its sequences keep their slots and blocks but do not run. Alone it gets all rows.
        """
        running = self.running
        first = bisect_left(running, (BACKGROUND_PRIORITY, 0), key=_order)
        has_others = first > 0 or any(
            not seq.is_background for seq in islice(self.waiting.in_turn(self.num_running_of), 1)
        )
        if not has_others:
            return len(running), self.slots.num_slots
        most = max(self.slots.num_slots // BACKGROUND_PART, 1)
        return min(first + most, len(running)), most - (len(running) - first)

    def _give_way(self) -> None:
        """Preempt background sequences whose slots, blocks or adapter slots other waiting sequences
        need."""
        if not (self.running and self.running[-1].is_background):
            return  # background sequences are the last of running
        others = takewhile(_is_in_front, self.waiting.in_turn(self.num_running_of))
        num_slots, num_blocks = self.slots.num_free, self.blocks.num_free - len(self.running)
        for seq in list(islice(others, self.slots.num_slots)):
            if seq.awaited_hash is not None:
                continue
            while self._lacks_adapter(seq) and (victim := self._background_with_adapter()):
                num_slots, num_blocks = num_slots + 1, num_blocks + len(victim.block_ids) + 1
                self._preempt(victim)
            if not (self.running and self.running[-1].is_background):
                return
            if self._lacks_adapter(seq):
                continue
            while num_slots < 1 or num_blocks < seq.num_wanted_blocks:
                victim = self.running[-1]
                num_slots, num_blocks = num_slots + 1, num_blocks + len(victim.block_ids) + 1
                self._preempt(victim)
                if not (self.running and self.running[-1].is_background):
                    return
            num_slots, num_blocks = num_slots - 1, num_blocks - seq.num_wanted_blocks

    def _level(self) -> None:
        """Preempt one sequence of the user who holds the most slots or blocks, if the next waiting
        sequence finds no slot or too few blocks.

        Otherwise a user with a sequence in every slot would keep all others waiting until one ends.
        Nothing is preempted if the waiting user would come to hold as much as that user does now,
        so one prompt that needs the blocks of a hundred sequences does not push out a hundred.
        """
        if max(self.num_running_of.values(), default=0) < 2:
            return
        seq = next(self.waiting.in_turn(self.num_running_of))
        if seq.awaited_hash is not None or self._lacks_adapter(seq):
            return
        if not self.slots.num_free:
            held, num_wanted = self.num_running_of, 1
        elif seq.num_wanted_blocks > self.blocks.num_free - len(self.running):
            held, num_wanted = Counter[str](), seq.num_wanted_blocks
            for other in self.running:
                held[other.user] += len(other.block_ids)
        else:
            return
        user = max(held, key=held.__getitem__)
        if held.get(seq.user, 0) + num_wanted >= held[user]:
            return
        for victim in reversed(self.running):
            if victim.user == user and victim.order[0] >= seq.order[0]:
                self._preempt(victim)
                return

    def _stop(self, seq: Sequence, *, has_bad_kv: bool = False) -> None:
        """Free the slot and the blocks of a running sequence."""
        index = bisect_left(self.running, seq.order, key=_order)
        assert self.running[index] is seq
        del self.running[index]
        self.num_running_of[seq.user] -= 1
        if not self.num_running_of[seq.user]:
            del self.num_running_of[seq.user]
        self.blocks.release(seq, has_bad_kv=has_bad_kv)
        self.slots.release(seq)
        if seq.adapter is not None:
            self.adapters.let_go(seq.adapter_slot)

    def _lacks_adapter(self, seq: Sequence) -> bool:
        """Whether `seq` needs an adapter slot on the device and none is free."""
        return seq.adapter is not None and not self.adapters.has_room(seq.adapter)

    def _background_with_adapter(self) -> Sequence | None:
        """The youngest background sequence that holds an adapter slot."""
        background = takewhile(_is_background, reversed(self.running))
        return next((seq for seq in background if seq.adapter is not None), None)

    def _preempt(self, seq: Sequence) -> None:
        """Free what a running sequence holds and queue it again; its KV will be recomputed."""
        self._stop(seq)
        seq.num_tokens = len(seq.token_ids)  # tokens in flight are dropped and sampled again
        seq.num_computed_tokens = 0
        seq.preempted_s = seq.preempted_s or time.monotonic()
        self.num_preemptions += 1
        self.add(seq)

    def _admit(self, step: Step, budget: int, num_background: int) -> int:
        """Admit waiting sequences in turn, while there are slots, blocks and tokens for them.

        budget          prompt tokens that their rows may have together.
        num_background  how many background sequences may be admitted.

        Returns the number of tokens that their rows have.
        """
        blocks, left = self.blocks, budget
        if not self.waiting or not self.slots.num_free:
            return 0
        num_looked_up = 0
        held_back: list[Sequence] = []  # sequences that wait for an adapter slot
        may_pass = True  # whether sequences behind them may take an adapter slot
        for seq in self.waiting.in_turn(self.num_running_of):
            if not (left and self.slots.num_free) or num_looked_up > MAX_LOOKUPS:
                break
            if seq.adapter is not None and not (may_pass and self.adapters.has_room(seq.adapter)):
                held_back.append(seq)
                may_pass = may_pass and seq.num_passed < MAX_PASSED
                if len(held_back) > MAX_HELD_BACK:
                    break
                continue
            if seq.is_background:
                if num_background < 1:
                    break  # all sequences behind it are in the background too
                num_background -= 1
            if seq.awaited_hash is not None and blocks.is_awaited(seq.awaited_hash):
                continue  # others may pass it
            # One block is kept free for each running sequence: if admission took them all, the
            # next steps would have to preempt.
            num_spare = blocks.num_free - len(self.running)
            if seq.num_wanted_blocks > num_spare:
                break  # it needed more at its last attempt, and looking again would be in vain
            hits, seq.awaited_hash = blocks.find_prefix(seq)
            num_looked_up += len(seq.block_hashes)
            if seq.awaited_hash is not None:
                continue
            seq.num_wanted_blocks = blocks.num_needed(seq, hits)
            step.num_update_words += num_update_words(seq) + layout.BLOCK_UPDATE_WORDS * (
                num_blocks_for(len(seq.token_ids), blocks.block_size)
            )
            if seq.num_wanted_blocks > num_spare or step.num_update_words > self._max_update_words:
                break
            self.waiting.remove(seq)
            if seq.adapter is not None:
                for other in held_back:
                    other.num_passed += 1
            left -= self._start(seq, hits, step, left)
        return budget - left

    def _start(self, seq: Sequence, hits: list[int], step: Step, budget: int) -> int:
        """Give `seq` its slot, its blocks and its first row; returns the tokens of that row."""
        self.blocks.allocate(seq, hits)
        self.slots.allocate(seq)
        if seq.adapter is not None:
            seq.num_passed = 0
            seq.adapter_slot, has_to_load = self.adapters.hold(seq.adapter)
            if has_to_load:
                step.adapter_loads.append(AdapterLoad(seq.adapter_slot, seq.adapter))
        insort(self.running, seq, key=_order)
        self.num_running_of[seq.user] = self.num_running_of.get(seq.user, 0) + 1
        seq.status = Status.RUNNING
        seq.num_wanted_blocks = 0
        seq.num_computed_tokens = len(hits) * self.blocks.block_size
        seq.num_host_tokens = seq.num_tokens
        if not seq.is_admitted:
            seq.is_admitted = True
            seq.stream.admit(seq.num_computed_tokens)
            self.num_prompt_tokens += seq.num_prompt_tokens
            self.num_cached_tokens += seq.num_computed_tokens
        step.slot_updates.append(slot_update(seq))
        for index, block_id in enumerate(seq.block_ids):
            step.block_updates += (seq.slot, index, block_id)
        query_len = min(seq.num_tokens - seq.num_computed_tokens, budget)
        _add_row(step, seq, query_len)
        return query_len


def _priority(seq: Sequence) -> int:
    """Lower values run first."""
    return seq.order[0]


def _is_background(seq: Sequence) -> bool:
    return seq.is_background


def _is_in_front(seq: Sequence) -> bool:
    return not seq.is_background


def _num_left(seq: Sequence) -> int:
    """Tokens that have to be computed before the next one can be sampled."""
    return seq.num_tokens - seq.num_computed_tokens


def _add_prompts(step: Step, prompts: list[Sequence], budget: int, *, for_oldest: int) -> int:
    """Add rows for prompts of one priority, of at most `budget` tokens; returns their tokens."""
    shares = share_out(list(map(_num_left, prompts)), budget, for_oldest=for_oldest)
    for seq, share in zip(prompts, shares, strict=True):
        if share:
            _add_row(step, seq, share)
    return sum(shares)


def _add_row(step: Step, seq: Sequence, query_len: int) -> None:
    step.seqs.append(seq)
    step.query_lens.append(query_len)
    seq.num_computed_tokens += query_len
    if seq.num_computed_tokens == seq.num_tokens:
        seq.num_tokens += 1  # a placeholder for the token that this row samples


def _sort_by_adapter(step: Step, num_adapter_slots: int) -> None:
    """Sort the rows by adapter slot, rows without an adapter first, and fill adapter_starts."""
    slots = [NO_SLOT if seq.adapter is None else seq.adapter_slot for seq in step.seqs]
    order = sorted(range(len(slots)), key=slots.__getitem__)
    if slots[order[-1]] == NO_SLOT:
        return  # no row of this step uses an adapter
    step.seqs = [step.seqs[row] for row in order]
    step.query_lens = [step.query_lens[row] for row in order]
    counts = [0] * (num_adapter_slots + 1)  # tokens without an adapter, then tokens of each slot
    for row, query_len in zip(order, step.query_lens, strict=True):
        counts[slots[row] + 1] += query_len
    step.adapter_starts = list(accumulate(counts))


def _fill(step: Step) -> None:
    """Derive the other lists of a step from its sequences and query lengths."""
    seqs = step.seqs
    step.generations = [seq.generation for seq in seqs]
    step.row_slots = [seq.slot for seq in seqs]
    step.seq_lens = seq_lens = [seq.num_computed_tokens for seq in seqs]
    step.row_samples = [seq.num_computed_tokens >= seq.num_host_tokens for seq in seqs]
    # The device itself keeps what it samples in the slot, so the host sends tokens only for rows
    # that lie within those that the sequence had at its admission.
    step.host_tokens = [
        None if end > seq.num_host_tokens else seq.token_ids[end - query_len : end]
        for seq, end, query_len in zip(seqs, seq_lens, step.query_lens, strict=True)
    ]
