"""Which tokens the rows of a step may draw: what the sequences' constraints allow, as bits.

A step that samples for a sequence with a constraint waits between its two launches (Pending) until
the tokens of all steps before it have been accepted. Its masks are then filled on worker threads,
while the forward pass runs and the event loop delivers tokens.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence as SequenceABC
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyserve import log
from pyserve.client import Constraint, MaskFiller
from pyserve.engine.batch import Step
from pyserve.engine.sequence import Sequence
from pyserve.errors import EngineError, InvalidRequestError, PyserveError
from pyserve.words import counted

MAX_THREADS = 8
MIN_SHARE_S = 0.004  # of a thread
MIN_MASK_S = 5e-5  # on average, for two threads: they hand the interpreter's lock to each other
OTHER_MASK_S = 3e-5  # of constraints that do not tell


class MaskedRow(NamedTuple):
    """A row of a step that must not draw any token.

    row         its index among the step's sampled rows.
    generation  of the stay in a slot that the row belongs to.
    """

    row: int
    seq: Sequence
    generation: int


class Failure(NamedTuple):
    """A sequence that cannot go on, and why."""

    row: MaskedRow
    error: PyserveError


def bitmask_words(vocab_size: int) -> int:
    """Words of 32 bits that a mask has."""
    return -(-vocab_size // 32)


def is_host_dependent(step: Step) -> bool:
    """Whether sampling `step` needs what the steps before it have sampled."""
    return any(
        seq.constraint is not None and is_sampled
        for seq, is_sampled in zip(step.seqs, step.row_samples, strict=True)
    )


def masked_rows(step: Step) -> list[MaskedRow]:
    """The rows of `step` that need a mask, once all tokens before it have been accepted.

    A row whose sequence has left its slot since needs none: what it draws will be dropped.
    """
    sampled = [
        (seq, generation)
        for seq, generation, is_sampled in zip(
            step.seqs, step.generations, step.row_samples, strict=True
        )
        if is_sampled
    ]
    return [
        MaskedRow(row, seq, generation)
        for row, (seq, generation) in enumerate(sampled)
        if seq.constraint is not None
        and seq.generation == generation
        and not seq.constraint.is_free
    ]


def accept(seq: Sequence, token_ids: list[int]) -> PyserveError | None:
    """Tell the constraint of `seq` what has come; what it fails with where that is wrong."""
    if seq.constraint is None:
        return None
    try:
        seq.constraint.accept(token_ids)
    except Exception:
        return _broken("accept")
    return _error_of(seq)


def is_end_void(seq: Sequence) -> bool:
    """Whether the stop token that has come last does not end `seq`."""
    return seq.constraint is not None and seq.constraint.is_end_void


def too_short(seq: Sequence) -> PyserveError | None:
    """What `seq` fails with if it ends now, of itself."""
    num_tokens, min_tokens = len(seq.token_ids) - seq.num_prompt_tokens, seq.params.min_tokens
    if num_tokens >= min_tokens:
        return None
    return InvalidRequestError(
        f"min_tokens is {min_tokens}, and after {counted(num_tokens, 'token')} the constraints on "
        "the answer allow nothing but its end",
        "min_tokens",
    )


class Filling(NamedTuple):
    """Masks that threads are filling.

    rows    that are masked, in the order of their masks.
    errors  of each thread: the rows that cannot go on, by their place in `rows`, and why.
    """

    rows: list[MaskedRow]
    errors: list[Future[dict[int, PyserveError]]]

    @property
    def masked_rows(self) -> list[int]:
        """The row of each among the sampled ones, ascending."""
        return [row.row for row in self.rows]

    def is_soon_over(self, timeout_s: float) -> bool:
        """Whether they are filled within so long; the calling thread sleeps until then."""
        return not wait(self.errors, timeout_s).not_done

    async def wait(self) -> list[Failure]:
        """Until they are filled; the sequences that cannot go on, whose draws do not matter."""
        errors: dict[int, PyserveError] = {}
        for future in self.errors:
            found = future.result() if future.done() else await asyncio.wrap_future(future)
            errors.update(found)
        return [
            Failure(row, failed)
            for index, row in enumerate(self.rows)
            if (failed := _error_of(row.seq) or errors.get(index)) is not None
        ]


class MaskWorkers:
    """Threads that fill masks; there are none before the first is needed."""

    def __init__(self, num_threads: int, vocab_size: int) -> None:
        self._num_threads = min(num_threads, MAX_THREADS)
        self._pool = ThreadPoolExecutor(self._num_threads, "mask")
        # Of the last word, the bits that stand for tokens.
        self._last_bits = np.uint32(2 ** ((vocab_size - 1) % 32 + 1) - 1)

    def fill(self, step: Step, bitmask: NDArray[np.int32]) -> Filling:
        """Begin to fill the first masks of `bitmask`, int32 [num_slots, ceil(vocab_size / 32)]."""
        rows = masked_rows(step)
        seqs = [row.seq for row in rows]
        shares = _shares(seqs, self._num_threads)
        fill = partial(self.fill_rows, seqs, bitmask, is_alone=len(shares) == 1)
        return Filling(rows, [self._pool.submit(fill, share) for share in shares])

    def fill_rows(
        self, seqs: SequenceABC[Sequence], bitmask: NDArray[np.int32], rows: SequenceABC[int], *,
        is_alone: bool,
    ) -> dict[int, PyserveError]:  # fmt: skip
        """On a thread: `rows` of `bitmask` for the sequences there; the errors of those that have
        nothing left.
        """
        errors: dict[int, PyserveError] = {}
        fillers: dict[int, tuple[MaskFiller, list[int]]] = {}
        for row in rows:
            constraint = _constraint_of(seqs[row])
            filler = constraint.filler
            if filler is not None:
                fillers.setdefault(id(filler), (filler, []))[1].append(row)
                continue
            try:
                constraint.fill_bitmask(bitmask[row])
            except Exception:
                errors[row] = _broken("fill_bitmask")
        for filler, its_rows in fillers.values():
            try:
                constraints = [seqs[row].constraint for row in its_rows]
                filler.fill(constraints, its_rows, bitmask, is_alone=is_alone)
            except Exception:
                errors |= dict.fromkeys(its_rows, _broken("fill_bitmask"))
        for row in rows:
            if row not in errors and (error := self._trim(seqs[row], bitmask[row])) is not None:
                errors[row] = error
        return errors

    def close(self) -> None:
        """End the threads. Harmless when called again."""
        self._pool.shutdown(cancel_futures=True)

    def _trim(self, seq: Sequence, words: NDArray[np.int32]) -> PyserveError | None:
        """Leave the bits of tokens that may come next; why there is none, if so."""
        bits = words.view(np.uint32)
        bits[-1] &= self._last_bits
        if not bits.any():
            return InvalidRequestError(
                "the constraints on the answer contradict each other, or its grammar has no end: "
                f"no token is allowed after {counted(_num_output_tokens(seq), 'output token')}"
            )
        error = too_short(seq) if seq.params.min_tokens else None
        if error is not None:  # the device masks these, too: is anything left beside them?
            for token_id in seq.stop_token_ids:
                bits[token_id >> 5] &= ~np.uint32(1 << (token_id & 31))
            return None if bits.any() else error
        return None


def _shares(seqs: SequenceABC[Sequence], max_threads: int) -> list[list[int]]:
    """Each thread's part of the indices of `seqs`: about as much work, and what cannot be done side
    by side together.
    """
    groups: dict[object, tuple[float, list[int]]] = {}  # seconds, indices
    total_s = 0.0
    for index, seq in enumerate(seqs):
        constraint, key, mask_s = _constraint_of(seq), index, OTHER_MASK_S
        if (filler := constraint.filler) is not None:
            source, mask_s = filler.work(constraint)
            key = id(source)
        group_s, group = groups.get(key, (0.0, []))
        group.append(index)
        groups[key] = group_s + mask_s, group
        total_s += mask_s
    num_threads = min(max_threads, len(groups), math.ceil(total_s / MIN_SHARE_S))
    if total_s < len(seqs) * MIN_MASK_S:
        num_threads = min(num_threads, 1)
    loads = [0.0] * num_threads
    shares: list[list[int]] = [[] for _ in loads]
    for group_s, group in sorted(groups.values(), reverse=True):
        least = loads.index(min(loads))
        loads[least] += group_s
        shares[least] += group
    return shares


def _num_output_tokens(seq: Sequence) -> int:
    return len(seq.token_ids) - seq.num_prompt_tokens


def _constraint_of(seq: Sequence) -> Constraint:
    assert seq.constraint is not None
    return seq.constraint


def _error_of(seq: Sequence) -> PyserveError | None:
    error = _constraint_of(seq).error
    return None if error is None else InvalidRequestError(f"the answer cannot go on: {error}")


def _broken(call: str) -> PyserveError:
    """Of the exception that is being handled: a bug of the constraint's."""
    log.get_logger().exception("a constraint has failed in %s", call)
    return EngineError("what constrains the tokens of this answer has failed")
