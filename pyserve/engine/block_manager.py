"""KV blocks: reference counts, a free list that keeps contents until reuse, and the prefix cache.

A full block whose token ids are known may be cached under a chained 128-bit keyed hash. Invariants
(check_invariants): a block is free exactly when no sequence refers to it; a cached block is found
by the hash of exactly its own contents; an awaited hash belongs to a running sequence that has the
block and has yet to compute it. Only bookkeeping: no KV is touched here.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Collection

from pyserve.engine.sequence import NEVER, Sequence

HASH_BYTES = 16
LOOKUP_BLOCKS = 8  # a prefix lookup hashes so many blocks at a time, as it may miss early


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold num_tokens tokens of one sequence."""
    return -(-num_tokens // block_size)


class BlockManager:
    """Owns `num_blocks` KV blocks of `block_size` tokens each.

    Hashes are keyed with a random key, so that nobody can craft prompts whose hashes collide.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._is_caching = enable_prefix_caching
        self._key = secrets.token_bytes(HASH_BYTES)
        self._ref_counts = [0] * num_blocks
        # Least recently used first; blocks without reusable contents before all others.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of: dict[bytes, int] = {}
        self._hash_of: list[bytes | None] = [None] * num_blocks
        # What a cached block's hash was made from: parent hash and token ids.
        self._preimage_of: list[bytes | None] = [None] * num_blocks
        self._awaited: dict[bytes, Sequence] = {}
        self._unsettled: list[Sequence] = []  # allocated, but not in _awaited yet; see `settle`

    @property
    def num_free(self) -> int:
        """Blocks that no sequence refers to; they may still hold cached contents."""
        return len(self._free)

    def root_hash(self, cache_salt: str, adapter: str = "") -> bytes:
        """The parent hash of a sequence's first block, from its cache salt and adapter version.

        Sequences share cached blocks only if their root hashes are equal.
        """
        name, salt = adapter.encode(), cache_salt.encode("utf-8", "surrogatepass")
        return self._hash(len(name).to_bytes(4, "little") + name + salt)

    def is_awaited(self, block_hash: bytes) -> bool:
        """True while a running sequence is going to compute this block."""
        return block_hash in self._awaited

    def find_prefix(self, seq: Sequence) -> tuple[list[int], bytes | None]:
        """Find the longest cached prefix of `seq`: its block ids, and a hash worth waiting for.

        The prefix leaves at least one token to compute. If running sequences are computing the
        blocks that follow it, the hash is that of the last consecutive such block; it is None if
        nobody is computing the block right after the prefix.
        """
        if not self._is_caching:
            return [], None
        self.settle()
        if seq.has_untold_prompt:
            return [], None
        limit = (len(seq.token_ids) - 1) // self.block_size
        hits: list[int] = []
        awaited = None
        for index in range(limit):
            if index == len(seq.block_hashes):
                self._extend_hashes(seq, min(index + LOOKUP_BLOCKS, limit))
            block_hash = seq.block_hashes[index]
            if awaited is None:
                block_id = self._block_of.get(block_hash)
                if block_id is not None and self._preimage_of[block_id] == seq.preimages[index]:
                    hits.append(block_id)
                    continue
            if block_hash not in self._awaited:
                break
            awaited = block_hash
        return hits, awaited

    def num_needed(self, seq: Sequence, hits: list[int]) -> int:
        """Number of free blocks that `allocate` would take: new blocks, and hits that are free."""
        num_total = num_blocks_for(len(seq.token_ids), self.block_size)
        return num_total - len(hits) + sum(1 for hit in hits if not self._ref_counts[hit])

    def allocate(self, seq: Sequence, hits: list[int]) -> None:
        """Give `seq` the cached blocks `hits` and new blocks for the rest of its known tokens.

        There must be `num_needed` free blocks.
        """
        assert not seq.block_ids, "allocated twice"
        for block_id in hits:
            if not self._ref_counts[block_id]:
                del self._free[block_id]
            self._ref_counts[block_id] += 1
        seq.block_ids = list(hits)
        for _ in range(num_blocks_for(len(seq.token_ids), self.block_size) - len(hits)):
            seq.block_ids.append(self._take())
        seq.kv_capacity = len(seq.block_ids) * self.block_size
        seq.num_offered_blocks = len(hits)
        if self._is_caching:
            seq.next_offer_len = (len(hits) + 1) * self.block_size
            self._unsettled.append(seq)

    def settle(self) -> None:
        """Enter the blocks of recently allocated sequences into `_awaited`, so others can wait.

        Hashing takes 2 us a block. It is therefore postponed until the step that computes the
        blocks has been launched, or until another sequence looks for its prefix.
        """
        for seq in self._unsettled:
            self._extend_hashes(seq, len(seq.token_ids) // self.block_size)
            for block_hash in seq.block_hashes[seq.num_offered_blocks :]:
                self._awaited.setdefault(block_hash, seq)
        self._unsettled.clear()

    def grow(self, seq: Sequence) -> int:
        """Append one new block to `seq` and return its id. There must be a free block."""
        block_id = self._take()
        seq.block_ids.append(block_id)
        seq.kv_capacity += self.block_size
        return block_id

    def offer(self, seq: Sequence, num_valid: int) -> None:
        """Put into the prefix cache the blocks of `seq` that its first `num_valid` tokens fill.

        The KV of those tokens has been computed, and their ids are known.
        """
        if seq.next_offer_len > num_valid:
            return
        self.settle()
        first, end = seq.num_offered_blocks, num_valid // self.block_size
        self._extend_hashes(seq, end)
        awaited, block_of = self._awaited, self._block_of
        for index in range(first, end):
            block_hash = seq.block_hashes[index]
            if awaited.get(block_hash) is seq:
                del awaited[block_hash]
            # If another sequence has computed the same block before, the cache keeps that one.
            if block_hash not in block_of:
                block_id = seq.block_ids[index]
                block_of[block_hash] = block_id
                self._hash_of[block_id] = block_hash
                self._preimage_of[block_id] = seq.preimages[index]
        seq.num_offered_blocks = end
        seq.next_offer_len = (end + 1) * self.block_size

    def release(self, seq: Sequence, *, has_bad_kv: bool = False) -> None:
        """Take all blocks from `seq`. has_bad_kv: their KV is wrong, so they leave the cache."""
        if seq in self._unsettled:
            self._unsettled.remove(seq)
        for block_hash in seq.block_hashes[seq.num_offered_blocks :]:
            if self._awaited.get(block_hash) is seq:
                del self._awaited[block_hash]
        # The last block becomes free first, so that it is reused before the prefix it depends on.
        for block_id in reversed(seq.block_ids):
            if has_bad_kv:
                self._uncache(block_id)
            self._ref_counts[block_id] -= 1
            if not self._ref_counts[block_id]:
                self._free[block_id] = None
                if self._hash_of[block_id] is None:
                    self._free.move_to_end(block_id, last=False)
        seq.block_ids = []
        seq.kv_capacity = 0
        seq.num_offered_blocks = 0
        seq.next_offer_len = NEVER

    def forget(self) -> None:
        """Empty the prefix cache. Running sequences keep their blocks, but nobody can hit them."""
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks
        self._preimage_of = [None] * self.num_blocks

    def check_invariants(self, running: Collection[Sequence]) -> None:
        """Assert that the bookkeeping agrees with the sequences `running`. Slow; for tests."""
        counts = [0] * self.num_blocks
        for seq in running:
            assert len(set(seq.block_ids)) == len(seq.block_ids), "a block twice in one sequence"
            assert seq.kv_capacity == len(seq.block_ids) * self.block_size
            assert seq.num_computed_tokens <= seq.kv_capacity
            assert seq.num_offered_blocks * self.block_size <= seq.num_computed_tokens
            for block_id in seq.block_ids:
                counts[block_id] += 1
        assert counts == self._ref_counts, "reference counts"
        assert {i for i, count in enumerate(counts) if not count} == set(self._free), "free list"
        for block_hash, block_id in self._block_of.items():
            preimage = self._preimage_of[block_id]
            assert self._hash_of[block_id] == block_hash
            assert preimage is not None and self._hash(preimage) == block_hash
        cached = [i for i, block_hash in enumerate(self._hash_of) if block_hash is not None]
        assert sorted(self._block_of.values()) == cached, "cached blocks"
        for block_hash, owner in self._awaited.items():
            assert owner in running, "awaited block of a sequence that does not run"
            assert block_hash in owner.block_hashes[owner.num_offered_blocks :]

    def _take(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        self._uncache(block_id)
        self._ref_counts[block_id] = 1
        return block_id

    def _uncache(self, block_id: int) -> None:
        block_hash = self._hash_of[block_id]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block_id] = None
            self._preimage_of[block_id] = None

    def _extend_hashes(self, seq: Sequence, end: int) -> None:
        """Hash the blocks of `seq` before block `end` that are not hashed yet."""
        first = len(seq.block_hashes)
        if first >= end:
            return
        parent = seq.block_hashes[-1] if first else seq.root_hash
        ids = array("i", seq.token_ids[first * self.block_size : end * self.block_size])
        data, block_bytes = ids.tobytes(), ids.itemsize * self.block_size
        for start in range(0, len(data), block_bytes):
            preimage = parent + data[start : start + block_bytes]
            parent = self._hash(preimage)
            seq.preimages.append(preimage)
            seq.block_hashes.append(parent)

    def _hash(self, preimage: bytes) -> bytes:
        return hashlib.blake2b(preimage, digest_size=HASH_BYTES, key=self._key).digest()
