"""How large a step may be that runs prompts beside sequences that decode, and whose prompts.

A chunk of a prompt keeps those that decode waiting for their next token, so its size follows a
time: the next such step has the tokens that would have fitted the target at the rate of the last
ones, which is that of this machine, this model and this load. In a larger step more tokens share
the reading of the weights, so from smaller ones the size is approached from below.

Where nobody decodes there is nobody to keep waiting but who comes next, for the rest of a step.
"""

from __future__ import annotations

from pyserve.engine.batch import Step

FIRST_LIMIT = 512  # tokens of any step, until steps have shown their rate
MIN_CHUNK = 64  # where no chunk fits the target, prompts still have to end
MIN_SAMPLE = 128  # tokens of a step whose rate says something
# That a step of prompts alone may take. Who comes meanwhile waits for it, on a card for the one
# launched behind it too, and then for its own. 200 ms are 8,192 tokens of 8B on an H200, and 215
# where they use an adapter. What does not fit is cut, and its rest is a step that costs more for
# each token.
ALONE_S = 0.25
WEIGHT = 0.25  # of the newest step in what is learned
# Later tokens of a prompt look at more of it, so its next step is slower than the last one by as
# much as that was than the one before: what was learned lags behind. A pause makes one step smaller
# by no more than this.
MAX_SLOWER = 1.5


class ChunkPacer:
    """Learns from steps how many tokens the next one may have.

    limit         of a mixed step.
    alone_limit   of a step of prompts alone.

    target_s  seconds that a mixed step may take. Where decoding alone takes more than half of it, a
              step may take twice as long as that instead: prompts must get on as well.
    """

    def __init__(self, target_s: float, *, max_tokens: int) -> None:
        self.limit = min(FIRST_LIMIT, max_tokens)
        self.alone_limit = self.limit
        self._target_s = target_s
        self._max_tokens = max_tokens
        self._decode_s: float | None = None  # of a step that only decodes
        self._token_s: float | None = None  # of one with prompts, for each of its tokens
        self._newest_s = 0.0  # the same of the last step alone; 0: it had none
        self._expected_s = 0.0  # of the next one, if it goes on like this

    def note(self, step: Step, duration_s: float) -> None:
        """`step` took duration_s seconds, in which nothing else ran."""
        if not step.num_prompt_tokens:
            self._decode_s = _blend(self._decode_s, duration_s)
            self._newest_s = self._expected_s = 0.0
        elif step.num_tokens >= min(MIN_SAMPLE, self.limit // 2):
            before_s, self._newest_s = self._newest_s, max(duration_s, 1e-6) / step.num_tokens
            rise_s = max(self._newest_s - before_s, 0.0) if before_s else 0.0
            self._expected_s = self._newest_s + rise_s
            self._token_s = _blend(self._token_s, self._newest_s)
        if self._token_s is not None:
            allowed_s = max(self._target_s, 2 * (self._decode_s or 0.0))
            self.limit = self._tokens_in(allowed_s)
            self.alone_limit = self._tokens_in(max(allowed_s, ALONE_S))

    def _tokens_in(self, duration_s: float) -> int:
        assert self._token_s is not None
        token_s = max(self._token_s, min(self._expected_s, MAX_SLOWER * self._token_s))
        return max(1, min(int(duration_s / token_s), self._max_tokens))


def share_out(needs: list[int], budget: int, *, for_oldest: int) -> list[int]:
    """Tokens of a step, `budget` at most, for prompts that need `needs` more, the oldest first.

    The first for_oldest of them go to the oldest ones in their order, so that each of them ends;
    the rest to those that need least, so that a short prompt does not wait until a long one has
    ended. What one part does not use, the other does.
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


def _blend(old: float | None, new: float) -> float:
    """Without what a pause of the process, or another one on the card, adds to a single step."""
    return new if old is None else old + WEIGHT * (min(new, 2 * old) - old)
