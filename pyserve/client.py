"""The interface between the API and the engine: token ids go in, token ids come out.

The API imports this module and nothing of the engine behind it. Everything here runs on one event
loop, without locks. A `SequenceStream` is a buffer: the engine appends to it and wakes its reader,
which takes all that is there at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from pyserve.errors import PyserveError
from pyserve.histogram import StepHistograms
from pyserve.params import SamplingParams

if TYPE_CHECKING:  # numpy is slow to import, and the port is to open before that
    import numpy as np
    from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort"]


class MaskFiller(Protocol):
    """Fills the masks of several constraints of its kind in one call, on any thread. It releases
    the GIL for most of that time.
    """

    def work(self, constraint: Any) -> tuple[object, float]:
        """The object that the constraint's next mask is computed from, which only one thread at a
        time may use, and an estimate of how many seconds that takes.
        """

    def fill(
        self,
        constraints: Sequence[Any],
        rows: Sequence[int],
        bitmask: NDArray[np.int32],
        *,
        is_alone: bool,
    ) -> None:
        """Fill row rows[i] of `bitmask`, int32 [num_rows, ceil(vocab_size / 32)], as
        constraints[i].fill_bitmask would.

        is_alone  no other thread fills masks meanwhile.
        """


class Constraint(Protocol):
    """Which tokens one sequence may produce next, such as by a grammar or because of bad words.

    All output tokens are passed to `accept` in order. Calls for one sequence never overlap. All but
    the properties may be called on worker threads; what takes long in them releases the GIL.

    is_free      every token is allowed now, so no mask is needed, for instance because reasoning
                 has not ended or no tool call has begun.
    is_finished  only the end of the sequence may follow.
    is_end_void  the stop token that was accepted last does not end the sequence, because something
                 that the answer must have is still missing.
    error        why the constraint cannot continue; None while it can. Only its sequence fails.
    filler       fills its next mask together with those of others; None: only fill_bitmask can.
    """

    @property
    def is_free(self) -> bool: ...

    @property
    def is_finished(self) -> bool: ...

    @property
    def is_end_void(self) -> bool: ...

    @property
    def error(self) -> str | None: ...

    @property
    def filler(self) -> MaskFiller | None: ...

    def fill_bitmask(self, words: NDArray[np.int32]) -> None:
        """Write all of `words`, int32 [ceil(vocab_size / 32)], for the engine's vocab_size.

        Bit t % 32 of word t // 32 says whether token t may come next. Stop tokens are treated like
        others: their bits say whether the sequence may end here.
        """

    def accept(self, token_ids: Sequence[int]) -> None:
        """Take the next output tokens, with a stop token if there is one. Sets `error`, if any."""

    def rollback(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` accepted tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One version of an adapter. A request keeps its version, whatever is loaded later.

    version  unique among all adapters of this server, whatever their names.
    weights  its weights in host memory, for the engine alone; freed with this object.
    """

    name: str
    version: int
    weights: Any = None

    def without_weights(self) -> Adapter:
        """A copy without the weights, so that keeping it does not keep them in memory."""
        return Adapter(self.name, self.version)


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """A name by which requests may choose an adapter; `root` is the folder or the repository of
    the hub that it was loaded from."""

    name: str
    root: str


class AdapterStore(Protocol):
    """The adapters that an engine serves beside its base model."""

    @property
    def served(self) -> list[ServedAdapter]:
        """All adapters that were loaded and not unloaded, in the order of loading."""

    @property
    def num_loads(self) -> int:
        """Number of times that an adapter was read into host memory."""

    @property
    def num_kept(self) -> int:
        """Number of versions in host memory."""

    def has(self, name: str) -> bool:
        """Whether requests may choose an adapter by this name."""

    async def load(self, name: str, root: str, *, is_reload: bool = False) -> None:
        """Serve the adapter in `root`, a folder or a repository of the hub, under `name`.

        is_reload  `name` may be served already, and gets a new version. Running requests keep the
                   version that they have.

        Raises InvalidRequestError for a name that is invalid or taken, CheckpointError where the
        folder has no adapter for this model, and another StartupError where there is no such folder
        or repository. Then nothing has changed.
        """

    def unload(self, name: str) -> None:
        """Stop serving `name`; requests that use it continue. Raises NotFoundError."""

    async def acquire(self, name: str) -> Adapter:
        """The present version of an adapter, held in host memory until `release` is called for it.

        Waits while other requests hold all versions that there is room for. Raises NotFoundError
        for an unknown name, QueueFullError where too many requests wait already, and EngineError
        where the adapter cannot be read.
        """

    def release(self, adapter: Adapter) -> None:
        """Undo one `acquire`, after all sequences of the request have ended."""


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate.

    priority       lower runs first; among equals, that of the user with the fewest running
                   sequences, then the oldest.
    cache_salt     only requests with the same salt share the prefix cache.
    user           whom the sequence counts for when slots and the queue are shared.
    constraint     on its output tokens. Only the engine uses it, and no other sequence shares it.
    is_background  all sequences that are not run first, whatever the policy, and may preempt it.
    adapter        adapter to use; None: the base model alone.
    """

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    user: str = ""
    constraint: Constraint | None = None
    is_background: bool = False
    adapter: Adapter | None = None


class TokenLogprobs(NamedTuple):
    """The logprob of a token at its position, and the most likely tokens there.

    By default it is taken before masks, biases, penalties and temperature (--logprobs-mode).

    logprob                the natural logarithm of its probability; -inf where that is 0.
    token_rank             1 + the number of tokens that are more likely.
    top_ids, top_logprobs  the most likely tokens, the most likely first, as many as were requested.
                           Entries beyond the size of the vocabulary have the id -1.
    """

    logprob: float
    token_rank: int
    top_ids: list[int]
    top_logprobs: list[float]

    def best(self, num: int | None) -> TokenLogprobs:
        """A copy with only the `num` most likely tokens; None: all of them."""
        logprob, token_rank, ids, logprobs = self
        return TokenLogprobs(logprob, token_rank, ids[:num], logprobs[:num])


@dataclass(slots=True)
class SequenceDelta:
    """What one sequence has produced since it was last read.

    token_ids      new output tokens, with the stop token, if any.
    finish_reason  set in the last delta, else None. "stop": a stop token came, or its constraint
                   allows only the end.
    stop_token_id  the stop token that ended the sequence; None if none did.
    logprobs       logprobs of each of the tokens, where they were requested.
    """

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(slots=True, eq=False)
class SequenceStream:
    """Output of one sequence: written by the engine, read by one coroutine of the API.

    num_cached_tokens  prompt tokens from the prefix cache; set before the first token.
    queued_s           when the engine accepted it, in monotonic s, like all times here.
    scheduled_s        when it was in a step for the first time; 0 until then.
    first_token_s      when its first token was sampled; 0 until then.
    ended_s            when it finished or failed; 0 until then.
    prompt_logprobs    logprobs of the prompt's tokens from the second on, where they were
                       requested; complete before the first output token.
    pooled             float32 [info.pooling.width]: the embedding or score of the prompt, where the
                       engine pools, once it has finished with "stop".
    """

    seq_id: int
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    queued_s: float = field(default_factory=time.monotonic)
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: NDArray[np.float32] | None = None
    _logprobs: list[TokenLogprobs] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _finish_reason: FinishReason | None = None
    _stop_token_id: int | None = None
    _error: PyserveError | None = None
    _wakeup: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_finished(self) -> bool:
        """Whether `finish` or `fail` was called; there may still be tokens to read."""
        return self._finish_reason is not None or self._error is not None

    def admit(self, num_cached_tokens: int) -> None:
        """Engine side: the sequence starts to run; so many prompt tokens come from the cache."""
        self.num_cached_tokens = num_cached_tokens
        self.scheduled_s = time.monotonic()

    def put(self, token_ids: list[int], logprobs: list[TokenLogprobs] | None = None) -> None:
        """Engine side: append output tokens, and the logprobs of each, if any; wake the reader."""
        assert self._finish_reason is None and self._error is None, "token after the end"
        self._token_ids += token_ids
        if logprobs is not None:
            self._logprobs += logprobs
        self._wakeup.set()

    def finish(self, reason: FinishReason, stop_token_id: int | None = None) -> None:
        """Engine side: the sequence has ended; exactly one of finish and fail is called."""
        assert not self.is_finished, "finished twice"
        self._finish_reason = reason
        self._stop_token_id = stop_token_id
        self.ended_s = time.monotonic()
        self._wakeup.set()

    def fail(self, error: PyserveError) -> None:
        """Engine side: the sequence has failed; after its tokens the reader gets `error` raised."""
        assert not self.is_finished, "failed after the end"
        self._error = error
        self.ended_s = time.monotonic()
        self._wakeup.set()

    def share_wakeup(self, wakeup: asyncio.Event) -> None:
        """Set `wakeup` on news from now on, so that one reader can wait for several streams.

        Called right after submit. The reader clears the event itself, then takes from each stream.
        """
        if self._wakeup.is_set():
            wakeup.set()
        self._wakeup = wakeup

    def take(self) -> SequenceDelta | None:
        """All output since the last call; None where there is none. Never waits.

        After the last output it raises the error that the sequence failed with, if it did.
        """
        if not self._token_ids and not self.is_finished:
            return None
        if self._error is not None and not self._token_ids:
            raise self._error
        delta = SequenceDelta(self._token_ids)
        self._token_ids = []
        if self._logprobs:
            delta.logprobs, self._logprobs = self._logprobs, []
        if self._error is not None:
            self._wakeup.set()  # the reader must call again, which then raises
        else:
            delta.finish_reason = self._finish_reason
            delta.stop_token_id = self._stop_token_id
        return delta

    async def read(self) -> SequenceDelta:
        """Wait for output and take all of it. Raises as `take` does.

        After the end each call returns the finish reason, or raises the error, at once.
        """
        while True:
            if not self.is_finished:
                await self._wakeup.wait()
            self._wakeup.clear()
            delta = self.take()
            if delta is not None:
                return delta


@dataclass(frozen=True, slots=True)
class PoolingInfo:
    """What an engine that pools computes from a prompt, instead of generating.

    kind           "embed": the last hidden state; "score": one number, above 0 for yes.
    width          size of the result, in float32 numbers.
    is_normalized  embeddings should be normalized to length 1, which the engine does not do.
    dimensions     sizes that an embedding may be cut to before that; (): any up to width.
    """

    kind: Literal["embed", "score"]
    width: int
    is_normalized: bool = True
    dimensions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the API needs to know about the engine; constant after the start."""

    max_model_len: int  # tokens, prompt and output together
    vocab_size: int  # token ids are in [0, vocab_size)
    max_num_seqs: int
    block_size: int  # tokens per KV block
    num_blocks: int
    dtype: str
    device: str
    max_queue: int = 1024  # sequences that may wait
    has_priorities: bool = False  # scheduling_policy is "priority", so priorities count
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9  # as configured
    has_logits: bool = False  # logprobs hold logits instead
    pooling: PoolingInfo | None = None  # None: it generates; else params must be params.POOLED
    num_adapter_slots: int = 0  # different adapters that may run at once


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for /metrics and the log. Counters only grow."""

    num_running: int
    num_waiting: int
    num_blocks_used: int
    num_preemptions: int
    num_steps: int
    prompt_tokens: int  # prompt tokens of admitted sequences
    cached_tokens: int  # those of them that the prefix cache served
    output_tokens: int
    step_age_s: float  # age of the running step, 0 where none runs
    error: str | None  # why the engine has given up; None while it has not
    step_deadline_s: float | None = None  # a step that takes longer has hung; None: no limit
    num_device_allocations: int = 0  # times memory was taken from a GPU; constant after ready
    num_awaiting: int = 0  # waiting sequences that wait for the prefill of an equal prompt
    sleep_level: int = 0  # 0: awake; 1: without a KV cache; 2: without weights, too
    num_nan_sequences: int = 0  # sequences that failed because logits were NaN
    running_adapters: tuple[str, ...] = ()  # names of adapters that running sequences use
    waiting_adapters: tuple[str, ...] = ()  # names of others that only waiting sequences use
    num_adapter_loads: int = 0  # times an adapter was put into a slot of the device
    num_adapter_reads: int = 0  # times an adapter was read into host memory
    steps: StepHistograms = field(default_factory=StepHistograms)  # the engine's own, not a copy


class EngineClient(Protocol):
    """All that the API sees of the engine. An engine ends when it is stopped or gives up.

    After its end all calls still work: `info` and `stats` return their last values, with nothing
    running, waiting or held; `submit`, `check_room`, `sleep` and `wake_up` raise UnavailableError
    with the reason; `abort`, `reset_prefix_cache` and another `stop` do nothing; `start` raises
    RuntimeError.
    """

    @property
    def info(self) -> EngineInfo: ...

    @property
    def adapters(self) -> AdapterStore | None:
        """The adapters that it serves; None: it serves its base model alone."""

    def start(self) -> None:
        """Start to run steps, on the event loop. Raises RuntimeError if it was called before."""

    async def stop(self) -> None:
        """Fail what still runs, and free threads and memory. `submit` raises from now on.

        May be called again, also while it runs, and before `start`.
        """

    async def wait_stopped(self) -> str:
        """Wait until the engine gives up; returns why. A `stop` does not end the wait.

        By then it has failed every stream, and `stats().error` says the same.
        """

    def check_room(self, num_sequences: int, *, num_tokens: int = 0, user: str = "") -> None:
        """Check that `user` may queue `num_sequences` more, with `num_tokens` prompt tokens in all.

        Raises QueueFullError where the queue has no room for them now, InvalidRequestError where it
        never will, and UnavailableError where the engine has ended. If it does not raise, they can
        be submitted at once.
        """

    def submit(self, request: SequenceRequest) -> SequenceStream:
        """Queue one sequence. Raises as `check_room`, and InvalidRequestError if it never fits."""

    def abort(self, stream: SequenceStream) -> None:
        """End a sequence. Does nothing after its end.

        The stream finishes with reason "abort" before this returns, and nothing more is put into
        it. Its blocks are free for others at once or, if the step in flight computes it, by the end
        of that step.
        """

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, so that prompts submitted from now on are computed.

        Running sequences keep their blocks.
        """

    async def sleep(self, level: int) -> None:
        """Free memory: level 1 the KV cache, 2 the weights too; on a GPU both levels free both.

        Returns when that is done, or `wake_up` was called meanwhile. Running sequences are queued
        again, and continue after `wake_up` with those submitted meanwhile. Raises UnavailableError.
        """

    async def wake_up(self) -> None:
        """Allocate the memory again; returns when that is done. Does nothing if it is awake.

        Raises UnavailableError, also where the memory or the weights cannot be had; then it stays
        asleep, and this may be called again.
        """

    def stats(self) -> EngineStats:
        """A snapshot of its figures. It is cheap and never raises."""
