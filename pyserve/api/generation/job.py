"""Job: a request to generate, in a form that is the same for all endpoints.

Each endpoint checks its wire type and converts it into one Job. Nothing that handles the Job knows
the wire types of requests.
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
    """A tokenised prompt. A worker thread has done all work whose time grows with its length.

    echo         text to show before each of its answers; "": nothing.
    detokenizer  decodes text that continues the prompt; each answer uses a copy of it.
    offsets      where the text of each token begins in `echo`, in characters; None: the tokens of
                 the prompt are not shown.
    text         the prompt as the model gets it, where the response shows it; None: it does not.
    """

    token_ids: list[int]
    echo: str
    detokenizer: Detokenizer
    offsets: list[int] | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """What ends the text of a sequence; the same for all sequences of a request.

    stop           strings that end the answer, none of them empty.
    is_stop_kept   the stop string or stop token that ended the answer stays in its text.
    eos_token_id   ends the answer without a stop_reason; None where EOS is ignored.
    min_tokens     the text of the first so many output tokens is not searched for stop strings.
    call_reason    the finish_reason of an answer that stopped by itself and calls tools.
    """

    stop: list[str]
    is_stop_kept: bool
    eos_token_id: int | None
    min_tokens: int
    call_reason: str = "tool_calls"


@dataclass(frozen=True, slots=True)
class BeamSearch:
    """Parameters of a beam search.

    width           number of beams that are kept in each round.
    length_penalty  a beam's score is its cumulative logprob divided by its length to this power:
                    above 0 favours long answers, below 0 short ones.
    """

    width: int
    length_penalty: float


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One request. Every prompt is answered n times.

    params            sampling parameters of each prompt.
    best_of           number of sequences that are generated for each prompt, at least n; the n with
                      the highest mean logprob are shown. 0: n, which are all shown.
    beam              answers come from a beam search; None: they are sampled.
    make_reasoning    makes for each answer what separates its reasoning from its content; None:
                      nothing does.
    make_stage        makes for each answer the stage that turns its text, without reasoning, into
                      parts.
    make_constraint   makes for each answer the constraint on its tokens; it returns None where all
                      tokens are allowed.
    words             how the endpoint formats the answers' tokens; None: tokens are not shown.
    is_run            False: only the prompts are shown, and nothing is generated.
    is_prompt_only    the prompts are run, but what is generated is not shown.
    is_streamed, include_usage, has_continuous_usage
                      whether the response is a stream, ends with the usage of all choices, and has
                      the usage so far in every frame.
    is_background     all requests that are not in the background go first.
    cache_salt        the client's salt: only requests with the same salt share the prefix cache.
    request_id        the client's id of the request; "": the server makes one.
    model             the requested model name, which may be an adapter's; "": the served model.
    ignored           fields of the request that had no effect.
    merged            how the order of the messages was changed, as turn_order.in_order returns it.
    clamped           "name=tokens" where the context length reduced a token limit; "": it did not.
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
