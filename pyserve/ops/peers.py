"""PeerGroup: communication between the cards of one machine through each other's memory.

All ranks make the same calls of these ops (cuda/gpu/comm) in the same order with the same shapes,
each on a single stream; they may be recorded in CUDA graphs. The host only launches them. Sums are
float32 in the order of ranks, and bit-equal on all ranks. A rank that waits for another one longer
than `spin_s` fails with a CUDA error. The plain-torch specification is in reference_comm.py.
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
SPIN_S = 20.0  # time limit of a wait for another rank, beyond that of the server's watchdog
TRIAL_SPIN_S = 5.0  # the same in the self-test, during which another rank may load kernels
MAX_HIDDEN = 16384  # the longest row that can be summed and normed in one kernel: kMaxNormHidden
_HALF = (torch.bfloat16, torch.float16)
_ABSENT = -0x7FFF8000  # kAbsent in one_shot.cuh, as int32: marks words that have not arrived


class Store(Protocol):
    """The methods of torch.distributed's Store that are used."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        """The value of a key; waits until it is set."""


class _Offer(msgspec.Struct, frozen=True):
    """What a rank tells the others about its buffer; `reason` says why it has none."""

    card_id: str
    handle: bytes
    num_bytes: int
    reason: str = ""


class PeerGroup:
    """tp_size ranks, each with a card of its own in a process of its own.

    reason     why the cards cannot use each other's memory, for the log; the same on all ranks,
               which are closed then. None: they can, and the self-test has passed.
    num_bytes  bytes of this card's memory that the group holds.
    table      int64 [PEER_WORDS] on the host, an argument of the native ops; None if there is a
               reason, and after `close`.
    """

    def __init__(
        self, tp_rank: int, tp_size: int, device: torch.device, exchange: Exchange, *,
        memory: PeerMemory | None = None, spin_s: float = SPIN_S,
    ) -> None:  # fmt: skip
        """Called on all ranks at the same time.

        exchange  exchange(own) returns the bytes of all ranks, in rank order. It is called a few
                  times, and also serves as a barrier. Its exceptions are passed on.
        memory    None: that of the CUDA device.
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
                exchange(b"")  # a barrier: no rank may free its buffer while others have it mapped
                self.close()

    def takes(self, x: Tensor) -> bool:
        """Whether all_reduce_ supports x; otherwise (size, dtype, alignment) NCCL is needed.

        All ranks get the same answer if their tensors have the same shape, strides and alignment.
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
        """x := the sum of all ranks' x, in place. Raises RuntimeError unless `takes(x)`."""
        if x.numel() * x.element_size() <= self._layout.limits.one_shot:
            _ops.all_reduce_one_shot(x, self.table)
        else:
            _ops.all_reduce_two_shot(x, self.table)

    def all_reduce_add_norm(
        self, partial: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor,
        offset: float = 0.0,
    ) -> None:  # fmt: skip
        """residual += the sum of all ranks' partial; out = rms_norm(residual). One kernel or two.

        partial, residual, out [num_rows, hidden] and weight [hidden] have one 16-bit dtype. partial
        may be overwritten. The sum is rounded before it is added, so that a row's bits do not
        depend on the number of rows. Raises RuntimeError unless `takes(partial)`.
        """
        num_bytes, hidden = partial.numel() * partial.element_size(), len(weight)
        is_one = num_bytes <= self._layout.limits.one_shot and hidden <= MAX_HIDDEN
        if is_one and hidden % 8 == 0:
            _ops.all_reduce_add_norm(partial, residual, weight, eps, offset, out, self.table)
        else:
            self.all_reduce_(partial)
            ops.add_rms_norm(partial, residual, weight, eps, out, offset)

    def gather_parts(self, local: Tensor, out: Tensor | None) -> None:
        """On rank 0: out[r] := rank r's local. On the other ranks `out` is None.

        local [num_rows, n], out [tp_size, num_rows, n]; float32, bfloat16 or float16. Rows and
        parts may have any strides, but if n elements are a multiple of 16 bytes, strides and
        addresses must be too. Rank 0's local may be out[0].
        """
        num_rows = len(local)
        row_bytes = max(local.shape[1] * local.element_size(), 1)
        most = max(self._layout.limits.gather // row_bytes, 1)  # rows for each kernel
        for begin in range(0, num_rows, most):
            rows = slice(begin, min(begin + most, num_rows))
            part = None if out is None else out[:, rows]
            _ops.gather_rows(local[rows], part, self.table)

    def gather_rows(self, local: Tensor, out: Tensor | None) -> None:
        """On rank 0: out [num_rows, tp_size * n] := all ranks' local [num_rows, n], side by side.
        Otherwise as gather_parts."""
        parts = None
        if out is not None:
            num_rows, n = local.shape
            parts = out.view(num_rows, self.tp_size, n).transpose(0, 1)
        self.gather_parts(local, parts)

    def broadcast_tokens(self, tokens: Tensor) -> None:
        """tokens int32 [n] := those of rank 0, in place."""
        most = peer_layout.MAX_PEER_TOKENS
        for begin in range(0, len(tokens), most):
            _ops.broadcast_tokens(tokens[begin : begin + most], self.table)

    def close(self) -> None:
        """Unmap the others' buffers and free our own; no call may follow. Harmless when repeated.

        The other ranks write to this rank's buffer, so their last step must have ended.
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
        """Allocate our buffer, and initialise its one-shot area as absent and the rest as zero."""
        places = self._layout
        self._own = self._memory.allocate(places.num_bytes)
        self.num_bytes = places.num_bytes
        words = self._memory.words(self._own, places.num_bytes // 4)
        words.zero_()
        words[places.one_shot // 4 : places.one_shot_end // 4] = _ABSENT
        handle = self._memory.export(self._own)  # also waits until the above is written
        return _Offer(self._memory.card_id(), handle, places.num_bytes)

    def _open(self, offers: list[_Offer]) -> None:
        """Map the buffers of all other ranks. Raises PeerError."""
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
        """Run the self-test, in which waits give up without a CUDA error; then make the real table.
        Raises PeerError."""
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
        """Call do(*arguments) on all ranks; returns the first rank's error, the same on all."""
        reason = ""
        try:
            do(*arguments)
        except (PeerError, RuntimeError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
        return _first([answer.decode() for answer in self._exchange(reason.encode())])


def exchange_over(store: Store, tp_rank: int, tp_size: int) -> Exchange:
    """Make the `exchange` of a PeerGroup from a store that all ranks share."""
    turns = itertools.count()

    def exchange(own: bytes) -> list[bytes]:
        turn = f"peers/{next(turns)}"
        store.set(f"{turn}/{tp_rank}", own.hex())
        answers = (store.get(f"{turn}/{other}") for other in range(tp_size))
        return [bytes.fromhex(answer.decode()) for answer in answers]

    return exchange


def _first(reasons: list[str]) -> str | None:
    """The first reason that is not empty, with its rank; None if there is none."""
    for other, reason in enumerate(reasons):
        if reason:
            return f"rank {other}: {reason}"
    return None
