"""StepExecutor: runs packed steps on a device.

It owns the model, the KV cache and the device state of the slots, which are allocated once, and
again after a sleep. The code is the same for every device. It takes a step as packed words and
their StepShape, so a process that did not schedule the step can execute it too (tensor parallel).
A runner brings it packed steps and fetches the results.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from pyserve import ops
from pyserve.config import LogprobsMode
from pyserve.engine.asked import pack_asked, read_told
from pyserve.engine.batch import (
    NOTHING_ASKED,
    AdapterLoad,
    Asked,
    StepOutput,
    StepShape,
    padded_size,
)
from pyserve.engine.graphs import MAX_GRAPH_TOKENS, GraphCache, has_same_bits
from pyserve.engine.state import StepLimits, StepState
from pyserve.engine.tensor_parallel import calls
from pyserve.engine.tensor_parallel.followers import Followers
from pyserve.engine.tensor_parallel.launched import LaunchedFollowers
from pyserve.engine.tiles import Tile, pool, share_tokens, tiles_of
from pyserve.errors import DeviceError
from pyserve.model.activations import Activations, Arena
from pyserve.model.context import AdapterRows, ForwardContext
from pyserve.model.decoder import Decoder
from pyserve.model.kv import KVCache
from pyserve.ops.reference_sample import processed_logits


def refuse_when_closed() -> NoReturn:
    """Raise the RuntimeError of calls that need memory which `close` has freed."""
    raise RuntimeError("the runner is closed: it executes nothing any more")


_Forward = tuple[ops.StepPlan, ForwardContext]


class _PaddedShape(NamedTuple):
    """The shape that a forward pass runs in, and the key of its CUDA graph.

    is_decode  no row has more than Decoder.decode_query_len tokens.
    """

    num_tokens: int
    num_rows: int
    is_decode: bool
    has_adapters: bool


class StepExecutor:
    """Executes packed steps: each is one `forward` and then one `sample`.

    Both are replayed if a CUDA graph of their shape was recorded (graphs.py), else run op by op.
    After `close`, `limits` and `device` can still be read; other calls raise RuntimeError.

    logprobs_mode  as --logprobs-mode; the processed modes work on a CPU only.
    followers      the other ranks of a model that several ranks share; they are told to make the
                   same calls. Then any failure in a step is raised as a DeviceError, because the
                   ranks are no longer in step.
    """

    def __init__(
        self, model: Decoder, limits: StepLimits, *, logprobs_mode: LogprobsMode = "raw_logprobs",
        followers: Followers | LaunchedFollowers | None = None,
    ) -> None:  # fmt: skip
        self.limits = limits
        self._followers = followers
        self._has_logits = logprobs_mode.endswith("logits")
        self._is_processed = logprobs_mode.startswith("processed")
        self.device = model.device
        self._is_closed = False
        self._model = model
        self.vocab_size = model.config.vocab_size
        self._is_leading = model.placement.is_leading
        self._group = model.placement.group
        self._kv_caches: list[KVCache] = []
        self._forwards: dict[_PaddedShape, _Forward] = {}
        self._activations: dict[int, Activations] = {}
        self._tiles: dict[int, list[Tile]] = {}
        self._graphs = GraphCache()
        self._make_state()

    def _make_state(self) -> None:
        self._state = StepState(self._model, self.limits, is_card=self.device.type == "cuda")
        # [max_num_batched_tokens, hidden_size]: the hidden states of the last forward pass. They
        # are at the start of the activations' arena, however many tokens the step had.
        self._hidden = self._activations_of(self.limits.max_num_batched_tokens).hidden

    @property
    def step_input(self) -> torch.Tensor:
        """int32 [max_step_words] on the device: `forward` reads the packed step here."""
        return self._state.step_input

    def bring(self, words: torch.Tensor) -> None:
        """Queue the copy of a packed step to step_input.

        words  int32 [num_words] in host memory; it must not change before the copy has ended.
        """
        self._tell(lambda: calls.Bring(words.numpy().tobytes()))
        self._state.step_input[: len(words)].copy_(words, non_blocking=True)

    @property
    def num_adapter_slots(self) -> int:
        return self._model.num_adapter_slots

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate, or replace, the KV cache: `num_blocks` blocks of every layer."""
        if self._is_closed:
            refuse_when_closed()
        self._tell(lambda: calls.AllocateKV(num_blocks))
        self._graphs.clear()  # they refer to the addresses of the old KV cache
        self._kv_caches.clear()
        self._kv_caches += [
            spec.allocate(num_blocks, self.limits.block_size, self.device)
            for spec in self._model.kv_specs()
        ]

    def free_kv(self) -> None:
        """Free the KV cache; nothing runs until `allocate_kv`."""
        self._tell(calls.FreeKV)
        self._graphs.clear()
        self._kv_caches.clear()

    @property
    def has_model(self) -> bool:
        """False from `drop_model` to `take_model`."""
        return hasattr(self, "_model")

    def drop_model(self) -> None:
        """Free the weights and all tensors of steps. After `free_kv` and this, a card holds only
        our CUDA context and code. No step may run until `take_model`. Harmless when called again.
        """
        self._tell(calls.DropModel)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # some queued copies may still be running
        self._drop_tensors()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def take_model(self, load: Callable[[], Decoder]) -> None:
        """Undo `drop_model`: take the model that `load` returns, which must be the same as before.
        Raises what `load` raises."""
        self._tell(calls.TakeModel)
        self._model = load()
        self._make_state()

    def _drop_tensors(self) -> None:
        """Drop all tensors but the KV cache."""
        self._graphs.clear()
        self._forwards.clear()
        self._activations.clear()
        self._tiles.clear()
        for name in ("_model", "_state", "_hidden"):
            vars(self).pop(name, None)

    def put_adapter(self, load: AdapterLoad) -> None:
        """Copy an adapter's weights into its slot.

        All steps that use the slot's previous adapter have ended, or precede this on the stream.
        """
        if self._is_closed:
            refuse_when_closed()
        if self._followers is not None:
            self._followers.tell_adapter(load.slot, load.adapter.weights)
        with torch.inference_mode():
            self._model.put_adapter(load.slot, load.adapter.weights)

    def reset(self) -> None:
        """Clear the slots' device state; a warm-up must, as its steps are of no real sequence."""
        if self._is_closed:
            refuse_when_closed()
        self._tell(calls.Reset)
        self._reset()

    def _reset(self) -> None:
        self._state.slots.zero_()
        self._state.block_table.zero_()
        self._state.token_counts.zero_()

    def has_graph(self, shape: StepShape) -> bool:
        """Whether the step's forward pass has a CUDA graph, so launching it costs little."""
        return self._padded(shape) in self._graphs

    def record(self, shape: StepShape) -> None:
        """Record CUDA graphs of the forward pass and the sampling of the step in step_input.

        Each graph is then replayed on that step. Called on a CUDA stream that is not the default
        one; clears the slots' state. Raises DeviceError if a replay's results are not bit-equal to
        those of the same step run op by op.
        """
        self._tell(lambda: calls.Record(shape))
        padded, num_samples = self._padded(shape), self._padded_samples(shape)
        self._reset()
        self._forward_or_replay(shape)
        hidden = self._hidden[: shape.num_tokens].clone()
        self._sample_or_replay(shape)
        results = self._state.results[: shape.num_samples].clone()
        if padded not in self._graphs:
            self._graphs.record(padded, lambda: self._forward(padded))
        if num_samples not in self._graphs:
            self._graphs.record(num_samples, lambda: self._sample(num_samples))
        self._reset()
        self._hidden.fill_(torch.nan)
        self._state.results.fill_(-1)
        self._forward_or_replay(shape)
        is_same = has_same_bits(self._hidden[: shape.num_tokens], hidden)
        self._sample_or_replay(shape)
        if not is_same or not has_same_bits(self._state.results[: shape.num_samples], results):
            raise DeviceError(
                f"a recorded step of {shape.num_tokens} tokens computes something else than the "
                "same step launched op by op; --enforce-eager serves without records"
            )
        self._reset()

    def forward(self, shape: StepShape, *, is_warmup: bool = False) -> None:
        """Plan the step that is in step_input and run the model's layers on it.

        is_warmup  run only one layer of each kind, as Decoder.warm_up does.
        """
        if self._is_closed:
            refuse_when_closed()
        with self._together():
            self._tell(lambda: calls.Forward(shape, is_warmup))
            self._forward_or_replay(shape, is_warmup=is_warmup)

    def _forward_or_replay(self, shape: StepShape, *, is_warmup: bool = False) -> None:
        padded = self._padded(shape)
        if is_warmup or not self._graphs.replay(padded):
            self._forward(padded, is_warmup=is_warmup)

    @property
    def results(self) -> torch.Tensor:
        """The tensor that `sample` writes and returns, on the device; see StepState.results."""
        return self._state.results

    @property
    def bitmask(self) -> torch.Tensor:
        """int32 [num_slots, ceil(vocab_size / 32)] on the device: `sample` reads masks here."""
        return self._state.bitmask

    @property
    def masked_rows(self) -> torch.Tensor:
        """int32 [num_slots] on the device: `sample` reads `tile_rows` of the masked rows here."""
        return self._state.masked_rows

    def tile_rows(self, masked_rows: Sequence[int]) -> list[int]:
        """The index within its logits tile of each of `masked_rows`, indices of sampled rows."""
        size = len(self._state.logits)
        return [row % size for row in masked_rows]

    @property
    def asked(self) -> torch.Tensor:
        """int32 on the device, as StepState.asked: the rows that need logprobs, by pack_asked."""
        return self._state.asked

    @property
    def told(self) -> torch.Tensor:
        """int32 [.., LOGPROB_WORDS] on the device: `sample` writes logprobs here for read_told."""
        return self._state.told

    def pack_asked(self, asked: Asked, words: NDArray[np.int32]) -> None:
        """Write `asked` to `words`, a host buffer of the size of the device tensor `asked`."""
        rows = asked._replace(sampled_rows=self.tile_rows(asked.sampled_rows))
        pack_asked(rows, words, num_slots=self.limits.num_slots)

    def output(self, results: NDArray[Any], asked: Asked, told: NDArray[np.int32]) -> StepOutput:
        """The StepOutput of a step that has ended.

        results, told  host copies of the tensors `results`, of the sampled rows alone, and `told`.
                       No reference to them is kept.
        """
        if results.ndim == 2:
            return StepOutput.of_pooled(results.copy())
        token_ids: list[list[int]] = results[:, None].tolist()
        if not any(asked):
            return StepOutput(token_ids)
        output = read_told(asked, told, num_slots=self.limits.num_slots)
        output.token_ids = token_ids
        return output

    def sample(
        self, shape: StepShape, masked_rows: Sequence[int] = (), asked: Asked = NOTHING_ASKED
    ) -> torch.Tensor:
        """Sample the tokens of the last forward pass, or pool its rows if the model pools.

        masked_rows  indices of sampled rows that have a mask, ascending; the caller has written
                     their masks and tile_rows to the device tensors `bitmask` and `masked_rows`.
        asked        rows that need logprobs; the caller has written them to the tensor `asked`.

        A step with masks or logprobs runs op by op, because no graph is recorded for it.
        Returns `results`: int32 [at least num_samples] token ids, or float32 [at least num_samples,
        width] pooled vectors. The next step overwrites it.
        """
        if self._is_closed:
            refuse_when_closed()
        with self._together():
            self._tell(lambda: calls.Sample(shape, asked.prompt_rows))
            self._sample_or_replay(shape, masked_rows, asked)
        return self._state.results

    def _sample_or_replay(
        self, shape: StepShape, masked_rows: Sequence[int] = (), asked: Asked = NOTHING_ASKED
    ) -> None:
        num_samples = self._padded_samples(shape)
        if masked_rows or any(asked) or not self._graphs.replay(num_samples):
            self._sample(num_samples, masked_rows, asked)

    def _tell(self, call: Callable[[], calls.AnyCall]) -> None:
        if self._followers is not None:
            self._followers.tell(call())

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._followers is None or isinstance(error, DeviceError):
                raise
            raise DeviceError(self._followers.cause(error)) from error

    def _forward(self, padded: _PaddedShape, *, is_warmup: bool = False) -> None:
        state = self._state
        with torch.inference_mode():
            plan, ctx = self._forward_of(padded)
            ops.plan_step(
                state.step_input, state.slots, state.block_table, state.token_counts,
                self.limits.block_size, plan,
            )  # fmt: skip
            self._model.plan(ctx)
            (self._model.warm_up if is_warmup else self._model.forward)(ctx)

    def _sample(
        self, num_samples: int, masked_rows: Sequence[int] = (), asked: Asked = NOTHING_ASKED
    ) -> None:
        state = self._state
        num_rows = num_masked = num_asked = 0  # counts over the tiles so far
        with torch.inference_mode():
            if self._model.pooler is not None:
                pool(self._model, self._hidden, self._tiles_of(num_samples))
                return
            self._tell_prompts(len(asked.prompt_rows))
            for tile in self._tiles_of(num_samples):
                tile.gather(self._hidden)
                self._model.compute_logits(tile.hidden, tile.logits, state.logit_parts)
                if not self._is_leading:
                    continue
                num_rows += len(tile.results)
                begin, num_masked = num_masked, bisect_left(masked_rows, num_rows)
                first, num_asked = num_asked, bisect_left(asked.sampled_rows, num_rows)
                asked_rows, told_logits = state.asked[first:num_asked], tile.logits
                if num_masked > begin and num_asked > first and not self._is_processed:
                    told_logits = state.raw_logits[: len(tile.logits)].copy_(tile.logits)
                if num_masked > begin:
                    ops.apply_bitmask(
                        tile.logits,
                        state.bitmask[begin:num_masked],
                        state.masked_rows[begin:num_masked],
                    )
                if num_asked > first and self._is_processed:
                    told_logits = processed_logits(
                        tile.logits, asked_rows, tile.slots, state.slots, state.token_counts
                    )
                ops.sample(
                    tile.logits, tile.slots, state.slots, state.token_counts,
                    workspace=state.sample_workspace, out=tile.results,
                )  # fmt: skip
                if num_asked > first:
                    ops.logprobs(
                        told_logits,
                        asked_rows,
                        tile.results,
                        ops.LogprobRows.of(state.told[first:num_asked]),
                        is_normalized=not self._has_logits,
                    )
            if self._group is not None:
                share_tokens(self._model, state, self._tiles_of(num_samples))

    def _tell_prompts(self, count: int) -> None:
        """Compute the `count` prompt logprobs that the tensor `asked` lists, tile by tile."""
        state = self._state
        limit, max_num_tokens = self.limits.num_slots, self.limits.max_num_batched_tokens
        rows = state.asked[limit : limit + max_num_tokens]
        next_token_ids = state.asked[limit + max_num_tokens :]
        for begin in range(0, count, len(state.logits)):
            end = min(begin + len(state.logits), count)
            size = end - begin
            hidden, logits = state.hidden[:size], state.logits[:size]
            torch.index_select(self._hidden, 0, rows[begin:end], out=hidden)
            self._model.compute_logits(hidden, logits, state.logit_parts)
            if not self._is_leading:
                continue
            ops.logprobs(
                logits,
                state.tile_row_ids[:size],
                next_token_ids[begin:end],
                ops.LogprobRows.of(state.told[limit + begin : limit + end]),
                is_normalized=not self._has_logits,
            )

    def close(self) -> None:
        """Drop all tensors and leave the process group. Harmless when called again."""
        if self._is_closed:
            return
        self._is_closed = True
        self._kv_caches.clear()
        self._drop_tensors()
        if self._group is not None:
            self._group.close()

    def _padded(self, shape: StepShape) -> _PaddedShape:
        """Pad a step's shape to one of a few, so that few graphs serve all small steps."""
        num_tokens = padded_size(shape.num_tokens, self.limits.max_num_batched_tokens)
        if self.device.type == "cuda" and num_tokens <= MAX_GRAPH_TOKENS:
            num_rows = min(num_tokens, self.limits.num_slots)  # each row has at least one token
        else:
            num_rows = padded_size(shape.num_rows, self.limits.num_slots)
        is_decode = shape.max_query_len <= self._model.decode_query_len
        return _PaddedShape(num_tokens, num_rows, is_decode, shape.has_adapters)

    def _padded_samples(self, shape: StepShape) -> int:
        return padded_size(shape.num_samples, self.limits.num_slots) if shape.num_samples else 0

    def _activations_of(self, num_tokens: int) -> Activations:
        activations = self._activations.get(num_tokens)
        if activations is None:
            activations = self._model.activations(Arena(self._state.activations), num_tokens)
            self._activations[num_tokens] = activations
        return activations

    def _forward_of(self, padded: _PaddedShape) -> _Forward:
        """The plan and context of a forward pass of this shape, made once and cached."""
        forward = self._forwards.get(padded)
        if forward is None:
            state = self._state
            num_tokens, num_rows, is_decode, has_adapters = padded
            plan = state.plan.narrow(num_tokens, num_rows)
            activations = self._activations_of(num_tokens)
            rows = AdapterRows(state.adapter_starts, activations.shrunk)
            ctx = ForwardContext(
                input_ids=plan.input_ids,
                positions=plan.positions,
                slot_mapping=plan.slot_mapping,
                row_slots=plan.row_slots,
                cu_seqlens_q=plan.cu_seqlens_q,
                seq_lens=plan.seq_lens,
                block_table=state.block_table,
                kv_caches=self._kv_caches,
                max_query_len=self._model.decode_query_len if is_decode else num_tokens,
                attention_plans=state.attention_plans,
                activations=activations,
                adapters=rows if has_adapters else None,
            )
            forward = self._forwards[padded] = plan, ctx
        return forward

    def _tiles_of(self, num_rows: int) -> list[Tile]:
        tiles = self._tiles.get(num_rows)
        if tiles is None:
            tiles = self._tiles[num_rows] = tiles_of(self._state, num_rows)
        return tiles
