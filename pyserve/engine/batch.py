"""What goes into a step and what comes out of it, as values.

The scheduler fills a Step, `pack` writes it as bytes, a runner executes those, and update() reads
the StepOutput beside the Step. A Step holds changes only: positions, KV slots and lengths are
derived on the device.
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

TILE_ROWS = 128  # that matrix products of many rows compute at once
MIN_UPDATE_WORDS = 2**16  # room for the slot and block updates of many short sequences


class Asked(NamedTuple):
    """What a step is asked about how likely tokens are (asked.py).

    sampled_rows    of the sampled rows, ascending.
    prompt_rows     of the step's tokens: those behind which a token of a prompt comes.
    next_token_ids  that token.
    """

    sampled_rows: list[int]
    prompt_rows: list[int]
    next_token_ids: list[int]


NOTHING_ASKED = Asked([], [], [])


class AdapterLoad(NamedTuple):
    """An adapter that is put into a slot before the step runs."""

    slot: int
    adapter: Adapter


class PromptSpan(NamedTuple):
    """A row's part of Asked.prompt_rows: positions of its sequence from `begin` on."""

    seq: Sequence
    generation: int
    begin: int
    num_rows: int


@dataclass(slots=True, eq=False)
class Step:
    """Rows of one step; the lists of the first group have one entry per row.

    seqs, generations   whose rows they are, and in which stay in a slot.
    row_slots, query_lens, host_tokens, row_samples, block_updates, slot_updates
                        as ops.pack_step takes them.
    seq_lens            tokens of the sequence whose KV is valid once the step has run.
    asked, prompt_spans as asked.py fills them; NOTHING_ASKED and none where nobody asks.
    adapter_loads       what must lie in its slot when the step runs, and does not yet.
    adapter_starts      where the tokens of each adapter slot begin, as ops/lora.py has it: the rows
                        are sorted by it then. Empty where no row uses an adapter.
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
    num_update_words: int = 0  # of the admitted sequences
    num_tokens: int = 0
    num_prompt_tokens: int = 0  # of them, in rows that do not decode

    asked: Asked = NOTHING_ASKED
    prompt_spans: list[PromptSpan] = field(default_factory=list)
    adapter_loads: list[AdapterLoad] = field(default_factory=list)
    adapter_starts: list[int] = field(default_factory=list)
    _shape: StepShape | None = field(default=None, init=False)

    @property
    def shape(self) -> StepShape:
        """As the header of the packed step will tell it. From the first call on, no row changes."""
        if self._shape is None:
            self._shape = StepShape(
                self.num_tokens, len(self.row_slots), sum(self.row_samples), max(self.query_lens),
                has_adapters=bool(self.adapter_starts),
            )  # fmt: skip
        return self._shape


@dataclass(slots=True, eq=False)
class StepOutput:
    """What a step has sampled.

    token_ids  of each sampled row, in row order; [-1] where its logits are NaN; [] where it is
               pooled.
    logprobs   of the sampled rows that ask, in row order; None where the step is asked nothing.
    prompt_logprobs
               of Asked.prompt_rows; likewise.
    pooled     float32 [width] of each sampled row, of a model that pools; None: it samples.
    """

    token_ids: list[list[int]]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    pooled: list[npt.NDArray[np.float32]] | None = None

    @classmethod
    def of_pooled(cls, vectors: npt.NDArray[np.float32]) -> StepOutput:
        """`vectors` are [num_samples, width]."""
        token_ids = [[] if np.isfinite(vector).all() else [-1] for vector in vectors]
        return cls(token_ids, pooled=list(vectors))


class StepShape(NamedTuple):
    """All that must be known of a packed step to launch it; the rest stays in its bytes."""

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
    """The shape that `count` tokens or rows (at least 1) are run in, at most `limit`.

    Matrix libraries keep compiled code, and a card a recorded graph, for each shape that they have
    met, so small shapes are few: powers of two up to 16, then multiples of 16 or more that waste
    less than a quarter. Above 1,024 they are the multiples of TILE_ROWS, which cost a matrix
    product what the rows do.
    """
    if count <= 16:
        size = 1 << (count - 1).bit_length()
    else:
        multiple = min(max(16, 1 << ((count - 1).bit_length() - 3)), TILE_ROWS)
        size = -(-count // multiple) * multiple
    return min(size, limit)


def padded_sizes(limit: int) -> list[int]:
    """All that padded_size makes of a count, the smallest first."""
    sizes = [1]
    while sizes[-1] < limit:
        sizes.append(padded_size(sizes[-1] + 1, limit))
    return sizes


def max_update_words(max_model_len: int, block_size: int) -> int:
    """Words that the admissions of one step may take: the largest sequence fits, or many small."""
    max_slot_update = layout.SLOT_UPDATE_WORDS + layout.SLOT_WORDS + max_model_len
    max_block_updates = layout.BLOCK_UPDATE_WORDS * num_blocks_for(max_model_len, block_size)
    return max(max_slot_update + max_block_updates, MIN_UPDATE_WORDS)


def max_step_words(
    max_num_batched_tokens: int, num_slots: int, *, max_model_len: int, block_size: int,
    num_adapter_slots: int = 0,
) -> int:  # fmt: skip
    """Words of the largest packed step: rows that grow by a block, host tokens, admissions."""
    return (
        layout.HEADER_WORDS
        + (num_adapter_slots + 1 if num_adapter_slots else 0)
        + (layout.ROW_WORDS + layout.BLOCK_UPDATE_WORDS) * num_slots
        + max_num_batched_tokens
        + max_update_words(max_model_len, block_size)
    )
