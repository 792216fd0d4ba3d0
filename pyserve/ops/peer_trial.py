"""The self-test of a PeerGroup: runs every op in every way, and compares every byte.

There are drivers that claim that cards can reach each other's memory, and then lose or mix up
writes. Therefore a group is used only after this test has passed on all ranks. It takes 0.1 s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import peer_layout, reference_comm

_HIDDEN = 4096
_EPS = 1e-6
_WIDTHS = (16032, 501)  # columns of gathered rows: copied by 16 bytes, and by 2 bytes at a time


class Group(Protocol):
    """The interface of PeerGroup that is tested."""

    tp_rank: int
    tp_size: int
    device: torch.device

    def all_reduce_(self, x: Tensor) -> None: ...

    def all_reduce_add_norm(
        self, partial: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor,
        offset: float = 0.0,
    ) -> None: ...  # fmt: skip

    def gather_rows(self, local: Tensor, out: Tensor | None) -> None: ...

    def broadcast_tokens(self, tokens: Tensor) -> None: ...


def find_fault(group: Group, control: Tensor) -> str | None:
    """Run all checks; returns what the first failed one found, or None.

    control  int32 [CONTROL_WORDS]: the control words of this rank's buffer.

    After a wrong result the remaining checks are still run, because the other ranks take part in
    them. After a wait that was given up they are not, because each would take seconds.
    """
    limits = peer_layout.LIMITS[group.tp_size]
    rounds = 2 * peer_layout.ONE_SHOT_ROUNDS + 1  # so that each area is used at least twice
    sizes = [16 << (3 * turn % 11) for turn in range(rounds)]
    sizes += [limits.one_shot, limits.one_shot + 16, 3 * limits.one_shot + 16 * group.tp_size]
    sizes += [limits.two_shot]
    checks: list[tuple[str, Callable[[Group, int, int], bool], int]]
    checks = [(f"the sum of {size} bytes", _is_sum_right, size // 2) for size in sizes]
    rows = [1, 3, limits.one_shot // (2 * _HIDDEN), 2 * limits.one_shot // (2 * _HIDDEN)]
    checks += [(f"the sum and norm of {count} rows", _is_norm_right, count) for count in rows]
    rows = [1, 7, 1, 2 * limits.gather // (2 * _WIDTHS[0]) + 1]  # the last needs three kernels
    checks += [(f"{count} gathered rows", _is_gather_right, count) for count in rows]
    checks += [(f"{count} tokens", _are_tokens_right, count) for count in (1, 256, 5, 4096, 2)]
    fault = None
    for seed, (name, check, size) in enumerate(checks):
        is_right = check(group, size, seed)
        if bool(control[peer_layout.CONTROL_IS_GIVEN_UP].item()):
            return fault or f"{name}: what another card wrote did not arrive"
        if not is_right:
            fault = fault or f"{name}: not what the ranks' cards had"
    return fault


def _payload(group: Group, seed: int, shape: tuple[int, ...]) -> list[Tensor]:
    """The inputs of all ranks, which every rank can compute: bfloat16 with varied bits, all finite,
    some -0."""
    count = 1
    for size in shape:
        count *= size
    index = torch.arange(count, dtype=torch.int64, device=group.device)
    parts = []
    for tp_rank in range(group.tp_size):
        mixed = (index + 1) * (2654435761 + 2 * (seed * group.tp_size + tp_rank))
        mixed = (mixed ^ (mixed >> 15)) % 65537 - 32768
        part = (mixed.float() / 512).bfloat16()
        parts.append(torch.where(mixed % 5 == 0, -0.0, part).view(shape))
    return parts


def _is_sum_right(group: Group, count: int, seed: int) -> bool:
    parts = _payload(group, seed, (count,))
    expected = reference_comm.sum_parts(parts)
    own = parts[group.tp_rank]
    group.all_reduce_(own)
    return torch.equal(own, expected)


def _is_norm_right(group: Group, num_rows: int, seed: int) -> bool:
    parts = _payload(group, seed, (num_rows, _HIDDEN))
    more = _payload(group, seed + 1000, (num_rows + 1, _HIDDEN))[0]
    residual, weight = more[:num_rows], more[num_rows]
    total, plain_residual = reference_comm.sum_parts(parts), residual.clone()
    plain = ops.add_rms_norm(total, plain_residual, weight, _EPS)
    out = torch.empty_like(plain)
    group.all_reduce_add_norm(parts[group.tp_rank], residual, weight, _EPS, out)
    return torch.equal(residual, plain_residual) and torch.equal(out, plain)


def _is_gather_right(group: Group, num_rows: int, seed: int) -> bool:
    is_right = True
    for width in _WIDTHS:
        parts = _payload(group, seed, (num_rows, width))
        expected = torch.cat(parts, dim=1)
        out = torch.full_like(expected, torch.nan) if group.tp_rank == 0 else None
        group.gather_rows(parts[group.tp_rank], out)
        is_right &= out is None or torch.equal(out.view(torch.int16), expected.view(torch.int16))
    return is_right


def _are_tokens_right(group: Group, count: int, seed: int) -> bool:
    expected = torch.arange(count, dtype=torch.int32, device=group.device) * 31 - seed
    tokens = expected.clone() if group.tp_rank == 0 else torch.full_like(expected, -1)
    group.broadcast_tokens(tokens)
    return torch.equal(tokens, expected)
