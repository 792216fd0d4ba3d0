"""Token masks: a bitmask of the tokens that each sequence's constraint allows it to sample next.

A step that samples for a constrained sequence waits between its forward pass and its sampling (see
Pending) until the constraint has accepted the tokens of all earlier steps. Worker threads then fill
the masks while the forward pass runs and the event loop delivers tokens.
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
MIN_SHARE_S = 0.004  # another thread is used for every so many seconds of work
# If a mask takes less than this on average, one thread fills all of them: several would mostly pass
# the GIL to each other.
MIN_MASK_S = 5e-5
OTHER_MASK_S = 3e-5  # assumed for constraints without a MaskFiller, which give no estimate


class MaskedRow(NamedTuple):
    """A sampled row of a step whose sequence may draw only some of the tokens.

    row         its index among the step's sampled rows.
    generation  Sequence.generation when the step was scheduled.
    """

    row: int
    seq: Sequence
    generation: int


class Failure(NamedTuple):
    """A sequence that cannot continue, and the error to fail it with."""

    row: MaskedRow
    error: PyserveError


def bitmask_words(vocab_size: int) -> int:
    """Number of 32-bit words in a mask of vocab_size bits."""
    return -(-vocab_size // 32)


def is_host_dependent(step: Step) -> bool:
    """Whether sampling `step` needs what the steps before it have sampled."""
    return any(
        seq.constraint is not None and is_sampled
        for seq, is_sampled in zip(step.seqs, step.row_samples, strict=True)
    )


def masked_rows(step: Step) -> list[MaskedRow]:
    """The rows of `step` that need a mask; called once all earlier tokens have been accepted.

    A row whose sequence has left its slot since needs none, because its token will be dropped.
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
    """Pass sampled tokens to the constraint of `seq`; returns the error if it rejects them."""
    if seq.constraint is None:
        return None
    try:
        seq.constraint.accept(token_ids)
    except Exception:
        return _broken("accept")
    return _error_of(seq)


def is_end_void(seq: Sequence) -> bool:
    """Whether the constraint of `seq` demands more output, so that a stop token does not end it."""
    return seq.constraint is not None and seq.constraint.is_end_void


def too_short(seq: Sequence) -> PyserveError | None:
    """The error of a sequence that would end now without min_tokens; None where it has enough."""
    num_tokens, min_tokens = len(seq.token_ids) - seq.num_prompt_tokens, seq.params.min_tokens
    if num_tokens >= min_tokens:
        return None
    return InvalidRequestError(
        f"min_tokens is {min_tokens}, and after {counted(num_tokens, 'token')} the constraints on "
        "the answer allow nothing but its end",
        "min_tokens",
    )


class Filling(NamedTuple):
    """Masks that worker threads are filling.

    rows    the masked rows, in the order of their masks in the bitmask.
    errors  one future per thread: a dict from the index in `rows` to the error of that row.
    """

    rows: list[MaskedRow]
    errors: list[Future[dict[int, PyserveError]]]

    @property
    def masked_rows(self) -> list[int]:
        """The index of each masked row among the step's sampled rows, ascending."""
        return [row.row for row in self.rows]

    def is_soon_over(self, timeout_s: float) -> bool:
        """Block the calling thread for up to timeout_s; whether all masks are filled by then."""
        return not wait(self.errors, timeout_s).not_done

    async def wait(self) -> list[Failure]:
        """Wait until all masks are filled; returns the sequences that cannot continue.

        What those sequences sample does not matter.
        """
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
    """A pool of at most MAX_THREADS threads that fill masks, started when first needed."""

    def __init__(self, num_threads: int, vocab_size: int) -> None:
        self._num_threads = min(num_threads, MAX_THREADS)
        self._pool = ThreadPoolExecutor(self._num_threads, "mask")
        # The bits of a mask's last word that stand for tokens.
        self._last_bits = np.uint32(2 ** ((vocab_size - 1) % 32 + 1) - 1)

    def fill(self, step: Step, bitmask: NDArray[np.int32]) -> Filling:
        """Start to fill the masks of `step` into the first rows of `bitmask`.

        bitmask  int32 [num_slots, ceil(vocab_size / 32)] in host memory.
        """
        rows = masked_rows(step)
        seqs = [row.seq for row in rows]
        shares = _shares(seqs, self._num_threads)
        fill = partial(self.fill_rows, seqs, bitmask, is_alone=len(shares) == 1)
        return Filling(rows, [self._pool.submit(fill, share) for share in shares])

    def fill_rows(
        self, seqs: SequenceABC[Sequence], bitmask: NDArray[np.int32], rows: SequenceABC[int], *,
        is_alone: bool,
    ) -> dict[int, PyserveError]:  # fmt: skip
        """Fill the given `rows` of `bitmask`, where row i belongs to seqs[i]. Runs on a thread.

        is_alone  no other thread fills masks at the same time.

        Returns the error of each row whose constraint failed or allows no token.
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
        """Clear the padding bits of a mask; returns an error if no token is left to sample."""
        bits = words.view(np.uint32)
        bits[-1] &= self._last_bits
        if not bits.any():
            return InvalidRequestError(
                "the constraints on the answer contradict each other, or its grammar has no end: "
                f"no token is allowed after {counted(_num_output_tokens(seq), 'output token')}"
            )
        error = too_short(seq) if seq.params.min_tokens else None
        if error is not None:
            # Below min_tokens the device masks stop tokens as well, so something else must be left.
            for token_id in seq.stop_token_ids:
                bits[token_id >> 5] &= ~np.uint32(1 << (token_id & 31))
            return None if bits.any() else error
        return None


def _shares(seqs: SequenceABC[Sequence], max_threads: int) -> list[list[int]]:
    """Divide the indices of `seqs` among threads, with about equal work for each.

    Sequences whose masks come from one source that only one thread may use go to the same thread.
    """
    groups: dict[object, tuple[float, list[int]]] = {}  # source -> (seconds of work, indices)
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
    """Log the exception being handled, a bug of a constraint, and return the error to fail with."""
    log.get_logger().exception("a constraint has failed in %s", call)
    return EngineError("what constrains the tokens of this answer has failed")
