"""thinking_token_budget: an end to thinking that takes too many tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pyserve.text.detokenizer import Detokenizer
from pyserve.text.parts import Content
from pyserve.text.reasoning import ReasoningStage

if TYPE_CHECKING:  # as in client.py
    import numpy as np
    from numpy.typing import NDArray


class ThinkingBudget:
    """Implements client.Constraint: behind so many tokens of thinking only what closes it, or the
    rest of that where it has begun by itself.

    budget       tokens between the markers of the thinking.
    make_stage   what tells the thinking of an answer from the rest.
    detokenizer  of the answer's text, markers shown; it is copied.
    end_ids      the tokens of the closing marker.
    """

    is_finished = is_end_void = False
    filler = None
    error: str | None = None

    def __init__(
        self,
        budget: int,
        make_stage: Callable[[], ReasoningStage],
        detokenizer: Detokenizer,
        end_ids: Sequence[int],
    ) -> None:
        self._budget = budget
        self._make_stage = make_stage
        self._first_detokenizer = detokenizer
        self._end_ids = end_ids
        self._output: list[int] = []
        self._start()

    @property
    def is_free(self) -> bool:
        return not self._is_spent

    def fill_bitmask(self, words: NDArray[np.int32]) -> None:
        token_id = self._end_ids[self._num_end_ids]
        words.fill(0)
        words.view("uint32")[token_id // 32] = 1 << token_id % 32

    def accept(self, token_ids: Sequence[int]) -> None:
        self._output += token_ids
        self._read(token_ids)

    def rollback(self, num_tokens: int) -> None:
        del self._output[len(self._output) - num_tokens :]
        self._start()
        self._read(self._output)

    def _start(self) -> None:
        self._stage = self._make_stage()
        self._detokenizer = self._first_detokenizer.copy()
        self._num_tokens = 0  # of the thinking
        self._num_end_ids = 0  # of the closing marker, that have come last
        self._has_closed = False  # by force

    @property
    def _is_spent(self) -> bool:
        stage = self._stage
        is_thinking = stage.has_begun and not stage.is_over
        # A marker that is whole and does not count as one would be forced again and again.
        return is_thinking and self._num_tokens >= self._budget and not self._has_closed

    def _read(self, token_ids: Sequence[int]) -> None:
        stage = self._stage
        for token_id in token_ids:
            if stage.is_over:
                return
            self._look_for_marker(token_id, is_forced=self._is_spent)
            self._num_tokens += stage.has_begun
            text = self._detokenizer.push([token_id])
            if text:
                stage.push(Content(text))

    def _look_for_marker(self, token_id: int, *, is_forced: bool) -> None:
        ids = self._end_ids
        if token_id == ids[self._num_end_ids]:
            self._num_end_ids += 1
        else:
            self._num_end_ids = int(token_id == ids[0])
        if self._num_end_ids == len(ids):
            self._num_end_ids = 0
            self._has_closed |= is_forced
