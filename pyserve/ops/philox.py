"""Philox4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as
easy as 1, 2, 3"). The twin of cuda/common/philox.h; both are tested against the paper's vectors.
"""

from __future__ import annotations

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Four random 32-bit words; counter and key are taken modulo 2^32 word by word."""
    c0, c1, c2, c3 = (word & _MASK for word in counter)
    k0, k1 = (word & _MASK for word in key)
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1 = (second >> 32) ^ c1 ^ k0, second & _MASK
        c2, c3 = (first >> 32) ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3
