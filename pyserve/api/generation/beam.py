"""Beam search: the most likely answers to a prompt, found a token at a time.

The engine knows nothing of it. In each round every live beam is a sequence of its own, which is the
prompt with the beam's tokens and asks for one token more; the prefix cache has nearly all of it.
What counts is not the token that comes but how likely the most likely ones are.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import msgspec

from pyserve.api.generation.generate import Choice, Generation
from pyserve.api.generation.job import BeamSearch, Job, Prompt
from pyserve.api.generation.slices import Slices
from pyserve.client import (
    Adapter,
    EngineClient,
    SequenceRequest,
    SequenceStream,
    TokenLogprobs,
)
from pyserve.errors import QueueFullError, RequestError
from pyserve.metrics import Metrics
from pyserve.params import SamplingParams
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.stop import StopChecker

ROOM_POLL_S = 0.05  # between two attempts at a full queue


@dataclass(frozen=True, slots=True)
class BeamText:
    """The text of a beam, looked at for stop strings.

    num_passed  further tokens whose text is not looked at.
    """

    detokenizer: Detokenizer
    checker: StopChecker
    num_passed: int = 0

    def longer(self, token_id: int) -> tuple[BeamText, bool]:
        """The text with one token more, and whether that completes a stop string."""
        longer = BeamText(self.detokenizer.copy(), self.checker.copy(), self.num_passed - 1)
        text = longer.detokenizer.push([token_id])
        return longer, self.num_passed <= 0 and longer.checker.push(text)[1] is not None


@dataclass(frozen=True, slots=True)
class Beam:
    """A beginning of an answer, or a whole one.

    logprobs       of each of its tokens.
    stop_token_id  its last token, where that ends it.
    text           None where there are no stop strings.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    stop_token_id: int | None = None
    text: BeamText | None = None


@dataclass(slots=True)
class Search:
    """The beams of one prompt, without the engine.

    params  max_tokens, min_tokens, stop_token_ids and num_logprobs of an answer.
    live    at most `width` beams, the most likely first; `advance` makes those of the next round.
    ended   the best of the whole answers, as many as are asked for and the best first.
    """

    settings: BeamSearch
    num_prompt_tokens: int
    params: SamplingParams
    n: int
    live: list[Beam] = field(default_factory=lambda: [Beam()])
    ended: list[Beam] = field(default_factory=list)
    num_rounds: int = 0

    def advance(self, entries: Sequence[TokenLogprobs]) -> None:
        """A round: `entries` are of the token behind each live beam.

        A stop token, or one that completes a stop string, ends a beam where it is among the
        2 * width most likely tokens behind it.
        """
        candidates: list[Beam] = []
        ended = self.ended[:]
        for beam, entry in zip(self.live, entries, strict=True):
            may_stop = len(beam.token_ids) >= self.params.min_tokens
            num_tried = 2 * self.settings.width
            likely = zip(entry.top_ids[:num_tried], entry.top_logprobs, strict=False)
            for place, (token_id, logprob) in enumerate(likely, 1):
                if token_id < 0 or logprob == -math.inf:
                    break
                is_stop = token_id in self.params.stop_token_ids
                if is_stop and not may_stop:
                    continue
                text, is_cut = beam.text, False
                if text is not None and not is_stop:
                    text, is_cut = text.longer(token_id)
                own = entry._replace(logprob=logprob, token_rank=place)
                own = own.best(self.params.num_logprobs or 0)
                longer = Beam(
                    [*beam.token_ids, token_id],
                    [*beam.logprobs, own],
                    beam.cumulative_logprob + logprob,
                    token_id if is_stop else None,
                    text,
                )
                (ended if is_stop or is_cut else candidates).append(longer)
        candidates.sort(key=lambda beam: -beam.cumulative_logprob)
        self.live = candidates[: self.settings.width]
        ended.sort(key=self.score, reverse=True)
        self.ended = ended[: self.n]
        self.num_rounds += 1

    @property
    def is_over(self) -> bool:
        """Whether no further round can change `best`."""
        if self.num_rounds == self.params.max_tokens or not self.live:
            return True
        if len(self.ended) < self.n:
            return False
        # No logprob is above 0, so a beam never becomes more likely: it can only become longer.
        longest = self.params.max_tokens if self.settings.length_penalty > 0 else self.num_rounds
        bound = self._score(self.live[0].cumulative_logprob, longest)
        return self.score(self.ended[-1]) >= bound

    def best(self) -> list[Beam]:
        """The n beams with the highest scores, or as many as there are."""
        return sorted([*self.ended, *self.live], key=self.score, reverse=True)[: self.n]

    def score(self, beam: Beam) -> float:
        """As vLLM's: the logprob by the length of prompt and answer, without the stop token."""
        num_tokens = len(beam.token_ids) - (beam.stop_token_id is not None)
        return self._score(beam.cumulative_logprob, num_tokens)

    def _score(self, cumulative_logprob: float, num_tokens: int) -> float:
        length = self.num_prompt_tokens + num_tokens
        return cumulative_logprob / math.pow(length, self.settings.length_penalty)


@dataclass(frozen=True, slots=True)
class _Answers:
    """Of one prompt: the search, and the choices that will show what it finds."""

    prompt: Prompt
    search: Search
    choices: list[Choice]


class BeamGeneration(Generation):
    """A Generation whose choices are the best beams; whole answers only.

    A choice has a stream of its own that the engine does not know. What was found is put into it,
    so that a beam becomes text as every other answer does.
    """

    def __init__(self, engine: EngineClient, metrics: Metrics, *, arrived_s: float) -> None:
        super().__init__(engine, metrics, arrived_s=arrived_s)
        self._answers: list[_Answers] = []
        self._round: list[SequenceStream] = []
        self._request = SequenceRequest((), SamplingParams(max_tokens=1))
        self._slices = Slices()

    async def submit(
        self, job: Job, *, cache_salt: str, user: str, adapter: Adapter | None = None
    ) -> None:
        """Queue the first round, one sequence for each prompt, if there is room for the others."""
        assert job.beam is not None
        width = job.beam.width
        num_tokens = width * sum(len(prompt.token_ids) for prompt in job.prompts)
        self._engine.check_room(width * len(job.prompts), num_tokens=num_tokens, user=user)
        self._request = SequenceRequest(
            (), self._request.params, job.priority, cache_salt, user, None, job.is_background,
            adapter,
        )  # fmt: skip
        for prompt, params in zip(job.prompts, job.params, strict=True):
            for sample_index in range(job.n):
                own_params = msgspec.structs.replace(params, sample_index=sample_index)
                stream = SequenceStream(-1, len(prompt.token_ids))
                self._add(job, prompt, own_params, stream)
            search = Search(job.beam, len(prompt.token_ids), params, job.n)
            if job.ending.stop:
                checker = StopChecker(job.ending.stop, job.ending.is_stop_kept)
                text = BeamText(prompt.detokenizer.copy(), checker, job.ending.min_tokens)
                search.live = [Beam(text=text)]
            self._answers.append(_Answers(prompt, search, self.choices[-job.n :]))
            await self._slices.rest()
        await self._begin_round()

    async def read_all(self) -> None:
        """Until every search is over and its choices have what it has found."""
        try:
            while self._round:
                await self._finish_round()
                await self._begin_round()
        except RequestError as error:
            self.error = error
            raise
        for answers in self._answers:
            _show(answers)
        await super().read_all()

    def close(self, reason: str) -> None:
        for stream in self._round:
            self._engine.abort(stream)
        self._round = []
        for choice in self.active:
            if not choice.stream.is_finished:
                choice.stream.finish("abort")
        super().close(reason)

    def _searching(self) -> list[_Answers]:
        return [answers for answers in self._answers if not answers.search.is_over]

    async def _begin_round(self) -> None:
        for answers in self._searching():
            search = answers.search
            params = SamplingParams(
                max_tokens=1,
                temperature=0.0,
                num_logprobs=max(2 * search.settings.width, search.params.num_logprobs or 0),
                num_prompt_logprobs=search.params.num_prompt_logprobs
                if search.num_rounds == 0
                else None,
            )
            for beam in search.live:
                token_ids = [*answers.prompt.token_ids, *beam.token_ids]
                request = replace(self._request, prompt_token_ids=token_ids, params=params)
                stream = await self._submit(request, is_first=search.num_rounds == 0)
                stream.share_wakeup(self._wakeup)
                self._round.append(stream)
                await self._slices.rest()

    async def _submit(self, request: SequenceRequest, *, is_first: bool) -> SequenceStream:
        # A search that has begun waits for room in the queue: others may have filled it meanwhile.
        while True:
            try:
                return self._engine.submit(request)
            except QueueFullError:
                if is_first:
                    raise
            await asyncio.sleep(ROOM_POLL_S)
            self._check_interruption()

    async def _finish_round(self) -> None:
        waiting = self._round
        entries: dict[int, TokenLogprobs] = {}
        while waiting:
            await self._wakeup.wait()
            self._wakeup.clear()
            self._check_interruption()
            for stream in waiting:
                if stream.is_finished and (delta := stream.take()) is not None:
                    assert delta.logprobs is not None, "a token without its logprobs"
                    entries[stream.seq_id] = delta.logprobs[0]
            waiting = [stream for stream in waiting if not stream.is_finished]
        streams = iter(self._round)
        for answers in self._searching():
            own = [next(streams) for _ in answers.search.live]
            if answers.search.num_rounds == 0:
                self._note_first_round(answers, own[0])
            answers.search.advance([entries[stream.seq_id] for stream in own])
            await self._slices.rest()
        self._round = []

    def _note_first_round(self, answers: _Answers, first: SequenceStream) -> None:
        for choice in answers.choices:
            stream = choice.stream
            stream.num_cached_tokens = first.num_cached_tokens
            stream.queued_s, stream.scheduled_s = first.queued_s, first.scheduled_s
            stream.first_token_s = first.first_token_s
            stream.prompt_logprobs = first.prompt_logprobs
            self._note_first_token(choice)


def _show(answers: _Answers) -> None:
    """Put the best beams into the streams of the choices; without a beam left one stays empty.

    A choice finds the stop string in its text by itself.
    """
    for choice, beam in zip_longest(answers.choices, answers.search.best()):
        if beam is None:
            choice.stream.finish("length")
            continue
        is_told = choice.params.num_logprobs is not None
        choice.stream.put(beam.token_ids, beam.logprobs if is_told else None)
        choice.stream.finish("length" if beam.stop_token_id is None else "stop", beam.stop_token_id)
