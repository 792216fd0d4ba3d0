"""What lies where in the memory that cards of one machine share, and how much a message may have.

The Python twin of cuda/common/peers.h, which says what each area and each word is; a test compares
the two. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_TP_SIZE: Final = 8
MAX_ROUND_CTAS: Final = 256
MAX_FLAG_CTAS: Final = 64
ONE_SHOT_ROUNDS: Final = 3
MAX_PEER_TOKENS: Final = 4096

PEER_MAGIC_WORD: Final = 0
PEER_TP_RANK: Final = 1
PEER_TP_SIZE: Final = 2
PEER_SPIN_NS: Final = 3
PEER_IS_TRIAL: Final = 4
PEER_ONE_SHOT_OFFSET: Final = 5
PEER_ONE_SHOT_BYTES: Final = 6
PEER_REDUCE_OFFSET: Final = 7
PEER_SPREAD_OFFSET: Final = 8
PEER_PIECE_BYTES: Final = 9
PEER_GATHER_OFFSET: Final = 10
PEER_GATHER_BYTES: Final = 11
PEER_TOKENS_OFFSET: Final = 12
PEER_BUFFERS: Final = 13
PEER_WORDS: Final = PEER_BUFFERS + MAX_TP_SIZE
PEER_MAGIC: Final = 0x70656572

CONTROL_ROUNDS: Final = 0
CONTROL_REDUCED: Final = CONTROL_ROUNDS + MAX_ROUND_CTAS
CONTROL_GATHERED: Final = CONTROL_REDUCED + MAX_FLAG_CTAS
CONTROL_TOLD: Final = CONTROL_GATHERED + MAX_FLAG_CTAS
CONTROL_IS_GIVEN_UP: Final = CONTROL_TOLD + 1
CONTROL_REDUCE_FLAGS: Final = CONTROL_TOLD + 64
CONTROL_SPREAD_FLAGS: Final = CONTROL_REDUCE_FLAGS + MAX_TP_SIZE * MAX_FLAG_CTAS
CONTROL_GATHER_FLAGS: Final = CONTROL_SPREAD_FLAGS + MAX_TP_SIZE * MAX_FLAG_CTAS
CONTROL_GATHER_ACKS: Final = CONTROL_GATHER_FLAGS + MAX_TP_SIZE * MAX_FLAG_CTAS
CONTROL_TOKEN_ACKS: Final = CONTROL_GATHER_ACKS + MAX_FLAG_CTAS
CONTROL_WORDS: Final = CONTROL_TOKEN_ACKS + 64

KIB, MIB = 1 << 10, 1 << 20
_ALIGNMENT = 4 * KIB  # of areas
# An allocation of its own: what is mapped into other processes is never less.
_GRANULARITY = 2 * MIB


@dataclass(frozen=True, slots=True)
class PeerLimits:
    """Bytes up to which a message goes one way; beyond two_shot NCCL is to be taken.

    gather  of a rank's rows, in one kernel.
    """

    one_shot: int
    two_shot: int
    gather: int


# The only place where these stand. Between two H200s one shot was the fastest of all sizes that
# `python -m bench.gpu_peers` tried it with, two shots up to the largest, before NCCL. Of one shot
# each card reads tp_size - 1 messages, of two shots two pieces from each other card, for a second
# trip: with 4 and 8 cards, which nobody has measured yet, 256 and 128 KiB cost about as much.
LIMITS: Final = {
    2: PeerLimits(one_shot=2 * MIB, two_shot=16 * MIB, gather=4 * MIB),
    4: PeerLimits(one_shot=256 * KIB, two_shot=16 * MIB, gather=2 * MIB),
    8: PeerLimits(one_shot=128 * KIB, two_shot=16 * MIB, gather=1 * MIB),
}


@dataclass(frozen=True, slots=True)
class PeerLayout:
    """Areas of one rank's buffer, in bytes from its start; all ranks have the same."""

    limits: PeerLimits
    one_shot: int
    reduce: int
    spread: int
    piece_bytes: int
    gather: int
    tokens: int
    num_bytes: int

    @property
    def one_shot_end(self) -> int:
        """Where what must be absent at first ends, and what must be zero begins again."""
        return self.reduce


def layout(tp_size: int) -> PeerLayout:
    """For tp_size ranks, one of LIMITS."""
    limits, others = LIMITS[tp_size], tp_size - 1
    piece_bytes = limits.two_shot // tp_size
    one_shot = _aligned(4 * CONTROL_WORDS)
    reduce = one_shot + _aligned(ONE_SHOT_ROUNDS * others * limits.one_shot)
    spread = reduce + _aligned(others * piece_bytes)
    gather = spread + _aligned(others * piece_bytes)
    tokens = gather + _aligned(others * limits.gather)
    end = tokens + _aligned(2 * MAX_PEER_TOKENS * 8)
    num_bytes = -(-end // _GRANULARITY) * _GRANULARITY
    return PeerLayout(limits, one_shot, reduce, spread, piece_bytes, gather, tokens, num_bytes)


def num_bytes(tp_size: int) -> int:
    """Of a card's memory; 0 where so many ranks do without."""
    return layout(tp_size).num_bytes if tp_size in LIMITS else 0


def table(
    places: PeerLayout, tp_rank: int, buffers: list[int], *, spin_s: float, is_trial: bool
) -> list[int]:
    """Words of the table that the ops take; buffers are addresses, in the order of ranks."""
    words = [0] * PEER_WORDS
    words[PEER_MAGIC_WORD] = PEER_MAGIC
    words[PEER_TP_RANK], words[PEER_TP_SIZE] = tp_rank, len(buffers)
    words[PEER_SPIN_NS], words[PEER_IS_TRIAL] = int(spin_s * 1e9), int(is_trial)
    words[PEER_ONE_SHOT_OFFSET] = places.one_shot
    words[PEER_ONE_SHOT_BYTES] = places.limits.one_shot
    words[PEER_REDUCE_OFFSET], words[PEER_SPREAD_OFFSET] = places.reduce, places.spread
    words[PEER_PIECE_BYTES] = places.piece_bytes
    words[PEER_GATHER_OFFSET], words[PEER_GATHER_BYTES] = places.gather, places.limits.gather
    words[PEER_TOKENS_OFFSET] = places.tokens
    words[PEER_BUFFERS : PEER_BUFFERS + len(buffers)] = buffers
    return words


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
