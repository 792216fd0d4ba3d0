"""What is asked of the engine, whichever endpoint has been asked for it.

Each endpoint checks its wire type and makes one Job of it; nothing behind this line knows a wire
type of a request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from pyserve.client import Constraint
from pyserve.constraints import unconstrained
from pyserve.params import SamplingParams
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.parts import Plain, Stage
from pyserve.text.reasoning import ReasoningStage


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is submitted: all that takes time in proportion to it has been done, on a thread.

    echo         what to show before its answers, "": nothing.
    detokenizer  of a text that goes on where the prompt ends; each answer takes a copy.
    offsets      where the text of each token begins in `echo`, in characters; None: it is not told.
    text         what the model is given, where it is told; None: it is not.
    """

    token_ids: list[int]
    echo: str
    detokenizer: Detokenizer
    offsets: list[int] | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How the text of a sequence ends; the same for all sequences of a request.

    stop           strings that end the answer, none of them empty.
    is_stop_kept   what ended the answer stays in its text.
    eos_token_id   ends the answer without a stop_reason; None where EOS is ignored.
    min_tokens     the text of so many output tokens is never part of a match of a stop string.
    call_reason    the finish_reason of an answer that has ended by itself and calls tools.
    """

    stop: list[str]
    is_stop_kept: bool
    eos_token_id: int | None
    min_tokens: int
    call_reason: str = "tool_calls"


@dataclass(frozen=True, slots=True)
class BeamSearch:
    """How the answers to a prompt are searched for.

    width           beams that are followed.
    length_penalty  the exponent of the length that a beam's logprob is divided by: above 0 it is
                    for long answers, below 0 against them.
    """

    width: int
    length_penalty: float


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One request: every prompt is answered n times.

    params            of each prompt.
    best_of           so many sequences answer a prompt, at least n, of which the n most likely are
                      shown; 0: n, and all are.
    beam              the answers are searched for; None: they are sampled.
    make_reasoning    for each answer what tells its thinking from the rest; None: nothing does.
    make_stage        a stage for each answer, which turns its text, without thinking, into parts.
    make_constraint   a constraint for each answer, which says the tokens that it may have; None:
                      all.
    words             how the endpoint tells of the answers' tokens; None: it does not.
    is_run            False: the prompts are shown and nothing is generated.
    is_prompt_only    the prompts are run and nothing is shown of what is generated.
    is_streamed, include_usage, has_continuous_usage
                      whether the answer is a stream, ends with the usage of all choices, and has
                      the usage so far in every frame.
    is_background     it gives way to all that is not.
    cache_salt        of the client: the prefix cache is shared only by requests with the same one.
    request_id        of the client; "": the server's own.
    model             the name that was asked for, which may be an adapter's; "": the served one.
    ignored           fields of the request that had no effect.
    merged            what was done to the order of the messages, as turn_order.in_order has it.
    clamped           "name=tokens" where the context cuts a token limit; "": it does not.
    """

    prompts: list[Prompt]
    params: list[SamplingParams]
    ending: Ending
    n: int = 1
    best_of: int = 0
    beam: BeamSearch | None = None
    make_reasoning: Callable[[], ReasoningStage] | None = None
    make_stage: Callable[[], Stage] = Plain
    make_constraint: Callable[[], Constraint | None] = unconstrained
    words: Any = None
    is_run: bool = True
    is_prompt_only: bool = False
    is_streamed: bool = False
    include_usage: bool = False
    has_continuous_usage: bool = False
    priority: int = 0
    is_background: bool = False
    cache_salt: str = ""
    request_id: str = ""
    model: str = ""
    ignored: list[str] = []
    merged: str = ""
    clamped: str = ""
