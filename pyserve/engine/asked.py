"""Logprobs: which rows of a step need them, and how the results reach the sequences.

A sampled row reports the logprob of the token that it draws; a prompt token reports the logprob of
the prompt token that follows it. By default the logprobs come from the model's raw logits, before
masks, biases, penalties and temperature; --logprobs-mode can choose processed values. A step none
of whose sequences requested logprobs skips all of this.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyserve.client import TokenLogprobs
from pyserve.engine.batch import Asked, PromptSpan, Step, StepOutput
from pyserve.limits import TOP_LOGPROBS

_TOP_END = 2 + TOP_LOGPROBS


def ask(step: Step) -> None:
    """Set `asked` and `prompt_spans` of `step` from what its sequences' parameters request."""
    asked, spans = Asked([], [], []), []
    num_sampled = first_token = 0
    for seq, generation, query_len, seq_len, is_sampled in zip(
        step.seqs, step.generations, step.query_lens, step.seq_lens, step.row_samples, strict=True
    ):
        if is_sampled:
            if seq.params.num_logprobs is not None:
                asked.sampled_rows.append(num_sampled)
            num_sampled += 1
        if seq.params.num_prompt_logprobs is not None:
            start = seq_len - query_len
            begin = max(start, len(seq.stream.prompt_logprobs))
            end = min(seq_len, seq.num_prompt_tokens - 1)
            if begin < end:
                first_row = first_token + begin - start
                asked.prompt_rows.extend(range(first_row, first_row + end - begin))
                asked.next_token_ids.extend(seq.token_ids[begin + 1 : end + 1])
                spans.append(PromptSpan(seq, generation, begin, end - begin))
        first_token += query_len
    step.asked, step.prompt_spans = asked, spans


def put_prompt_logprobs(step: Step, output: StepOutput) -> None:
    """Append the prompt logprobs that an executed step has computed to the sequences' streams."""
    told = iter(output.prompt_logprobs or ())
    for seq, generation, begin, num_rows in step.prompt_spans:
        entries = [next(told) for _ in range(num_rows)]
        if seq.generation == generation:
            # A sequence that resumed after preemption recomputes entries that it already delivered.
            num_top = seq.params.num_prompt_logprobs
            new = entries[len(seq.stream.prompt_logprobs) - begin :]
            seq.stream.prompt_logprobs += [entry.best(num_top) for entry in new]


def pack_asked(asked: Asked, words: NDArray[np.int32], *, num_slots: int) -> None:
    """Write `asked` into `words` (int32 [num_slots + 2 * max_num_batched_tokens]).

    The layout is that of StepState.asked, which the executor reads.
    """
    num_prompt_rows = (len(words) - num_slots) // 2
    at = 0
    for ids, room in (
        (asked.sampled_rows, num_slots),
        (asked.prompt_rows, num_prompt_rows),
        (asked.next_token_ids, num_prompt_rows),
    ):
        words[at : at + len(ids)] = ids
        at += room


def read_told(asked: Asked, words: NDArray[np.int32], *, num_slots: int) -> StepOutput:
    """Convert `words`, the contents of StepState.told (int32 [.., LOGPROB_WORDS]), to logprobs.

    Returns a StepOutput without token ids.
    """
    sampled = words[: len(asked.sampled_rows)]
    prompts = words[num_slots : num_slots + len(asked.prompt_rows)]
    return StepOutput([], _read(sampled), _read(prompts))


def _read(words: NDArray[np.int32]) -> list[TokenLogprobs]:
    """`words` are rows as in ops.LogprobRows.words: int32 [num_rows, LOGPROB_WORDS]."""
    reals = words.view(np.float32)
    return [
        TokenLogprobs(*entry)
        for entry in zip(
            reals[:, 0].tolist(),
            words[:, 1].tolist(),
            words[:, 2:_TOP_END].tolist(),
            reals[:, _TOP_END:].tolist(),
            strict=True,
        )
    ]
