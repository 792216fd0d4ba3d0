"""The seam between the API and the engine: token ids go in, token ids come out.

The API imports this and nothing behind it. Everything here runs on the one event loop; no locks.
A `SequenceStream` is a buffer, not a queue: the engine appends and wakes its reader, and a reader
that comes late takes all that has gathered at once.
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

if TYPE_CHECKING:  # the port opens before anything as slow to import as numpy
    import numpy as np
    from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort"]


class MaskFiller(Protocol):
    """Fills the masks of several constraints of its kind in one call, on any thread, and lets go of
    the interpreter's lock for most of it.
    """

    def work(self, constraint: Any) -> tuple[object, float]:
        """What its mask is made from, by one thread at a time, and about how many seconds that
        takes.
        """

    def fill(
        self,
        constraints: Sequence[Any],
        rows: Sequence[int],
        bitmask: NDArray[np.int32],
        *,
        is_alone: bool,
    ) -> None:
        """Row rows[i] of `bitmask`, int32 [.., ceil(vocab_size / 32)], as constraints[i] would.

        is_alone  no other thread fills masks now.
        """


class Constraint(Protocol):
    """Which tokens one sequence may produce next: a grammar, words that are forbidden.

    It knows the output tokens that it has accepted, all of them and in order. The calls for one
    sequence never overlap; all but the properties may come from a thread that is not the event
    loop's, and what takes long in them lets go of the interpreter's lock.

    is_free      every token is allowed now, so no mask is needed: reasoning has not ended, no tool
                 call has begun.
    is_finished  nothing but an end may follow.
    is_end_void  the stop token that has come last does not end the sequence: what the answer must
                 have is yet to come.
    error        why it cannot go on, None while it can; the sequence fails with it, alone.
    filler       what fills its next mask together with others; None: fill_bitmask alone does.
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
        """Write all of `words`, int32 [ceil(vocab_size / 32)] of the engine's vocab_size.

        Bit t % 32 of word t // 32 says whether token t may come next. Stop tokens are tokens like
        the others: their bits say whether the sequence may end here.
        """

    def accept(self, token_ids: Sequence[int]) -> None:
        """These output tokens have come, a stop token included. What is wrong goes to `error`."""

    def rollback(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` accepted ones."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What was loaded under a name, once: a request keeps to it whatever is loaded later.

    version  no other adapter of this server has the same, whatever its name.
    weights  the engine's own, in the host's memory for as long as somebody has this.
    """

    name: str
    version: int
    weights: Any = None

    def without_weights(self) -> Adapter:
        """The same for whoever must not keep them."""
        return Adapter(self.name, self.version)


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """A name that requests may choose an adapter by; `root` is where it comes from, as that was
    named: a folder, or a repository of the hub."""

    name: str
    root: str


class AdapterStore(Protocol):
    """The adapters that an engine serves beside its base model."""

    @property
    def served(self) -> list[ServedAdapter]:
        """All that have been loaded and not unloaded, in the order of their loading."""

    @property
    def num_loads(self) -> int:
        """Times an adapter was read, a counter."""

    @property
    def num_kept(self) -> int:
        """Versions in the host's memory."""

    def has(self, name: str) -> bool:
        """Whether `acquire` would look for it."""

    async def load(self, name: str, root: str, *, is_reload: bool = False) -> None:
        """Serve the adapter of `root`, a folder or a repository of the hub, under `name`, as a new
        version; is_reload: also where the name is served already. Requests that run go on with the
        version that they have.

        Raises InvalidRequestError where the name is taken or none, CheckpointError where there is
        no adapter for this model in the folder, another StartupError where there is no such folder
        and the hub does not give it: then nothing has changed.
        """

    def unload(self, name: str) -> None:
        """Serve it no more; requests that use it go on. Raises NotFoundError."""

    async def acquire(self, name: str) -> Adapter:
        """The present version, which stays in the host's memory until it is released as often as
        acquired. Waits where the memory is full of versions that others hold.

        Raises NotFoundError where nothing is served under the name, QueueFullError where too many
        wait, EngineError where it cannot be read again.
        """

    def release(self, adapter: Adapter) -> None:
        """Its request, whose sequences have all ended, needs it no more."""


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate.

    priority       lower runs first; of equal ones the user who runs the fewest, then the oldest.
    cache_salt     the prefix cache is shared by requests with the same one.
    user           with whom slots and places in the queue are shared.
    constraint     of its output tokens; the engine alone uses it, and no two sequences share one.
    is_background  it comes after all that are not, whatever the policy, and is preempted for them.
    adapter        what is added to the base model; None: nothing.
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
    """How likely a token is where it stands, before masks, biases, penalties and temperature.

    logprob                the natural logarithm of its probability; -inf where that is 0.
    token_rank             1 + the number of tokens that are more likely.
    top_ids, top_logprobs  the most likely tokens, in falling order: as many as were asked for; -1
                           behind the last of the vocabulary.
    """

    logprob: float
    token_rank: int
    top_ids: list[int]
    top_logprobs: list[float]

    def best(self, num: int | None) -> TokenLogprobs:
        """The same with the first `num` most likely tokens alone."""
        logprob, token_rank, ids, logprobs = self
        return TokenLogprobs(logprob, token_rank, ids[:num], logprobs[:num])


@dataclass(slots=True)
class SequenceDelta:
    """What one sequence has produced since it was last read.

    token_ids          new output tokens, the stopping one included.
    finish_reason      None while the sequence runs; the last delta carries it. "stop": by a stop
                       token, or because nothing but one was allowed.
    stop_token_id      the id of stop_token_ids that ended the sequence, None otherwise.
    logprobs           of each of the tokens, where they were asked for.
    """

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(slots=True, eq=False)
class SequenceStream:
    """Output of one sequence: written by the engine, read by one coroutine of the API.

    num_cached_tokens  prompt tokens from the prefix cache; set before the first token.
    queued_s           when the engine accepted it, on the monotonic clock as all of these.
    scheduled_s        when it was in a step for the first time; 0 until then.
    first_token_s      when its first token was sampled; 0 until then.
    ended_s            when it finished or failed; 0 until then.
    prompt_logprobs    of the prompt's tokens from the second on, where they were asked for: all of
                       them before the first output token.
    pooled             float32 [info.pooling.width], where the engine pools: what the prompt has
                       become, once it has finished with "stop".
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
        """True after `finish` or `fail`; tokens that nobody has read yet may remain."""
        return self._finish_reason is not None or self._error is not None

    def admit(self, num_cached_tokens: int) -> None:
        """Engine side: the sequence begins to run, this much of its prompt from the cache."""
        self.num_cached_tokens = num_cached_tokens
        self.scheduled_s = time.monotonic()

    def put(self, token_ids: list[int], logprobs: list[TokenLogprobs] | None = None) -> None:
        """Engine side: append output tokens, with the logprobs of each or none; wake the reader."""
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
        """Engine side: the sequence has failed; `read` raises `error` after what it delivered."""
        assert not self.is_finished, "failed after the end"
        self._error = error
        self.ended_s = time.monotonic()
        self._wakeup.set()

    def share_wakeup(self, wakeup: asyncio.Event) -> None:
        """Wake `wakeup` from here on, so that one reader can wait for several streams at once.

        Called right after submit; the reader clears the event itself and then takes from each.
        """
        if self._wakeup.is_set():
            wakeup.set()
        self._wakeup = wakeup

    def take(self) -> SequenceDelta | None:
        """All that has gathered since the last call, None where nothing has. Never waits.

        Raises the error the sequence failed with, after what it had delivered.
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
            self._wakeup.set()  # the next call raises
        else:
            delta.finish_reason = self._finish_reason
            delta.stop_token_id = self._stop_token_id
        return delta

    async def read(self) -> SequenceDelta:
        """Wait for output and take all that there is. Raises as `take` does.

        After the end it returns the finish reason, or raises the error, again and at once.
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
    """What an engine makes of a prompt in place of an answer.

    kind           "embed": its last hidden state; "score": one number, above 0 for yes.
    width          numbers that a prompt becomes.
    is_normalized  embeddings are meant to be divided by their length; the engine does not.
    dimensions     to which an embedding may be cut before that; (): any up to width.
    """

    kind: Literal["embed", "score"]
    width: int
    is_normalized: bool = True
    dimensions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the API must know about the engine; constant after start."""

    max_model_len: int  # tokens, prompt and output together
    vocab_size: int  # token ids are in [0, vocab_size)
    max_num_seqs: int
    block_size: int  # tokens a KV block
    num_blocks: int
    dtype: str
    device: str
    max_queue: int = 1024  # sequences that may wait
    has_priorities: bool = False  # scheduling_policy is "priority": submit's priority counts
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9  # as configured
    has_logits: bool = False  # in place of log probabilities
    pooling: PoolingInfo | None = None  # None: it generates; else it takes params.POOLED alone
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
    cached_tokens: int  # of those, served by the prefix cache
    output_tokens: int
    step_age_s: float  # age of the running step, 0 where none runs
    error: str | None  # why the engine has stopped; None while it is sound
    step_deadline_s: float | None = None  # a step that takes longer has hung; None: no limit
    num_device_allocations: int = 0  # times memory was taken from a GPU; constant after ready
    num_awaiting: int = 0  # of the waiting, those that wait for an equal prompt's prefill
    sleep_level: int = 0  # 0: awake; 1: without a KV cache; 2: without weights, too
    num_nan_sequences: int = 0  # failed, as the model's output was not a number
    running_adapters: tuple[str, ...] = ()  # names of those that running sequences use
    waiting_adapters: tuple[str, ...] = ()  # of those that waiting ones use and no running one does
    num_adapter_loads: int = 0  # times an adapter was put into a slot of the device
    num_adapter_reads: int = 0  # times one was read into the host's memory
    steps: StepHistograms = field(default_factory=StepHistograms)  # the engine's own, not a copy


class EngineClient(Protocol):
    """All that the API sees of the engine. An engine ends when it is stopped or gives up.

    After its end every call still has an answer: `info` and `stats` return their last values, with
    nothing running, waiting or held; `submit`, `check_room`, `sleep` and `wake_up` raise
    UnavailableError with the reason; `abort`, `reset_prefix_cache` and another `stop` do nothing;
    `start` raises RuntimeError.
    """

    @property
    def info(self) -> EngineInfo: ...

    @property
    def adapters(self) -> AdapterStore | None:
        """None: the engine serves its base model alone."""

    def start(self) -> None:
        """Begin to step; called once, on the event loop. RuntimeError the second time."""

    async def stop(self) -> None:
        """Fail what still runs, free threads and memory. `submit` raises from here on.

        Harmless when called again, also while it runs and before `start`.
        """

    async def wait_stopped(self) -> str:
        """Why the engine has given up, once it has; waits for ever while it is sound.

        By then it has failed every stream and `stats().error` says the same. `stop` alone does not
        end the wait.
        """

    def check_room(self, num_sequences: int, *, num_tokens: int = 0, user: str = "") -> None:
        """Whether `user` may queue `num_sequences` more, with `num_tokens` prompt tokens in all.

        Raises QueueFullError where the queue has no room for them now, InvalidRequestError where it
        never will, and UnavailableError where the engine has stopped. What passes can be submitted
        at once.
        """

    def submit(self, request: SequenceRequest) -> SequenceStream:
        """Queue one sequence. Raises as `check_room` does, and InvalidRequestError where it can
        never fit.
        """

    def abort(self, stream: SequenceStream) -> None:
        """End the sequence. Harmless after its end.

        The stream finishes with reason "abort" before this returns, and nothing more is put into
        it. Its blocks are free for others within one step: by the end of the step in flight, if
        that computes it.
        """

    def reset_prefix_cache(self) -> None:
        """Forget the prompts and answers so far: what is submitted from here on is computed.

        What runs goes on with the blocks that it has.
        """

    async def sleep(self, level: int) -> None:
        """Give memory back: 1 the KV cache, 2 the weights as well; on a card both either way.

        Returns when it has, or when `wake_up` was called meanwhile. What runs is queued again and
        goes on after `wake_up`; what is submitted meanwhile waits, too. Raises UnavailableError.
        """

    async def wake_up(self) -> None:
        """Take the memory again. Returns when it has. Harmless where it is awake. Raises as
        `sleep` does, also where the memory or the weights are not there: it sleeps on then, and may
        be asked again.
        """

    def stats(self) -> EngineStats:
        """A snapshot; cheap, raises nothing."""
