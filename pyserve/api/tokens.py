"""POST /tokenize and /detokenize: what the model would read, and back."""

from __future__ import annotations

from functools import partial

from aiohttp import web

from pyserve.api.answer import json_response
from pyserve.api.body import Wire, ignored_header
from pyserve.api.chat import tokenize_messages
from pyserve.api.prompts import check_size, max_tokenize_size
from pyserve.api.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from pyserve.api.sampling import check_token_ids
from pyserve.api.state import STATE
from pyserve.errors import InvalidRequestError

TOKENIZE = Wire(TokenizeRequest)
DETOKENIZE = Wire(DetokenizeRequest)


async def tokenize(request: web.Request) -> web.StreamResponse:
    """Token ids of a text, or of the prompt made from messages."""
    state = request.app[STATE]
    loaded = state.model()
    body, ignored = await TOKENIZE.read(request, state)
    state.check_model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("exactly one of prompt and messages must be given", "prompt")
    if body.messages is not None:
        token_ids = await tokenize_messages(
            state, loaded, body.messages, add_special_tokens=body.add_special_tokens is True
        )
    else:
        text = body.prompt or ""
        max_model_len = loaded.engine.info.max_model_len
        check_size(len(text), "characters", max_model_len=max_model_len, param="prompt")
        add_special_tokens = body.add_special_tokens is not False
        token_ids = await state.run_text(
            len(text),
            partial(loaded.tokenizer.encode, text, add_special_tokens=add_special_tokens),
        )
    return json_response(
        TokenizeResponse(len(token_ids), loaded.engine.info.max_model_len, token_ids),
        ignored_header(ignored),
    )


async def detokenize(request: web.Request) -> web.StreamResponse:
    """The text of token ids, special tokens included."""
    state = request.app[STATE]
    loaded = state.model()
    max_model_len = loaded.engine.info.max_model_len
    body, ignored = await DETOKENIZE.read(
        request, state, max_list_ids=max_tokenize_size(max_model_len)
    )
    state.check_model_name(body.model)
    check_size(len(body.tokens), "tokens", max_model_len=max_model_len, param="tokens")

    def decode() -> str:
        check_token_ids(body.tokens, loaded.tokenizer.vocab_size, "tokens")
        return loaded.tokenizer.decode(body.tokens, skip_special_tokens=False)

    text = await state.run_text(len(body.tokens), decode)
    return json_response(DetokenizeResponse(text), ignored_header(ignored))
