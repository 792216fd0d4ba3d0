"""Chunked prefill: how many prompt tokens a step may run, and how prompts share them.

A mixed step computes chunks of prompts beside sequences that decode, and these get their next
token only when the whole step has ended. So its size follows from a time: ChunkPacer learns what a
token costs on this machine, with this model and load, and allows as many as fit the target. Larger
steps spread the reading of the weights over more tokens, so a rate that was learned from small
steps is too slow rather than too fast, and the size approaches the target from below.

A step of prompts alone delays only requests that arrive while it runs, so it may take longer.
"""

from __future__ import annotations

from pyserve.engine.batch import Step

FIRST_LIMIT = 512  # tokens of any step, until steps have shown their rate
MIN_CHUNK = 64  # tokens, even where they exceed the target: prompts have to make progress
MIN_SAMPLE = 128  # tokens of a step; a smaller one says too little about the cost of a token
# Seconds that a step of prompts alone may take. A request that arrives meanwhile waits for that
# step, on a card also for the one that is already launched behind it. An 8B on an H200 takes 0.2 s
# for 8,192 tokens, 0.215 s with an adapter: a shorter limit would cut such a prompt in two, and the
# small second step costs more for each token.
ALONE_S = 0.25
WEIGHT = 0.25  # of the newest step in the moving averages, where it is a full one
# Of a step whose tokens cost less than the average. Pauses make steps longer, never shorter, so a
# good rate can be trusted sooner.
WEIGHT_OF_BETTER = 0.5
# The later tokens of a prompt attend to more keys, so each chunk of a long prompt is slower than
# the one before it and an average lags behind. The next cost is extrapolated from the last two, but
# never beyond this multiple of the average: a pause of the process must not stop prompts.
MAX_SLOWER = 1.5


class ChunkPacer:
    """Learns from the durations of steps how many tokens the next one may have.

    limit         tokens of a mixed step, those of the rows that decode included.
    alone_limit   tokens of a step of prompts alone.

    target_s    seconds that a mixed step should take. If a step that only decodes takes more than
                half of it, a mixed step may take twice as long as that one, so that prompts make
                progress under any load.
    max_tokens  upper bound of both limits.
    """

    def __init__(self, target_s: float, *, max_tokens: int) -> None:
        self.limit = min(FIRST_LIMIT, max_tokens)
        self.alone_limit = self.limit
        self._target_s = target_s
        self._max_tokens = max_tokens
        self._decode_s: float | None = None  # average duration of a step that only decodes
        self._token_s: float | None = None  # average seconds per token of a step with prompts
        self._newest_s = 0.0  # seconds per token of the last step; 0: it had no prompts
        self._expected_s = 0.0  # of the next step, extrapolated from the last two

    def note(self, step: Step, duration_s: float) -> None:
        """Learn that `step` took duration_s seconds, in which nothing else ran."""
        if not step.num_prompt_tokens:
            self._decode_s = _blend(self._decode_s, duration_s, WEIGHT)
            self._newest_s = self._expected_s = 0.0
        elif step.num_tokens >= min(MIN_SAMPLE, self.limit // 2):
            is_alone = step.num_prompt_tokens == step.num_tokens
            fullness = min(step.num_tokens / (self.alone_limit if is_alone else self.limit), 1.0)
            self._note_rate(max(duration_s, 1e-6) / step.num_tokens, fullness)
        if self._token_s is not None:
            allowed_s = max(self._target_s, 2 * (self._decode_s or 0.0))
            self.limit = self._tokens_in(allowed_s)
            self.alone_limit = self._tokens_in(max(allowed_s, ALONE_S))

    def _note_rate(self, token_s: float, fullness: float) -> None:
        """Learn that the tokens of a step took token_s seconds each. `fullness` is the share of the
        limit that the step had.

        The last few tokens of a prompt cost more each than those of a full step do. If they counted
        as much, the limit would fall below what a full step may have, the next prompt would be cut
        again, and its last tokens would keep the limit there. A rate that is better than the
        average counts whatever the size of the step, as a larger one only improves on it.
        """
        if fullness >= 0.5:
            rise_s = max(token_s - self._newest_s, 0.0) if self._newest_s else 0.0
            self._newest_s, self._expected_s = token_s, token_s + rise_s
        else:
            self._newest_s = self._expected_s = 0.0
        is_better = self._token_s is not None and token_s < self._token_s
        weight = WEIGHT_OF_BETTER if is_better else WEIGHT * fullness
        self._token_s = _blend(self._token_s, token_s, weight)

    def _tokens_in(self, duration_s: float) -> int:
        assert self._token_s is not None
        token_s = max(self._token_s, min(self._expected_s, MAX_SLOWER * self._token_s))
        return max(1, min(int(duration_s / token_s), self._max_tokens))


def share_out(needs: list[int], budget: int, *, for_oldest: int) -> list[int]:
    """Share `budget` tokens of a step between prompts; returns the tokens of each.

    needs       tokens that each prompt still has to compute, the oldest prompt first.
    for_oldest  so many tokens of the budget go to the oldest prompts in order, so that long ones
                end too. The rest goes to the prompts that need least, so that a short prompt does
                not wait behind a long one. What one part leaves over, the other uses.
    """
    shares = [0] * len(needs)
    by_need = sorted(range(len(needs)), key=needs.__getitem__)
    left = budget
    for order, part in ((range(len(needs)), for_oldest), (by_need, budget)):
        for index in order:
            taken = min(needs[index] - shares[index], part, left)
            shares[index] += taken
            part -= taken
            left -= taken
    return shares


def _blend(old: float | None, new: float, weight: float) -> float:
    """Moving average; a single step counts as at most twice the average, as a pause of the process
    or another process on the card may have prolonged it."""
    return new if old is None else old + weight * (min(new, 2 * old) - old)
