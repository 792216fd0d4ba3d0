"""StepState: all tensors that an executor allocates besides the model and the KV cache.

The executor makes one on its device. The planner makes one on the meta device, where it takes no
memory, to learn its size: so a tensor that is added here is in the memory ledger by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyserve.engine.batch import max_step_words
from pyserve.engine.block_manager import num_blocks_for
from pyserve.engine.masks import bitmask_words
from pyserve.model.activations import Arena
from pyserve.model.decoder import Decoder
from pyserve.ops import LOGPROB_WORDS, AttentionPlan, StepPlan, sample_workspace
from pyserve.ops import step_layout as layout

Ledger = tuple[tuple[str, int], ...]  # (name, bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The largest step, and the longest sequence.

    num_slots               maximum number of running sequences, and so of rows of a step.
    max_num_batched_tokens  maximum number of tokens of a step.
    max_model_len           maximum number of tokens of a sequence, prompt and output together.
    block_size              tokens of a KV block.
    logits_tile_rows        rows of logits that exist at once.
    """

    num_slots: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    logits_tile_rows: int


class StepState:
    """All tensors that steps read and write.

    step_input        int32 [max_step_words]: the packed step; words behind it are undefined
    plan              ops.StepPlan, which ops.plan_step derives from the packed step
    slots, block_table, token_counts
                      state of the slots, as ops.plan_step takes it
    results           results of sampled rows: int32 [num_slots] token ids, or float32 [num_slots,
                      width] vectors if the model pools
    bitmask           int32 [num_slots, ceil(vocab_size / 32)]: token masks of the masked rows
    masked_rows       int32 [num_slots]: for each mask, the index of its row within a logits tile
    logits            [logits_tile_rows, vocab_size] of the model's dtype: one tile of sampled rows
    hidden            [logits_tile_rows, hidden_size]: their hidden states
    hidden_rows       int32 [logits_tile_rows]: the tokens that these belong to, as indices
    raw_logits        as logits: a copy from before masking, for raw logprobs of masked rows
    logit_parts       scratch in which several ranks gather the logits of a tile, as
                      Decoder.compute_logits takes it; None with one rank
    tile_row_ids      int32 [logits_tile_rows]: 0, 1, ...
    asked             int32 [num_slots + 2 * max_num_batched_tokens]: three lists for logprobs:
                      sampled rows, as indices within their tiles (num_slots entries); prompt
                      tokens, as indices within the step; the token that follows each of these
    told              int32 [num_slots + max_num_batched_tokens, LOGPROB_WORDS]: the logprobs of the
                      sampled rows, then of the prompt tokens in `asked`
    activations       uint8 [num_bytes]: memory of an Arena
    attention_plans   window -> AttentionPlan; empty on a CPU
    sample_workspace  scratch of ops.sample; None on a CPU

    If the model pools, logits have no columns, and the tensors for masks and logprobs no rows. On a
    rank that does not sample, logits have no columns either.
    """

    def __init__(self, model: Decoder, limits: StepLimits, *, is_card: bool) -> None:
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._num_adapter_slots = model.num_adapter_slots
        device = model.device
        vocab_size, num_slots = model.config.vocab_size, limits.num_slots
        num_logits = vocab_size if model.placement.is_leading else 0
        num_told = num_slots
        if model.pooler is not None:
            num_logits = num_told = 0
        tile_rows = min(limits.logits_tile_rows, num_slots)

        def zeros(part: str, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            # Zeroing touches all pages now, so that resident memory does not grow while serving.
            return self._note(part, torch.empty(shape, dtype=dtype, device=device).zero_())

        def empty(part: str, *shape: int, dtype: torch.dtype) -> torch.Tensor:
            return self._note(part, torch.empty(shape, dtype=dtype, device=device))

        max_num_tokens, max_model_len = limits.max_num_batched_tokens, limits.max_model_len
        num_bytes = activation_bytes(model, max_num_tokens)
        self.activations = empty("activations", num_bytes, dtype=torch.uint8)
        self.logits = empty("logits", tile_rows, num_logits, dtype=model.dtype)
        self.hidden = empty("logits", tile_rows, model.config.hidden_size, dtype=model.dtype)
        self.hidden_rows = empty("logits", tile_rows, dtype=torch.int32)
        num_parts = model.num_logit_parts(tile_rows)
        self.logit_parts: torch.Tensor | None = None
        if num_parts:
            self.logit_parts = empty("logits", num_parts, dtype=model.dtype)
        self.raw_logits = empty("logprobs", tile_rows, num_logits, dtype=model.dtype)
        self.tile_row_ids = zeros("logprobs", tile_rows)
        # An arange on the meta device would import sympy, which takes half a second.
        self.tile_row_ids.copy_(torch.arange(tile_rows, dtype=torch.int32))
        num_asked = max_num_tokens if num_told else 0
        self.asked = zeros("logprobs", num_told + 2 * num_asked)
        self.told = zeros("logprobs", num_told + num_asked, LOGPROB_WORDS)
        self.attention_plans: dict[int, AttentionPlan] = {}
        self.sample_workspace: torch.Tensor | None = None
        if is_card:
            self.attention_plans = model.attention_plans(max_num_tokens, num_slots)
            for attention in self.attention_plans.values():
                self._note("attention plans", attention.work)
                self._note("attention plans", attention.workspace)
            if num_logits:
                self.sample_workspace = self._note(
                    "sampling", sample_workspace.allocate(tile_rows, vocab_size, device=device)
                )
        num_blocks = num_blocks_for(max_model_len, limits.block_size)
        num_words = max_step_words(
            max_num_tokens, num_slots, max_model_len=max_model_len, block_size=limits.block_size,
            num_adapter_slots=model.num_adapter_slots,
        )  # fmt: skip
        self.slots = zeros("slots", num_slots, layout.SLOT_WORDS)
        self.block_table = zeros("slots", num_slots, num_blocks)
        self.token_counts = zeros("slots", num_slots, vocab_size, dtype=torch.int16)
        self.step_input = zeros("step buffers", num_words)
        if model.pooler is None:
            self.results = zeros("step buffers", num_slots)
        else:
            width = model.pooler.width
            self.results = zeros("step buffers", num_slots, width, dtype=torch.float32)
        self.bitmask = zeros("token masks", num_told, bitmask_words(vocab_size))
        self.masked_rows = zeros("token masks", num_told)
        self.plan = StepPlan.allocate(max_num_tokens, num_slots, device)
        for tensor in self.plan:
            self._note("step buffers", tensor)

    @property
    def adapter_starts(self) -> torch.Tensor:
        """int32 [num_adapter_slots + 1], a view of step_input: Step.adapter_starts as packed."""
        begin = layout.HEADER_WORDS
        return self.step_input[begin : begin + self._num_adapter_slots + 1]

    def ledger(self) -> Ledger:
        """The bytes of all tensors, summed up by part."""
        return tuple(
            (part, sum(tensor.nbytes for tensor in tensors))
            for part, tensors in self._parts.items()
        )

    def _note(self, part: str, tensor: torch.Tensor) -> torch.Tensor:
        self._parts.setdefault(part, []).append(tensor)
        return tensor


def activation_bytes(model: Decoder, num_tokens: int) -> int:
    """Bytes that the activations of a step of num_tokens tokens take."""
    arena = Arena.endless()
    model.activations(arena, num_tokens)
    return arena.num_bytes
