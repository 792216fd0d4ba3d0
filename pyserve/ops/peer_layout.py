"""Layout of the memory that cards of one machine share, and the size limits of messages.

The Python twin of cuda/common/peers.h, which explains each area and word; a test compares the two.
This file must not import torch.
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
_ALIGNMENT = 4 * KIB  # of the areas' starts
# The buffer's size is a multiple of this, the driver's unit, so that no other allocation shares the
# memory that other processes map.
_GRANULARITY = 2 * MIB


@dataclass(frozen=True, slots=True)
class PeerLimits:
    """The largest messages, in bytes, of each way.

    one_shot  all-reduce in which each card reads all other cards' messages.
    two_shot  all-reduce by reduce-scatter and all-gather; larger messages go through NCCL.
    gather    rows of one rank that one gather kernel takes.
    """

    one_shot: int
    two_shot: int
    gather: int


# tp_size -> limits. Between two H200s, `python -m bench.gpu_peers` measured one shot as fastest for
# all sizes that it tried with it, and two shots as faster than NCCL up to the largest size. In one
# shot a card reads tp_size - 1 whole messages, in two shots only two pieces of 1 / tp_size from
# each other card, but with a second trip. With 4 and 8 cards, which nobody has measured yet, both
# are expected to cost the same at about 256 and 128 KiB.
LIMITS: Final = {
    2: PeerLimits(one_shot=2 * MIB, two_shot=16 * MIB, gather=4 * MIB),
    4: PeerLimits(one_shot=256 * KIB, two_shot=16 * MIB, gather=2 * MIB),
    8: PeerLimits(one_shot=128 * KIB, two_shot=16 * MIB, gather=1 * MIB),
}


@dataclass(frozen=True, slots=True)
class PeerLayout:
    """Areas of a rank's buffer, as offsets in bytes from its start; the same on all ranks."""

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
        """The end of the one-shot area, which is initialised as absent; all else is zeroed."""
        return self.reduce


def layout(tp_size: int) -> PeerLayout:
    """The layout for tp_size ranks, which must be a key of LIMITS."""
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
    """Bytes of a rank's buffer on its card; 0 if so many ranks do not use one."""
    return layout(tp_size).num_bytes if tp_size in LIMITS else 0


def table(
    places: PeerLayout, tp_rank: int, buffers: list[int], *, spin_s: float, is_trial: bool
) -> list[int]:
    """The int64 words of the table that the native ops take.

    buffers   addresses of the ranks' buffers in this process, in the order of ranks.
    spin_s    seconds after which a wait for another rank fails.
    is_trial  such a wait gives up quietly instead of raising a CUDA error; for the self-test.
    """
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
