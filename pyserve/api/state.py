"""ServerState: what the handlers of one server share: its status, model, metrics and queues."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Literal, TypeVar

from aiohttp import web

from pyserve.api.batches.service import BatchService
from pyserve.api.batches.store import Store
from pyserve.api.generation.generate import Generation
from pyserve.api.generation.request_log import RequestLog
from pyserve.api.http.http_metrics import HttpMetrics
from pyserve.api.http.keys import CLIENT, Keys
from pyserve.api.http.uploads import Uploads
from pyserve.api.life.startup import Startup
from pyserve.api.life.watchdog import LoopWatchdog
from pyserve.api.store.background import Runs
from pyserve.api.store.responses import ResponseStore
from pyserve.api.text_queue import TextQueue
from pyserve.client import EngineClient, EngineInfo
from pyserve.config import ServerConfig, named_keys
from pyserve.errors import InvalidRequestError, NotFoundError, UnavailableError
from pyserve.metrics import Metrics
from pyserve.text.chat_template import ChatTemplate
from pyserve.text.grammar import Grammars
from pyserve.text.reasoning import ReasoningParser
from pyserve.text.score_template import ScoreTemplate
from pyserve.text.tokenizer import GenerationDefaults, Tokenizer
from pyserve.text.tool_parsers.registry import ToolFormat

MAX_RETRY_AFTER_S = 60
SHORT_TEXT_CHARS = 4000  # up to here text is tokenised on the event loop: about a millisecond

Work = Literal["generate", "embed", "score"]

R = TypeVar("R")

# Parts of the error message, by what a model is for: what it does and at which endpoints, and what
# kind of model an endpoint needs.
_DOES: dict[Work, str] = {
    "generate": "generates text: ask /v1/chat/completions, /v1/completions",
    "embed": "makes embeddings: ask /v1/embeddings, /v1/score",
    "score": "scores documents: ask /v1/rerank, /v1/score",
}
_TAKES: dict[Work, str] = {
    "generate": "a model that generates",
    "embed": "an embedding model, which one that generates may be with --runner embed",
    "score": "a reranker, which one that generates may be with --runner score",
}


def check_work(info: EngineInfo, *works: Work) -> None:
    """Raise InvalidRequestError where the model does none of `works`.

    The message says what the endpoint needs: a model for the first of `works`.
    """
    own: Work = "generate" if info.pooling is None else info.pooling.kind
    if own not in works:
        raise InvalidRequestError(
            f"the model that is served {_DOES[own]}; this endpoint takes {_TAKES[works[0]]}",
            "model",
        )


@dataclass(frozen=True, slots=True)
class Loaded:
    """All that the API needs of a loaded model. The engine is not started yet.

    reasoning       separates reasoning from content; None: it is not separated.
    tools           how the model writes tool calls; None: they are not parsed.
    score_template  the prompt of a model that scores documents; None: it does not.
    prepared        grammars that were made before the engine was; None: they are made here.
    """

    tokenizer: Tokenizer
    chat_template: ChatTemplate
    defaults: GenerationDefaults
    engine: EngineClient
    reasoning: ReasoningParser | None = None
    tools: ToolFormat | None = None
    score_template: ScoreTemplate | None = None
    prepared: InitVar[Grammars | None] = None
    grammars: Grammars = field(init=False)

    def __post_init__(self, prepared: Grammars | None) -> None:
        vocab_size = self.engine.info.vocab_size
        grammars = prepared or Grammars.of(self.tokenizer, self.defaults, vocab_size)
        assert grammars.vocabulary.vocab_size == vocab_size
        object.__setattr__(self, "grammars", grammars)


@dataclass(slots=True, eq=False)
class ServerState:
    """The state of one server. Every handler reads it; serve.py owns it and alone sets `status`.

    loaded         the model; None until it is loaded.
    num_in_flight  number of requests that use the model.
    generations    the running generations, each with the request ids by which it can be aborted.
    batches        None: --batch-dir is not given.
    created        Unix time of the start, in s.
    """

    config: ServerConfig
    metrics: Metrics
    startup: Startup = field(default_factory=Startup)
    watchdog: LoopWatchdog = field(init=False)
    status: Literal["starting", "ready", "draining", "failed"] = "starting"
    loaded: Loaded | None = None
    num_in_flight: int = 0
    generations: dict[Generation, set[str]] = field(default_factory=dict)
    uploads: Uploads = field(default_factory=Uploads)
    batches: BatchService | None = None
    request_log: RequestLog = field(init=False)
    http_metrics: HttpMetrics = field(init=False)
    keys: Keys = field(init=False)
    responses: ResponseStore = field(init=False)
    runs: Runs = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _text_queue: TextQueue = field(default_factory=TextQueue)

    def __post_init__(self) -> None:
        self.watchdog = LoopWatchdog(lambda: self.num_in_flight)
        self.http_metrics = HttpMetrics(self.config.root_path)
        self.metrics.add(self.http_metrics)
        self.request_log = RequestLog(has_arrivals=self.config.log_requests)
        keys = named_keys(self.config.api_keys)
        self.keys = Keys(keys, is_shared=self.config.share_prefix_cache)
        self.metrics.count_usage_of(self.keys.users)
        config = self.config
        self.responses = ResponseStore(config.response_store_bytes, config.response_store_age_s)
        self.runs = Runs(config.response_store_bytes)
        self.metrics.watch_responses(
            lambda: (self.responses.num_responses, self.responses.num_bytes, len(self.runs))
        )

    def open_batches(self) -> None:
        """Open --batch-dir, if it is given. Raises StartupError."""
        config = self.config
        if config.batch_dir is None:
            return
        store = Store(
            config.batch_dir,
            max_file_bytes=config.batch_max_file_bytes,
            max_bytes=config.batch_max_total_bytes,
            num_owners=len(self.keys.users),
        )
        self.batches = BatchService(
            store,
            owner_of=self.keys.owner,
            users=self.keys.users,
            max_inflight=config.batch_max_inflight,
            max_body_bytes=config.max_body_bytes,
        )

    @property
    def model_name(self) -> str:
        """The base model's name in responses and metrics."""
        return self.config.served_model_names[0]

    def model(self) -> Loaded:
        """The model, for a new request. Raises UnavailableError where the server is not ready."""
        if self.status == "draining":
            raise UnavailableError("the server is shutting down")
        if self.status == "failed":
            raise UnavailableError("the engine has stopped, and the server with it")
        if self.loaded is None or self.status == "starting":
            phase = self.startup.phase
            eta_s = phase.eta_s(time.monotonic())
            percent = "" if phase.progress is None else f", {phase.progress:.0%}"
            raise UnavailableError(
                f"the server is starting (phase {phase.name}{percent})",
                max(1, min(int(eta_s or 1), MAX_RETRY_AFTER_S)),
            )
        return self.loaded

    def model_with_room(self, request: web.Request, *works: Work) -> Loaded:
        """The model, if it does one of `works` (none given: "generate") and its queue has room.

        Called before the body is read, so that a refusal costs next to nothing. Raises as `model`,
        QueueFullError where the client may not queue one more sequence, and InvalidRequestError
        where the model does none of `works`.
        """
        loaded = self.model()
        check_work(loaded.engine.info, *(works or ("generate",)))
        loaded.engine.check_room(1, user=request[CLIENT])
        return loaded

    def adapter_named(self, name: str | None) -> str | None:
        """The adapter that a request for model `name` uses; None: the base model alone.

        No name means the base model, too. Raises NotFoundError where `name` is not served.
        """
        if not name or name in self.config.served_model_names:
            return None
        adapters = self.loaded.engine.adapters if self.loaded is not None else None
        if adapters is None or not adapters.has(name):
            raise NotFoundError(f"The model `{name[:200]}` does not exist.", "model")
        return name

    def check_model_name(self, name: str | None) -> None:
        """Raise NotFoundError where `name` is given and not served."""
        self.adapter_named(name)

    def name_in_answers(self, name: str | None) -> str:
        """The model name in responses to a request for `name`.

        That is the adapter's name, or the first name of the base model.
        """
        is_adapter = bool(name) and name not in self.config.served_model_names
        return name if is_adapter and name else self.model_name

    def enter(self) -> None:
        """Count a request that begins to use the model."""
        self.num_in_flight += 1

    def leave(self) -> None:
        """Count such a request as ended, whether it succeeded or not."""
        self.num_in_flight -= 1
        if self.num_in_flight == 0:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request uses the model; False where that takes longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.num_in_flight:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                return False
        return True

    async def run_text(
        self,
        request: web.Request,
        size: int,
        function: Callable[[], R],
        *,
        short: int = SHORT_TEXT_CHARS,
        is_answer: bool = False,
    ) -> R:
        """Run work on text, on a thread where it could block the event loop; returns its result.

        size       how much text it is about, in bytes, characters or tokens.
        short      up to this size the work runs on the event loop at once.
        is_answer  it is the last work of a request, so it is never refused for a full queue.

        Raises QueueFullError, and what `function` raises.
        """
        if size <= short:
            return function()
        return await self._text_queue.run(
            function, client=request[CLIENT], num_bytes=size, is_answer=is_answer
        )

    def close(self) -> None:
        """Release threads, memory and files. Work that still runs on threads is not waited for."""
        self._text_queue.close()
        self.responses.close()
        if self.batches is not None:
            self.batches.close()


STATE = web.AppKey("state", ServerState)
