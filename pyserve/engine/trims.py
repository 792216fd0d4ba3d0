"""Where a mixed step ends: at a padded size, with a few last tokens of a prompt left over.

Beyond 512 tokens the cost of a step rises from one padded size to the next, so a prompt of 1,024
tokens beside 31 rows that decode costs what 1,152 do. The 31 tokens too many are cheap in the step
after it, which runs for the rows that decode in any case. So the newest prompt is trimmed by them.

That only helps if the step after it is small. If it took the next prompt along, the trimmed one
would wait for all of that, and as prompts come one after another where sequences end one after
another, each of them would. So nothing is admitted to the step after a trim. And as two prompts may
wait after it, no part of the second is begun where the whole does not fit beside the first: its
rest would be in the way of the next one again. Steps with prompts and small ones then alternate.

Where more steps have prompts than every second one could take, there is no such slack, and prompts
fill the steps.
"""

from __future__ import annotations

from bisect import bisect_right

from pyserve.engine.sequence import Sequence

MIN_TRIMMED_SIZE = 512  # tokens of a step; below it padding costs little
# Of the steps in which rows decode, the part that may have prompts besides: alternating steps take
# prompts in half of them, and some slack is needed for prompts that come together.
MAX_MIXED_PART = 1 / 3
WEIGHT = 1 / 256  # of the newest step in the moving average of that part

Chunk = tuple[Sequence, int]  # a prompt, and how many of its next tokens a step runs


class Trimmer:
    """Decides which mixed step ends at a padded size, and what the step after it may run.

    trimmed  the prompt that the last step has trimmed; the next step runs the rest of it.

    sizes    the padded sizes of a step, ascending.
    """

    def __init__(self, sizes: list[int]) -> None:
        self.trimmed: Sequence | None = None
        self._sizes = sizes
        self._mixed_part = 0.0

    def may_trim(self, num_decoding: int, limit: int) -> bool:
        """Whether a step of num_decoding rows that decode and at most `limit` prompt tokens may be
        trimmed."""
        is_large = num_decoding + limit >= MIN_TRIMMED_SIZE
        return num_decoding > 0 and is_large and self._mixed_part < MAX_MIXED_PART

    def trim(self, chunks: list[Chunk], num_decoding: int) -> None:
        """Shorten the newest of the `chunks` that end their prompts, if the step exceeds a padded
        size by at most half of the distance to the next.

        num_decoding  rows of the step that decode.
        """
        num_tokens = num_decoding + sum(num_new for _, num_new in chunks)
        index = bisect_right(self._sizes, num_tokens) - 1
        num_over = num_tokens - self._sizes[index]
        if not num_over or self._sizes[index] < MIN_TRIMMED_SIZE:
            return
        if 2 * num_over > self._sizes[index + 1] - self._sizes[index]:
            return
        ending = [
            (seq.order, number)
            for number, (seq, num_new) in enumerate(chunks)
            if num_over < num_new == seq.num_tokens - seq.num_computed_tokens
        ]
        if ending:
            _, number = max(ending)
            seq, num_new = chunks[number]
            chunks[number] = seq, num_new - num_over
            self.trimmed = seq

    def note(self, num_decoding: int, chunks: list[Chunk]) -> None:
        """Learn from a step how many of those in which rows decode have prompts."""
        if num_decoding:
            self._mixed_part += WEIGHT * (bool(chunks) - self._mixed_part)
