"""POST /tokenize and /detokenize: texts or messages -> token ids, and token ids -> text."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import msgspec
from aiohttp import web

from pyserve.api.endpoints.body import Wire, ignored_header, merged_header
from pyserve.api.endpoints.conversation import read_conversation
from pyserve.api.endpoints.functions import renamed, with_tool_messages
from pyserve.api.endpoints.prompts import encode_any, max_tokenize_tokens, truncation
from pyserve.api.endpoints.sampling import check_token_ids
from pyserve.api.endpoints.tool_grammar import in_words
from pyserve.api.endpoints.tools import read_tools
from pyserve.api.http.delivery import json_response
from pyserve.api.state import STATE, Loaded
from pyserve.api.wire.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from pyserve.errors import InvalidRequestError

TOKENIZE = Wire(TokenizeRequest)
DETOKENIZE = Wire(DetokenizeRequest)
# Fields that only affect messages: with a plain text they are reported as ignored.
OF_MESSAGES = (
    "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs",
    "documents", "reasoning_effort", "tools", "tool_choice",
)  # fmt: skip


async def tokenize(request: web.Request) -> web.StreamResponse:
    """Answer with the token ids of a text, or of the prompt that messages make."""
    state = request.app[STATE]
    loaded = state.model()
    body, ignored = await TOKENIZE.read(request, state)
    state.check_model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("exactly one of prompt and messages must be given", "prompt")
    max_model_len = loaded.engine.info.max_model_len
    merged = ""
    if body.messages is not None:
        body, places = with_tool_messages(body)
        with renamed(places).errors():
            tools = replace(read_tools(body), format=loaded.tools)
            tools = await in_words(request, state, tools)
            conversation = await read_conversation(
                request, state, loaded, body, max_tokens=1, tools=tools
            )
        token_ids, merged = conversation.prompt.token_ids, conversation.merged
        ignored = [*ignored, *tools.ignored, *conversation.ignored]
    else:
        ignored = [*ignored, *(n for n in OF_MESSAGES if getattr(body, n) not in (None, {}, []))]
        if body.truncate_prompt_tokens is None and body.truncation_side is not None:
            ignored.append("truncation_side")
        text = body.prompt or ""
        token_ids = await state.run_text(
            request, len(text), partial(_tokenize_text, loaded, body, text)
        )

    def encode() -> bytes:
        texts = None
        if body.return_token_strs:
            texts = [loaded.tokenizer.id_to_token(token_id) or "" for token_id in token_ids]
        response = TokenizeResponse(len(token_ids), max_model_len, token_ids, texts)
        return msgspec.json.encode(response)

    data = await state.run_text(request, len(token_ids), encode, is_answer=True)
    return json_response(data, ignored_header(ignored) | merged_header(merged))


def _tokenize_text(loaded: Loaded, body: TokenizeRequest, text: str) -> list[int]:
    max_model_len = loaded.engine.info.max_model_len
    add_special_tokens = body.add_special_tokens is not False
    cut = truncation(body, max_model_len=max_model_len, max_tokens=1)
    token_ids = encode_any(
        loaded.tokenizer, text, add_special_tokens=add_special_tokens, max_model_len=max_model_len
    )
    if cut is None:
        return token_ids
    return cut.cut_text(loaded.tokenizer, token_ids, has_special_tokens=add_special_tokens)


async def detokenize(request: web.Request) -> web.StreamResponse:
    """Answer with the text of token ids, special tokens included."""
    state = request.app[STATE]
    loaded = state.model()
    limit = max_tokenize_tokens(loaded.engine.info.max_model_len)
    body, ignored = await DETOKENIZE.read(request, state, max_list_ids=limit)
    state.check_model_name(body.model)
    if len(body.tokens) > limit:
        raise InvalidRequestError(
            f"tokens has {len(body.tokens)} tokens, the limit is {limit}", "tokens"
        )

    def decode() -> bytes:
        check_token_ids(body.tokens, loaded.tokenizer.vocab_size, "tokens")
        text = loaded.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return msgspec.json.encode(DetokenizeResponse(text))

    data = await state.run_text(request, len(body.tokens), decode)
    return json_response(data, ignored_header(ignored))
