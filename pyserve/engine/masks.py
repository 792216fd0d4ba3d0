"""Which tokens the rows of a step may draw: what the sequences' constraints allow, as bits.

A step that samples for a sequence with a constraint waits between its two launches (Pending) until
the tokens of all steps before it have been accepted. Its masks are then filled on worker threads,
while the forward pass runs and the event loop delivers tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as SequenceABC
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyserve import log
from pyserve.engine.batch import Step
from pyserve.engine.sequence import Sequence
from pyserve.errors import EngineError, InvalidRequestError, PyserveError
from pyserve.words import counted

MAX_THREADS = 8
MIN_ROWS = 4  # of a thread: handing over fewer takes longer than filling them


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

    masked_rows  the row of each among the sampled ones, in ascending order.
    """

    masked_rows: list[int]
    chunks: list[list[MaskedRow]]
    errors: list[asyncio.Future[list[PyserveError | None]]]

    async def wait(self) -> list[Failure]:
        """Until they are filled; the sequences that cannot go on, whose draws do not matter."""
        errors = await asyncio.gather(*self.errors)
        return [
            Failure(row, failed)
            for chunk, chunk_errors in zip(self.chunks, errors, strict=True)
            for row, error in zip(chunk, chunk_errors, strict=True)
            if (failed := _error_of(row.seq) or error) is not None
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
        loop, num_chunks = asyncio.get_running_loop(), -(-len(rows) // MIN_ROWS)
        num_chunks = min(num_chunks, self._num_threads)
        chunks = [rows[i::num_chunks] for i in range(num_chunks)]
        errors = [
            loop.run_in_executor(
                self._pool, self.fill_rows, chunk, bitmask[i : len(rows) : num_chunks]
            )
            for i, chunk in enumerate(chunks)
        ]
        return Filling([row.row for row in rows], chunks, errors)

    def fill_rows(
        self, rows: SequenceABC[MaskedRow], bitmask: NDArray[np.int32]
    ) -> list[PyserveError | None]:
        """On a thread: the masks of some rows, and what each fails with where nothing is left."""
        return [self._fill_row(row.seq, words) for row, words in zip(rows, bitmask, strict=True)]

    def close(self) -> None:
        """End the threads. Harmless when called again."""
        self._pool.shutdown(cancel_futures=True)

    def _fill_row(self, seq: Sequence, words: NDArray[np.int32]) -> PyserveError | None:
        assert seq.constraint is not None
        try:
            seq.constraint.fill_bitmask(words)
        except Exception:
            return _broken("fill_bitmask")
        bits = words.view(np.uint32)
        bits[-1] &= self._last_bits
        if not bits.any():
            return InvalidRequestError(
                "the constraints on the answer contradict each other, or its grammar has no end: "
                f"no token is allowed after {counted(_num_output_tokens(seq), 'output token')}"
            )
        error = too_short(seq)
        if error is not None:  # the device masks these, too: is anything left beside them?
            for token_id in seq.stop_token_ids:
                bits[token_id >> 5] &= ~np.uint32(1 << (token_id & 31))
            return None if bits.any() else error
        return None


def _num_output_tokens(seq: Sequence) -> int:
    return len(seq.token_ids) - seq.num_prompt_tokens


def _error_of(seq: Sequence) -> PyserveError | None:
    assert seq.constraint is not None
    error = seq.constraint.error
    return None if error is None else InvalidRequestError(f"the answer cannot go on: {error}")


def _broken(call: str) -> PyserveError:
    """Of the exception that is being handled: a bug of the constraint's."""
    log.get_logger().exception("a constraint has failed in %s", call)
    return EngineError("what constrains the tokens of this answer has failed")
