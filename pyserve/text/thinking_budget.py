"""thinking_token_budget: ends the thinking of an answer after a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pyserve.text.detokenizer import Detokenizer
from pyserve.text.parts import Content
from pyserve.text.reasoning import ReasoningStage

if TYPE_CHECKING:  # NumPy is needed for types only, as in client.py
    import numpy as np
    from numpy.typing import NDArray


class ThinkingBudget:
    """Implements client.Constraint: once the thinking has used up its budget, only its closing
    marker is allowed, or the rest of the marker if the model has begun to write it.

    budget       tokens of thinking between the markers.
    make_stage   makes the stage that tells thinking from the rest of the answer.
    detokenizer  for the answer's text, with markers shown; it is copied, not changed.
    end_ids      token ids of the closing marker.
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
        self._num_tokens = 0  # tokens of thinking so far
        self._num_end_ids = 0  # tokens of the closing marker that the output ends with
        self._has_closed = False  # the closing marker was forced

    @property
    def _is_spent(self) -> bool:
        stage = self._stage
        is_thinking = stage.has_begun and not stage.is_over
        # The stage may not recognise the forced marker, which must not be forced over and over.
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
