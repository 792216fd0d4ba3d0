"""Generation: submits the sequences of one Job, reads their tokens and turns them into parts.

One coroutine reads all choices of a request, which share one wake-up event. No token costs a task,
a queue entry or an object that outlives the wake-up. Streamed and whole responses use the same
code, so their contents cannot differ.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from pyserve.api.generation.job import Ending, Job, Prompt
from pyserve.api.generation.slices import Slices
from pyserve.api.generation.told import Told, ToldTokens
from pyserve.api.wire.protocol import CompletionTokensDetails, PromptTokensDetails, Usage
from pyserve.client import (
    Adapter,
    EngineClient,
    SequenceDelta,
    SequenceRequest,
    SequenceStream,
)
from pyserve.errors import AbortedError, RequestError
from pyserve.metrics import Metrics
from pyserve.params import SamplingParams
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.parts import Content, Part, Stage, joined, pass_on
from pyserve.text.reasoning import ReasoningStage
from pyserve.text.stop import StopChecker


@dataclass(slots=True, eq=False)
class Choice:
    """One sequence of a request, and the state that turns its tokens into parts.

    index                 position among all choices of the request.
    sample_index          position among the choices of its prompt.
    thinking              separates the reasoning from the rest; None once the reasoning is over, or
                          where it is not separated at all.
    num_tokens            output tokens up to the one that ended the answer; later ones of the same
                          delta are not counted.
    cumulative_logprob    sum of the logprobs of the counted tokens, where there are logprobs.
    num_reasoning_tokens  tokens between the markers of the reasoning; None: it is not separated.
    first_token_s         when its first tokens were read here, in monotonic s; 0 until then.
    prefix                the prompt to echo before its text; "" once that has been done.
    prompt_text           text of its prompt, where the response shows it.
    prefix_offsets        offsets of the echoed prompt's tokens, where they are shown.
    told, words           hold the tokens to show, and how the endpoint formats them; None: no
                          tokens are shown.
    is_prompt_only        what is generated is neither shown nor counted.
    parts                 all parts of a whole response; a stream keeps none.
    """

    index: int
    sample_index: int
    stream: SequenceStream
    params: SamplingParams
    ending: Ending
    detokenizer: Detokenizer
    stop_checker: StopChecker | None
    stage: Stage
    thinking: ReasoningStage | None = None
    num_tokens: int = 0
    cumulative_logprob: float = 0.0
    num_reasoning_tokens: int | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    first_token_s: float = 0.0
    prefix: str = ""
    prompt_token_ids: Sequence[int] = ()
    prompt_text: str | None = None
    prefix_offsets: list[int] | None = None
    told: ToldTokens | None = None
    words: Any = None
    is_prompt_only: bool = False
    parts: list[Part] = field(default_factory=list)

    def advance(self, delta: SequenceDelta) -> Sequence[Part]:
        """Turn `delta` into new parts; sets finish_reason when these are the last ones."""
        if self.is_prompt_only:
            delta = SequenceDelta([], delta.finish_reason and "length")
        token_ids, told = delta.token_ids, self.told
        if told is not None:
            told.expect(delta.logprobs)
        is_cut = delta.stop_token_id is not None and not self.ending.is_stop_kept
        visible = token_ids[:-1] if is_cut else token_ids
        was_thinking = self.thinking is not None
        parts: Sequence[Part] = ()
        if self.stop_checker is None and not was_thinking and told is None:
            text = self.detokenizer.push(visible)
            self.num_tokens += len(token_ids)
        else:
            text = ""
            if was_thinking:
                parts = self._think(visible)
            else:
                text = self._advance_checked(visible)
            if self.finish_reason is None:
                self.num_tokens += len(token_ids) - len(visible)
        if delta.finish_reason is not None and self.finish_reason is None:
            text += self._flush()
            if self.finish_reason is None:
                self.finish_reason = delta.finish_reason
                if delta.stop_token_id != self.ending.eos_token_id:
                    self.stop_reason = delta.stop_token_id
                if told is not None:
                    told.end(token_ids[len(visible) :])
        has_news = bool(text) or (told is not None and told.is_due)
        if was_thinking:
            if has_news:
                parts = [*parts, *self._tell(text)]
            if self.thinking is not None and self.finish_reason is not None:
                parts = [*parts, *pass_on(self.thinking.flush(), self.stage)]
        elif has_news:
            parts = self.stage.push(self._content(text))
        if self.finish_reason is not None:
            parts = [*parts, *self.stage.flush()]
        if self.prefix or self.prefix_offsets is not None:
            parts = _with_prefix(Content(self.prefix, self._prompt_tokens()), parts)
            self.prefix, self.prefix_offsets = "", None
        return parts

    def _content(self, text: str) -> Content:
        """Text to show, with the tokens it is made of, where tokens are shown."""
        return Content(text) if self.told is None else Content(text, self.told.settle(len(text)))

    def _prompt_tokens(self) -> tuple[Told, ...]:
        """The tokens of the echoed prompt, where they are shown."""
        if self.prefix_offsets is None:
            return ()
        logprobs = (None, *self.stream.prompt_logprobs)
        told = zip(self.prompt_token_ids, self.prefix_offsets, logprobs, strict=True)
        return tuple(Told(*token, is_prompt=True) for token in told)

    def usage(self) -> Usage:
        """Usage of this choice so far: its output tokens and those of its prompt."""
        return _usage([self.stream], [self])

    def _think(self, token_ids: list[int]) -> list[Part]:
        # This goes token by token, to count the tokens between the two markers of the reasoning.
        parts: list[Part] = []
        for token_id in token_ids:
            thinking = self.thinking
            has_begun = thinking is not None and thinking.has_begun
            text = self._advance_checked([token_id])
            if text:
                parts += self._tell(text)
            if has_begun and self.thinking is not None:
                self.num_reasoning_tokens = (self.num_reasoning_tokens or 0) + 1
            if self.finish_reason is not None:
                break
        return joined(parts) if len(parts) > 1 else parts

    def _tell(self, text: str) -> Sequence[Part]:
        """The parts that the next text of an answer, which may still be reasoning, becomes."""
        thinking = self.thinking
        if thinking is None:
            return self.stage.push(self._content(text))
        parts = thinking.push(self._content(text))
        if not thinking.is_over:
            return parts
        self.thinking = None
        self.detokenizer.hide(thinking.marker_ids)
        return pass_on(parts, self.stage)

    def _advance_checked(self, token_ids: list[int]) -> str:
        # This goes token by token, because usage counts no token after the one that completed the
        # stop string.
        checker = self.stop_checker
        text = ""
        for token_id in token_ids:
            self.num_tokens += 1
            piece = self.detokenizer.push([token_id])
            if self.told is not None:
                self.told.push(token_id, len(piece))
            if checker is None or self.num_tokens <= self.ending.min_tokens:
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
    """All choices of one request. `close` must be called, however the request ends.

    arrived_s  when the request arrived, in monotonic s.
    end        "finished", "aborted" or "failed"; None while it runs.
    error      the error that `read` has raised, if any.
    active     the choices that have not ended.
    """

    def __init__(self, engine: EngineClient, metrics: Metrics, *, arrived_s: float) -> None:
        self.arrived_s = arrived_s
        self.end: str | None = None
        self.error: RequestError | None = None
        self.choices: list[Choice] = []
        self.active: list[Choice] = []
        self._engine = engine
        self._metrics = metrics
        self._wakeup = asyncio.Event()
        self._interruption: RequestError | None = None
        self._num_shown = 0  # number of choices of each prompt that are shown; 0: all

    def wake(self) -> None:
        """Let `read` return, with an empty list where there is no news."""
        self._wakeup.set()

    def interrupt(self, error: RequestError) -> None:
        """Let `read` raise `error`, now if it waits, else when it is called next."""
        self._interruption = error
        self._wakeup.set()

    def abort(self, error: AbortedError) -> None:
        """Interrupt, and also abort the sequences at once, even if the client reads nothing."""
        self.interrupt(error)
        for choice in self.active:
            self._engine.abort(choice.stream)

    async def submit(
        self, job: Job, *, cache_salt: str, user: str, adapter: Adapter | None = None
    ) -> None:
        """Queue all sequences of `job`. Raises what EngineClient.check_room and submit raise.

        cache_salt  salt of the prefix cache, made from the job's salt and the API key's user.
        user        the client (keys.CLIENT) that limits and fairness count the sequences for.
        adapter     adapter that all of them use; None: the base model alone.
        """
        num_run = max(job.n, job.best_of)
        self._num_shown = job.n
        num_sequences = num_run * len(job.prompts)
        # All sequences of a request are accepted or none. For a single one `submit` checks that.
        if job.is_run and num_sequences > 1:
            num_tokens = num_run * sum(len(prompt.token_ids) for prompt in job.prompts)
            self._engine.check_room(num_sequences, num_tokens=num_tokens, user=user)
        slices = Slices()
        for prompt, params in zip(job.prompts, job.params, strict=True):
            for sample_index in range(num_run):
                await slices.rest()
                own_params = msgspec.structs.replace(params, sample_index=sample_index)
                if job.is_run:
                    stream = self._engine.submit(
                        SequenceRequest(
                            prompt.token_ids,
                            own_params,
                            job.priority,
                            cache_salt,
                            user,
                            job.make_constraint(),
                            job.is_background,
                            adapter,
                        )
                    )
                else:  # nothing is generated, so the engine does not get the sequence
                    stream = SequenceStream(-1, len(prompt.token_ids))
                    stream.finish("length")
                self._add(job, prompt, own_params, stream)

    def _add(
        self, job: Job, prompt: Prompt, params: SamplingParams, stream: SequenceStream
    ) -> None:
        stream.share_wakeup(self._wakeup)
        ending = job.ending
        choice = Choice(
            index=len(self.choices),
            sample_index=params.sample_index,
            stream=stream,
            params=params,
            prefix=prompt.echo,
            prompt_token_ids=prompt.token_ids,
            prompt_text=prompt.text,
            prefix_offsets=prompt.offsets,
            told=None if job.words is None else ToldTokens(len(prompt.echo)),
            words=job.words,
            is_prompt_only=job.is_prompt_only,
            ending=ending,
            detokenizer=prompt.detokenizer.copy(),
            stop_checker=StopChecker(ending.stop, ending.is_stop_kept) if ending.stop else None,
            stage=job.make_stage(),
            thinking=job.make_reasoning() if job.make_reasoning is not None else None,
            num_reasoning_tokens=0 if job.make_reasoning is not None else None,
        )
        self.choices.append(choice)
        self.active.append(choice)

    async def read(self) -> list[tuple[Choice, Sequence[Part]]]:
        """Wait for news; returns the choices that have any, each with its new parts.

        A choice leaves `active` with its last part. Raises the error that a sequence failed with,
        or the one given to `interrupt`.
        """
        await self._wakeup.wait()
        self._wakeup.clear()
        try:
            return self._take_news()
        except RequestError as error:
            self.error = error
            raise

    def _take_news(self) -> list[tuple[Choice, Sequence[Part]]]:
        self._check_interruption()
        news = []
        has_ended = False
        for choice in self.active:
            delta = choice.stream.take()
            if delta is None:
                continue
            num_before = choice.num_tokens
            news.append((choice, choice.advance(delta)))
            if delta.logprobs is not None:
                counted = delta.logprobs[: choice.num_tokens - num_before]
                choice.cumulative_logprob += sum(entry.logprob for entry in counted)
            if not choice.first_token_s and delta.token_ids:
                self._note_first_token(choice)
            if choice.finish_reason is not None:
                self._finish(choice, choice.finish_reason)
                has_ended = True
        if has_ended:
            self.active = [c for c in self.active if c.finish_reason is None]
        return news

    async def read_all(self) -> None:
        """Read until all choices have ended; collect their parts in `parts`.

        Raises RequestError.
        """
        while self.active:
            for choice, parts in await self.read():
                choice.parts += parts

    def shown(self) -> list[Choice]:
        """The choices to show in a whole response: with best_of, the n most likely per prompt.

        The most likely ones are those with the highest mean logprob of their tokens.
        """
        shown: list[Choice] = []
        for _, group in groupby(self.choices, _prompt_of):
            choices = list(group)
            if 0 < self._num_shown < len(choices):
                best = sorted(choices, key=_mean_logprob, reverse=True)[: self._num_shown]
                choices = [replace(c, index=len(shown) + i) for i, c in enumerate(best)]
            shown += choices
        return shown

    def usage(self) -> Usage:
        """Usage of all choices so far, shown or not. A prompt counts once, whatever n is."""
        return _usage(
            [choice.stream for choice in self.choices if choice.sample_index == 0], self.choices
        )

    def close(self, reason: str) -> None:
        """Abort the choices that still run, with finish reason `reason`: "abort" or "error".

        Also records the metrics of the request. Only the first call has an effect.
        """
        if self.end is not None or not self.choices:
            return
        running = [choice for choice in self.active if choice.finish_reason is None]
        for choice in running:
            choice.finish_reason = reason
            self._finish(choice, reason)
        self.active = []
        self.end = "finished" if not running else "aborted" if reason == "abort" else "failed"
        self._metrics.num_requests[self.end] += 1
        for _, group in groupby(self.choices, _prompt_of):
            num_tokens = [choice.num_tokens for choice in group]
            self._metrics.observe_prompt(len(num_tokens), max(num_tokens))

    def _check_interruption(self) -> None:
        if self._interruption is not None:
            raise self._interruption

    def _note_first_token(self, choice: Choice) -> None:
        choice.first_token_s = time.monotonic()
        self._metrics.time_to_first_token_s.observe(choice.first_token_s - self.arrived_s)

    def _finish(self, choice: Choice, reason: str) -> None:
        self._engine.abort(choice.stream)
        self._metrics.observe_sequence(
            choice.stream,
            reason,
            num_output_tokens=choice.num_tokens,
            max_tokens=choice.params.max_tokens,
            e2e_s=time.monotonic() - self.arrived_s,
        )


def _prompt_of(choice: Choice) -> int:
    """The index of the first choice of this choice's prompt: a key to group choices by."""
    return choice.index - choice.sample_index


def _mean_logprob(choice: Choice) -> float:
    return choice.cumulative_logprob / max(choice.num_tokens, 1)


def _with_prefix(prefix: Content, parts: Sequence[Part]) -> Sequence[Part]:
    """Put an echoed prompt in front. It bypasses the stages, which would look for calls in it."""
    return joined([prefix, *parts[:1]]) + list(parts[1:])


def _usage(prompts: Sequence[SequenceStream], choices: Sequence[Choice]) -> Usage:
    num_prompt_tokens = sum(stream.num_prompt_tokens for stream in prompts)
    num_output_tokens = sum(choice.num_tokens for choice in choices)
    details: CompletionTokensDetails | UnsetType = UNSET
    if choices and choices[0].num_reasoning_tokens is not None:
        details = CompletionTokensDetails(sum(c.num_reasoning_tokens or 0 for c in choices))
    return Usage(
        prompt_tokens=num_prompt_tokens,
        total_tokens=num_prompt_tokens + num_output_tokens,
        completion_tokens=num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(stream.num_cached_tokens for stream in prompts)
        ),
        completion_tokens_details=details,
    )
