"""Beam search: finds the most likely answers to a prompt, one token per round.

The engine knows nothing of it. In each round every live beam is submitted as a sequence of its own:
the prompt followed by the beam's tokens, of which nearly all are in the prefix cache. It generates
one token, which is not used; what counts are the logprobs of the most likely tokens beside it.
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

ROOM_POLL_S = 0.05  # time between two attempts to submit to a full queue


@dataclass(frozen=True, slots=True)
class BeamText:
    """The text of a beam, which is searched for stop strings.

    num_passed  number of next tokens whose text is not searched, because of min_tokens.
    """

    detokenizer: Detokenizer
    checker: StopChecker
    num_passed: int = 0

    def longer(self, token_id: int) -> tuple[BeamText, bool]:
        """The text with one more token, and whether that token completes a stop string."""
        longer = BeamText(self.detokenizer.copy(), self.checker.copy(), self.num_passed - 1)
        text = longer.detokenizer.push([token_id])
        return longer, self.num_passed <= 0 and longer.checker.push(text)[1] is not None


@dataclass(frozen=True, slots=True)
class Beam:
    """A partial or whole answer.

    logprobs            logprobs of each of its tokens.
    cumulative_logprob  sum of the logprobs of its tokens.
    stop_token_id       its last token, if that is a stop token; else None.
    text                its text; None where the request has no stop strings.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    stop_token_id: int | None = None
    text: BeamText | None = None


@dataclass(slots=True)
class Search:
    """The beams of one prompt. It does not deal with the engine.

    params      max_tokens, min_tokens, stop_token_ids and num_logprobs of an answer.
    n           number of answers that are requested.
    live        partial answers, at most `width`, the most likely first.
    ended       the n best whole answers so far, the best first.
    num_rounds  number of rounds so far, which is also the number of tokens of a live beam.
    """

    settings: BeamSearch
    num_prompt_tokens: int
    params: SamplingParams
    n: int
    live: list[Beam] = field(default_factory=lambda: [Beam()])
    ended: list[Beam] = field(default_factory=list)
    num_rounds: int = 0

    def advance(self, entries: Sequence[TokenLogprobs]) -> None:
        """Extend the live beams by one token: a round of the search.

        `entries` has for each live beam the logprobs of its next token. Each of the 2 * width most
        likely next tokens makes a new beam. It is ended if the token is a stop token or completes
        a stop string; the `width` most likely others become the live beams.
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
        """Whether the search is over, because no further round could change `best`."""
        if self.num_rounds == self.params.max_tokens or not self.live:
            return True
        if len(self.ended) < self.n:
            return False
        # No logprob is above 0, so the cumulative logprob of a beam never rises, and its score can
        # only rise by its length. The bound is the best score that a live beam could reach.
        longest = self.params.max_tokens if self.settings.length_penalty > 0 else self.num_rounds
        bound = self._score(self.live[0].cumulative_logprob, longest)
        return self.score(self.ended[-1]) >= bound

    def best(self) -> list[Beam]:
        """The n beams with the highest scores, ended or not, the best first; maybe fewer than n."""
        return sorted([*self.ended, *self.live], key=self.score, reverse=True)[: self.n]

    def score(self, beam: Beam) -> float:
        """vLLM's score: cumulative logprob / length ** length_penalty.

        The length is that of prompt and answer, without a stop token.
        """
        num_tokens = len(beam.token_ids) - (beam.stop_token_id is not None)
        return self._score(beam.cumulative_logprob, num_tokens)

    def _score(self, cumulative_logprob: float, num_tokens: int) -> float:
        length = self.num_prompt_tokens + num_tokens
        return cumulative_logprob / math.pow(length, self.settings.length_penalty)


@dataclass(frozen=True, slots=True)
class _Answers:
    """The search for one prompt, and the choices that will show its best beams."""

    prompt: Prompt
    search: Search
    choices: list[Choice]


class BeamGeneration(Generation):
    """A Generation whose choices are the best beams of a search. It cannot be streamed.

    Each choice has a SequenceStream that the engine does not know. The tokens of a beam are put
    into it, so that they become text in the same way as those of every other answer.
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
        """Queue the first round, one sequence per prompt, if there is room for a full round.

        Raises what EngineClient.check_room and submit raise.
        """
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
        """Run rounds until every search is over, then put the best beams into the choices' `parts`.

        Raises RequestError.
        """
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
        # After the first round, wait for room in the queue: other requests may have filled it.
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
    """Put the best beams into the streams of the choices; a choice without a beam stays empty.

    The finish reason ignores stop strings: the choice finds the stop string in its text by itself.
    """
    for choice, beam in zip_longest(answers.choices, answers.search.best()):
        if beam is None:
            choice.stream.finish("length")
            continue
        is_told = choice.params.num_logprobs is not None
        choice.stream.put(beam.token_ids, beam.logprobs if is_told else None)
        choice.stream.finish("length" if beam.stop_token_id is None else "stop", beam.stop_token_id)
