"""RequestLog: one log line at the end of every request that used the model.

With --enable-log-requests there is another one at its arrival. The lines hold numbers and field
names, never text of the client's: no prompt, no stop string, and no error message, which may quote
them. The rate of lines is limited; those left out are counted, and the next line says how many.
Requests from batches are not logged, because their errors are in the batch's files.
"""

from __future__ import annotations

import logging
import re
import time
from contextvars import ContextVar

from aiohttp import web

from pyserve.api.generation.generate import Choice, Generation
from pyserve.api.http.keys import IS_BACKGROUND
from pyserve.api.http.request_id import current as current_request_id
from pyserve.errors import QueueFullError, RequestError
from pyserve.log import get_logger
from pyserve.params import SamplingParams
from pyserve.words import counted

LINES_PER_S, MAX_BURST_LINES = 50.0, 500.0
MAX_PARAM_CHARS = 64
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")
# Whether the end of the request that this task answers has been logged. An error that is raised
# after that gets no second line.
_has_ended: ContextVar[bool] = ContextVar("has_ended", default=False)


class LineBudget:
    """A token bucket: allows `max_burst_lines` at once, and `lines_per_s` in the long run.

    num_dropped  lines that were not allowed since the last `pop_dropped`.
    """

    def __init__(self, lines_per_s: float, max_burst_lines: float) -> None:
        self._lines_per_s = lines_per_s
        self._max_burst_lines = max_burst_lines
        self._num_lines = max_burst_lines
        self._refilled_s = time.monotonic()
        self.num_dropped = 0

    def take(self, now_s: float) -> bool:
        """Take room for one line at monotonic time `now_s`; False, counted, where there is none."""
        refill = (now_s - self._refilled_s) * self._lines_per_s
        self._num_lines = min(self._num_lines + refill, self._max_burst_lines)
        self._refilled_s = now_s
        if self._num_lines < 1.0:
            self.num_dropped += 1
            return False
        self._num_lines -= 1.0
        return True

    def pop_dropped(self) -> int:
        """Return num_dropped and set it to 0."""
        num_dropped, self.num_dropped = self.num_dropped, 0
        return num_dropped


class RequestLog:
    """Logs the requests of one server; `has_arrivals`: their arrivals too."""

    def __init__(self, *, has_arrivals: bool) -> None:
        self._has_arrivals = has_arrivals
        self._budget = LineBudget(LINES_PER_S, MAX_BURST_LINES)

    @property
    def num_dropped(self) -> int:
        """Lines that were left out since the last one was written."""
        return self._budget.num_dropped

    def begin(self) -> None:
        """Note that this task begins to answer a request."""
        _has_ended.set(False)

    def arrived(self, request: web.BaseRequest, generation: Generation) -> None:
        """Log, if enabled, that all sequences of a request have been queued."""
        if not self._has_arrivals or not self._take_line(request):
            return
        choice = generation.choices[0]
        num_prompts = sum(choice.sample_index == 0 for choice in generation.choices)
        n = len(generation.choices) // num_prompts
        settings = "".join(f", {name}={value}" for name, value in _settings(choice))
        num_tokens = generation.usage().prompt_tokens
        text = f"arrived: {num_tokens} prompt tokens, prompts={num_prompts}, n={n}{settings}"
        _say(request, text)

    def ended(self, request: web.BaseRequest, generation: Generation) -> None:
        """Log that all choices of a request have ended; nothing where there were none."""
        if not generation.choices:
            return
        _has_ended.set(True)
        if self._take_line(request):
            _say(request, describe(generation, time.monotonic()))

    def refused(self, request: web.BaseRequest, error: RequestError) -> None:
        """Log that a request has ended with `error`, unless `ended` has already logged its end.

        Refusals because of a full queue are not logged one by one: the engine logs their number.
        """
        if _has_ended.get() or isinstance(error, QueueFullError) or not self._take_line(request):
            return
        param = _UNSAFE.sub("?", (error.param or "-")[:MAX_PARAM_CHARS])
        _say(request, f"refused: {error.status} {error.type}, field {param}")

    def _take_line(self, request: web.BaseRequest) -> bool:
        if request.get(IS_BACKGROUND) or not get_logger().isEnabledFor(logging.INFO):
            return False
        if not self._budget.take(time.monotonic()):
            return False
        if num_dropped := self._budget.pop_dropped():
            get_logger().info("%s about requests left out", counted(num_dropped, "line"))
        return True


def _say(request: web.BaseRequest, text: str) -> None:
    get_logger().info("request %s %s %s", current_request_id.get(), request.path, text)


def describe(generation: Generation, now: float) -> str:
    """The text of a line at monotonic time `now`: how a request ended, its tokens and its times."""
    choices = generation.choices
    reasons = ",".join(dict.fromkeys(str(choice.finish_reason) for choice in choices))
    usage = generation.usage()
    cached = usage.prompt_tokens_details
    begun = [choice for choice in choices if choice.first_token_s]
    if generation.error is not None:
        reasons += f", {generation.error.status} {generation.error.type}"
    text = (
        f"{generation.end} ({reasons}): {usage.prompt_tokens} prompt tokens "
        f"({cached.cached_tokens if cached else 0} cached), {usage.completion_tokens} output "
        f"tokens, queued {1000 * _queued_s(choices[0]):.0f} ms"
    )
    if begun:
        first_s = min(choice.first_token_s for choice in begun)
        text += f", first token {1000 * (first_s - generation.arrived_s):.0f} ms"
        num_later_tokens = usage.completion_tokens - len(begun)
        if num_later_tokens > 0 and now > first_s:
            text += f", {num_later_tokens / (now - first_s):.1f} tokens/s"
    return f"{text}, {now - generation.arrived_s:.2f} s"


def _queued_s(choice: Choice) -> float:
    stream = choice.stream
    return (stream.scheduled_s or stream.ended_s) - stream.queued_s


def _settings(choice: Choice) -> list[tuple[str, object]]:
    """Names and values of parameters that differ from the defaults; of collections the length."""
    params = choice.params
    defaults = SamplingParams(max_tokens=params.max_tokens)
    settings: list[tuple[str, object]] = [("max_tokens", params.max_tokens)]
    for name in params.__struct_fields__:
        value = getattr(params, name)
        if name not in ("max_tokens", "sample_index") and value != getattr(defaults, name):
            settings.append((name, len(value) if isinstance(value, dict | tuple) else value))
    if choice.ending.stop:
        settings.append(("stop", len(choice.ending.stop)))
    return settings
