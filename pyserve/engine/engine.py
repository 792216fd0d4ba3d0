"""Engine: the synchronous core. A step is schedule -> execute -> update.

The engine owns all sequences by id, checks new requests, and puts sampled tokens on the sequences'
streams. The Scheduler decides what a step runs, and a Runner executes it. Not thread-safe: all
calls come from one thread, and only the work that Runner.launch starts runs elsewhere.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pyserve.client import FinishReason, SequenceRequest, SequenceStream
from pyserve.engine.asked import ask, put_prompt_logprobs
from pyserve.engine.batch import Step, StepOutput
from pyserve.engine.block_manager import num_blocks_for
from pyserve.engine.chunks import ChunkPacer
from pyserve.engine.masks import accept, is_end_void, is_host_dependent, too_short
from pyserve.engine.queue_bound import Load
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.sequence import BACKGROUND_PRIORITY, Sequence, Status
from pyserve.engine.token_masks import check_token_ids, constraint_of
from pyserve.errors import ContextError, EngineError, InvalidRequestError, PyserveError
from pyserve.histogram import StepHistograms
from pyserve.params import POOLED, SamplingParams
from pyserve.words import counted


@dataclass(frozen=True, slots=True)
class Pending:
    """A step whose forward pass is queued.

    bitmask  int32 [num_slots, ceil(vocab_size / 32)] in host memory: the token masks of its rows
             are written here, once all steps before it have ended.
    """

    launch_sampling: Callable[[SequenceABC[int]], asyncio.Future[StepOutput]]
    bitmask: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 0), np.int32))

    def sample(self, masked_rows: SequenceABC[int] = ()) -> asyncio.Future[StepOutput]:
        """Queue the rest of the step, logits and sampling. Called once, before the next launch.

        masked_rows  indices of sampled rows, ascending: bitmask[i] is the mask of masked_rows[i].

        Errors are set on the returned future. A DeviceError means that the device is lost and no
        further step can run; after any other exception only this step has failed.
        """
        return self.launch_sampling(masked_rows)


class Runner(Protocol):
    """Executes steps, in the order of the calls.

    run_ahead_depth         how many steps to launch ahead of the one whose result is awaited.
    step_deadline_s         seconds after which a step counts as hanging; None: no limit.
    num_device_allocations  how often GPU memory has been allocated so far (cudaMalloc).

    After `close` these three can still be read; `attach`, `launch` and `run` raise RuntimeError.
    """

    run_ahead_depth: int
    step_deadline_s: float | None

    @property
    def num_device_allocations(self) -> int: ...

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver the results of all later launches on `loop`. Called before the first launch."""

    def is_replayed(self, step: Step) -> bool:
        """Whether `step` has a recorded CUDA graph, so that launching it costs the host little."""

    def launch(self, step: Step) -> Pending:
        """Queue the forward pass of `step` without waiting for it; never raises for a failed step.

        Errors are set on the future that Pending.sample returns.
        """

    def run(self, step: Step) -> StepOutput:
        """Execute `step` without masks and wait for it. No step may be in flight.

        Raises DeviceError if the device is lost, else the exception that the step failed with.
        """

    def close(self) -> None:
        """Free threads and memory. No step may be in flight. Harmless when called again."""


_NAN = [-1]  # StepOutput.token_ids of a row whose logits are NaN


class Engine:
    """Takes requests and puts output tokens, or pooled vectors, on the streams of their sequences.

    max_model_len   maximum length of a sequence in tokens, prompt and output together.
    vocab_size      token ids are in [0, vocab_size).
    policy          "priority" honours SequenceRequest.priority; "fcfs" ignores it.
    pacer           learns how large steps may be; None: the token budget is the only limit.
    is_pooling      the model pools prompts instead of sampling: all parameters are params.POOLED.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, *, max_model_len: int, vocab_size: int,
        policy: Literal["fcfs", "priority"], pacer: ChunkPacer | None = None,
        is_pooling: bool = False,
    ) -> None:  # fmt: skip
        self.scheduler = scheduler
        self.runner = runner
        self.num_steps = 0
        self.num_output_tokens = 0
        self.num_finished = 0  # sequences that have ended for whatever reason
        self.num_nan_sequences = 0
        self.has_first_tokens = False  # the last update delivered some sequence's first token
        self.histograms = StepHistograms()
        self._pacer = pacer
        if pacer is not None:
            scheduler.mixed_limit, scheduler.alone_limit = pacer.limit, pacer.alone_limit
        self._last_update_s = 0.0
        self._is_pooling = is_pooling
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._has_priorities = policy == "priority"
        self.load = Load()  # of all sequences that have not ended
        self.load_of: dict[str, Load] = {}  # the same by user; only users with sequences
        self._seqs: dict[int, Sequence] = {}
        self._num_constrained = 0  # sequences with a constraint
        self._num_asking = 0  # sequences that requested logprobs
        self._next_seq_id = 0
        # Not `secrets`: a system call releases the GIL, and getting it back may take milliseconds.
        self._seeds = random.Random()

    @property
    def num_seqs(self) -> int:
        """Sequences that have not ended."""
        return len(self._seqs)

    def step(self) -> bool:
        """Run one whole step synchronously; False where there is nothing to run.

        No sequence may have a constraint.
        """
        step = self.schedule()
        if step is None:
            return False
        assert not self.is_host_dependent(step), "masks are filled on the event loop"
        self.update(step, self.runner.run(step))
        return True

    def add(self, request: SequenceRequest) -> SequenceStream:
        """Queue one sequence and return its stream.

        Raises InvalidRequestError for token ids outside the vocabulary and where the sequence can
        never fit; ContextError where a prompt to be pooled is longer than max_model_len.
        """
        params, user = request.params, request.user
        assert params == POOLED or not self._is_pooling
        token_ids = list(request.prompt_token_ids)
        self._check(token_ids, params)
        constraint = constraint_of(params, request.constraint, self._vocab_size)
        seq_id = self._next_seq_id
        self._next_seq_id += 1
        seq = Sequence(
            stream=SequenceStream(seq_id, len(token_ids)),
            params=params,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            max_total_tokens=len(token_ids) + params.max_tokens,
            order=(self._priority(request), seq_id),
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            stop_token_ids=frozenset(i for i in params.stop_token_ids if 0 <= i < self._vocab_size),
            root_hash=self._root_hash(request),
            num_tokens=len(token_ids),
            user=user,
            constraint=constraint,
            adapter=request.adapter,
        )
        self._num_constrained += seq.constraint is not None
        self._num_asking += params.has_logprobs
        size = Load(1, len(token_ids))
        self.load += size
        self.load_of[user] = self.load_of.get(user, Load()) + size
        self._seqs[seq_id] = seq
        self.scheduler.add(seq)
        return seq.stream

    def abort(self, stream: SequenceStream) -> None:
        """End the sequence and free its slot and blocks at once, even with a step in flight.

        Harmless after its end.
        """
        seq = self._seqs.get(stream.seq_id)
        if seq is not None:
            self._finish(seq, "abort")

    def _root_hash(self, request: SequenceRequest) -> bytes:
        """The version is part of the hash: sequences share no blocks across adapter versions."""
        version = "" if request.adapter is None else str(request.adapter.version)
        return self.scheduler.blocks.root_hash(request.cache_salt, version)

    def _priority(self, request: SequenceRequest) -> int:
        if request.is_background:
            return BACKGROUND_PRIORITY
        return request.priority if self._has_priorities else 0

    def schedule(self) -> Step | None:
        """The next step to execute; None where there is nothing to run."""
        step = self.scheduler.schedule()
        if self._num_asking and step is not None:
            ask(step)
        return step

    def is_host_dependent(self, step: Step) -> bool:
        """Whether sampling `step` must wait for `update` of all steps before it."""
        return self._num_constrained > 0 and is_host_dependent(step)

    def update(self, step: Step, output: StepOutput) -> None:
        """Account for an executed step: put full blocks into the prefix cache, deliver its tokens.

        Results of rows whose sequence has left its slot since the launch (aborted, preempted or
        finished) are dropped.
        """
        offer = self.scheduler.blocks.offer
        sampled, sampled_logprobs = iter(output.token_ids), iter(output.logprobs or ())
        pooled = iter(output.pooled or ())
        if step.prompt_spans:
            put_prompt_logprobs(step, output)
        num_output_tokens = 0
        num_first_tokens = 0  # first ones since their sequence was admitted or readmitted
        now_s = time.monotonic()
        for seq, generation, seq_len, is_sampled, host_tokens in zip(
            step.seqs, step.generations, step.seq_lens, step.row_samples, step.host_tokens,
            strict=True,
        ):  # fmt: skip
            token_ids = next(sampled) if is_sampled else None
            num_top, logprobs = seq.params.num_logprobs, None
            if is_sampled and num_top is not None:
                logprobs = [next(sampled_logprobs).best(num_top)]
            vector = next(pooled, None) if is_sampled else None
            if seq.generation != generation:
                continue
            if token_ids == _NAN:
                self.num_nan_sequences += 1
                self._fail(seq, EngineError("the model's output was not a number"), has_bad_kv=True)
                continue
            if seq.next_offer_len <= seq_len:
                offer(seq, seq_len)
            if vector is not None:
                seq.stream.pooled = vector
                self._note_first_token(seq, now_s)
                self._finish(seq, "stop")
                continue
            if token_ids is None:
                continue
            if seq.constraint is not None and (failed := accept(seq, token_ids)) is not None:
                self._fail(seq, failed)
                continue
            seq.token_ids += token_ids
            seq.stream.put(token_ids, logprobs)
            num_output_tokens += len(token_ids)
            if host_tokens is not None:
                num_first_tokens += 1
                self._note_first_token(seq, now_s)
            if token_ids[-1] in seq.stop_token_ids and not is_end_void(seq):
                self._finish(seq, "stop", token_ids[-1])
            elif len(seq.token_ids) == seq.max_total_tokens:
                self._finish(seq, "length")
            elif seq.constraint is not None and seq.constraint.is_finished:
                self._end(seq)
        self.has_first_tokens = num_first_tokens > 0
        self.num_output_tokens += num_output_tokens
        self.num_steps += 1
        # All other tokens follow one that the last update delivered, so the time since then is
        # their inter-token latency.
        num_gaps = num_output_tokens - num_first_tokens
        if num_gaps:
            self.histograms.inter_token_s.observe(now_s - self._last_update_s, num_gaps)
        self.histograms.num_tokens.observe(step.num_tokens)
        self._last_update_s = now_s

    def _note_first_token(self, seq: Sequence, now_s: float) -> None:
        """Record the latency of the first token of `seq` since it was admitted or readmitted."""
        if not seq.stream.first_token_s:
            seq.stream.first_token_s = now_s
        else:
            self.histograms.inter_token_s.observe(now_s - seq.preempted_s)
        seq.preempted_s = 0.0

    def note_duration(self, step: Step, duration_s: float) -> None:
        """Record that `step` has taken duration_s seconds, and update the pacer's limits."""
        self.histograms.duration_s.observe(duration_s)
        if self._pacer is not None:
            self._pacer.note(step, duration_s)
            self.scheduler.mixed_limit = self._pacer.limit
            self.scheduler.alone_limit = self._pacer.alone_limit

    def fail_row(self, seq: Sequence, generation: int, error: PyserveError) -> None:
        """Fail only the sequence of one row in flight, if it has not left its slot since."""
        if seq.generation == generation and seq.stream.seq_id in self._seqs:
            self._fail(seq, error)

    def fail_step(self, step: Step) -> None:
        """Account for a step whose execution raised: its sequences fail, all others continue."""
        for seq, generation in zip(step.seqs, step.generations, strict=True):
            if seq.generation == generation:
                self._fail(seq, EngineError("the step that ran this sequence failed"))
        for load in step.adapter_loads:
            self.scheduler.adapters.reload(load.adapter)
            # Sequences admitted after this step expected to find the adapter loaded in its slot.
            for seq in list(self.scheduler.running):
                if seq.adapter is not None and seq.adapter.version == load.adapter.version:
                    self._fail(seq, EngineError("the step that put in its adapter failed"))

    def fail_waiting(self, error: PyserveError) -> None:
        """Fail every waiting sequence; the engine goes on."""
        for seq in list(self.scheduler.waiting):
            self._fail(seq, error)

    def fail_all(self, error: PyserveError) -> None:
        """Fail every sequence, even if the bookkeeping is inconsistent. No step may run after it.

        Blocks and slots are not released.
        """
        for seq in self._seqs.values():
            seq.stream.fail(error)
        self._seqs.clear()
        self._num_constrained = self._num_asking = 0
        self.scheduler.waiting.clear()
        self.scheduler.running.clear()
        self.scheduler.num_running_of.clear()
        self.load = Load()
        self.load_of.clear()

    def check_invariants(self) -> None:
        """Assert that all bookkeeping agrees. Slow; for tests."""
        self.scheduler.check_invariants()
        queued = [*self.scheduler.waiting, *self.scheduler.running]
        assert {id(seq) for seq in queued} == {id(seq) for seq in self._seqs.values()}
        assert len(queued) == len(self._seqs)
        assert self._num_constrained == sum(seq.constraint is not None for seq in queued)
        assert self._num_asking == sum(seq.params.has_logprobs for seq in queued)
        assert not any(seq.stream.is_finished for seq in queued)
        assert self.load == sum(self.load_of.values(), Load())
        assert self.load == Load(len(queued), sum(seq.num_prompt_tokens for seq in queued))
        assert self.load_of.keys() == {seq.user for seq in queued}

    def _end(self, seq: Sequence) -> None:
        """End a sequence whose constraint is finished: nothing but a stop token could follow.

        It fails where it has fewer than min_tokens.
        """
        error = too_short(seq)
        if error is None:
            self._finish(seq, "stop")
        else:
            self._fail(seq, error)

    def _finish(
        self, seq: Sequence, reason: FinishReason, stop_token_id: int | None = None
    ) -> None:
        self._remove(seq)
        seq.stream.finish(reason, stop_token_id)

    def _fail(self, seq: Sequence, error: PyserveError, *, has_bad_kv: bool = False) -> None:
        self._remove(seq, has_bad_kv=has_bad_kv)
        seq.stream.fail(error)

    def _remove(self, seq: Sequence, *, has_bad_kv: bool = False) -> None:
        assert seq.status is not Status.FINISHED
        self.scheduler.finish(seq, has_bad_kv=has_bad_kv)
        self.num_finished += 1
        self._num_constrained -= seq.constraint is not None
        self._num_asking -= seq.params.has_logprobs
        size = Load(1, seq.num_prompt_tokens)
        self.load -= size
        self.load_of[seq.user] -= size
        if not self.load_of[seq.user].num_seqs:
            del self.load_of[seq.user]
        del self._seqs[seq.stream.seq_id]  # last: if anything above raises, fail_all still finds it

    def _check(self, token_ids: list[int], params: SamplingParams) -> None:
        if not token_ids:
            raise InvalidRequestError("the prompt is empty, at least 1 token is needed", "prompt")
        check_token_ids("prompt", token_ids, self._vocab_size)
        check_token_ids("logit_bias", params.logit_bias, self._vocab_size)
        # The last output token is never an input, so it needs no KV; pooling has no output token.
        num_inputs = len(token_ids) + params.max_tokens - 1
        num_tokens = num_inputs + (not self._is_pooling)
        if self._is_pooling and num_tokens > self._max_model_len:
            raise ContextError(
                f"the prompt has {num_tokens}", "input", num_tokens=num_tokens,
                max_model_len=self._max_model_len,
            )  # fmt: skip
        if num_tokens > self._max_model_len:
            raise InvalidRequestError(
                f"{counted(len(token_ids), 'prompt token')} and max_tokens {params.max_tokens} "
                f"make {num_tokens}, the limit is {self._max_model_len} tokens",
                "prompt" if len(token_ids) >= self._max_model_len else "max_tokens",
            )
        blocks = self.scheduler.blocks
        num_needed = num_blocks_for(num_inputs, blocks.block_size)
        if num_needed > blocks.num_blocks:
            raise InvalidRequestError(
                f"{num_tokens} tokens need {num_needed} KV blocks, there are {blocks.num_blocks}",
                "max_tokens",
            )
