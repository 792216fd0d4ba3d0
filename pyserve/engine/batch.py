"""The input and the output of a step, as values.

The scheduler fills a Step, `pack` writes it as bytes, a runner executes those bytes, and
Engine.update reads the StepOutput together with the Step. A Step holds only what has changed since
the last one: positions, KV slots and sequence lengths are derived on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pyserve import ops
from pyserve.client import Adapter, TokenLogprobs
from pyserve.engine.block_manager import num_blocks_for
from pyserve.engine.sequence import Sequence
from pyserve.ops import step_layout as layout

TILE_ROWS = 128  # rows that a tile of a large matrix product has
MIN_UPDATE_WORDS = 2**16  # room for the slot and block updates of many short sequences


class Asked(NamedTuple):
    """The rows of a step whose log probabilities are requested (asked.py fills it).

    sampled_rows    indices among the sampled rows, ascending.
    prompt_rows     indices among the step's tokens: those that are followed by a prompt token whose
                    log probability is requested.
    next_token_ids  that following token, for each of prompt_rows.
    """

    sampled_rows: list[int]
    prompt_rows: list[int]
    next_token_ids: list[int]


NOTHING_ASKED = Asked([], [], [])


class AdapterLoad(NamedTuple):
    """An adapter that must be copied into an adapter slot before the step runs."""

    slot: int
    adapter: Adapter


class PromptSpan(NamedTuple):
    """The part of Asked.prompt_rows that belongs to one row.

    seq, generation  the sequence, and which of its stays in a slot this was.
    begin, num_rows  positions begin to begin + num_rows - 1 of the sequence.
    """

    seq: Sequence
    generation: int
    begin: int
    num_rows: int


@dataclass(slots=True, eq=False)
class Step:
    """The rows of one step. Each row is the next query_len tokens of one sequence.

    The lists of the first group have one entry per row.

    seqs, generations   the sequence of each row, and which of its stays in a slot this is: results
                        for a sequence that has left its slot since are dropped.
    row_slots, query_lens, host_tokens, row_samples, block_updates, slot_updates
                        as ops.pack_step takes them.
    seq_lens            tokens of the sequence whose KV is valid once the step has run.
    asked, prompt_spans the log probabilities that are requested, as asked.py fills them.
    adapter_loads       adapters that the step uses and that are not in their slots yet.
    adapter_starts      index of the first token of each adapter slot, as ops/lora.py takes it; the
                        rows are then sorted by slot. Empty if no row uses an adapter.
    """

    seqs: list[Sequence] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    row_slots: list[int] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    seq_lens: list[int] = field(default_factory=list)
    host_tokens: list[list[int] | None] = field(default_factory=list)
    row_samples: list[bool] = field(default_factory=list)

    block_updates: list[int] = field(default_factory=list)
    slot_updates: list[bytes] = field(default_factory=list)
    num_update_words: int = 0  # words of the packed step that admitted sequences take
    num_tokens: int = 0
    num_prompt_tokens: int = 0  # those of num_tokens in rows that prefill

    asked: Asked = NOTHING_ASKED
    prompt_spans: list[PromptSpan] = field(default_factory=list)
    adapter_loads: list[AdapterLoad] = field(default_factory=list)
    adapter_starts: list[int] = field(default_factory=list)
    _shape: StepShape | None = field(default=None, init=False)

    @property
    def shape(self) -> StepShape:
        """The shape in the header of the packed step. No row may change after the first call."""
        if self._shape is None:
            self._shape = StepShape(
                self.num_tokens, len(self.row_slots), sum(self.row_samples), max(self.query_lens),
                has_adapters=bool(self.adapter_starts),
            )  # fmt: skip
        return self._shape


@dataclass(slots=True, eq=False)
class StepOutput:
    """The results of a step.

    token_ids  for each sampled row in row order: its new tokens; [-1] if its logits are NaN, [] if
               the row is pooled.
    logprobs   for each of Asked.sampled_rows; None if none are requested.
    prompt_logprobs
               for each of Asked.prompt_rows; None if none are requested.
    pooled     float32 [width] for each sampled row of a model that pools; None if it samples.
    """

    token_ids: list[list[int]]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    pooled: list[npt.NDArray[np.float32]] | None = None

    @classmethod
    def of_pooled(cls, vectors: npt.NDArray[np.float32]) -> StepOutput:
        """The output of a step whose sampled rows are pooled: `vectors` [num_samples, width]."""
        token_ids = [[] if np.isfinite(vector).all() else [-1] for vector in vectors]
        return cls(token_ids, pooled=list(vectors))


class StepShape(NamedTuple):
    """What the host must know of a packed step to launch it; all else stays in its bytes."""

    num_tokens: int
    num_rows: int
    num_samples: int  # sampled rows
    max_query_len: int
    has_adapters: bool = False

    @classmethod
    def of(cls, words: npt.NDArray[np.int32]) -> StepShape:
        """The shape that the header of a packed step tells."""
        header = words[: layout.HEADER_WORDS].tolist()
        return cls(
            num_tokens=header[layout.HEADER_NUM_TOKENS],
            num_rows=header[layout.HEADER_NUM_ROWS],
            num_samples=header[layout.HEADER_NUM_SAMPLES],
            max_query_len=header[layout.HEADER_MAX_QUERY_LEN],
            has_adapters=header[layout.HEADER_NUM_ADAPTER_SLOTS] > 0,
        )


def pack(step: Step, buffer: npt.NDArray[np.int32]) -> int:
    """Pack `step` into `buffer` (int32 [max_step_words]); returns the number of words used."""
    return ops.pack_step(
        buffer,
        step.row_slots,
        step.query_lens,
        step.host_tokens,
        step.row_samples,
        step.block_updates,
        step.slot_updates,
        step.adapter_starts,
    )


def padded_size(count: int, limit: int) -> int:
    """The size that `count` tokens or rows (at least 1) are padded to, at most `limit`.

    There are few padded sizes, as each has a recorded graph on a card and compiled code in matrix
    libraries: powers of two up to 16, multiples of 16 up to 128, then multiples of 32 or more,
    chosen so that padding is less than a quarter. Above 1,024 every multiple of TILE_ROWS is a
    size: no graphs are recorded there, and a matrix product computes whole tiles in any case.
    """
    if count <= 16:
        size = 1 << (count - 1).bit_length()
    else:
        multiple = min(max(16, 1 << ((count - 1).bit_length() - 3)), TILE_ROWS)
        size = -(-count // multiple) * multiple
    return min(size, limit)


def padded_sizes(limit: int) -> list[int]:
    """All sizes that padded_size returns for counts up to `limit`, ascending."""
    sizes = [1]
    while sizes[-1] < limit:
        sizes.append(padded_size(sizes[-1] + 1, limit))
    return sizes


def max_update_words(max_model_len: int, block_size: int) -> int:
    """int32 words that admissions may take in one step: enough for the longest sequence alone, or
    for many short ones."""
    max_slot_update = layout.SLOT_UPDATE_WORDS + layout.SLOT_WORDS + max_model_len
    max_block_updates = layout.BLOCK_UPDATE_WORDS * num_blocks_for(max_model_len, block_size)
    return max(max_slot_update + max_block_updates, MIN_UPDATE_WORDS)


def max_step_words(
    max_num_batched_tokens: int, num_slots: int, *, max_model_len: int, block_size: int,
    num_adapter_slots: int = 0,
) -> int:  # fmt: skip
    """int32 words of the largest packed step: every row grows by a block, all tokens come from the
    host, and admissions take all that they may."""
    return (
        layout.HEADER_WORDS
        + (num_adapter_slots + 1 if num_adapter_slots else 0)
        + (layout.ROW_WORDS + layout.BLOCK_UPDATE_WORDS) * num_slots
        + max_num_batched_tokens
        + max_update_words(max_model_len, block_size)
    )
