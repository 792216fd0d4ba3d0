"""ModelRunner: executes steps on one worker thread, in the order they are launched.

Owns the model, the KV cache and the device state of the slots, all of it allocated once. The event
loop only hands over a Step and gets a future: packing, planning, forward and sampling happen on the
worker, most of it outside the GIL.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from pyserve import ops
from pyserve.engine.batch import LOGITS_TILE_ROWS, Step, max_step_words, pack, padded_size
from pyserve.engine.block_manager import num_blocks_for
from pyserve.model.context import ForwardContext
from pyserve.model.decoder import Decoder
from pyserve.ops import step_layout as layout


class ModelRunner:
    """Implements engine.Runner on a CPU.

    num_slots               sequences that run at once, and rows of a step at most.
    max_num_batched_tokens  tokens of a step at most.
    num_threads             that one op may use.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        num_threads: int,
    ) -> None:
        self._model = model
        self._block_size = block_size
        self._num_slots = num_slots
        device = model.device
        # Written once here, so that resident memory does not grow while serving.
        self._kv_caches = [
            (
                torch.empty(shape, dtype=spec.dtype, device=device).zero_(),
                torch.empty(shape, dtype=spec.dtype, device=device).zero_(),
            )
            for spec in model.kv_specs()
            for shape in [(num_blocks, block_size, spec.num_kv_heads, spec.head_dim)]
        ]
        max_blocks_per_seq = num_blocks_for(max_model_len, block_size)
        self._slots = _zeros(num_slots, layout.SLOT_WORDS, device=device)
        self._block_table = _zeros(num_slots, max_blocks_per_seq, device=device)
        self._token_counts = _zeros(
            num_slots, model.config.vocab_size, dtype=torch.int16, device=device
        )
        self._plan = ops.StepPlan.allocate(max_num_batched_tokens, num_slots, device)
        self._views: dict[tuple[int, int], tuple[ops.StepPlan, ForwardContext]] = {}
        self._max_num_tokens = max_num_batched_tokens
        num_words = max_step_words(
            max_num_batched_tokens, num_slots, max_model_len=max_model_len, block_size=block_size
        )
        self._buffer = np.zeros(num_words, np.int32)
        self._step_input = torch.from_numpy(self._buffer)
        self._executor = ThreadPoolExecutor(
            1, "step", initializer=torch.set_num_threads, initargs=(num_threads,)
        )

    def launch(self, step: Step) -> Future[list[int]]:
        """Start `step`; see engine.Runner."""
        return self._executor.submit(self._execute, step)

    def close(self) -> None:
        """End the worker and drop the tensors; nothing is in flight and nothing comes after."""
        self._executor.shutdown()
        self._kv_caches.clear()
        self._views.clear()
        del self._model, self._slots, self._block_table, self._token_counts, self._plan

    def _execute(self, step: Step) -> list[int]:
        with torch.inference_mode():
            num_words = pack(step, self._buffer)
            plan, ctx = self._views_for(step.num_tokens, len(step.seqs))
            ops.plan_step(
                self._step_input[:num_words],
                self._slots,
                self._block_table,
                self._token_counts,
                self._block_size,
                plan,
            )
            hidden = self._model.forward(ctx)
            # Not more than padded rows: sample_rows holds padding from num_samples on.
            num_padded = padded_size(step.num_samples, self._num_slots) if step.num_samples else 0
            return self._sample(hidden, plan.sample_rows[:num_padded])[: step.num_samples]

    def _views_for(self, num_tokens: int, num_rows: int) -> tuple[ops.StepPlan, ForwardContext]:
        """The plan's tensors, padded to one of a few shapes, and the forward's view of them."""
        key = padded_size(num_tokens, self._max_num_tokens), padded_size(num_rows, self._num_slots)
        views = self._views.get(key)
        if views is None:
            plan = self._plan.narrow(*key)
            ctx = ForwardContext(
                input_ids=plan.input_ids,
                positions=plan.positions,
                slot_mapping=plan.slot_mapping,
                row_slots=plan.row_slots,
                cu_seqlens_q=plan.cu_seqlens_q,
                seq_lens=plan.seq_lens,
                block_table=self._block_table,
                kv_caches=self._kv_caches,
                max_query_len=key[0],
                attention_plans={},
            )
            views = self._views[key] = plan, ctx
        return views

    def _sample(self, hidden: torch.Tensor, sample_rows: torch.Tensor) -> list[int]:
        """One id per row of sample_rows (int32 [num_samples, 2]: index into hidden, slot).

        A padded row (-1, -1) samples from any hidden state and gives 0.
        """
        sampled: list[int] = []
        for start in range(0, len(sample_rows), LOGITS_TILE_ROWS):
            rows = sample_rows[start : start + LOGITS_TILE_ROWS]
            logits = self._model.compute_logits(hidden.index_select(0, rows[:, 0].clamp_min(0)))
            sampled += ops.sample(logits, rows[:, 1], self._slots, self._token_counts).tolist()
        return sampled


def _zeros(*shape: int, device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """As torch.zeros, but its pages are there at once."""
    return torch.empty(shape, dtype=dtype, device=device).zero_()
