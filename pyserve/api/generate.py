"""One request: its sequences are submitted, read together and turned into text.

One coroutine reads all choices of a request through one shared wake-up; per token there is no
task, no queue and no object that outlives the wake-up. Streamed and whole answers take this road
alike, so they cannot differ.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from pyserve.api.protocol import PromptTokensDetails, Usage
from pyserve.api.sampling import Ending
from pyserve.client import EngineClient, SequenceDelta, SequenceStream
from pyserve.metrics import Metrics
from pyserve.params import SamplingParams
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.stop import StopChecker


@dataclass(slots=True, eq=False)
class Choice:
    """One sequence of a request and the text it has become.

    num_tokens counts the output tokens up to the one that ended the answer, and no further.
    """

    index: int
    sample_index: int
    stream: SequenceStream
    ending: Ending
    detokenizer: Detokenizer
    stop_checker: StopChecker | None
    num_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    last_token_s: float = 0.0
    pieces: list[str] = field(default_factory=list)

    def advance(self, delta: SequenceDelta) -> str:
        """New text of `delta`; sets finish_reason with the last of it."""
        token_ids = delta.token_ids
        is_cut = delta.finish_reason == "stop" and not self.ending.include_stop
        visible = token_ids[:-1] if is_cut else token_ids
        if self.stop_checker is None:
            text = self.detokenizer.push(visible)
            self.num_tokens += len(token_ids)
        else:
            text = self._advance_checked(self.stop_checker, visible)
            if self.finish_reason is not None:
                return text
            self.num_tokens += len(token_ids) - len(visible)
        if delta.finish_reason is not None:
            text += self._flush()
            if self.finish_reason is None:
                self.finish_reason = delta.finish_reason
                if delta.stop_token_id != self.ending.eos_token_id:
                    self.stop_reason = delta.stop_token_id
        return text

    def _advance_checked(self, checker: StopChecker, token_ids: list[int]) -> str:
        # Token by token: usage ends with the token that completed the stop string.
        text = ""
        for token_id in token_ids:
            self.num_tokens += 1
            piece = self.detokenizer.push([token_id])
            if self.num_tokens <= self.ending.min_tokens:
                text += piece
                continue
            text += self._check(checker, piece)
            if self.finish_reason is not None:
                break
        return text

    def _check(self, checker: StopChecker, piece: str) -> str:
        text, matched = checker.push(piece)
        if matched is not None:
            self.finish_reason = "stop"
            self.stop_reason = matched
        return text

    def _flush(self) -> str:
        rest = self.detokenizer.flush()
        if self.stop_checker is None:
            return rest
        text = self._check(self.stop_checker, rest)
        return text if self.finish_reason is not None else text + self.stop_checker.flush()


class Generation:
    """All choices of one request. `close` must be called, however the request ends."""

    def __init__(self, engine: EngineClient, metrics: Metrics, *, arrived_s: float) -> None:
        self.choices: list[Choice] = []
        self.active: list[Choice] = []
        self._engine = engine
        self._metrics = metrics
        self._arrived_s = arrived_s
        self._wakeup = asyncio.Event()

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        n: int,
        ending: Ending,
        detokenizers: Sequence[Detokenizer],
        priority: int,
        cache_salt: str,
    ) -> None:
        """Queue the n sequences of one prompt. Raises what EngineClient.submit raises."""
        for sample_index in range(n):
            stream = self._engine.submit(
                prompt_token_ids,
                msgspec.structs.replace(params, sample_index=sample_index),
                priority=priority,
                cache_salt=cache_salt,
            )
            stream.share_wakeup(self._wakeup)
            choice = Choice(
                index=len(self.choices),
                sample_index=sample_index,
                stream=stream,
                ending=ending,
                detokenizer=detokenizers[sample_index],
                stop_checker=(
                    StopChecker(ending.stop, ending.include_stop) if ending.stop else None
                ),
            )
            self.choices.append(choice)
            self.active.append(choice)

    async def read(self) -> list[tuple[Choice, str]]:
        """Wait for news: the choices that have any, each with its new text.

        A choice leaves `active` with its last text. Raises the error a sequence failed with.
        """
        await self._wakeup.wait()
        self._wakeup.clear()
        now = time.monotonic()
        news = []
        for choice in self.active:
            delta = choice.stream.take()
            if delta is None:
                continue
            news.append((choice, choice.advance(delta)))
            self._observe(choice, len(delta.token_ids), now)
            if choice.finish_reason is not None:
                self._finish(choice, choice.finish_reason, now)
        if any(choice.finish_reason is not None for choice, _ in news):
            self.active = [c for c in self.active if c.finish_reason is None]
        return news

    async def read_all(self) -> None:
        """Until every choice has ended; its text is in `pieces`."""
        while self.active:
            for choice, text in await self.read():
                choice.pieces.append(text)

    def usage(self) -> Usage:
        """Tokens of all choices so far; a prompt counts once, whatever its n."""
        firsts = [choice.stream for choice in self.choices if choice.sample_index == 0]
        num_prompt_tokens = sum(stream.num_prompt_tokens for stream in firsts)
        num_output_tokens = sum(choice.num_tokens for choice in self.choices)
        return Usage(
            prompt_tokens=num_prompt_tokens,
            total_tokens=num_prompt_tokens + num_output_tokens,
            completion_tokens=num_output_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(stream.num_cached_tokens for stream in firsts)
            ),
        )

    def close(self, reason: str) -> None:
        """Abort what still runs; it is counted as having ended by `reason`."""
        now = time.monotonic()
        for choice in self.active:
            if choice.finish_reason is None:
                self._finish(choice, reason, now)
        self.active = []

    def _observe(self, choice: Choice, num_new_tokens: int, now: float) -> None:
        if not num_new_tokens:
            return
        if not choice.last_token_s:
            self._metrics.time_to_first_token_s.observe(now - self._arrived_s)
        else:
            gap_s = (now - choice.last_token_s) / num_new_tokens
            self._metrics.inter_token_latency_s.observe(gap_s, num_new_tokens)
        choice.last_token_s = now

    def _finish(self, choice: Choice, reason: str, now: float) -> None:
        self._engine.abort(choice.stream)
        self._metrics.num_finished[reason] += 1
        self._metrics.e2e_latency_s.observe(now - self._arrived_s)
