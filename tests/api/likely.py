"""A scripted engine that tells how likely tokens are, and beam search over it, written plainly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyserve.client import SequenceRequest, SequenceStream, TokenLogprobs
from pyserve.errors import QueueFullError
from pyserve.limits import TOP_LOGPROBS
from tests.api.fakes import FakeEngine, Script, Submitted

LogprobsOf = Callable[[list[int]], NDArray[np.float64]]
# (score, output tokens with a stop token, whether that is the end)
Found = tuple[float, list[int], bool]


def made_up(vocab_size: int, favoured: Sequence[int] = ()) -> LogprobsOf:
    """Logprobs of the next token, by the tokens before it; the favoured are often likely."""

    def logprobs_of(token_ids: list[int]) -> NDArray[np.float64]:
        logits = np.random.default_rng(token_ids).normal(0.0, 2.0, vocab_size)
        logits[list(favoured)] += 5.0
        return np.asarray(logits - np.log(np.exp(logits).sum()), np.float64)

    return logprobs_of


def entry_of(row: NDArray[np.float64], token_id: int | None = None) -> TokenLogprobs:
    """What an engine tells where `row` are the logprobs; None: of the most likely token."""
    order = np.argsort(-row, kind="stable")[:TOP_LOGPROBS].tolist()
    padding = TOP_LOGPROBS - len(order)
    token_id = order[0] if token_id is None else token_id
    return TokenLogprobs(
        float(row[token_id]),
        1 + int((row > row[token_id]).sum()),
        order + [-1] * padding,
        row[order].tolist() + [-np.inf] * padding,
    )


def plain_beam_search(
    logprobs_of: LogprobsOf, prompt: list[int], *, width: int, n: int, max_tokens: int,
    ends: Sequence[int] = (), min_tokens: int = 0, length_penalty: float = 1.0,
    is_cut: Callable[[list[int]], bool] = lambda token_ids: False,
) -> list[Found]:  # fmt: skip
    """The n best of all beams that were ever whole, after max_tokens rounds.

    is_cut  whether an output's last token completes a stop string.
    """
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    found: list[Found] = []
    for _ in range(max_tokens):
        longer = []
        for total, token_ids in live:
            row = logprobs_of(prompt + token_ids)
            for token_id in np.argsort(-row, kind="stable")[: 2 * width].tolist():
                sequence = total + float(row[token_id]), [*token_ids, token_id]
                if token_id not in ends and is_cut(sequence[1]):
                    length = len(prompt) + len(sequence[1])
                    found.append((sequence[0] / length**length_penalty, sequence[1], True))
                elif token_id not in ends:
                    longer.append(sequence)
                elif len(token_ids) >= min_tokens:
                    length = len(prompt) + len(token_ids)
                    found.append((sequence[0] / length**length_penalty, sequence[1], True))
        live = sorted(longer, key=lambda sequence: -sequence[0])[:width]
    for total, token_ids in live:
        length = len(prompt) + len(token_ids)
        found.append((total / length**length_penalty, token_ids, False))
    return sorted(found, key=lambda one: -one[0])[:n]


@dataclass
class LikelyEngine(FakeEngine):
    """Of each sequence the next token alone, which is the most likely one, and its logprobs.

    num_full  attempts to submit that find the queue full, once `full_from` sequences have come.
    """

    logprobs_of: LogprobsOf = made_up(448)
    full_from: int = 1
    num_full: int = 0

    def submit(self, request: SequenceRequest) -> SequenceStream:
        assert request.params.max_tokens == 1
        if self.num_full and len(self.submitted) >= self.full_from:
            self.num_full -= 1
            raise QueueFullError("the queue is full", 1)
        return super().submit(request)

    async def _play(self, item: Submitted, script: Script) -> None:
        stream = item.stream
        stream.admit(self.num_cached_tokens)
        await asyncio.sleep(script.delay_s)
        if stream.is_finished:
            return
        if script.error is not None:
            stream.fail(script.error)
            return
        entry = entry_of(self.logprobs_of(item.prompt))
        if item.params.num_prompt_logprobs is not None:
            stream.prompt_logprobs += [entry] * (len(item.prompt) - 1)
        assert item.params.num_logprobs is not None
        entry = entry.best(item.params.num_logprobs)
        stream.first_token_s = time.monotonic()
        stream.put([entry.top_ids[0]], [entry])
        stream.finish("length")
