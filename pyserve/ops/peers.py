"""PeerGroup: cards of one machine that work together by each other's memory (cuda/gpu/comm).

Of the ops here all ranks make the same calls in the same order with the same shapes, each on one
stream; a CUDA graph may hold them. They take no host time but the launch. Sums are float32 in the
order of ranks, on every rank bit for bit the same. A rank that waits longer than `spin_s` for
another ends in a CUDA error. The plain-torch meaning of each is in reference_comm.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import peer_layout, peer_trial
from pyserve.ops.native import native as _ops
from pyserve.ops.peer_memory import CudaPeerMemory, PeerError, PeerMemory

Exchange = Callable[[bytes], list[bytes]]
SPIN_S = 20.0  # of a wait; the server's watchdog is faster
TRIAL_SPIN_S = 5.0  # of one in the self-test, for kernels that are loaded meanwhile
MAX_HIDDEN = 16384  # of a row with a norm in the same kernel: kMaxNormHidden
_HALF = (torch.bfloat16, torch.float16)
_ABSENT = -0x7FFF8000  # kAbsent in one_shot.cuh, as int32


class Store(Protocol):
    """What torch.distributed calls a store."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        """Waits until it is set."""


class _Offer(msgspec.Struct, frozen=True):
    """What a rank tells the others of its buffer; `reason` where it has none."""

    card_id: str
    handle: bytes
    num_bytes: int
    reason: str = ""


class PeerGroup:
    """tp_size ranks, each with a card of its own in a process of its own.

    reason     why the cards cannot work together so, for a log line; all ranks have the same, and
               are closed already. None: they can, and the self-test has compared every byte.
    num_bytes  of this card that the group holds, for the ledger.
    table      int64 words on the host that the native ops take; None where there is a reason.
    """

    def __init__(
        self, tp_rank: int, tp_size: int, device: torch.device, exchange: Exchange, *,
        memory: PeerMemory | None = None, spin_s: float = SPIN_S,
    ) -> None:  # fmt: skip
        """Every rank at the same time: exchange(own) gives the bytes of all, in rank order.

        It is called a few times, and is a barrier too; what it raises comes through.
        """
        self.tp_rank, self.tp_size, self.device = tp_rank, tp_size, device
        self.num_bytes = 0
        self._exchange = exchange
        self._spin_s = spin_s
        self._own: int | None = None
        self._opened: list[int] = []
        self.table: Tensor | None = None
        self.reason: str | None = f"{tp_size} ranks, not 2, 4 or 8"
        if tp_size in peer_layout.LIMITS:
            self._layout = peer_layout.layout(tp_size)
            self._memory = memory or CudaPeerMemory(device)
            self.reason = self._set_up()
            if self.reason is not None:
                self._unmap()
                exchange(b"")  # what others have mapped must not be freed
                self.close()

    def takes(self, x: Tensor) -> bool:
        """Whether all_reduce_ does x, or a larger message or another dtype needs NCCL.

        The same on all ranks where they call it for views of tensors that are alike.
        """
        num_bytes = x.numel() * x.element_size()
        return (
            x.dtype in _HALF
            and num_bytes <= self._layout.limits.two_shot
            and num_bytes % 16 == 0
            and x.is_contiguous()
            and x.data_ptr() % 16 == 0
        )

    def all_reduce_(self, x: Tensor) -> None:
        """x := the sum of all ranks' x, in place; `takes` it, else RuntimeError."""
        if x.numel() * x.element_size() <= self._layout.limits.one_shot:
            _ops.all_reduce_one_shot(x, self.table)
        else:
            _ops.all_reduce_two_shot(x, self.table)

    def all_reduce_add_norm(
        self, partial: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor,
        offset: float = 0.0,
    ) -> None:  # fmt: skip
        """residual += the sum of all ranks' partial, out = rms_norm(residual): one kernel, or two.

        partial, residual, out [num_rows, hidden], weight [hidden] of one 16-bit dtype. `takes`
        partial, else RuntimeError; it may be overwritten. The sum is rounded before it is added:
        the number of rows does not change a row's bits.
        """
        num_bytes, hidden = partial.numel() * partial.element_size(), len(weight)
        is_one = num_bytes <= self._layout.limits.one_shot and hidden <= MAX_HIDDEN
        if is_one and hidden % 8 == 0:
            _ops.all_reduce_add_norm(partial, residual, weight, eps, offset, out, self.table)
        else:
            self.all_reduce_(partial)
            ops.add_rms_norm(partial, residual, weight, eps, out, offset)

    def gather_parts(self, local: Tensor, out: Tensor | None) -> None:
        """out[r] := rank r's local, on rank 0; None on the others.

        local [num_rows, n], out [tp_size, num_rows, n], rows and parts with any stride, float32,
        bfloat16 or float16. Where n is a multiple of 16 bytes, so are strides and addresses. Rank
        0's local may be out[0].
        """
        num_rows = len(local)
        row_bytes = max(local.shape[1] * local.element_size(), 1)
        most = max(self._layout.limits.gather // row_bytes, 1)  # rows of one kernel
        for begin in range(0, num_rows, most):
            rows = slice(begin, min(begin + most, num_rows))
            part = None if out is None else out[:, rows]
            _ops.gather_rows(local[rows], part, self.table)

    def gather_rows(self, local: Tensor, out: Tensor | None) -> None:
        """out [num_rows, tp_size * n] := all ranks' local [num_rows, n], side by side, on rank 0;
        as gather_parts."""
        parts = None
        if out is not None:
            num_rows, n = local.shape
            parts = out.view(num_rows, self.tp_size, n).transpose(0, 1)
        self.gather_parts(local, parts)

    def broadcast_tokens(self, tokens: Tensor) -> None:
        """tokens int32 [n] := rank 0's, in place."""
        most = peer_layout.MAX_PEER_TOKENS
        for begin in range(0, len(tokens), most):
            _ops.broadcast_tokens(tokens[begin : begin + most], self.table)

    def close(self) -> None:
        """Unmap the others' buffers and free our own; no call follows. Harmless when repeated.

        The others must be done with this rank's buffer, which they write to: their last step is.
        """
        self._unmap()
        if self._own is not None:
            self._memory.free(self._own)
            self._own, self.num_bytes = None, 0

    def _unmap(self) -> None:
        self.table = None
        while self._opened:
            self._memory.close(self._opened.pop())

    def _set_up(self) -> str | None:
        try:
            offer = self._offer()
        except PeerError as error:
            offer = _Offer("", b"", 0, str(error))
        answers = self._exchange(msgspec.json.encode(offer))
        offers = [msgspec.json.decode(answer, type=_Offer) for answer in answers]
        reasons = [other.reason for other in offers]
        if len({other.num_bytes for other in offers}) > 1 and not any(reasons):
            return "the ranks' versions of pyserve differ"
        reason = _first(reasons) or self._agree(self._open, offers)
        return reason or self._agree(self._try)

    def _offer(self) -> _Offer:
        """Our buffer, allocated and ready: absent where one-shot messages come, else zero."""
        places = self._layout
        self._own = self._memory.allocate(places.num_bytes)
        self.num_bytes = places.num_bytes
        words = self._memory.words(self._own, places.num_bytes // 4)
        words.zero_()
        words[places.one_shot // 4 : places.one_shot_end // 4] = _ABSENT
        handle = self._memory.export(self._own)  # waits for the above
        return _Offer(self._memory.card_id(), handle, places.num_bytes)

    def _open(self, offers: list[_Offer]) -> None:
        """Map all others' buffers."""
        assert self._own is not None
        buffers = []
        for other, offer in enumerate(offers):
            if other == self.tp_rank:
                buffers.append(self._own)
                continue
            self._memory.check_access(offer.card_id)
            buffers.append(self._memory.open(offer.handle))
            self._opened.append(buffers[-1])
        self._buffers = buffers

    def _try(self) -> None:
        """The self-test, with waits that end without an error of CUDA; then the real table."""
        self.table = self._make_table(TRIAL_SPIN_S, is_trial=True)
        assert self._own is not None
        control = self._memory.words(self._own, peer_layout.CONTROL_WORDS)
        fault = peer_trial.find_fault(self, control)
        if fault is not None:
            raise PeerError(fault)
        self.table = self._make_table(self._spin_s, is_trial=False)

    def _make_table(self, spin_s: float, *, is_trial: bool) -> Tensor:
        words = peer_layout.table(
            self._layout, self.tp_rank, self._buffers, spin_s=spin_s, is_trial=is_trial
        )
        return torch.tensor(words, dtype=torch.int64)

    def _agree(self, do: Callable[..., None], *arguments: object) -> str | None:
        """Why it did not work out on some rank; the same answer on all."""
        reason = ""
        try:
            do(*arguments)
        except (PeerError, RuntimeError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
        return _first([answer.decode() for answer in self._exchange(reason.encode())])


def exchange_over(store: Store, tp_rank: int, tp_size: int) -> Exchange:
    """A PeerGroup's exchange over a store that all ranks have."""
    turns = itertools.count()

    def exchange(own: bytes) -> list[bytes]:
        turn = f"peers/{next(turns)}"
        store.set(f"{turn}/{tp_rank}", own.hex())
        answers = (store.get(f"{turn}/{other}") for other in range(tp_size))
        return [bytes.fromhex(answer.decode()) for answer in answers]

    return exchange


def _first(reasons: list[str]) -> str | None:
    """With the rank that it is from."""
    for other, reason in enumerate(reasons):
        if reason:
            return f"rank {other}: {reason}"
    return None
