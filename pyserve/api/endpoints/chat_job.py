"""A ChatRequest -> Job: the common path of all conversation APIs.

The Messages and Responses APIs translate their requests into a ChatRequest, make the Job from it
here, and write the parts of the answer in their own format.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import msgspec
from aiohttp import web

from pyserve.api.endpoints.conversation import read_conversation
from pyserve.api.endpoints.logprobs import read_chat_tokens
from pyserve.api.endpoints.openai import make_job
from pyserve.api.endpoints.structured import read_constraint
from pyserve.api.endpoints.thinking import makes_thinking_budget
from pyserve.api.endpoints.tool_grammar import hold_to_tools
from pyserve.api.endpoints.tools import read_tools, with_parser
from pyserve.api.generation.job import Job
from pyserve.api.state import Loaded, ServerState
from pyserve.api.wire.protocol import ChatRequest
from pyserve.constraints import makes_all_of, unconstrained


async def chat_job(
    request: web.Request,
    state: ServerState,
    loaded: Loaded,
    body: ChatRequest,
    *,
    ignored: list[str],
) -> Job:
    """Make the Job of the chat `body`.

    request  the HTTP request that `body` comes from, in whatever API it was sent to.
    ignored  names of fields that are already known to have no effect.

    Raises InvalidRequestError and NotBuiltError naming the field of `body`, ChatTemplateError, and
    QueueFullError or UnavailableError if work on a thread is refused.
    """
    max_tokens = body.max_completion_tokens or body.max_tokens or 1
    has_auto = state.config.enable_auto_tool_choice
    tools = with_parser(read_tools(body), loaded.tools, has_auto=has_auto)
    tools, held = await hold_to_tools(request, state, loaded, body, tools)
    conversation = await read_conversation(
        request, state, loaded, body, max_tokens=max_tokens, tools=tools
    )
    ignored = [*ignored, *tools.ignored, *conversation.ignored]
    if body.echo and not conversation.prompt.echo:
        ignored.append("echo")
    make_reasoning = free_until = None
    if loaded.reasoning is not None:
        is_hidden = body.include_reasoning is False
        opening = conversation.opening
        make_reasoning = partial(loaded.reasoning.stage, opening, is_hidden=is_hidden)
        free_until = loaded.reasoning.free_until(opening)
    elif body.include_reasoning is False:
        ignored.append("include_reasoning")
    makes_budget = makes_thinking_budget(body.thinking_token_budget, loaded, conversation, ignored)
    limit = "max_tokens", body.max_tokens
    if body.max_completion_tokens is not None:
        limit = "max_completion_tokens", body.max_completion_tokens
    if held is None:
        makes_grammar = await read_constraint(
            request, state, loaded, body, ignored=ignored, free_until=free_until
        )
    else:
        makes_grammar = held.makes(free_until)
    prompt = conversation.prompt
    # Without a reasoning parser, the answer shows the <think> that the template wrote at the end of
    # the prompt. A grammar prescribes the whole answer, so nothing may be put before it.
    if makes_grammar is unconstrained:
        prompt = replace(prompt, echo=prompt.echo + conversation.opened)
    tokens = read_chat_tokens(body, state, loaded, ignored)
    job = await make_job(
        body,
        loaded,
        [prompt],
        prompt_name="messages",
        limit=limit,
        default_max_tokens=loaded.defaults.max_new_tokens,
        ignored=ignored,
        make_reasoning=make_reasoning,
        make_constraint=makes_all_of([makes_budget, makes_grammar]),
        tokens=tokens,
    )
    return tools.apply(msgspec.structs.replace(job, merged=conversation.merged))
