"""How a packed step runs on a device.

StepExecutor owns the model, the KV cache and the device state of the slots, all of it allocated
once, and anew after a sleep; it is the same on every device. It is given bytes and their shape, so
that what executes a step need not be what has scheduled it. A runner brings it packed steps and
takes results away.
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
    """What every call that would need freed memory comes to."""
    raise RuntimeError("the runner is closed: it executes nothing any more")


_Forward = tuple[ops.StepPlan, ForwardContext]


class _PaddedShape(NamedTuple):
    """What a forward pass is run as; is_decode: no row is longer than what counts as decoding."""

    num_tokens: int
    num_rows: int
    is_decode: bool
    has_adapters: bool


class StepExecutor:
    """Executes packed steps: each is one `forward` and then one `sample`.

    Both are replayed where their shape was recorded (graphs.py), else called op by op.
    After `close` the limits and the device are still told; all else raises RuntimeError.

    logprobs_mode  what is told where logprobs are asked for. The processed ones are on a CPU alone.
    followers      the other ranks of a model that several share, which make the same calls. With
                   them what fails in a step is a DeviceError: the ranks are not in step any more.
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
        # [max_num_tokens, hidden_size], of the step that was forwarded last: they lie at the
        # beginning of the activations, whatever its number of tokens.
        self._hidden = self._activations_of(self.limits.max_num_batched_tokens).hidden

    @property
    def step_input(self) -> torch.Tensor:
        """int32 [max_step_words] on the device: where `forward` reads the packed step."""
        return self._state.step_input

    def bring(self, words: torch.Tensor) -> None:
        """Queue the copy of a packed step, in host memory, to where `forward` reads it."""
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
        self._graphs.clear()  # they read and write the one that goes
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
        """Free the weights and what steps read and write, so that a card holds nothing of ours but
        code, where the KV cache is free. No step runs, and none until `take_model`. Harmless when
        called again."""
        self._tell(calls.DropModel)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # also copies that nobody has waited for
        self._drop_tensors()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def take_model(self, load: Callable[[], Decoder]) -> None:
        """Compute with what `load` makes, the same model again, after `drop_model`. Raises what
        `load` raises."""
        self._tell(calls.TakeModel)
        self._model = load()
        self._make_state()

    def _drop_tensors(self) -> None:
        """All but the KV cache."""
        self._graphs.clear()
        self._forwards.clear()
        self._activations.clear()
        self._tiles.clear()
        for name in ("_model", "_state", "_hidden"):
            vars(self).pop(name, None)

    def put_adapter(self, load: AdapterLoad) -> None:
        """Put an adapter into its slot; every step that was to find another there has ended."""
        if self._is_closed:
            refuse_when_closed()
        if self._followers is not None:
            self._followers.tell_adapter(load.slot, load.adapter.weights)
        with torch.inference_mode():
            self._model.put_adapter(load.slot, load.adapter.weights)

    def reset(self) -> None:
        """Forget every sequence, as a warm-up must."""
        if self._is_closed:
            refuse_when_closed()
        self._tell(calls.Reset)
        self._reset()

    def _reset(self) -> None:
        self._state.slots.zero_()
        self._state.block_table.zero_()
        self._state.token_counts.zero_()

    def has_graph(self, shape: StepShape) -> bool:
        """Whether launching the step costs the host next to nothing."""
        return self._padded(shape) in self._graphs

    def record(self, shape: StepShape) -> None:
        """Record both launches of the step that lies in step_input, and try the records on it.

        Called on a CUDA stream that is not the default one. Forgets every sequence. Raises
        DeviceError where a replay gives other bits than the same launches op by op.
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
        """Plan the step that lies in step_input and run the model's layers on it.

        is_warmup  as Decoder.warm_up.
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
        """On the device: where `sample` leaves what it returns, of as many rows as may be."""
        return self._state.results

    @property
    def bitmask(self) -> torch.Tensor:
        """int32 [num_slots, ceil(vocab_size / 32)] on the device: where `sample` reads masks."""
        return self._state.bitmask

    @property
    def masked_rows(self) -> torch.Tensor:
        """int32 [num_slots] on the device: `tile_rows` of the masked rows, where it reads them."""
        return self._state.masked_rows

    def tile_rows(self, masked_rows: Sequence[int]) -> list[int]:
        """The rows of their tiles that the sampled rows are."""
        size = len(self._state.logits)
        return [row % size for row in masked_rows]

    @property
    def asked(self) -> torch.Tensor:
        """int32 on the device: where `sample` reads which rows are asked; pack_asked writes it."""
        return self._state.asked

    @property
    def told(self) -> torch.Tensor:
        """int32 [.., LOGPROB_WORDS] on the device: where `sample` leaves what read_told reads."""
        return self._state.told

    def pack_asked(self, asked: Asked, words: NDArray[np.int32]) -> None:
        """Write to `words`, of the size of `asked`, what `sample` is to find there."""
        rows = asked._replace(sampled_rows=self.tile_rows(asked.sampled_rows))
        pack_asked(rows, words, num_slots=self.limits.num_slots)

    def output(self, results: NDArray[Any], asked: Asked, told: NDArray[np.int32]) -> StepOutput:
        """`results`, of the sampled rows, and `told` are what those hold when the step has ended;
        nothing of them is kept."""
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
        """Draw the tokens of the step that was forwarded last -> int32 [at least num_samples], or
        pool its rows -> float32 [at least num_samples, width].

        masked_rows  ascending: the first entries of `bitmask` and `masked_rows` are theirs. Such a
                     step is not replayed: its masks have no recorded shape.
        asked        lies in `asked` too, with tile_rows of its sampled rows; not replayed either.

        What is returned is overwritten by the next step.
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
        num_rows = num_masked = num_asked = 0  # of the tiles before
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
        """Logprobs of the tokens behind `count` rows of hidden states, a tile at a time."""
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
        """Drop the tensors. Harmless when called again."""
        if self._is_closed:
            return
        self._is_closed = True
        self._kv_caches.clear()
        self._drop_tensors()
        if self._group is not None:
            self._group.close()

    def _padded(self, shape: StepShape) -> _PaddedShape:
        """One of a few shapes, so that few records serve all small steps."""
        num_tokens = padded_size(shape.num_tokens, self.limits.max_num_batched_tokens)
        if self.device.type == "cuda" and num_tokens <= MAX_GRAPH_TOKENS:
            num_rows = min(num_tokens, self.limits.num_slots)  # each has a token: there are no more
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
        """What a forward pass reads and writes, made once for each shape."""
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
