"""A runner without a model: the next token is a hash of all tokens before it, through a paged KV.

It reads packed steps as the plan op does. The KV of a position is a chained hash, written at the KV
slot that the block table gives and read back through it, so that a wrong block, a wrong position or
a block reused too early changes the tokens. `expected_tokens` computes them without any of it.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from pyserve.engine.batch import Step, StepOutput, max_step_words, max_update_words, pack
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.engine import Engine, Pending
from pyserve.engine.masks import bitmask_words
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.slots import SlotAllocator
from pyserve.ops import step_layout as layout
from pyserve.params import SamplingParams
from tests.engine.constraints import Rule

VOCAB_SIZE = 64
POISON = 0x7FFF_FFFF
GREEDY_SEED = 0
ALL_TOKENS = frozenset(range(VOCAB_SIZE))
NO_MASKS: dict[int, NDArray[np.int32]] = {}


def kv_hash(parent: int, token_id: int, position: int) -> int:
    """KV of one position: depends on all tokens up to it, as hidden states do."""
    packed = struct.pack("<qii", parent, token_id, position)
    return int.from_bytes(blake2b(packed, digest_size=7).digest(), "little")


def draw(
    kv: Iterable[int], params: SamplingParams, seed: int, counts: tuple[frozenset[int], list[int]],
    is_banned: bool, allowed: Collection[int] = ALL_TOKENS,
) -> int:  # fmt: skip
    """The token after `kv`; every sampling parameter has its influence. -1: none is allowed."""
    left = set(allowed) - set(params.stop_token_ids) if is_banned else allowed
    if not left:
        return -1
    kv = list(kv)
    key = [
        len(kv),
        params.temperature,
        seed if params.temperature else GREEDY_SEED,
        params.sample_index,
        params.top_k,
        sorted(params.logit_bias.items()),
    ]
    if params.has_penalties:
        key += [params.repetition_penalty, params.presence_penalty, params.frequency_penalty]
        key += [sorted(counts[0]), sorted(counts[1])]
    data = np.asarray(kv, np.int64).tobytes() + repr(key).encode()
    while True:
        digest = blake2b(data, digest_size=8).digest()
        token_id = int.from_bytes(digest, "little") % VOCAB_SIZE
        if token_id in left:
            return token_id
        data = digest


def expected_tokens(
    prompt: list[int], params: SamplingParams, rule: Rule = lambda output: None
) -> list[int]:
    """What a sequence with a given seed must produce, whatever happens around it."""
    assert params.seed is not None
    kv: list[int] = []
    for position, token_id in enumerate(prompt):
        kv.append(kv_hash(kv[-1] if kv else 0, token_id, position))
    output: list[int] = []
    while len(output) < params.max_tokens:
        token_id = draw(
            kv, params, params.seed, (frozenset(prompt), output), len(output) < params.min_tokens,
            ALL_TOKENS if (allowed := rule(output)) is None else allowed,
        )  # fmt: skip
        output.append(token_id)
        if token_id in params.stop_token_ids:
            break
        kv.append(kv_hash(kv[-1], token_id, len(kv)))
    return output


class FakeSlot:
    """What the device would keep in one slot row."""

    def __init__(self, words: np.ndarray) -> None:
        floats = words.view(np.float32)
        head = layout.SLOT_UPDATE_WORDS
        row, float_row = words[head:], floats[head:]
        self.num_computed = int(row[layout.SLOT_NUM_COMPUTED])
        self.last_token = int(row[layout.SLOT_LAST_TOKEN])
        self.min_total_len = int(row[layout.SLOT_MIN_TOTAL_LEN])
        low, high = row[layout.SLOT_SEED_LOW], row[layout.SLOT_SEED_HIGH]
        self.seed = struct.unpack("<q", struct.pack("<ii", low, high))[0]
        at = layout.SLOT_HEADER_WORDS
        num_bias, num_stop = int(row[layout.SLOT_NUM_BIAS]), int(row[layout.SLOT_NUM_STOP])
        bias_ids = row[at : at + num_bias].tolist()
        bias_values = float_row[at + num_bias : at + 2 * num_bias].tolist()
        at += 2 * num_bias
        stop_ids = row[at : at + num_stop].tolist()
        at += num_stop
        num_prompt = int(words[layout.SLOT_UPDATE_NUM_PROMPT_TOKENS])
        num_output = int(words[layout.SLOT_UPDATE_NUM_OUTPUT_TOKENS])
        tokens = row[at:].tolist()
        assert len(tokens) == num_prompt + num_output, "tokens to count"
        self.prompt = frozenset(tokens[:num_prompt])
        self.output: list[int] = tokens[num_prompt:]
        self.params = SamplingParams(
            max_tokens=1,
            temperature=float(float_row[layout.SLOT_TEMPERATURE]),
            top_k=int(row[layout.SLOT_TOP_K]),
            repetition_penalty=float(float_row[layout.SLOT_REPETITION_PENALTY]),
            presence_penalty=float(float_row[layout.SLOT_PRESENCE_PENALTY]),
            frequency_penalty=float(float_row[layout.SLOT_FREQUENCY_PENALTY]),
            sample_index=int(row[layout.SLOT_SAMPLE_INDEX]),
            logit_bias=dict(zip(bias_ids, bias_values, strict=True)),
            stop_token_ids=tuple(stop_ids),
        )
        assert bool(row[layout.SLOT_HAS_PENALTIES]) == self.params.has_penalties


class FakeRunner:
    """Executes at once, in the order of the calls, as a device would; implements engine.Runner.

    on_step     called with each step before it runs; what it raises, the step raises.
    nan_seeds   sequences whose logits are NaN.
    """

    def __init__(
        self, num_blocks: int, block_size: int, num_slots: int, *, max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:  # fmt: skip
        self.on_step: Callable[[Step], None] = lambda step: None
        self.nan_seeds: set[int] = set()
        self.max_replayed_tokens = 0  # of a step that counts as replayed
        self.is_closed = False
        self._unsampled: Step | None = None
        self.run_ahead_depth = 0
        self.step_deadline_s: float | None = None
        self.num_device_allocations = 0
        self._block_size = block_size
        self._kv = np.full(num_blocks * block_size, POISON, np.int64)
        self._block_table = np.full((num_slots, -(-max_model_len // block_size)), POISON, np.int64)
        self._slots: list[FakeSlot | None] = [None] * num_slots
        self._max_num_tokens = max_num_batched_tokens
        num_words = max_step_words(
            max_num_batched_tokens, num_slots, max_model_len=max_model_len, block_size=block_size
        )
        self._buffer = np.zeros(num_words, np.int32)
        self._bitmask = np.zeros((num_slots, bitmask_words(VOCAB_SIZE)), np.int32)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._refuse_when_closed()
        self.loop = loop

    def is_replayed(self, step: Step) -> bool:
        return step.num_tokens <= self.max_replayed_tokens

    def launch(self, step: Step) -> Pending:
        self._refuse_when_closed()
        assert self._unsampled is None, "launched before the last step was sampled"
        self._unsampled = step
        return Pending(self._sample_step, self._bitmask)

    def run(self, step: Step, masked_rows: Sequence[int] = ()) -> StepOutput:
        self._refuse_when_closed()
        self.on_step(step)
        masks = dict(zip(masked_rows, self._bitmask, strict=False))
        return StepOutput([[token_id] for token_id in self.execute(self.pack(step), masks)])

    def _sample_step(self, masked_rows: Sequence[int]) -> asyncio.Future[StepOutput]:
        assert list(masked_rows) == sorted(set(masked_rows))
        step, self._unsampled = self._unsampled, None
        assert step is not None, "sampled twice"
        future = self.loop.create_future()
        try:
            self.loop.call_soon(future.set_result, self.run(step, masked_rows))
        except Exception as error:
            self.loop.call_soon(future.set_exception, error)
        return future

    def close(self) -> None:
        self.is_closed = True

    def _refuse_when_closed(self) -> None:
        if self.is_closed:
            raise RuntimeError("the runner is closed")

    def pack(self, step: Step) -> np.ndarray:
        """The words of `step`, in a buffer that the next call overwrites."""
        return self._buffer[: pack(step, self._buffer)]

    def execute(
        self, words: np.ndarray, masks: Mapping[int, NDArray[np.int32]] = NO_MASKS
    ) -> list[int]:
        """Run one packed step; `masks` by sampled row."""
        num_rows, num_tokens, num_samples = words[1:4].tolist()
        assert words[layout.HEADER_NUM_WORDS] == len(words)
        assert 0 < num_tokens <= self._max_num_tokens and num_rows <= len(self._slots)
        at = int(words[layout.HEADER_SLOT_UPDATES_OFFSET])
        for _ in range(words[layout.HEADER_NUM_SLOT_UPDATES]):
            record = words[at : at + int(words[at])]
            self._slots[record[layout.SLOT_UPDATE_SLOT]] = FakeSlot(record)
            self._block_table[record[layout.SLOT_UPDATE_SLOT]] = POISON
            at += len(record)
        at = int(words[layout.HEADER_BLOCK_UPDATES_OFFSET])
        count = int(words[layout.HEADER_NUM_BLOCK_UPDATES])
        for slot, index, block_id in words[at : at + 3 * count].reshape(-1, 3):
            self._block_table[slot, index] = block_id
        sampled: list[int] = []
        rows_at = int(words[layout.HEADER_ROWS_OFFSET])
        tokens_at = int(words[layout.HEADER_TOKENS_OFFSET])
        for row in words[rows_at : rows_at + 4 * num_rows].reshape(-1, 4).tolist():
            slot, query_len, offset, is_sampled = row
            state = self._slots[slot]
            assert state is not None and query_len > 0
            if offset == -1:
                assert query_len == 1
                token_ids = [state.last_token]
            else:
                token_ids = words[tokens_at + offset : tokens_at + offset + query_len].tolist()
            num_tokens -= query_len
            kv = self._append(slot, state, token_ids)
            if is_sampled:
                sampled.append(self._sample(state, kv, masks.get(len(sampled))))
        assert num_tokens == 0 and num_samples == len(sampled)
        return sampled

    def _append(self, slot: int, state: FakeSlot, token_ids: list[int]) -> list[int]:
        """Write the KV of token_ids; returns the KV of the whole sequence, read back."""
        table = self._block_table[slot]
        for token_id in token_ids:
            position = state.num_computed
            assert 0 <= token_id < VOCAB_SIZE, "a token that the host does not know"
            parent = int(self._kv[self._kv_slot(table, position - 1)]) if position else 0
            self._kv[self._kv_slot(table, position)] = kv_hash(parent, token_id, position)
            state.num_computed += 1
        positions = np.arange(state.num_computed)
        return self._kv[
            table[positions // self._block_size] * self._block_size + positions % self._block_size
        ].tolist()

    def _kv_slot(self, table: np.ndarray, position: int) -> int:
        return int(table[position // self._block_size]) * self._block_size + (
            position % self._block_size
        )

    def _sample(self, state: FakeSlot, kv: list[int], mask: NDArray[np.int32] | None) -> int:
        if state.seed in self.nan_seeds:
            state.last_token = 0
            return -1
        token_id = draw(
            kv, state.params, state.seed, (state.prompt, state.output),
            state.num_computed < state.min_total_len,
            ALL_TOKENS if mask is None else {i for i in ALL_TOKENS if mask[i // 32] >> i % 32 & 1},
        )  # fmt: skip
        state.last_token = max(token_id, 0)
        if state.params.has_penalties and token_id >= 0:
            state.output.append(token_id)
        return token_id


def make_engine(
    *, num_blocks: int = 64, block_size: int = 4, num_slots: int = 8,
    max_num_batched_tokens: int = 32, max_model_len: int = 128, enable_prefix_caching: bool = True,
    policy: str = "fcfs",
) -> Engine:  # fmt: skip
    """An engine on a FakeRunner."""
    scheduler = Scheduler(
        BlockManager(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching),
        SlotAllocator(num_slots),
        max_num_batched_tokens=max_num_batched_tokens,
        max_update_words=max_update_words(max_model_len, block_size),
    )
    runner = FakeRunner(
        num_blocks, block_size, num_slots, max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
    )  # fmt: skip
    assert policy in ("fcfs", "priority")
    return Engine(
        scheduler, runner, max_model_len=max_model_len, vocab_size=VOCAB_SIZE,
        policy="priority" if policy == "priority" else "fcfs",
    )  # fmt: skip
