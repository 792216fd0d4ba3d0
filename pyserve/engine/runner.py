"""How a packed step runs on a device, and the runner that does it on a CPU.

StepExecutor owns the model, the KV cache and the device state of the slots, all of it allocated
once; it is the same on every device. It is given bytes and their shape, so that what executes a
step need not be what has scheduled it. A runner brings it packed steps and takes results away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NoReturn

import numpy as np
import torch

from pyserve import ops
from pyserve.engine.batch import (
    Step,
    StepOutput,
    StepShape,
    max_step_words,
    pack,
    padded_size,
)
from pyserve.engine.block_manager import num_blocks_for
from pyserve.engine.engine import Pending
from pyserve.model.context import ForwardContext
from pyserve.model.decoder import Decoder
from pyserve.model.kv import KVCache
from pyserve.ops import attention_plan, sample_workspace
from pyserve.ops import step_layout as layout
from pyserve.ops.build import Report, report_nothing


def refuse_when_closed() -> NoReturn:
    """What every call that would need freed memory comes to."""
    raise RuntimeError("the runner is closed: it executes nothing any more")


class StepExecutor:
    """Executes packed steps: each is one `forward` and then one `sample`.

    After `close` the sizes and the device are still told; all else raises RuntimeError.

    num_slots               sequences that run at once, and rows of a step at most.
    max_num_batched_tokens  tokens of a step at most.
    logits_tile_rows        rows of logits that exist at once.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        block_size: int,
        num_slots: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        logits_tile_rows: int,
    ) -> None:
        self.max_num_tokens = max_num_batched_tokens
        self.num_slots = num_slots
        self.max_model_len = max_model_len
        self.num_step_words = max_step_words(
            max_num_batched_tokens, num_slots, max_model_len=max_model_len, block_size=block_size
        )
        self.device = model.device
        self._is_closed = False
        self._model = model
        self._block_size = block_size
        self._logits_tile_rows = logits_tile_rows
        device, config = model.device, model.config
        max_blocks_per_seq = num_blocks_for(max_model_len, block_size)
        self._slots = _zeros(num_slots, layout.SLOT_WORDS, device=device)
        self._block_table = _zeros(num_slots, max_blocks_per_seq, device=device)
        self._token_counts = _zeros(num_slots, config.vocab_size, dtype=torch.int16, device=device)
        self._sampled = _zeros(num_slots, device=device)
        self._hidden = torch.empty(0, device=device)  # of the step that was forwarded last
        self._plan = ops.StepPlan.allocate(max_num_batched_tokens, num_slots, device)
        self._kv_caches: list[KVCache] = []
        self._views: dict[tuple[int, int, bool], tuple[ops.StepPlan, ForwardContext]] = {}
        # Longest query that counts as decoding; a step without a longer one is planned as such.
        self._decode_query_len = attention_plan.decode_query_len(
            config.num_heads, config.num_kv_heads
        )
        self._attention_plans: dict[int, ops.AttentionPlan] = {}
        self._sample_workspace: torch.Tensor | None = None
        if device.type == "cuda":
            self._attention_plans = {
                window: attention_plan.allocate(
                    max_num_batched_tokens, num_slots, num_heads=config.num_heads,
                    num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, device=device,
                )
                for window in set(config.windows)
            }  # fmt: skip
            self._sample_workspace = sample_workspace.allocate(
                min(logits_tile_rows, num_slots), config.vocab_size, device=device
            )

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate, or replace, the KV cache: `num_blocks` blocks of every layer."""
        if self._is_closed:
            refuse_when_closed()
        self._kv_caches.clear()
        self._kv_caches += [
            spec.allocate(num_blocks, self._block_size, self.device)
            for spec in self._model.kv_specs()
        ]

    def reset(self) -> None:
        """Forget every sequence, as a warm-up must."""
        if self._is_closed:
            refuse_when_closed()
        self._slots.zero_()
        self._block_table.zero_()
        self._token_counts.zero_()

    def forward(self, shape: StepShape, step_input: torch.Tensor) -> None:
        """Plan a step and run the model's layers on it.

        step_input int32 [num_step_words] on the device: the packed step, then anything.
        """
        if self._is_closed:
            refuse_when_closed()
        with torch.inference_mode():
            plan, ctx = self._views_for(shape)
            ops.plan_step(
                step_input,
                self._slots,
                self._block_table,
                self._token_counts,
                self._block_size,
                plan,
            )
            for window, attention in self._attention_plans.items():
                ops.plan_attention(
                    ctx.cu_seqlens_q,
                    ctx.seq_lens,
                    attention,
                    num_heads=self._model.config.num_heads,
                    num_kv_heads=self._model.config.num_kv_heads,
                    window=window,
                )
            self._hidden = self._model.forward(ctx)

    def sample(self, shape: StepShape) -> torch.Tensor:
        """Draw the tokens of the step that was forwarded last -> int32 [at least num_samples].

        What is returned is overwritten by the next step.
        """
        if self._is_closed:
            refuse_when_closed()
        num_samples = padded_size(shape.num_samples, self.num_slots) if shape.num_samples else 0
        with torch.inference_mode():
            # From num_samples on these are padding, (-1, -1): any hidden state will do for them.
            sample_rows = self._plan.sample_rows[:num_samples]
            for start in range(0, num_samples, self._logits_tile_rows):
                rows = sample_rows[start : start + self._logits_tile_rows]
                hidden = self._hidden.index_select(0, rows[:, 0].clamp_min(0))
                ops.sample(
                    self._model.compute_logits(hidden),
                    rows[:, 1],
                    self._slots,
                    self._token_counts,
                    workspace=self._sample_workspace,
                    out=self._sampled[start : start + len(rows)],
                )
        return self._sampled

    def close(self) -> None:
        """Drop the tensors. Harmless when called again."""
        if self._is_closed:
            return
        self._is_closed = True
        self._kv_caches.clear()
        self._views.clear()
        self._attention_plans.clear()
        del self._model, self._slots, self._block_table, self._token_counts, self._plan
        del self._hidden

    def _views_for(self, shape: StepShape) -> tuple[ops.StepPlan, ForwardContext]:
        """The plan's tensors, padded to one of a few shapes, and the forward's view of them."""
        num_tokens = padded_size(shape.num_tokens, self.max_num_tokens)
        num_rows = padded_size(shape.num_rows, self.num_slots)
        is_decode = shape.max_query_len <= self._decode_query_len
        key = num_tokens, num_rows, is_decode
        views = self._views.get(key)
        if views is None:
            plan = self._plan.narrow(num_tokens, num_rows)
            ctx = ForwardContext(
                input_ids=plan.input_ids,
                positions=plan.positions,
                slot_mapping=plan.slot_mapping,
                row_slots=plan.row_slots,
                cu_seqlens_q=plan.cu_seqlens_q,
                seq_lens=plan.seq_lens,
                block_table=self._block_table,
                kv_caches=self._kv_caches,
                max_query_len=self._decode_query_len if is_decode else num_tokens,
                attention_plans=self._attention_plans,
            )
            views = self._views[key] = plan, ctx
        return views


class CpuRunner:
    """Implements engine.Runner on a CPU: steps run on one worker thread.

    The event loop only hands over a Step and gets a future: packing, forward and sampling happen on
    the worker, most of it outside the GIL. `num_threads` is what one op may use.
    """

    run_ahead_depth = 0  # a step's successor would wait for the same cores
    step_deadline_s: float | None = None  # a long prompt may take minutes

    def __init__(self, executor: StepExecutor, *, num_threads: int) -> None:
        self._executor = executor
        self._is_closed = False
        self._buffer = np.zeros(executor.num_step_words, np.int32)
        self._step_input = torch.from_numpy(self._buffer)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = ThreadPoolExecutor(
            1, "step", initializer=torch.set_num_threads, initargs=(num_threads,)
        )

    @property
    def num_device_allocations(self) -> int:
        return 0

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._is_closed:
            refuse_when_closed()
        self._loop = loop

    def warm_up(
        self, steps: Sequence[Step], *, budget_s: float, report: Report = report_nothing
    ) -> None:
        """Run `steps` until `budget_s` are spent: matrix libraries compile a shape they first meet,
        and keep what they compiled. report(done, total) counts the steps."""
        deadline_s = time.monotonic() + budget_s
        for done, step in enumerate(steps):
            report(done, len(steps))
            if time.monotonic() > deadline_s:
                break
            self._executor.reset()
            self.run(step)
        self._executor.reset()

    def launch(self, step: Step) -> Pending:
        if self._is_closed:
            refuse_when_closed()
        assert self._loop is not None, "steps are launched on a loop"
        forward = self._thread.submit(self._forward, step)
        return Pending(partial(self._loop.run_in_executor, self._thread, self._sample, forward))

    def run(self, step: Step) -> StepOutput:
        if self._is_closed:
            refuse_when_closed()
        return self._thread.submit(self._sample, self._thread.submit(self._forward, step)).result()

    def close(self) -> None:
        """End the worker and drop the tensors; nothing is in flight."""
        self._is_closed = True
        self._thread.shutdown()
        self._executor.close()

    def _forward(self, step: Step) -> StepShape:
        pack(step, self._buffer)
        shape = StepShape.of(self._buffer)
        self._executor.forward(shape, self._step_input)
        return shape

    def _sample(self, forward: Future[StepShape]) -> StepOutput:
        """`forward` has ended: the worker does one thing after another."""
        shape = forward.result()
        sampled = self._executor.sample(shape).numpy()
        return StepOutput(sampled[: shape.num_samples, None].tolist())


def _zeros(*shape: int, device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """As torch.zeros, but its pages are there at once."""
    return torch.empty(shape, dtype=dtype, device=device).zero_()
